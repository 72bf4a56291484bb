"""Every example of every page runs, and prints what the page shows.

A page's fenced blocks of Python are one program, in their order. A block of `text` right after one
is what it printed; WRITE_OUTPUT=1 writes it there. A block with `>>>` is a doctest. A comment
`<!-- hidden: ... -->` holds code that readers need not see.
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
BLOCK = re.compile(r"^<!-- hidden:\n(.*?)^-->$|^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
# Lines of a model beside its plan: tests/families builds the models and compares the plans; and
# lines of examples/trainers beside theirs: tests/test_trainers.py compares the lines.
FRAGMENTS = [ROOT / "docs" / "families.md", ROOT / "docs" / "in_your_trainer.md"]
PYTHON = ("python", "pycon")


def blocks(page):
    """(line, language, text) of each block of a page, with what is shown right after it or None."""
    text = page.read_text("utf-8")
    found = list(BLOCK.finditer(text))
    for block, after in zip_longest(found, found[1:]):
        hidden, language, code = block.groups()
        shown = None
        if after and after[2] == "text" and not text[block.end() : after.start()].strip():
            shown = after[3]
        line = text[: block.start()].count("\n") + 1
        yield line, "python" if hidden else language, hidden or code, shown


def programs():
    for page in PAGES:
        if page not in FRAGMENTS and any(language in PYTHON for _, language, _, _ in blocks(page)):
            yield pytest.param(page, id=page.relative_to(ROOT).as_posix())


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


def run_doctest(code, names, page, line):
    test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
    test.globs = names  # not the copy that it made: the next block goes on
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.write, clear_globs=False)
    assert not runner.failures, report.getvalue()


@pytest.mark.promotes_dtypes
@pytest.mark.promotes_ranks
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", list(programs()))
def test_a_page_prints_what_it_shows(page, tmp_path, monkeypatch):
    program = [block for block in blocks(page) if block[1] in PYTHON]
    for _, _, code, _ in program:
        for library in set(imported(source(code))) - set(sys.stdlib_module_names):
            pytest.importorskip(library)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, _, code, shown in program:
        if code.lstrip().startswith(">>>"):
            run_doctest(code, names, page, line)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, page, "exec"), names)
        if os.environ.get("WRITE_OUTPUT") and shown is not None:
            text = page.read_text("utf-8")
            after = "```\n\n```text\n"
            text = text.replace(code + after + shown, code + after + printed.getvalue())
            page.write_text(text, "utf-8")
        else:
            assert printed.getvalue() == (shown or ""), f"{page}:{line}"


def test_the_first_use_is_within_forty_lines_of_the_readme():
    start = (ROOT / "README.md").read_text("utf-8").splitlines()[:40]
    assert any("teon(" in line for line in start) and any("plan(" in line for line in start)


def test_the_repository_has_one_address():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    pages = [ROOT / "CITATION.cff", *PAGES]
    found = re.findall(
        r"https://github\.com/[\w-]+/teon_optax", "\n".join(p.read_text("utf-8") for p in pages)
    )
    assert {*found} == {urls["Repository"]}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    documented = set(re.findall(r"^::: teon_optax\.([\w.]+)$", page, re.M))
    of_contrib = {f"contrib.{name}" for name in teon_optax.contrib.__all__}
    assert documented == {*teon_optax.__all__, *of_contrib} - {"contrib"}


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in nav] == []


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


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
    ours = [found[f"teon {method}"] for method in ("polar_express", "schatten")]
    if figure == "wall_median_ratio":
        ratios = [peer["wall_ratio"] for peer in ours]
    else:
        ratios = [peer[figure] / found["optax muon"][figure] for peer in ours]
    first, second = (f"{ratio:.3f}".removeprefix("0") for ratio in ratios)
    assert f"\n| {row} | {first} | {second} |" in (ROOT / "README.md").read_text("utf-8")


def test_bf16_parameters_on_a_gpu_in_the_readme_are_those_of_the_committed_benchmark():
    found = results("update_cost-llama-1b-bfloat16-gpu")["optimizers"]
    plain, bf16 = (
        f"{found[f'teon polar_express{products}']['wall_ratio']:.3f}".removeprefix("0")
        for products in ("", ", bf16")
    )
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"LLaMA-1B took {plain} of Muon's time, and {bf16} with it" in readme


def test_mode_1_half_as_long_in_the_readme_is_that_of_the_committed_runs():
    minus = results("reproduce/reproduce")["half_as_long"]["teon-1-muon-scale"]["minus"]["muon"]
    mean, half = (f"{minus[key]:.3f}".removeprefix("0") for key in ("mean", "half"))
    assert f"it ends {mean} ± {half} above Muon" in (ROOT / "README.md").read_text("utf-8")


def test_products_of_models_in_the_readme_are_those_of_the_committed_benchmark():
    models = results("models")["models"]
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| ([\w./ -]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.M)
    assert len([row for row in rows if row[0] in models]) >= 6
    for name, *shown in rows:
        if name in models:
            found = models[name]["optimizers"]
            ours = [
                ("teon polar_express", "flops"),
                ("teon schatten", "flops"),
                ("teon polar_express", "tpu_passes"),
            ]
            ratios = [found[peer][figure] / found["optax muon"][figure] for peer, figure in ours]
            assert shown == [f"{ratio:.3f}".removeprefix("0") for ratio in ratios], name


def test_bytes_in_the_readme_are_those_of_the_committed_benchmark():
    rows = results("communication-gpt-4x256")["rows"]["8"]
    ratios = [
        rows[layout]["teon"]["bytes"] / rows[layout]["optax muon"]["bytes"]
        for layout in ("fan-in", "fan-out", "2-D", "HSDP")
    ]
    least, most = (f"{ratio:.3f}".removeprefix("0") for ratio in (min(ratios), max(ratios)))
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"{least} to {most} of the bytes" in " ".join(readme.split())


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


def test_one_rate_is_recommended_for_the_fallback():
    # A regression in NumPyro is no language model, and has a rate of its own.
    texts = [page.read_text("utf-8") for page in PAGES if page.name != "in_your_trainer.md"]
    texts += [path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")]
    rates = re.findall(r"fallback=optax\.adamw\((\d[\de.-]*)", "\n".join(texts))
    assert {*rates} == {"3e-4"}
