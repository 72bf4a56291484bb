"""Trees that other libraries made: their listings are kept in trees/, so none of these is needed.

The first lines of a file say whose tree it is, of which version, and how it was made. Then comes a
line for each leaf, with the verdict of `test_roles` for those of two axes and more; `0,1` are two
layers. The page shows the plan, or what is asked; WRITE_OUTPUT=1 writes it there.
"""

import os
import pathlib
import re
import warnings

import pytest
from checks import PAGE
from test_default_rules import Box, array, nested
from test_roles import verdicts

from teon_optax import default_rules, plan, rules
from teon_optax._paths import leaf_paths

FOLDER = pathlib.Path(__file__).parent / "trees"
TREES = sorted(file.stem for file in FOLDER.glob("*.txt"))
TEST = "tests/families/test_trees.py::test_a_tree"
# Three trees of which the page shows every ready set.
SHOWN = {"tunix_qwen3": None, "easydel_deepseekv2": 16, "tunix_llama3_lora": None}


def shapes_of(name):
    """Path -> shape."""
    return {path: leaf.shape for path, leaf in leaf_paths(read(name)[1])}


def read(name):
    """The three lines about a tree, its arrays by path, and the verdicts."""
    lines = (FOLDER / f"{name}.txt").read_text("utf-8").splitlines()
    head, rows = [line.removeprefix("# ") for line in lines[:3]], {}
    for line in lines[3:]:
        row = re.fullmatch(r"(\S+): ([\dx]+) ?(.*)", line)
        assert row is not None, line
        path, shape, verdict = row.groups()
        sizes = tuple(map(int, shape.split("x")))
        numbers = re.search(r"\d+(?:,\d+)+", path)
        for number in numbers[0].split(",") if numbers else [""]:
            one = path.replace(numbers[0], number) if numbers else path
            rows[one] = sizes, verdict or "F"
    make = Box if "levanter" in name else lambda leaf: leaf
    params = nested({path: make(array(*shape)) for path, (shape, _) in rows.items()})
    return head, params, {path: verdict for path, (_, verdict) in rows.items()}


@pytest.mark.parametrize("name", TREES)
def test_a_tree(name):
    _, params, expected = read(name)
    found = verdicts(params)
    matrices = {path for path in expected if path in found}
    assert {path: found[path] for path in matrices} == expected


# Names of arrays, and of recurrent cells, which nothing else shows.
KEPT = "kernel", "w", "weight", "bias", "scale", "embedding", "cell", "weight_ih", "weight_hh"


def renamed(path, words):
    """The path with a word that means nothing for each name; numbers and arrays' names are kept."""
    segments = []
    for segment in path.split("/"):
        if segment in KEPT or segment.isdecimal() or "lora" in segment:
            segments.append(segment)
            continue
        first, second = divmod(len(words), 26)
        word = words.setdefault(
            re.sub(r"\d+", "#", segment), f"zo{chr(97 + first)}{chr(97 + second)}x"
        )
        segments.append("_".join([word, *re.findall(r"\d+", segment)]))
    return "/".join(segments)


@pytest.mark.parametrize("vocabulary", [None, 32])
@pytest.mark.parametrize("name", [name for name in TREES if "levanter" not in name])
def test_a_tree_with_names_that_mean_nothing_is_never_misread(name, vocabulary):
    """Even if the vocabulary is as large as the network is wide: then asked, or right."""
    _, _, expected = read(name)
    shapes, words = shapes_of(name), {}
    ends = re.compile(r"(.*embed[^/]*|lm_head|logits[^/]*)/")
    leaves = {
        renamed(path, words): tuple(
            vocabulary if vocabulary and size == 64 and ends.match(path) else size for size in shape
        )
        for path, shape in shapes.items()
    }
    assert len(leaves) == len(shapes)
    found = verdicts(nested({path: array(*shape) for path, shape in leaves.items()}))
    wrong = {
        path: (found[renamed(path, words)], verdict)
        for path, verdict in expected.items()
        if found[renamed(path, words)] not in (verdict, "?")
    }
    assert not wrong


def summary(verdict_of):
    """What each matrix is, by the last names of its path."""

    def called(letter):
        names = dict.fromkeys(
            re.sub(r"/(kernel|weight|w)$", "", path).rpartition("/")[2]
            for path, verdict in verdict_of.items()
            if verdict.startswith(letter)
        )
        return ", ".join(f"`{name}`" for name in names)

    words = {"T": "K = 2", "?": "asked", "M": "Muon"}
    parts = [f"{word}: {called(letter)}" for letter, word in words.items() if called(letter)]
    return "; ".join(parts) or "all in the fallback, with a warning"


def shown(name):
    """The section of the page about a tree."""
    (title, library, how), params, _ = read(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            text = str(plan(params, default_rules(params)))
        except ValueError as error:
            text = str(error)
    text = "\n".join([*(f"UserWarning: {w.message}" for w in caught), text])
    return f'<a id="{name}"></a>\n\n### {title}\n\n{library}: {how}.\n\n```text\n{text}\n```\n'


def sets(name, head_dim):
    """The section of the page with the ready sets of a tree."""
    (title, *_), params, _ = read(name)
    calls = {f"rules.{name}(params)": getattr(rules, name) for name in ("paper", "muon")}
    calls |= {f"rules.{n}(params)": getattr(rules, n) for n in ("all_hidden", "attention_out")}
    call = f"rules.per_head(params, head_dim={head_dim})" if head_dim else "rules.per_head(params)"
    calls |= {
        call: lambda params: rules.per_head(params, head_dim),
        "rules.lora(params)": rules.lora,
    }
    lines = [f"### Ready sets: {title}", "", "```python"]
    for call, make in calls.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                text = f"{call}\n{make(params)}"
            except ValueError as error:
                text = f"{call}\nValueError: {error}"
        lines += ["# " + text.partition("\n")[0], text.partition("\n")[2], ""]
    return "\n".join([*lines[:-1], "```", ""])


def test_the_page_shows_every_tree_and_the_ready_sets_of_three():
    page = PAGE.read_text("utf-8")
    table = "<!-- trees -->\n\n| family | library | plan | test |\n|---|---|---|---|\n"
    sections = ["<!-- sections of trees -->", "## Trees of other libraries", ""]
    for name in TREES:
        (title, library, _), _, expected = read(name)
        table += f"| [{title}](#{name}) | {library} | {summary(expected)} | `{TEST}[{name}]` |\n"
        sections.append(shown(name))
    for name, head_dim in SHOWN.items():
        sections.append(sets(name, head_dim))
    pattern = r"(?s:(.*))(<!-- trees -->\n\n(?:\|.*\n)*)(?s:(.*)(<!-- sections.*))"
    parts = re.fullmatch(pattern, page)
    assert parts is not None
    before, shown_table, between, shown_sections = parts.groups()
    if os.environ.get("WRITE_OUTPUT"):
        PAGE.write_text("".join([before, table, between, "\n".join(sections)]), "utf-8")
    else:
        assert shown_table == table and shown_sections == "\n".join(sections)
