"""`Rule`: what it accepts, what it refuses and in which words; and the paths it is searched in."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.tree_util import FlattenedIndexKey
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule
from teon_optax._paths import leaf_paths
from teon_optax._rule import fan_axes

D = MuonDimensionNumbers
# Called with what their annotations exclude, or makes what these cannot say.
Untyped: Any = Rule
UntypedD: Any = D
BLOCK = r"block_(?P<layer>\d+)/"


def test_a_rule_of_a_pattern_alone_is_muon_of_matrices():
    rule = Rule("kernel")
    assert dataclasses.astuple(rule) == ("kernel", 1, 1, None, None, 1, (), None)


def test_a_rule_is_frozen_and_hashable():
    rule = Untyped(BLOCK, stack=2, dims=D(0, [1, 2]), split=[2, 3])
    assert hash(rule) == hash(Rule(BLOCK, stack=2, dims=D((0,), (1, 2)), split=(2, 3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.stack = 3


def test_integers_of_numpy_become_python_s():
    rule = Untyped(
        "w", stack=np.int64(1), mode=np.int32(2), layer_axis=np.int8(0), split=np.uint8(3)
    )
    assert rule == Rule("w", 1, 2, None, 0, 3)
    assert {type(value) for value in (rule.stack, rule.mode, rule.layer_axis, rule.split)} == {int}


def test_the_pattern_is_searched_anywhere_in_the_path():
    assert Rule("attn/query").search("block_0/attn/query/kernel")
    assert not Rule("^attn/query").search("block_0/attn/query/kernel")


@pytest.mark.parametrize(
    "rule",
    [
        Rule("kernel"),
        Rule(r"h\.(?P<layer>\d+)/w", stack=2, mode=3, dims=D((0, 1), 2), split=(1, 2)),
        Rule("kernel", stack=4, layer_axis=-1, dims=D(0, 1)),
        Rule('say "w"'),
        Rule("a\nb"),
        Rule("a\\\\"),
    ],
    ids=repr,
)
def test_a_printed_rule_can_be_pasted_back(rule):
    assert eval(repr(rule), {"Rule": Rule, "MuonDimensionNumbers": D}) == rule


def test_a_printed_rule_leaves_defaults_out():
    assert repr(Rule(r"h\d/w", stack=0)) == r'Rule(r"h\d/w", stack=0)'


@pytest.mark.parametrize(
    ("dims", "axes"),
    [
        (D(0, 1), ((0,), (1,))),
        (D((0, 1), 2), ((0, 1), (2,))),
        (D(1, (2, 0)), ((1,), (2, 0))),
        (D((0,), (1,)), ((0,), (1,))),
    ],
    ids=str,
)
def test_fan_axes_are_tuples_in_the_order_written(dims, axes):
    assert fan_axes(dims) == fan_axes(Untyped("w", dims=dims).dims) == axes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5,), "`Rule(5)`: pattern should be a string, a regular expression."),
        ((re.compile("w"),), "`Rule(re.compile('w'))`: pattern should be a string"),
        (("h.(",), "`Rule('h.(')`: the pattern is no regular expression: missing ),"),
        (("a{99999999999}",), "the pattern is no regular expression: the repetition number is too"),
        (("w", -1), '`Rule(r"w", stack=-1)` has a negative stack: write 0 for the fallback'),
        (("w", 2.0), "`Rule('w', stack=2.0)`: stack should be an integer, not float."),
        (("w", True), "`Rule('w', stack=True)`: stack should be an integer, not bool."),
        (("w", "2"), "`Rule('w', stack='2')`: stack should be an integer, not str."),
        (("w", 1, 0), '`Rule(r"w", mode=0)` has mode 0: write 1 (joint over fan_out'),
        (("w", 1, 4), '`Rule(r"w", mode=4)` has mode 4: write 1 (joint over fan_out'),
        (("w", 1, None), "`Rule('w', mode=None)`: mode should be an integer, not NoneType."),
        (("w", 1, 1, (0, 1)), "`Rule('w', dims=(0, 1))`: dims should be `optax.contrib.Muon"),
        (("w", 1, 1, UntypedD("a", 1)), "dims='a')`: dims should be an integer, not str."),
        (("w", 1, 1, UntypedD(0.0, 1)), "dims=0.0)`: dims should be an integer, not float."),
        (("w", 1, 1, D((), 1)), "output_axis=1))`: name at least one axis of each kind."),
        (("w", 1, 1, D(0, ())), "output_axis=()))`: name at least one axis of each kind."),
        (("w", 1, 1, D(0, 0)), "names an axis twice: reduction axes, output axes and layer_axis"),
        (("w", 1, 1, D((0, 1), (1, 2))), "names an axis twice"),
        (("w", 1, 1, D(0, 1), 1), "layer_axis=1)` names an axis twice"),
        (("w", 1, 1, None, 0.5), "`Rule('w', layer_axis=0.5)`: layer_axis should be an integer"),
        (("w", 1, 1, None, (0,)), "layer_axis=(0,))`: layer_axis should be an integer, not tuple"),
        (("w", 1, 1, None, None, 0), "`Rule('w', split=0)`: split should be a positive number of"),
        (("w", 1, 1, None, None, ()), "`Rule('w', split=())`: split should be a positive number"),
        (("w", 1, 1, None, None, (2, 0)), "split=(2, 0))`: split should be a positive number"),
        (("w", 1, 1, None, None, 1.5), "`Rule('w', split=1.5)`: split should be an integer"),
        (("w", 2), '`Rule(r"w", stack=2)` cannot tell which layer a leaf belongs to: put `(?P<la'),
        ((r"h_(\d+)", 12), "cannot tell which layer a leaf belongs to"),
    ],
    ids=str,
)
def test_a_wrong_rule_is_refused_when_it_is_built(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Rule(*arguments)


def test_without_a_layer_a_stack_of_0_or_1_is_a_rule():
    assert [Rule("w", stack).stack for stack in (0, 1)] == [0, 1]


def test_a_layer_group_or_a_layer_axis_makes_a_stack():
    assert Rule(BLOCK, stack=2).stack == Rule("w", stack=2, layer_axis=0).stack == 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Variable:
    """A box as Flax's: its array is the attribute `value`."""

    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class NamedArray:
    """A box as penzai's."""

    data_array: Any


class Flattened:
    """A node whose children have no names but their position, as haliax's arrays."""

    def __init__(self, array):
        self.array = array

    def __repr__(self):
        return f"Flattened({self.array})"


jax.tree_util.register_pytree_with_keys(
    Flattened,
    lambda node: (((FlattenedIndexKey(0), node.array),), None),
    lambda _, children: Flattened(*children),
)


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"b": {"w": 1}, "a": [2, (3,)]}, ["a/0", "a/1/0", "b/w"]),
        ({"kernel": Variable(1)}, ["kernel"]),
        ({"kernel": Variable(Variable(1))}, ["kernel"]),
        ({"w": NamedArray(1)}, ["w"]),
        ({"weight": Flattened(1)}, ["weight"]),
        ({"attn": {"value": 1}}, ["attn/value"]),
        (Attention(1, 2), ["query", "value"]),
        (Attention(1, Variable(2)), ["query", "value"]),
        (Attention(optax.MaskedNode(), 2), ["value"]),
        (Attention(1, optax.MaskedNode()), ["query"]),
        (Attention(None, 2), ["value"]),
        ({"a": None, "b": 1, "c": optax.MaskedNode()}, ["b"]),
        (1, [""]),
        ({}, []),
    ],
    ids=str,
)
def test_paths_have_no_keys_of_boxes_and_all_others(tree, paths):
    found = leaf_paths(tree)
    assert [path for path, _ in found] == paths
    assert [leaf for _, leaf in found] == jax.tree.leaves(tree)


class Indexed:
    """A node that holds a NumPy array beside its child, as models keep tables."""

    def __init__(self, child, table):
        self.child, self.table = child, table


jax.tree_util.register_pytree_node(
    Indexed,
    lambda node: ((node.child,), node.table),
    lambda table, children: Indexed(*children, table),
)


def test_paths_of_trees_whose_structures_cannot_be_compared_are_read_each_time():
    first, second = ({name: Indexed(1, np.arange(3))} for name in ("a", "a"))
    with pytest.raises(ValueError, match="Exception raised while checking equality of metadata"):
        assert jax.tree.structure(first) == jax.tree.structure(second)
    assert leaf_paths(first) == leaf_paths(second) == [("a", 1)]
