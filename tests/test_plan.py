"""Which matrices go together: types, runs, names, the fallback, errors, and the printed table."""

import itertools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, default_rules, orthogonalize, plan
from tests.counting import count_products

D = MuonDimensionNumbers


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def blocks(numbers, *shape, name="block_{}", leaf="w"):
    return {name.format(number): {leaf: array(*shape)} for number in numbers}


def layers(planned):
    return [group.layers for group in planned.groups]


def members(planned):
    return [group.members for group in planned.groups]


@pytest.mark.parametrize(
    ("stack", "depth", "runs"),
    [
        (1, 3, [(0,), (1,), (2,)]),
        (2, 4, [(0, 1), (2, 3)]),
        (2, 5, [(0, 1), (2, 3), (4,)]),
        (3, 5, [(0, 1, 2), (3, 4)]),
        (4, 3, [(0, 1, 2)]),
        (12, 13, [tuple(range(12)), (12,)]),
    ],
)
def test_layers_are_cut_into_runs_of_k_of_which_the_last_may_be_shorter(stack, depth, runs):
    rule = Rule(r"block_(?P<layer>\d+)/w", stack=stack)
    assert layers(plan(blocks(range(depth), 4, 6), [rule])) == runs
    scanned = {"w": array(depth, 4, 6)}
    assert layers(plan(scanned, [Rule("w", stack=stack, layer_axis=0)])) == runs


def test_layer_10_comes_after_layer_9():
    planned = plan(blocks(range(12), 4, 6), [Rule(r"block_(?P<layer>\d+)/w", stack=3)])
    assert members(planned)[3] == ("block_9/w", "block_10/w", "block_11/w")


def test_gaps_do_not_break_a_run():
    planned = plan(blocks([0, 5, 7, 30], 4, 6), [Rule(r"block_(?P<layer>\d+)/w", stack=2)])
    assert layers(planned) == [(0, 5), (7, 30)]


def test_where_the_optional_group_does_not_match_the_layer_is_0():
    params = blocks(["", "_1", "_2"], 4, 6, name="block{}")
    planned = plan(params, [Rule(r"^block(_(?P<layer>\d+))?/w", stack=2)])
    assert members(planned) == [("block/w", "block_1/w"), ("block_2/w",)]
    assert layers(planned) == [(0, 1), (2,)]


def test_positions_in_a_list_are_layer_numbers_too():
    params = {"h": [{"w": array(4, 6)} for _ in range(3)]}
    planned = plan(params, [Rule(r"h/(?P<layer>\d+)/w", stack=2)])
    assert members(planned) == [("h/0/w", "h/1/w"), ("h/2/w",)]


@pytest.mark.parametrize(
    "second",
    [
        {"block_1": {"other": array(4, 6)}},
        {"block_1": {"w": array(6, 4)}},
        {"block_1": {"w": array(4, 6, dtype="bfloat16")}},
        {"encoder_block_1": {"w": array(4, 6)}},
    ],
    ids=["path", "shape", "dtype", "module"],
)
def test_leaves_that_differ_in_more_than_the_layer_are_not_stacked(second):
    params = {"block_0": {"w": array(4, 6)}, **second}
    assert len(plan(params, [Rule(r"block_(?P<layer>\d+)", stack=2)]).groups) == 2


def test_leaves_of_different_rules_are_not_stacked():
    rules = [Rule(r"block_(?P<layer>0)/w", stack=2), Rule(r"block_(?P<layer>\d+)/w", stack=2)]
    assert layers(plan(blocks(range(3), 4, 6), rules)) == [(0,), (1, 2)]


def test_query_key_and_value_of_one_rule_are_three_types():
    block = {name: {"kernel": array(4, 4)} for name in ("query", "key", "value")}
    params = {f"block_{i}": block for i in range(2)}
    planned = plan(params, [Rule(r"block_(?P<layer>\d+)/(query|key|value)", stack=2)])
    assert sorted(members(planned)) == [
        (f"block_0/{name}/kernel", f"block_1/{name}/kernel") for name in ("key", "query", "value")
    ]


def test_the_first_rule_that_matches_takes_the_leaf():
    rules = [Rule("block_0", stack=0), Rule("block_1", mode=3), Rule("block")]
    planned = plan(blocks(range(3), 4, 6), rules)
    assert planned.fallback == ("block_0/w",)
    assert [group.rule for group in planned.groups] == rules[1:]


@pytest.mark.parametrize(
    ("shape", "rule", "expected"),
    [
        ((4, 6), Rule("w"), [("w",)]),
        ((2, 4, 6), Rule("w", stack=2, layer_axis=0), [("w[0]", "w[1]")]),
        ((4, 3, 6), Rule("w", stack=2, layer_axis=1), [("w[0]", "w[1]"), ("w[2]",)]),
        ((4, 6), Rule("w", split=2), [("w:0",), ("w:1",)]),
        ((4, 6), Rule("w", split=(1, 5)), [("w:0",), ("w:1",)]),
        (
            (2, 4, 6),
            Rule("w", 2, layer_axis=0, split=2),
            [("w:0[0]", "w:0[1]"), ("w:1[0]", "w:1[1]")],
        ),
        ((2, 4, 6), Rule("w", dims=D(1, 2)), [("w",)]),
    ],
    ids=["a matrix", "layers", "layers elsewhere", "parts", "sizes", "layers of parts", "experts"],
)
def test_members_are_named_by_path_part_and_layer(shape, rule, expected):
    assert members(plan({"w": array(*shape)}, [rule])) == expected


def test_the_number_in_the_path_comes_before_that_along_the_axis():
    """Scans of two layers each, one after another; a run may cross from one to the next."""
    rule = Rule(r"block_(?P<layer>\d+)/w", stack=3, layer_axis=0)
    planned = plan(blocks([10, 9], 2, 4, 6), [rule])
    assert layers(planned) == [((9, 0), (9, 1), (10, 0)), ((10, 1),)]
    assert members(planned)[0] == ("block_9/w[0]", "block_9/w[1]", "block_10/w[0]")


@pytest.mark.parametrize(
    ("shape", "rule", "fan_in", "fan_out", "batch", "joint"),
    [
        ((2, 4, 6), Rule("w", 2, 1, layer_axis=0), 4, 6, 1, (8, 6)),
        ((2, 4, 6), Rule("w", 2, 2, layer_axis=0), 4, 6, 1, (4, 12)),
        ((2, 4, 6), Rule("w", 2, 3, layer_axis=0), 4, 6, 1, (2, 24)),
        ((2, 4, 6), Rule("w", 2, dims=D(2, 1), layer_axis=0), 6, 4, 1, (12, 4)),
        ((5, 4, 6), Rule("w", dims=D(1, 2)), 4, 6, 5, (4, 6)),
        ((4, 2, 3), Rule("w", dims=D(0, (1, 2))), 4, 6, 1, (4, 6)),
        ((4, 6), Rule("w", split=3), 4, 2, 1, (4, 2)),
        ((4, 6, 5), Rule("w", dims=D(0, (1, 2)), split=2), 4, 15, 1, (4, 15)),
    ],
    ids=str,
)
def test_a_group_knows_one_layer_s_fans_and_the_joint_shape(
    shape, rule, fan_in, fan_out, batch, joint
):
    group = plan({"w": array(*shape)}, [rule]).groups[0]
    assert (group.fan_in, group.fan_out, group.batch) == (fan_in, fan_out, batch)
    assert group.joint == joint


def test_without_rules_they_are_the_default_rules():
    params: Any = {f"block_{i}": {"attn": {"query": {"kernel": array(4, 4)}}} for i in range(2)}
    params["embed"] = {"embedding": array(9, 4)}
    planned = plan(params)
    assert planned == plan(params, default_rules(params))
    assert planned.groups[0].rule.stack == 2


def test_rules_may_come_from_any_iterable():
    params = blocks(range(2), 4, 6)
    assert plan(params, (Rule(name) for name in ("a", "w"))) == plan(params, [Rule("a"), Rule("w")])


def test_arrays_and_their_shapes_have_the_same_plan():
    shapes, rules = blocks(range(2), 4, 6), [Rule("w")]
    arrays = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    assert plan(arrays, rules) == plan(shapes, rules)


@st.composite
def trees_and_rules(draw):
    """Leaves of any rank in modules of any number, under rules that fit what they take."""
    shapes = st.lists(st.sampled_from([2, 4, 6]), max_size=3)
    names = st.sampled_from("abc")
    tree = draw(
        st.dictionaries(
            st.integers(0, 12).map(str), st.dictionaries(names, shapes.map(lambda s: array(*s)))
        )
    )
    options = st.builds(
        dict, stack=st.integers(0, 3), mode=st.integers(1, 3), split=st.integers(1, 2)
    )
    rules = [
        Rule(rf"^(?P<layer>\d+)/{name}$", dims=D(-2, -1), **draw(options))
        for name in draw(st.lists(names, max_size=3))
    ]
    return tree, rules


@given(trees_and_rules())
def test_every_leaf_is_in_exactly_one_place(example):
    tree, rules = example
    planned = plan(tree, rules)
    places = list(planned.fallback)
    for group in planned.groups:
        parts = group.rule.split
        places += [m.removesuffix(":0") for m in group.members if parts == 1 or m.endswith(":0")]
        assert len({m.partition(":")[2] for m in group.members}) == 1
    paths = [f"{module}/{leaf}" for module, leaves in tree.items() for leaf in leaves]
    assert sorted(places) == sorted(paths)


@pytest.mark.parametrize(
    ("shape", "rules", "reason"),
    [
        ((4, 6), [], "no rule"),
        ((4, 6), [Rule("other")], "no rule"),
        ((4, 6), [Rule("w", stack=0)], "stack=0"),
        ((3, 4, 6), [Rule("w", stack=0)], "stack=0"),
        ((4,), [Rule("w")], "1-D: no matrix"),
        ((), [Rule("w")], "0-D: no matrix"),
        ((4,), [Rule("w", stack=2, layer_axis=0)], "1-D: no matrix"),
        ((4,), [Rule("w", dims=D(0, 5))], "1-D: no matrix"),
    ],
    ids=str,
)
def test_the_fallback_says_why(shape, rules, reason):
    planned = plan({"w": array(*shape)}, rules)
    assert planned.untouched == (("w", shape, reason),)
    assert planned.groups == planned.series == ()


def test_two_leaves_of_one_layer_are_refused():
    rule = Rule(r"block_(?P<layer>\d+)/w", stack=2)
    apart = {"encoder": blocks([3], 4, 6), "decoder": blocks([3], 4, 6)}
    assert len(plan(apart, [rule]).series) == 2
    words = (
        f"'block_03/w' and 'block_3/w', shape (4, 6), taken by `{rule}`: both are layer 3 of one "
        r"series: let `(?P<layer>\d+)` match the number that tells them apart."
    )
    with pytest.raises(ValueError) as error:
        plan(blocks(["3", "03"], 4, 6), [rule])
    assert words in str(error.value)


def test_blocks_told_apart_by_a_number_that_is_not_the_layer_are_different_types():
    params = {f"stage_{stage}": blocks(range(2), 4, 6) for stage in range(2)}
    planned = plan(params, [Rule(r"block_(?P<layer>\d+)/w", stack=2)])
    assert members(planned) == [
        (f"stage_{stage}/block_0/w", f"stage_{stage}/block_1/w") for stage in range(2)
    ]


def test_two_leaves_with_one_path_are_refused():
    params = {"a": {"b": array(4, 6)}, "a/b": array(4, 6)}
    with pytest.raises(ValueError, match="'a/b', .* two leaves of the tree have this path"):
        plan(params, [Rule("b")])


@pytest.mark.parametrize(
    ("leaf", "rule", "words"),
    [
        (array(2, 4, 6), Rule("w"), ": 3 axes are left for fan_in and fan_out, not 2: pass"),
        (array(4, 6), Rule("w", dims=D(0, 2)), ": axes (2,) are not all among its 2 axes"),
        (array(4, 6), Rule("w", split=4), ": split=4 does not fit its first fan_out axis"),
        (array(4, 0), Rule("w"), ": it has an empty axis: leave it out with `stack=0`"),
        (array(4, 6, dtype="int32"), Rule("w"), ": its dtype is int32, and only real floating"),
        (array(4, 6, dtype="complex64"), Rule("w"), ": its dtype is complex64, and only real"),
        (array(4, 6), Rule("(?P<layer>w)"), ": its layer is 'w', not a number: let `(?P<layer>"),
    ],
    ids=str,
)
def test_a_rule_that_does_not_fit_its_leaf_is_named_with_path_and_shape(leaf, rule, words):
    with pytest.raises(ValueError) as error:
        plan({"w": leaf}, [rule])
    assert f"'w', shape {leaf.shape}, taken by `{rule}`{words}" in str(error.value)


def test_all_leaves_that_do_not_fit_are_named_at_once():
    params = {"a": array(2, 3, 4), "b": array(4, 6), "c": array(2, 2, dtype="int8"), "d": array(2)}
    with pytest.raises(ValueError, match="^Rules do not fit the leaves that they take:\n") as error:
        plan(params, [Rule("[a-d]")])
    assert re.findall("^  '(.)'", str(error.value), re.M) == ["a", "c"]


@pytest.mark.parametrize(
    "rules", [Rule("w"), "w", ["w"], 5, [Rule("w"), None], [("w", 2)]], ids=str
)
def test_rules_that_are_no_rules_are_refused(rules):
    with pytest.raises(ValueError, match="`rules=.*` should be a tuple of `Rule`, such as"):
        plan({"w": array(4, 6)}, rules)


def test_the_table_shows_types_fallback_unused_rules_and_totals():
    block = {
        "attn": {"query": {"kernel": array(4, 6), "bias": array(6)}, "qkv": array(4, 18)},
        "experts": array(5, 4, 7),
    }
    params = {f"block_{i}": block for i in range(3)} | {"embed": array(50, 4)}
    rules = [
        Rule(r"block_(?P<layer>\d+)/attn/query", stack=2),
        Rule(r"block_(?P<layer>\d+)/attn/qkv", stack=3, mode=3, split=3),
        Rule("experts", dims=D(1, 2)),
        Rule("embed", stack=0),
        Rule("head"),
    ]
    assert str(plan(params, rules)).split("\n") == [
        "orthogonalized             layers  fan_in x fan_out  K  mode  Gram  groups",
        "block_*/attn/qkv:0-2          0-2             4 x 6  3     3     3       3",
        "block_*/attn/query/kernel     0-1             4 x 6  2     1     6       1",
        "  1.55 times the products of its layers alone (stack=1); with mode=2 0.57 times",
        "block_2/attn/query/kernel       2             4 x 6  1     1     4       1",
        "block_*/experts                               4 x 7  1     1     4      15",
        "",
        "fallback                  shape             why  leaves",
        "block_*/attn/query/bias       6  1-D: no matrix       3",
        "embed                    50 x 4         stack=0       1",
        "",
        'takes no leaf: Rule(r"head")',
        "TEON 264 (29%), Muon 444 (48%), fallback 218 (24%) of the parameters",
        "matrix products per step: 55.2 kFLOP, 75% of Muon's 73.9 kFLOP (5 polynomial steps each, "
        "on cpu)",
    ]


def test_of_96_layers_there_is_one_row_per_type():
    rule = Rule(r"block_(?P<layer>\d+)/w", stack=2)
    lines = str(plan(blocks(range(96), 4, 6), [rule])).split("\n")
    assert lines[1] == "block_*/w         0-95             4 x 6  2     1     6      48"
    assert len(lines) == 8


NOTE = (
    r"  (\d+\.\d\d) times the products of its layers alone \(stack=1\); "
    r"with mode=(\d) (\d\.\d\d) times"
)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize(
    ("mode", "shape", "other"), [(1, (8, 16), "2"), (1, (8, 24), "2"), (2, (24, 8), "1")], ids=str
)
def test_a_row_says_that_its_layers_alone_cost_less_and_which_mode_would_too(
    monkeypatch, backend, mode, shape, other
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def traced(**settings):
        rules, params = [Rule(r"block_(?P<layer>\d+)", **settings)], blocks(range(2), *shape)
        jax.clear_caches()  # a trace for another backend is another one
        state: Any = optax.EmptyState()
        counted = count_products(lambda tree: orthogonalize(rules).update(tree, state), params)
        return counted.flops, str(plan(params, rules))

    (joint, text), (alone, plain) = traced(stack=2, mode=mode), traced()
    turned, cheaper = traced(stack=2, mode=int(other))
    assert joint > alone > turned
    (found,) = re.findall(f"^{NOTE}$", text, re.M)
    assert found == (f"{joint / alone:.2f}", other, f"{turned / alone:.2f}")
    assert "alone" not in plain + cheaper


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_one_of_modes_1_and_2_costs_no_more_than_the_layers_alone(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for K, fan_in, fan_out, mode in itertools.product((2, 3, 9), (4, 5, 8, 21), (4, 6, 7), (1, 2)):
        rule = Rule(r"block_(?P<layer>\d+)", stack=K, mode=mode)
        text = str(plan(blocks(range(K), fan_in, fan_out), [rule]))
        assert all(float(ratio) < 1 for _, _, ratio in re.findall(NOTE, text)), text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        ([0, 1, 2, 3], "0-3"),
        ([9, 10, 2], "2, 9-10"),
        ([0, 2, 4, 6], "0, 2, 4, 6"),
        (range(0, 96, 2), "0, 2 .. 94 (48)"),
        ([10**8, 10**8 + 2, 10**8 + 4, 10**8 + 6], "100000000 .. 100000006 (4)"),
    ],
    ids=str,
)
def test_layers_are_shown_as_spans_of_numbers(numbers, text):
    rule = Rule(r"block_(?P<layer>\d+)/w", stack=100)
    line = str(plan(blocks(numbers, 4, 6), [rule])).split("\n")[1]
    assert re.split("  +", line)[1] == text


def test_layers_of_several_scans_are_shown_as_pairs():
    rule = Rule(r"block_(?P<layer>\d+)/w", stack=2, layer_axis=0)
    assert " 3-4[0-1] " in str(plan(blocks([3, 4], 2, 4, 6), [rule]))
    assert " 0[0] .. 58[1] (60) " in str(plan(blocks(range(0, 60, 2), 2, 4, 6), [rule]))


def test_layers_may_be_negative():
    rule = Rule(r"block_(?P<layer>-?\d+)/w", stack=2)
    planned = plan(blocks([1, -1, -2, -3], 4, 6), [rule])
    assert layers(planned) == [(-3, -2), (-1, 1)]
    assert " -3..-1, 1 " in str(planned)


def test_layers_with_and_without_a_number_print_in_one_row():
    params = {f"layers_{i}": {"w": array(2, 4, 6)} for i in range(2)}
    rules = [
        Rule(r"layers_(?P<layer>0)/w", stack=2, layer_axis=0),
        Rule(r"layers_1/w", stack=2, layer_axis=0),
    ]
    line = str(plan(params, rules)).split("\n")[1]
    assert re.split("  +", line)[:2] == ["layers_*/w[*]", "0-1, 0[0-1]"]


def test_rows_of_one_name_are_told_apart_by_their_numbers():
    sizes = {"fc1": (4, 6), "fc2": (6, 4), "fc3": (4, 6), "fc4": (6, 4)}
    lines = str(plan({name: {"w": array(*size)} for name, size in sizes.items()}, [Rule("w")]))
    assert [line.split("  ")[0] for line in lines.split("\n")[1:3]] == ["fc{1, 3}/w", "fc{2, 4}/w"]


SHAPES = {
    f"{name}_{i}": array(*shape)
    for i in range(3)
    for name, shape in {"tall": (24, 8), "wide": (8, 24), "square": (8, 8), "e": (2, 8, 9)}.items()
}


@pytest.mark.promotes_dtypes
@pytest.mark.parametrize(
    "rules",
    [
        [Rule("tall|wide|square")],
        [Rule("(tall|wide|square)_(?P<layer>.)", stack=2)],
        [Rule("(tall|wide|square)_(?P<layer>.)", stack=3, mode=2)],
        [Rule("square_(?P<layer>.)", stack=3, mode=3), Rule("^e_(?P<layer>.)", 2, dims=D(1, 2))],
    ],
)
def test_the_flops_are_those_of_the_products_that_an_update_traces(rules):
    planned = plan(SHAPES, rules).as_dict()
    traced = count_products(orthogonalize(rules).update, SHAPES, optax.EmptyState())
    assert planned["flops"]["plan"] == traced.flops
    dims = {path: D(1, 2) if path[0] == "e" else D(0, 1) for path in SHAPES}
    taken = {member for group in planned["groups"] for member in group["members"]}
    taken_dims: Any = {path: dims[path] if path in taken else None for path in SHAPES}
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=taken_dims)
    state = jax.eval_shape(muon.init, SHAPES)
    masked = {path: leaf if path in taken else None for path, leaf in SHAPES.items()}
    assert planned["flops"]["muon"] == count_products(muon.update, masked, state).flops


def test_the_dict_form_is_the_plan_in_json():
    params = blocks(range(3), 2, 4, 6) | {"bias": array(6), "embed": array(9, 4)}
    rules = [Rule(r"block_(?P<layer>\d+)", 4, layer_axis=0), Rule("embed", stack=0), Rule("head")]
    planned = plan(params, rules)
    form = json.loads(json.dumps(planned.as_dict()))
    assert form == planned.as_dict()
    assert [tuple(group["members"]) for group in form["groups"]] == members(planned)
    assert form["groups"][1] == {
        "members": ["block_2/w[0]", "block_2/w[1]"],
        "layers": [[2, 0], [2, 1]],
        "rule": str(rules[0]),
        "mode": 1,
        "fan_in": 4,
        "fan_out": 6,
        "batch": 1,
        "gram": 6,
    }
    assert form["fallback"] == [
        {"path": "bias", "shape": [6], "reason": "no rule"},
        {"path": "embed", "shape": [9, 4], "reason": "stack=0"},
    ]
    assert form["unused"] == ['Rule(r"head")']
    assert form["parameters"] == {"TEON": 144, "Muon": 0, "fallback": 42}
    assert form["flops"].keys() == {"plan", "muon"}


@pytest.mark.parametrize(
    "rule",
    [Rule("p" * 150), Rule("p", split=tuple(range(1, 60))), Rule("very|" * 40, dims=D(0, 1))],
    ids=["long pattern", "long argument", "words"],
)
def test_a_rule_that_takes_no_leaf_wraps_in_100_columns(rule):
    lines = str(plan({"w": array(4, 6)}, [Rule("w"), rule])).split("\n")
    assert max(map(len, lines)) <= 100
    first = next(i for i, line in enumerate(lines) if line.startswith("takes no leaf: "))
    text = "".join(lines[first:-2]).replace(" ", "")
    assert text == f"takes no leaf: {rule}".replace(" ", "")


def test_a_row_is_one_line_however_long_its_path():
    path = "/".join(f"very_long_module_name_{c}" for c in "abcdefgh")
    lines = str(plan({path: array(4, 6), "w": array(4, 6)}, [Rule("very"), Rule("w")])).split("\n")
    long, short = lines[1 : lines.index("")]
    assert long.split() == [path, *"4 x 6 1 1 4 1".split()]
    assert short.startswith("w ") and len(short) <= 100


@st.composite
def unequal_scans(draw):
    """Rules with and without a number that read the same leaves, scanned, fused, or neither."""
    numbers = draw(st.sets(st.integers(-3, 300), min_size=1, max_size=12))
    scans = draw(st.lists(st.sampled_from([1, 3, 40]), min_size=1, max_size=3))
    shapes = itertools.cycle([(scan, *draw(st.permutations([4, 8]))) for scan in scans])
    name = draw(st.sampled_from(["block_{}", "b1/a_{}", "module/" * 12 + "{}"]))
    params = {name.format(n): {"w": array(*next(shapes))} for n in numbers}
    numbered = Rule(r"_(?P<layer>-?\d+)/", stack=draw(st.integers(1, 4)), layer_axis=0)
    few = "|".join(str(number) for number in sorted(numbers)[:2])
    split = draw(st.sampled_from([1, 2, (1, 3), (1, 7)]))
    rest = (
        Rule(f"({few})/w", stack=2, layer_axis=0) if draw(st.booleans()) else Rule("w", dims=None)
    )
    return params, [numbered, rest, Rule("w", stack=2, layer_axis=0, split=split)]


@given(unequal_scans())
def test_a_plan_prints_in_100_columns_but_for_longer_paths(example):
    try:
        planned = plan(*example)
    except ValueError:  # Two leaves of one layer, or a split that does not fit.
        return
    lines = str(planned).split("\n")
    # Beside a path, which has 12 columns at least, there are 88 for all others.
    assert all(len(line) - len(line.split("  ")[0]) <= 88 for line in lines if len(line) > 100)


def test_a_plan_of_nothing_can_be_printed():
    assert "TEON 0 (0%), Muon 0 (0%), fallback 0 (0%)" in str(plan({}, []))


def test_a_first_layer_without_a_number_is_in_the_row_of_the_others():
    params = {name: {"w": array(4, 6)} for name in ("block", "block_1", "block_2")}
    line = str(plan(params, [Rule(r"block(_(?P<layer>\d+))?/w", stack=3)])).split("\n")[1]
    assert re.split("  +", line)[:2] == ["block_*/w", "0-2"]


def test_trees_whose_keys_are_equal_but_read_differently_have_plans_of_their_own():
    for key in (True, 1, 1.0):
        assert plan({"h": {key: array(4, 4)}}, [Rule(f"^h/{key}$")]).fallback == ()


def test_layers_whose_dtypes_alternate_are_rows_of_their_own():
    kinds = "float32", "bfloat16"
    params = {f"block_{i}": {"w": jax.ShapeDtypeStruct((4, 6), kinds[i % 2])} for i in range(4)}
    planned = plan(params, [Rule(r"block_(?P<layer>\d+)", stack=2)])
    assert [group.layers for group in planned.groups] == [(0, 2), (1, 3)]
    rows = [re.split("  +", line)[:2] for line in str(planned).splitlines()]
    assert rows[1:4:2] == [["block_{0, 2}/w", "0, 2"], ["block_{1, 3}/w", "1, 3"]]


def test_sizes_of_numpy_are_json_and_share_no_plan():
    shape: Any = tuple(np.array([4, 6]))
    tree, same = ({"w": jax.ShapeDtypeStruct(s, "float32")} for s in (shape, (4, 6)))
    rules = [Rule("w", stack=1)]
    for each in (tree, same):
        form = plan(each, rules).as_dict()
        assert json.loads(json.dumps(form)) == form
        assert json.loads(json.dumps(plan(each, []).as_dict()))["fallback"][0]["shape"] == [4, 6]


def test_a_plan_counts_the_products_of_the_method_that_it_is_asked_about():
    """For 8 x 32: 4 S + 2 r - 3 products of 8 x 8 in one segment of S quintics, 3 S of cubics."""
    params, rules = {"w": jax.ShapeDtypeStruct((8, 32), jnp.float32)}, [Rule("w")]
    product = 2 * 8**3
    counted = {
        method: plan(params, rules, method=method).as_dict()["flops"]
        for method in ("polar_express", "schatten", "fast", "svd")
    }
    muon = 5 * (2 * 4 + 1) * product
    assert counted == {
        "polar_express": {"plan": (4 * 5 + 8 - 3) * product, "muon": muon},
        "schatten": {"plan": (4 * 4 + 8 - 3) * product, "muon": muon},
        "fast": {"plan": (4 * 2 + 3 * 2 + 8 - 3) * product, "muon": muon},
        "svd": {"plan": None, "muon": muon},
    }


def test_the_last_line_of_a_plan_names_the_steps_of_its_method():
    params, rules = {"w": jax.ShapeDtypeStruct((8, 32), jnp.float32)}, [Rule("w")]
    last = str(plan(params, rules, method="schatten")).splitlines()[-1]
    assert last.endswith("(4 polynomial steps, Muon's 5, on cpu)")
    last = str(plan(params, rules, method="svd")).splitlines()[-1]
    assert last.startswith("matrix products per step: not counted for method='svd'; Muon's are")
    with pytest.raises(ValueError, match="`method='nope'` is unknown"):
        plan(params, rules, method="nope")
