"""Every example of every page runs when it is pasted alone, and prints what the page shows.

A fenced block of Python is a program of its own. A block of `text` right after one is what it
printed; WRITE_OUTPUT=1 writes it there. A block with `>>>` is a doctest.
"""

import ast
import contextlib
import doctest
import io
import json
import os
import pathlib
import re
import sys
import tomllib
from itertools import zip_longest

import jax
import jax.numpy as jnp
import pytest

import teon_optax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
# `py` marks the program of examples/minimal.py, which tests/integration/test_minimal.py runs.
PYTHON = ("python", "pycon")


def blocks(page):
    """(line, language, text) of each block of a page, with what is shown right after it or None."""
    text = page.read_text("utf-8")
    found = list(BLOCK.finditer(text))
    for block, after in zip_longest(found, found[1:]):
        language, code = block.groups()
        shown = None
        between = re.sub("<!--.*?-->", "", text[block.end() : after.start()] if after else "")
        if after and after[1] == "text" and not between.strip():
            shown = after[2]
        yield text[: block.start()].count("\n") + 1, language, code, shown


def programs():
    for page in PAGES:
        for number, block in enumerate(blocks(page)):
            if block[1] in PYTHON:
                name = page.relative_to(ROOT).as_posix()
                yield pytest.param(page, number, id=f"{name}:{block[0]}")


def imported(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def source(code):
    """A block without the prompts and the output of a doctest."""
    examples = doctest.DocTestParser().get_examples(code)
    return "".join(example.source for example in examples) if examples else code


def run_doctest(code, page, line):
    test = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), line)
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.write)
    assert not runner.failures, report.getvalue()


@pytest.mark.promotes_dtypes
@pytest.mark.promotes_ranks
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("page", "number"), list(programs()))
def test_a_block_runs_alone_and_prints_what_the_page_shows(page, number, tmp_path, monkeypatch):
    line, _, code, shown = list(blocks(page))[number]
    for library in set(imported(source(code))) - set(sys.stdlib_module_names):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    if code.lstrip().startswith(">>>"):
        return run_doctest(code, page, line)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + code, page, "exec"), {"__name__": "__main__"})
    if os.environ.get("WRITE_OUTPUT") and shown is not None:
        text = page.read_text("utf-8")
        after = "```\n\n```text\n"
        text = text.replace(code + after + shown, code + after + printed.getvalue())
        page.write_text(text, "utf-8")
    else:
        assert printed.getvalue() == (shown or ""), f"{page}:{line}"


def test_no_page_hides_code_from_its_readers():
    assert [page.name for page in PAGES if "<!-- hidden" in page.read_text("utf-8")] == []


def test_the_first_use_is_within_forty_lines_of_the_readme():
    start = (ROOT / "README.md").read_text("utf-8").splitlines()[:40]
    assert any("teon(" in line for line in start) and any("plan(" in line for line in start)


def test_the_repository_has_one_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    urls = project["project"]["urls"]
    pages = [ROOT / "CITATION.cff", *PAGES]
    found = re.findall(
        r"https://github\.com/[\w-]+/teon_optax", "\n".join(p.read_text("utf-8") for p in pages)
    )
    assert {*found} == {urls["Repository"]}
    hooks = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (absolute,) = hooks["substitutions"]
    assert absolute["replacement"].startswith(f"]({urls['Repository']}/blob/")
    assert all(url.startswith(urls["Repository"]) for url in urls.values())


def test_links_of_the_readme_lead_somewhere_on_pypi_too():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    hooks = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (absolute,) = hooks["substitutions"]
    text = re.sub(absolute["pattern"], absolute["replacement"], words("README.md"))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    assert all(link.startswith(("https://", "#")) for link in links)
    assert sum("/blob/main/docs/" in link for link in links) > 8


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    documented = set(re.findall(r"^::: teon_optax\.([\w.]+)$", page, re.M))
    of_contrib = {f"contrib.{name}" for name in teon_optax.contrib.__all__}
    returned = {"_rule.Rules", "_plan.plan.Series", "_plan.plan.Untouched", "_alignment.Alignments"}
    public = {*teon_optax.__all__, *of_contrib} - {"contrib", "__version__"}
    assert documented == public | returned


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in nav] == []


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def words(name):
    """A page's text, in lines of any length."""
    return " ".join((ROOT / name).read_text("utf-8").split())


@pytest.mark.parametrize(
    ("row", "figure", "measured"),
    [
        ("products (FLOPs)", "flops", "gpt-24x256-float32-cpu"),
        ("TPU passes of products", "tpu_passes", "gpt-24x256-float32-cpu"),
        ("lines of the compiled program", "hlo_lines", "gpt-24x256-float32-cpu"),
        ("temporary memory", "temp_bytes", "gpt-24x256-float32-cpu"),
        ("wall time, CPU", "wall_median_ratio", "gpt-8x384-float32-cpu"),
        ("wall time, one H200", "wall_median_ratio", "gpt-small-float32-gpu"),
    ],
)
def test_costs_in_the_readme_are_those_of_the_committed_benchmark(row, figure, measured):
    found = results(f"update_cost-{measured}")["optimizers"]
    cells = []
    for peer in ("polar_express", "schatten", "fast", "K = 1"):
        own = found.get(f"teon {peer}", {})
        if figure == "wall_median_ratio":
            ratio = own.get("wall_ratio")
        else:
            ratio = own[figure] / found["optax muon"][figure]
        cells.append("" if ratio is None else f"{ratio:.3f}")
    (shown,) = re.findall(
        rf"^\| {re.escape(row)} \|(.*)\|$", (ROOT / "README.md").read_text("utf-8"), re.M
    )
    assert [cell.strip() for cell in shown.split("|")] == cells


def test_bf16_parameters_on_a_gpu_are_those_of_the_committed_benchmark():
    found = results("update_cost-llama-1b-bfloat16-gpu")["optimizers"]
    plain, bf16 = (
        found[f"teon polar_express{products}"]["wall_ratio"] for products in ("", ", bf16")
    )
    expected = f"LLaMA-1B on an H200: {plain:.2f} of Muon's time in TF32, {bf16:.2f} in bf16"
    assert expected in words("docs/what_to_set.md")


def test_losses_in_the_readme_are_those_of_the_committed_runs():
    record = results("reproduce/reproduce")
    whole, short = record["headline"], record["half_as_long"]
    adamw, teon = (whole[name]["minus"]["muon"] for name in ("adamw", "teon-1-muon-scale"))
    half = short["teon-1-muon-scale"]["minus"]["muon"]
    readme = words("README.md")
    assert f"AdamW ends {adamw['mean']:.3f} nats above Muon and TEON {shown(teon)}" in readme
    assert f"TEON ends {shown(half)} above Muon" in readme


def shown(difference):
    return f"{difference['mean']:.3f} ± {difference['half']:.3f}"


def test_products_of_models_in_the_readme_are_those_of_the_committed_benchmark():
    ratios = []
    for name, model in results("models")["models"].items():
        ours, muon = (model["optimizers"][peer] for peer in ("teon polar_express", "optax muon"))
        ratios.append((ours["flops"] / muon["flops"], name))
    least, most = (f"{ratio:.3f} ({name})" for ratio, name in (min(ratios), max(ratios)))
    expected = f"Of {len(ratios)} published models' updates, products are {least} to {most}"
    assert expected in words("README.md")


def test_bytes_in_the_readme_are_those_of_the_committed_benchmark():
    rows = results("communication-gpt-4x256")["rows"]["8"]
    ratios = [
        rows[layout][peer]["bytes"] / rows[layout]["optax muon"]["bytes"]
        for layout in ("fan-in", "fan-out", "2-D", "HSDP")
        for peer in ("teon", "rules.muon")
    ]
    assert f"{min(ratios):.3f} to {max(ratios):.3f} of the bytes" in words("README.md")


def test_optax_muon_is_refused_on_explicit_meshes_and_ours_run_there():
    rows = results("communication-gpt-4x256")["rows"]
    for count in ("8", "16", "32", "64"):
        for layout in ("fan-in", "2-D"):
            found = rows[count][f"{layout} Explicit"]
            assert found["optax muon"]["error"].startswith("ShardingTypeError")
            for peer in ("teon", "rules.muon"):
                assert found[peer]["bytes"] == rows[count][layout][peer]["bytes"]


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def test_what_the_readme_keeps_from_being_orthogonalized_goes_to_the_fallback():
    attention = {name: {"kernel": (16, 16)} for name in ("query", "key", "value", "out")}
    blocks = {f"block_{i}": {"attn": attention, "norm": {"scale": (16,)}} for i in range(2)}
    rest = {
        "embed": {"embedding": (64, 16)},
        "conv": {"kernel": (3, 3, 16, 32)},
        "lm_head": {"kernel": (16, 64)},
    }
    planned = teon_optax.plan(shapes(blocks | rest))
    norms = {f"block_{i}/norm/scale" for i in range(2)}
    others = {f"{name}/{leaf}" for name, leaves in rest.items() for leaf in leaves}
    assert {*planned.fallback} == norms | others


def test_low_rank_factors_alone_go_to_the_fallback():
    factors = {name: {"lora_a": (64, 4), "lora_b": (4, 64)} for name in ("query", "value")}
    tree = shapes({f"block_{i}": {"attn": factors} for i in range(2)})
    with pytest.warns(UserWarning, match="the fallback optimizer gets them all"):
        planned = teon_optax.plan(tree)
    assert len(planned.fallback) == len(jax.tree.leaves(tree))


def test_a_query_wider_than_the_model_costs_more_jointly_in_mode_1_alone():
    tree = shapes({f"block_{i}": {"query": {"kernel": (1024, 2048)}} for i in range(2)})
    pattern = r"block_(?P<layer>\d+)/query"
    shares = []
    for mode in (1, 2):
        rules = [teon_optax.Rule(pattern, stack=2, mode=mode)]
        flops = teon_optax.plan(tree, rules).as_dict()["flops"]
        shares.append(flops["plan"] / flops["muon"])
    assert shares[0] > 1 > shares[1]


def test_links_between_files_lead_somewhere():
    lost = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.M | re.S)
        for path in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text):
            if not (page.parent / path).exists():
                lost.append((page.name, path))
    assert lost == []


def test_pages_name_files_that_exist():
    # The library may be installed elsewhere: a wheel is tested in a folder without its source.
    library = pathlib.Path(teon_optax.__file__).parent
    files = [path.as_posix() for root in (ROOT, library) for path in root.rglob("*.py")]
    lost = []
    for page in PAGES:
        for name in re.findall(r"`((?:[\w.]+/)*\w+\.py)`", page.read_text("utf-8")):
            if not any(path.endswith(f"/{name}") for path in files):
                lost.append((page.name, name))
    assert lost == []


def test_pages_show_one_learning_rate():
    # What is compared with another optimizer has that one's rate, and `scale=` makes it AdamW's.
    pages = [page for page in PAGES if page.name != "migrating.md"]
    texts = [page.read_text("utf-8") for page in pages]
    texts += [path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")]
    rates = re.findall(r"teon\((\d[\de.-]*)(?!.*scale=)", "\n".join(texts))
    assert {*rates} == {"0.01"} and len(rates) > 10


def test_first_rates_on_the_page_are_those_of_the_committed_runs():
    text = (ROOT / "benchmarks" / "results" / "first_rate.md").read_text("utf-8")
    tables = re.findall(r"^\| getting started, .*\n(?:\|.*\n)+", text, re.M)
    assert len(tables) == 2
    page = (ROOT / "docs" / "getting_started.md").read_text("utf-8")
    for steps, shown in (
        (200, "ends at {} with a peak of 0.02 and at {}"),
        (100, "200 at {} and {}"),
    ):
        (row,) = re.findall(rf"^\| train_gpt, {steps} .*\n.*\n\| `teon\(rate\)` (.*)$", text, re.M)
        lower, higher = re.findall(r"\d\.\d{3}", row)[:2]
        assert shown.format(higher, lower) in words("docs/getting_started.md")
    for name in ("teon(rate)", "optax.contrib.muon(rate)", "optax.adamw(rate)"):
        *_, shown = re.findall(rf"^\| `{re.escape(name)}` \|.*$", page, re.M)
        best = [
            min(float(cell.strip(" *")) for cell in row.split("|")[:-1] if cell.strip())
            for table in tables
            for row in re.findall(rf"^\| `{re.escape(name)}` \|(.*)\|$", table, re.M)
        ]
        assert shown.endswith("".join(f" | {loss:.3f}" for loss in best) + " |")


def test_pages_give_the_fallback_a_rate_in_one_way():
    # `fallback=` is for another optimizer than AdamW, and for AdamW where an argument is compared.
    texts = {page.name: page.read_text("utf-8") for page in PAGES if page.name != "migrating.md"}
    texts |= {path.name: path.read_text("utf-8") for path in (ROOT / "examples").rglob("*.py")}
    assert [name for name, text in texts.items() if "fallback=optax.adamw(" in text] == []
