"""Every way to couple matrices, against float64 and the definition."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from holdings import (
    FAN_IN,
    HEADS,
    HOLDINGS,
    LAYER,
    NAMES,
    SLICE,
    gaussian,
    kernels,
    named,
    scanned,
    scanned_fused,
    updated,
    whole,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as D
from spectra import function_of

from teon_optax import Rule, alignment, orthogonalize, plan, polar_express
from tests.counting import count_products

METHODS = {"svd": "svd", "polynomial": polar_express(2, 0.1)}


# Every holding in one mode, two holdings in every mode.
TABLE = [(holding, 1) for holding in HOLDINGS]
TABLE += [(h, mode) for h in ("siblings of layers", "heads of parts") for mode in (2, 3)]


def named_case(case):
    holding, mode = case
    return f"{holding}, mode {mode}"


def rule_of(case):
    rule = HOLDINGS[case[0]][1]
    pattern = f"^{named_case(case)}/x/.*{rule.pattern}"
    return dataclasses.replace(rule, pattern=pattern, mode=case[1])


def tree_of(cases, seed=0):
    T = gaussian(seed)
    return {
        named_case(case): {"x": jax.tree.map(jnp.asarray, HOLDINGS[case[0]][0](T))}
        for case in cases
    }


def expected_of(case, T, function):
    """The update as leaves hold it, and how far rounding may move it."""
    holding, mode = case
    tolerances = []

    def joint(group):
        values = np.linalg.svd(oracles.unfolding(list(group), mode), compute_uv=False)
        tolerances.append(2 * oracles.rounding(values, function is not np.ones_like))
        return oracles.joint(list(group), mode, function)

    return updated(holding, T, joint), max(tolerances)


def compiled(cases, **arguments):
    """The update of their trees."""
    transform = orthogonalize([rule_of(case) for case in cases], **arguments)
    return jax.jit(lambda tree: transform.update(tree, optax.EmptyState())[0])


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def updates(method):
    """Of all cases, in one compilation."""
    return compiled(TABLE, method=METHODS[method])(tree_of(TABLE))


@pytest.mark.parametrize("case", TABLE, ids=named_case)
def test_the_update_is_that_of_the_definition_however_leaves_hold_the_matrices(
    case, method, updates
):
    function = function_of(METHODS[method])
    expected, tolerance = expected_of(case, gaussian(), function)
    result = updates[named_case(case)]["x"]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=0), result, expected
    )


# What has unequal runs, and every kind of joining.
FEW = [
    ("siblings of layers", 2),
    ("siblings of layers", 3),
    ("heads of parts", 1),
    ("heads of siblings", 1),
    ("scanned siblings", 2),
]


@pytest.fixture(scope="module")
def update_few():
    """The update of their trees, compiled for float32."""
    update = compiled(FEW)
    update(tree_of(FEW))
    return update


def assert_near(result, expected, tolerance):
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.float64(ours.astype("float32")), np.float64(theirs.astype("float32"))
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_zero_gives_zero_and_scale_does_not_matter(scale, update_few):
    tree = tree_of(FEW)
    result = update_few(jax.tree.map(lambda leaf: leaf * np.float32(scale), tree))
    assert_near(
        result,
        jax.tree.map(lambda u: u if scale else jnp.zeros_like(u), update_few(tree)),
        1e-3,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_its_group_and_in_no_other(bad, update_few):
    tree = tree_of(FEW[:4])
    spoilt = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaf.at[(0,) * leaf.ndim].set(bad) if "block_9" in str(keys) else leaf,
        tree,
    )
    rest = tree_of(FEW[4:])
    result, expected = update_few(spoilt | rest), update_few(tree | rest)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(result):
        if "scanned" not in str(keys):
            assert np.isfinite(leaf).all() == ("block_11" in str(keys))
            assert np.isfinite(leaf).any() == ("block_11" in str(keys))
    last = [
        {
            name: tree["x"]["block_11"]
            for name, tree in t.items()
            if "x" in tree and "block_11" in tree["x"]
        }
        for t in (result, expected)
    ]
    jax.tree.map(np.testing.assert_array_equal, *last)


def test_each_leaf_keeps_its_dtype(update_few):
    tree = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), tree_of(FEW))
    result = update_few(tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("bfloat16")}
    wide = update_few(jax.tree.map(lambda leaf: leaf.astype("float32"), tree))
    assert_near(result, wide, 1e-2)


def test_a_number_for_scale_is_the_root_mean_square_of_every_group():
    cases = [("siblings of layers", 2), ("heads of parts", 3), ("parts", 1)]
    result = compiled(cases, method="svd", scale=0.2)(tree_of(cases))
    for of_case in result.values():
        for block in [["block_9", "block_10"], ["block_11"]]:
            leaves = jax.tree.leaves([of_case["x"][name] for name in block])
            rms = np.sqrt(np.mean(np.concatenate([np.ravel(leaf) for leaf in leaves]) ** 2))
            assert rms == pytest.approx(0.2, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_updates_are_those_of_one_device(kind, update_few):
    mesh, tree = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2), tree_of(FEW)
    # Heads, which only whole groups have, are cut as well.
    names = {FAN_IN: "data", HEADS: "model"}
    specs = jax.tree.map(lambda M: P(*map(names.get, M.shape)), tree)
    put = jax.tree.map(lambda M, spec: jax.device_put(M, NamedSharding(mesh, spec)), tree, specs)
    given = specs if kind == AxisType.Auto else None
    program: Any = compiled(FEW, shardings=given).lower(put).compile()
    assert " all-to-all(" in program.as_text()
    result = program(put)
    assert_near(result, update_few(tree), 1e-4)
    for leaf, before in zip(jax.tree.leaves(result), jax.tree.leaves(put), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)


def test_siblings_come_by_layer_then_in_the_order_of_the_alternatives():
    planned = plan(named(gaussian(), whole), [Rule(f"{LAYER}/{SLICE}", stack=2)])
    assert planned.groups[0].members == tuple(f"block_{i}/{n}" for i in (9, 10) for n in NAMES)
    assert planned.groups[0].layers == (9, 9, 9, 10, 10, 10)
    assert [len(group.members) for group in planned.groups] == [6, 3]
    turned = plan(named(gaussian(), whole), [Rule(rf"{LAYER}/(?P<slice>v\w+|key|query)")])
    assert turned.groups[0].members == ("block_9/value", "block_9/key", "block_9/query")


def test_members_are_named_by_part_layer_and_head():
    rule = Rule("w", dims=D(1, (2, 4)), layer_axis=0, split=2, join=("heads", "parts"))
    planned = plan({"w": jax.ShapeDtypeStruct((2, 5, 2, 3, 4), jnp.float32)}, [rule])
    assert planned.groups[1].members == tuple(f"w:{p}[1]#{h}" for p in (0, 1) for h in range(3))


def test_the_table_and_the_dict_show_k_and_the_mode():
    planned = plan(named(gaussian(), whole), [Rule(f"{LAYER}/{SLICE}", stack=2, mode=2)])
    lines = str(planned).split("\n")
    assert re.split("  +", lines[1]) == ["block_*/query", "9-10", "12 x 16", "6", "2", "12", "1"]
    assert re.split("  +", lines[2]) == ["block_11/query", "11", "12 x 16", "3", "2", "12", "1"]
    assert [group["mode"] for group in planned.as_dict()["groups"]] == [2, 2]


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_the_flops_are_those_of_the_products_that_an_update_traces(mode):
    tree = jax.tree.map(jnp.asarray, kernels(gaussian()))
    coupling = [Rule(f"{LAYER}/{SLICE}", stack=2, mode=mode)]
    traced = count_products(orthogonalize(coupling).update, tree, optax.EmptyState())
    assert plan(tree, coupling).as_dict()["flops"]["plan"] == traced.flops


def test_alignment_measures_the_matrices_that_are_coupled():
    T = gaussian()
    (first, last), (as_parts, _) = (
        alignment(hold(T), [rule])
        for hold, rule in (
            (scanned, Rule(SLICE, 2, layer_axis=0)),
            (scanned_fused, Rule("w", 2, layer_axis=1, split=3, join="parts")),
        )
    )
    assert len(first.members) == 6 and len(last.members) == 3
    np.testing.assert_allclose(first.ratios, as_parts.ratios, rtol=1e-4)
    stack = [np.float64(M) for M in whole(T[2])]
    nuclear = sum(np.linalg.norm(M, "nuc") for M in stack)
    expected = [nuclear / np.linalg.norm(oracles.unfolding(stack, m), "nuc") for m in (1, 2)]
    np.testing.assert_allclose(last.ratios, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"join": "head"}, 'join should be "parts", "heads" or ("parts", "heads")'),
        ({"join": ["heads"]}, "join should be"),
        ({"join": ("parts", ["heads"])}, "join should be"),
        ({"join": "parts"}, "should join parts of one size, two at least: split into such"),
        ({"join": "parts", "split": (4, 2)}, "should join parts of one size"),
    ],
    ids=str,
)
def test_a_rule_that_couples_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Rule("w", **arguments)


def test_siblings_of_unequal_shape_or_absent_are_refused_with_the_way_out():
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tree = {"block_0": {"query": array((8, 8)), "key": array((8, 4)), "value": array((8, 4))}}
    rule = Rule(f"{LAYER}/{SLICE}")
    with pytest.raises(
        ValueError, match="'block_0/query', shape .* no 'key', 'value' of its shape"
    ):
        plan(tree, [rule])
    ways_out = [Rule(f"{LAYER}/(?P<slice>key|value)"), Rule("query")]
    assert [len(group.members) for group in plan(tree, ways_out).groups] == [2, 1]
    tree = {"block_0": {"query": array((8, 8))}, "block_1": dict.fromkeys(NAMES, array((8, 8)))}
    with pytest.raises(ValueError, match="'block_0/query', .* write a rule for each shape"):
        plan(tree, [rule])
    with pytest.raises(ValueError, match="no axis is left for the heads to join"):
        plan({"w": array((8, 2, 4))}, [Rule("w", dims=D(0, (1, 2)), join="heads")])


def test_a_slice_that_refers_to_another_group_is_sorted_as_text():
    tree = {name: jnp.eye(2) for name in ("b_b", "a_a")}
    groups = plan(tree, [Rule(r"(?P<name>a|b)_(?P<slice>\1)")]).groups
    assert [group.members for group in groups] == [("a_a",), ("b_b",)]


def test_alternatives_may_hold_an_escaped_bar():
    tree = {name: jax.ShapeDtypeStruct((4, 4), jnp.float32) for name in ("a", "k|v")}
    (group,) = plan(tree, [Rule(r"(?P<slice>k\|v|a)")]).groups
    assert group.members == ("k|v", "a")
