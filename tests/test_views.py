"""`Rule(view=...)`: parts that lie in turns along one axis are read as separate leaves are."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers
from oracles import EPS

from teon_optax import Rule, alignment, contrib, orthogonalize, plan
from teon_optax._plan.layout import layout_of, to_leaf, to_matrices

D: Any = MuonDimensionNumbers
LAYERS, WIDTH, HEADS, SIZE, QUERIES, HIDDEN = 4, 8, 4, 6, 2, 10


class Case(NamedTuple):
    """One layer of a fused leaf, the rule that sees its parts, and those as leaves of their own.

    Attributes:
      shapes: Shape of each part.
      dims: Axes of each part.
      fused: From parts to the fused leaf.
      parts: From the fused leaf to parts.
      arguments: What a rule for the fused leaf has.
    """

    shapes: list[tuple[int, ...]]
    dims: Any
    fused: Any
    parts: Any
    arguments: dict[str, Any]


def by_groups(leaf):
    grouped = leaf.reshape(WIDTH, HEADS, QUERIES + 2, SIZE)
    return [grouped[:, :, :QUERIES], grouped[:, :, QUERIES:-1], grouped[:, :, -1:]]


CASES = {
    "Q, K and V by heads": Case(
        [(WIDTH, HEADS, SIZE)] * 3,
        D(0, (1, 2)),
        lambda parts: np.stack(parts, 2).reshape(WIDTH, -1),
        lambda leaf: list(np.moveaxis(leaf.reshape(WIDTH, HEADS, 3, SIZE), 2, 0)),
        {"view": (WIDTH, HEADS, 3, SIZE), "dims": D(0, (1, 3))},
    ),
    "Q, K and V by groups of queries": Case(
        [(WIDTH, HEADS, QUERIES, SIZE), *[(WIDTH, HEADS, 1, SIZE)] * 2],
        D(0, (2, 1, 3)),
        lambda parts: np.concatenate(parts, 2).reshape(WIDTH, -1),
        by_groups,
        {
            "view": (WIDTH, HEADS, QUERIES + 2, SIZE),
            "dims": D(0, (2, 1, 3)),
            "split": (QUERIES, 1, 1),
        },
    ),
    "gate and up in turns": Case(
        [(WIDTH, HIDDEN)] * 2,
        D(0, 1),
        lambda parts: np.stack(parts, 2).reshape(WIDTH, -1),
        lambda leaf: list(np.moveaxis(leaf.reshape(WIDTH, HIDDEN, 2), 2, 0)),
        {"view": (WIDTH, HIDDEN, 2), "dims": D(0, 1)},
    ),
    "gate and up in turns, (out, in)": Case(
        [(HIDDEN, WIDTH)] * 2,
        D(1, 0),
        lambda parts: np.stack(parts, 1).reshape(-1, WIDTH),
        lambda leaf: list(np.moveaxis(leaf.reshape(HIDDEN, 2, WIDTH), 1, 0)),
        {"view": (HIDDEN, 2, WIDTH), "dims": D(-1, 0)},
    ),
    "heads of a latent vector, fan_in by heads": Case(
        [(HEADS, SIZE, WIDTH)] * 2,
        D((0, 1), 2),
        lambda parts: np.stack(parts, 1).reshape(-1, WIDTH),
        lambda leaf: list(np.moveaxis(leaf.reshape(HEADS, 2, SIZE, WIDTH), 1, 0)),
        {"view": (HEADS, 2, SIZE, WIDTH), "dims": D((0, 2), 3)},
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def parts_of(case, seed=0):
    """The parts of every layer."""
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=shape) for shape in case.shapes] for _ in range(LAYERS)]


def separate(case, parts):
    return {
        f"{i}/{part}": jnp.float32(leaf)
        for i, layer in enumerate(parts)
        for part, leaf in enumerate(layer)
    }


def updates_of(tree, rules) -> dict[str, jax.Array]:
    transform: Any = orthogonalize(rules, method="svd")
    state = transform.init(tree)
    return jax.jit(lambda leaves: transform.update(leaves, state)[0])(tree)


def expected_of(case, parts, stack, mode):
    """Updates of separate leaves, fused again."""
    rule = Rule(r"(?P<layer>\d+)/", stack=stack, mode=mode, dims=case.dims)
    updates = updates_of(separate(case, parts), [rule])
    return [
        case.fused([np.asarray(updates[f"{i}/{part}"]) for part in range(len(case.shapes))])
        for i in range(LAYERS)
    ]


@each_case
@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("stack", [1, 2, 3])
def test_layers_of_a_view_are_updated_as_separate_leaves(case, stack, mode):
    parts = parts_of(case)
    tree = {f"block_{i}": jnp.float32(case.fused(layer)) for i, layer in enumerate(parts)}
    rule = Rule(r"block_(?P<layer>\d+)", stack=stack, mode=mode, **case.arguments)
    updates = updates_of(tree, [rule])
    for i, expected in enumerate(expected_of(case, parts, stack, mode)):
        np.testing.assert_allclose(updates[f"block_{i}"], expected, atol=32 * EPS)


@each_case
@pytest.mark.parametrize("layer_axis", [0, 1, -1])
def test_a_view_is_that_of_one_layer_of_a_scanned_leaf(case, layer_axis):
    parts = parts_of(case)
    scanned = np.stack([case.fused(layer) for layer in parts], layer_axis)
    rule = Rule("w", stack=2, layer_axis=layer_axis, **case.arguments)
    updates = updates_of({"w": jnp.float32(scanned)}, [rule])["w"]
    expected = np.stack(expected_of(case, parts, 2, 1), layer_axis)
    np.testing.assert_allclose(updates, expected, atol=32 * EPS)


def test_parts_of_a_view_can_be_joined():
    """Q, K and V of a layer jointly: the axis of parts is one that `dims` does not name."""
    case, parts = CASES["Q, K and V by heads"], parts_of(CASES["Q, K and V by heads"])
    joined = Rule(r"block_(?P<layer>\d+)", stack=2, join="heads", **case.arguments)
    siblings = Rule(r"(?P<layer>\d+)/(?P<slice>0|1|2)", stack=2, dims=case.dims)
    tree = {f"block_{i}": jnp.float32(case.fused(layer)) for i, layer in enumerate(parts)}
    updates, expected = updates_of(tree, [joined]), updates_of(separate(case, parts), [siblings])
    for i in range(LAYERS):
        fused = case.fused([np.asarray(expected[f"{i}/{part}"]) for part in range(3)])
        np.testing.assert_allclose(updates[f"block_{i}"], fused, atol=32 * EPS)


@each_case
def test_alignment_measures_the_parts_of_a_view(case):
    parts = parts_of(case)
    fused = {f"block_{i}": np.float32(case.fused(layer)) for i, layer in enumerate(parts)}
    rule = Rule(r"block_(?P<layer>\d+)", stack=2, **case.arguments)
    of_parts = Rule(r"(?P<layer>\d+)/", stack=2, dims=case.dims)
    found = [group[2:] for group in alignment(fused, [rule])]
    wanted = [group[2:] for group in alignment(separate(case, parts), [of_parts])]
    if "split" in case.arguments:
        np.testing.assert_allclose(
            sorted(map(jax.tree.leaves, found)), sorted(map(jax.tree.leaves, wanted)), rtol=1e-4
        )
    else:  # Parts are a batch of one group, which adds up the nuclear norms of all.
        assert len(found) * len(case.shapes) == len(wanted)


@st.composite
def views(draw):
    """A leaf, with or without an axis of layers, and any way to take its axes apart."""
    view = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    cuts = sorted(draw(st.sets(st.integers(1, len(view) - 1))))
    bounds = [0, *cuts, len(view)]
    shape = [int(np.prod(view[i:j])) for i, j in zip(bounds, bounds[1:], strict=False)]
    layer_axis = draw(st.sampled_from([None, *range(len(shape) + 1)]))
    if layer_axis is not None:
        shape.insert(layer_axis, draw(st.integers(1, 3)))
    axes = draw(st.permutations(range(len(view))))
    fans = sorted(draw(st.sets(st.integers(1, len(view)), min_size=2, max_size=2)) | {1})[-2:]
    dims = D(tuple(axes[: fans[0]]), tuple(axes[fans[0] : fans[1]]))
    return tuple(shape), Rule("w", view=tuple(view), dims=dims, layer_axis=layer_axis)


@given(views())
def test_to_leaf_is_the_inverse_of_to_matrices_of_a_view(example):
    shape, rule = example
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    layout = layout_of(shape, rule)
    np.testing.assert_array_equal(to_leaf(to_matrices(leaf, layout), layout), leaf, strict=True)


def test_a_plan_has_the_shapes_of_the_parts():
    case = CASES["Q, K and V by groups of queries"]
    tree = {f"block_{i}": jnp.zeros((WIDTH, HEADS * (QUERIES + 2) * SIZE)) for i in range(2)}
    groups = plan(tree, [Rule(r"block_(?P<layer>\d+)", stack=2, **case.arguments)]).groups
    shapes = [(group.members[0], group.fan_in, group.fan_out) for group in groups]
    heads = HEADS * SIZE
    assert shapes == [
        ("block_0:0", WIDTH, QUERIES * heads),
        ("block_0:1", WIDTH, heads),
        ("block_0:2", WIDTH, heads),
    ]


def test_a_printed_plan_says_in_which_shape_a_leaf_is_seen():
    case = CASES["gate and up in turns"]
    text = str(plan({"w": jnp.zeros((WIDTH, 2 * HIDDEN))}, [Rule("w", **case.arguments)]))
    assert re.search(r"^w +8 x 10 +1 +1 +8 +2\n  each layer seen as \(8, 10, 2\)$", text, re.M)


def test_a_view_of_another_size_is_refused_with_path_and_shape():
    taken = re.escape("'w', shape (8, 12), taken by `Rule(r\"w\", ")
    with pytest.raises(ValueError, match=taken + ".* has 80 entries and the leaf 96"):
        plan({"w": jnp.zeros((8, 12))}, [Rule("w", view=(8, 5, 2), dims=D(0, 1))])
    with pytest.raises(ValueError, match=r"has 80 entries and one layer of it 48: write lengths"):
        plan({"w": jnp.zeros((2, 48))}, [Rule("w", view=(8, 10), layer_axis=0)])


def test_dims_count_the_axes_of_the_view():
    with pytest.raises(ValueError, match=r"axes \(3,\) are not all among its 3 axes"):
        plan({"w": jnp.zeros((8, 12))}, [Rule("w", view=(8, 6, 2), dims=D(0, 3))])
    assert Rule("w", view=(8, 6), dims=D(0, 1), layer_axis=0).layer_axis == 0


NO_SHAPES = [8, (), (8,), (8, 0), (8, -1), (8.0, 2), "ab", (True, 2)]


@pytest.mark.parametrize("view", NO_SHAPES, ids=repr)
def test_what_is_no_shape_is_no_view(view):
    with pytest.raises(ValueError, match=r"`Rule\('w', view=.*\)`: view should be a"):
        Rule("w", view=view)


def test_a_printed_rule_has_its_view():
    rule = Rule("w", view=(8, 6, 2), dims=D(0, 1))
    assert eval(repr(rule), {"Rule": Rule, "MuonDimensionNumbers": D}) == rule
    assert hash(rule) == hash(Rule("w", view=[8, 6, 2], dims=D(0, 1)))  # pyright: ignore


def test_a_group_without_gradient_stays_zero_in_a_view():
    case = CASES["gate and up in turns"]
    tree = {"w": jnp.zeros((WIDTH, 2 * HIDDEN))}
    transform: Any = orthogonalize([Rule("w", **case.arguments)])
    updates, _ = transform.update(tree, optax.EmptyState())
    assert not np.any(updates["w"])


TYPES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
# How a leaf (WIDTH, fan_out), or one of layers before that, lies on a mesh of 2 x 4 or 8 devices.
MESHES = {
    "fan_in": ((2, 4), P("x", None)),
    "fan_out evenly": ((4, 2), P(None, "x")),
    "fan_out by two axes": ((2, 2), P(None, ("x", "y"))),
    "both": ((2, 4), P("x", "y")),
    "fan_out not by heads": ((1, 8), P(None, "y")),
    "whole": ((2, 4), P()),
}


@pytest.mark.parametrize("is_scanned", [False, True], ids=["leaves", "scanned"])
@pytest.mark.parametrize("where", MESHES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["Q, K and V by heads", "Q, K and V by groups of queries"])
def test_a_mesh_changes_neither_the_update_of_a_view_nor_where_it_lies(
    name, kind, where, is_scanned
):
    case, parts = CASES[name], parts_of(CASES[name])
    lengths, spec = MESHES[where]
    mesh = jax.make_mesh(lengths, ("x", "y"), axis_types=(TYPES[kind],) * 2)
    fused = [np.float32(case.fused(layer)) for layer in parts]
    tree = {"w": np.stack(fused)} if is_scanned else {f"w_{i}": w for i, w in enumerate(fused)}
    own = NamedSharding(mesh, P(None, *spec) if is_scanned else spec)
    layers = {"layer_axis": 0} if is_scanned else {}
    rule = Rule("w" if is_scanned else r"w_(?P<layer>\d+)", stack=2, **layers, **case.arguments)
    expected = updates_of(jax.tree.map(jnp.asarray, tree), [rule])
    shardings = jax.tree.map(lambda _: own, tree)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tree, shardings)
        given = shardings if kind == "Auto" else None
        transform: Any = orthogonalize([rule], method="svd", shardings=given)
        state = transform.init(placed)
        updates = jax.jit(lambda leaves: transform.update(leaves, state)[0])(placed)
    for path, update in updates.items():
        assert update.sharding.is_equivalent_to(own, update.ndim)
        np.testing.assert_allclose(np.asarray(update), np.asarray(expected[path]), atol=32 * EPS)


@pytest.mark.parametrize("kind", [None, *TYPES])
@pytest.mark.parametrize("name", CASES)
def test_what_follows_the_polar_factor_sees_the_parts_of_a_view(name, kind):
    """NorMuon's second moment and its norms are those of separate leaves."""
    case, parts = CASES[name], parts_of(CASES[name])
    of_parts = Rule(r"(?P<layer>\d+)/", dims=case.dims)
    of_fused = Rule(r"w_(?P<layer>\d+)", **case.arguments)

    def updates(tree, rule):
        transform: Any = contrib.scale_by_normuon([rule])
        state = transform.init(tree)
        for _ in range(2):
            done, state = transform.update(tree, state)
        return done

    expected = updates(separate(case, parts), of_parts)
    tree = {f"w_{i}": jnp.float32(case.fused(layer)) for i, layer in enumerate(parts)}
    if kind:
        mesh = jax.make_mesh((2,), ("x",), axis_types=(TYPES[kind],))
        tree = jax.device_put(tree, NamedSharding(mesh, P(None, "x")))
    for i in range(LAYERS):
        fused = case.fused([np.asarray(expected[f"{i}/{part}"]) for part in range(len(parts[0]))])
        found = np.asarray(updates(tree, of_fused)[f"w_{i}"])
        np.testing.assert_allclose(found, fused, rtol=64 * EPS)
