"""Every tree of tests/trees/ is read as its listing says, and by rules that can be printed."""

import collections
import functools
import itertools
import os
import pathlib
import re
import string
import warnings

import pytest
from listings import array, expanded, leaf_of, nested, read, same, stacked, trees, written, wrong
from optax.contrib import MuonDimensionNumbers

from benchmarks.architectures import ARCHITECTURES
from teon_optax import Rule, default_rules, plan
from teon_optax._paths import leaf_paths

SNAPSHOT = pathlib.Path(__file__).parent / "snapshot.txt"
TREES = trees()
# What the default rules do otherwise than the listing says, by tree. A leaf that is read rightly
# again fails its test, and goes from here; then its tree goes from misread.txt to its kind.
MISREAD: dict[str, set[str]] = {}
each_tree = pytest.mark.parametrize("tree", TREES.values(), ids=list(TREES))
FAMILIES = trees("kinds/families")
# One block alone has Q, K and V, and nothing to stack them with.
unstacked = pytest.mark.filterwarnings("ignore:Q, K and V are recognized")
each_family = pytest.mark.parametrize("tree", FAMILIES.values(), ids=list(FAMILIES))


@functools.cache
def found_in(name):
    return read(TREES[name].params, TREES[name].lines_by_path)


@each_tree
def test_a_leaf_is_read_as_its_listing_says_or_is_asked(tree):
    found = wrong(tree, found_in(tree.name))
    known = {path for each in MISREAD.get(tree.title, ()) for path in expanded(each)}
    assert found.keys() == known, found


@each_tree
def test_a_leaf_without_a_name_is_asked_or_the_fallbacks_or_read_rightly(tree):
    """Each word of its path means nothing, even what the arrays are called; stacked or alone."""
    pairs = itertools.product(string.ascii_lowercase, repeat=2)
    words = collections.defaultdict(lambda: "zo{}{}x".format(*next(pairs)))

    def renamed(path):
        return re.sub("[A-Za-z]+", lambda word: words[word[0]], path)

    leaves = {renamed(path): array(*line.shape) for path, line in tree.lines_by_path.items()}
    found = read(nested(leaves))
    for path, line in tree.lines_by_path.items():
        what, answer = found[renamed(path)], line.answer
        right = [each._replace(kind="M") for each in (*answer.readings, *answer.offered)]
        if what.reading.kind != "F" and not what.is_asked:
            reading = what.reading._replace(kind="M")
            assert any(same(reading, each, line.shape) for each in right), (path, what)


@each_tree
@unstacked
def test_joint_groups_are_pairs_of_neighbouring_layers_of_one_kind(tree):
    params, found = tree.params, found_in(tree.name)
    first = [Rule(f"^{re.escape(path)}$", stack=0) for path, what in found.items() if what.is_asked]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rules = default_rules(params, first)
    groups = [group for group in plan(params, rules).groups if group.rule.stack > 1]
    alone = [group for group in groups if group.rule.layer_axis is None]
    members = {tuple(dict.fromkeys(map(leaf_of, group.members))) for group in alone}
    assert members == stacked(tree, found)
    assert all(group.rule.mode == 1 and group.rule.stack == 2 for group in groups)


@each_family
@unstacked
def test_no_rules_mean_the_default_rules(tree):
    params = tree.params
    assert plan(params) == plan(params, default_rules(params))


@each_family
@unstacked
def test_every_rule_takes_a_leaf_and_no_leaf_fits_two(tree):
    params = tree.params
    rules = default_rules(params)
    fits = [[rule for rule in rules if rule.search(path)] for path, _ in leaf_paths(params)]
    assert all(len(fit) <= 1 for fit in fits)
    assert {rule for fit in fits for rule in fit} == set(rules)


@each_family
@unstacked
def test_printed_rules_can_be_pasted_back(tree):
    rules = default_rules(tree.params)
    names = {"Rule": Rule, "MuonDimensionNumbers": MuonDimensionNumbers}
    assert eval(str(rules), names) == rules


def test_the_snapshot_has_how_every_tree_is_read_and_what_is_offered():
    """`WRITE_OUTPUT=1 python -m pytest tests/test_trees.py -k snapshot` writes it anew."""
    lines = ["# How the default rules read every tree of tests/trees and benchmarks/architectures."]
    for name, tree in TREES.items():
        lines += ["", f"# {name}", *written(tree.params, found_in(name))]
    for name, architecture in ARCHITECTURES.items():
        params = architecture.shapes()
        lines += ["", f"# {name}", *written(params, read(params))]
    if os.environ.get("WRITE_OUTPUT"):
        SNAPSHOT.write_text("\n".join([*lines, ""]), "utf-8")
    assert SNAPSHOT.read_text("utf-8").splitlines() == lines
