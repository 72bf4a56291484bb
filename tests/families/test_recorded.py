"""A page shows the trees that other libraries made, whose listings are in tests/trees/libraries.

It shows the plan, or what is asked; WRITE_OUTPUT=1 writes it there.
"""

import os
import re
import warnings

import pytest
from checks import PAGE, PLANS
from listings import array, nested, read, same, trees

from teon_optax import default_rules, plan, rules

TREES = trees("libraries/*")
TEST = "tests/test_trees.py::test_a_leaf_is_read_as_its_listing_says_or_is_asked"
# Three trees of which the page shows every ready set.
SHOWN = {"tunix_qwen3": None, "easydel_deepseekv2": 16, "tunix_llama3_lora": None}


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
    lines, words = TREES[name].lines_by_path, {}
    ends = re.compile(r"(.*embed[^/]*|lm_head|logits[^/]*)/")
    shapes = {
        path: tuple(
            vocabulary if vocabulary and size == 64 and ends.match(path) else size
            for size in line.shape
        )
        for path, line in lines.items()
    }
    leaves = {renamed(path, words): array(*shape) for path, shape in shapes.items()}
    assert len(leaves) == len(shapes)
    found = read(nested(leaves))
    wrong = {}
    for path, line in lines.items():
        what = found[renamed(path, words)]
        right = [same(what.reading, each, shapes[path]) for each in line.answer.readings]
        if not what.is_asked and not any(right):
            wrong[path] = str(what), line.answer
    assert not wrong


def summary(tree):
    """What each matrix is, by the last names of its path."""

    def called(kind):
        names = dict.fromkeys(
            re.sub(r"/(kernel|weight|w)$", "", path).rpartition("/")[2]
            for path, answer in tree.answers.items()
            if kind == ("?" if answer.is_asked else answer.readings[0].kind)
        )
        return ", ".join(f"`{name}`" for name in names)

    words = {"T": "K = 2", "?": "asked", "M": "Muon"}
    parts = [f"{word}: {called(kind)}" for kind, word in words.items() if called(kind)]
    return "; ".join(parts) or "all in the fallback, with a warning"


def shown(name):
    """The section of the page about a tree."""
    tree, params = TREES[name], TREES[name].params
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            text = str(plan(params, default_rules(params)))
        except ValueError as error:
            text = str(error)
    head = f'<a id="{name}"></a>\n\n## {tree.title}\n\n{tree.library}: {tree.how}.'
    text = "\n".join([*(f"UserWarning: {w.message}" for w in caught), text])
    return f"{head}\n\n```text\n{text}\n```\n"


def sets(name, head_dim):
    """The section of the page with the ready sets of a tree."""
    params = TREES[name].params
    calls = {f"rules.{name}(params)": getattr(rules, name) for name in ("paper", "muon")}
    calls |= {f"rules.{n}(params)": getattr(rules, n) for n in ("all_hidden", "attention_out")}
    call = f"rules.per_head(params, head_dim={head_dim})" if head_dim else "rules.per_head(params)"
    calls |= {
        call: lambda params: rules.per_head(params, head_dim),
        "rules.lora(params)": rules.lora,
    }
    lines = [f"## Ready sets: {TREES[name].title}", "", "```text"]
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
    page, plans = PAGE.read_text("utf-8"), PLANS / "other_libraries.md"
    table = "<!-- trees -->\n\n| family | library | plan | test |\n|---|---|---|---|\n"
    sections = ["# Trees of other libraries", ""]
    for name, tree in TREES.items():
        title = f"[{tree.title}](families/{plans.name}#{name})"
        table += f"| {title} | {tree.library} | {summary(tree)} | `{TEST}[{name}]` |\n"
        sections.append(shown(name))
    for name, head_dim in SHOWN.items():
        sections.append(sets(name, head_dim))
    parts = re.fullmatch(r"(?s:(.*))(<!-- trees -->\n\n(?:\|.*\n)*)(?s:(.*))", page)
    assert parts is not None
    before, _, after = parts.groups()
    written = {PAGE: before + table + after, plans: "\n".join(sections)}
    for path, text in written.items():
        if os.environ.get("WRITE_OUTPUT"):
            path.write_text(text, "utf-8")
        else:
            assert path.read_text("utf-8") == text
