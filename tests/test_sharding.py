"""Updates of sharded leaves: the numbers of one device, in two all-to-alls."""

import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, orthogonalize, scale_by_teon, teon

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
RULES = (
    Rule(r"block_(?P<layer>\d+)/(query|key)", stack=2),
    Rule(r"block_(?P<layer>\d+)/(up|down)"),
)
D = 16


def transformer(blocks=3, d=D):
    """Square pairs with a shorter tail, wide and tall matrices, and a vector that no rule takes."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    def block():
        matrices = {"query": (d, d), "key": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
        return {name: normal(*shape) for name, shape in matrices.items()} | {"norm": normal(d)}

    return {f"block_{i}": block() for i in range(blocks)}


def mesh_of(kind=AUTO, **sizes):
    sizes = sizes or {"data": 8}
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def specs_of(tree, spec):
    """`spec` for every matrix, turned for `down` if it names two axes of the mesh."""

    def of(keys, leaf):
        if leaf.ndim < 2:
            return P()
        turn = "down" in jax.tree_util.keystr(keys) and None not in spec
        return P(*reversed(spec)) if turn else spec

    return jax.tree_util.tree_map_with_path(of, tree)


def put(tree, mesh, specs):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def assert_same(sharded, single, tolerance=1e-4):
    for (keys, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(sharded), jax.tree.leaves(single), strict=True
    ):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < tolerance, (jax.tree_util.keystr(keys), error)


def assert_sharded_update_is_the_same(tree, mesh, specs, rules=RULES, **arguments):
    """Of `orthogonalize`, compiled; gives the compiled update's text."""
    single = orthogonalize(rules, **arguments).update(tree, optax.EmptyState())[0]
    given = None if EXPLICIT in mesh.axis_types else specs
    transform = orthogonalize(rules, shardings=given, **arguments)
    update = jax.jit(lambda tree: transform.update(tree, optax.EmptyState())[0])
    compiled = update.lower(put(tree, mesh, specs)).compile()
    sharded = compiled(put(tree, mesh, specs))
    assert_same(sharded, single)
    for leaf, spec in zip(jax.tree.leaves(sharded), jax.tree.leaves(specs), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    return compiled.as_text()


LAYOUTS = {
    "replicated": ({"data": 8}, P()),
    "fan_in": ({"data": 8}, P("data", None)),
    "fan_out": ({"data": 8}, P(None, "data")),
    "two axes along one": ({"data": 4, "model": 2}, P(("data", "model"), None)),
    "two axes": ({"data": 4, "model": 2}, P("data", "model")),
    "replicas of shards": ({"replica": 2, "data": 4}, P(None, "data")),
    "three axes": ({"replica": 2, "data": 2, "model": 2}, P("model", "data")),
    "one device of an axis": ({"data": 8, "model": 1}, P("data", "model")),
}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_updates_are_those_of_one_device(layout, kind):
    sizes, spec = LAYOUTS[layout]
    tree = transformer()
    text = assert_sharded_update_is_the_same(tree, mesh_of(kind, **sizes), specs_of(tree, spec))
    assert text.count(" all-to-all(") == 2
    cut = math.prod(sizes[name] for names in spec if names for name in np.ravel(names))
    assert ("all-gather" in text) == (cut < 8)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("mode", [1, 2, 3])
def test_every_mode_with_a_shorter_tail(mode, kind):
    tree = {f"block_{i}": {"w": leaf} for i, leaf in enumerate(normal(5, D, 2 * D))}
    rules = (Rule(r"block_(?P<layer>\d+)/w", stack=3, mode=mode),)
    mesh = mesh_of(kind, data=4, model=2)
    assert_sharded_update_is_the_same(tree, mesh, specs_of(tree, P("data", "model")), rules)


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


HEADS = MuonDimensionNumbers(0, (1, 2))
LEAVES = {
    "heads, model axis along heads": (
        (D, 4, 8),
        Rule(r"(?P<layer>\d+)", stack=2, dims=HEADS),
        P("data", "model", None),
    ),
    "heads, model axis within a head": (
        (D, 2, 8),
        Rule(r"(?P<layer>\d+)", stack=2, dims=HEADS),
        P(None, None, ("data", "model")),
    ),
    "layers that stay": (
        (16, D, 2 * D),
        Rule(r"", stack=2, layer_axis=0),
        P(("data", "model"), None, None),
    ),
    "layers along one axis": (
        (8, D, 2 * D),
        Rule(r"", stack=2, layer_axis=0),
        P("data", "model", None),
    ),
    "groups of layers across devices": (
        (8, D, 2 * D),
        Rule(r"", stack=2, layer_axis=0),
        P(("data", "model"), None, None),
    ),
    "layers that are not cut, with a tail": (
        (5, D, 2 * D),
        Rule(r"", stack=2, layer_axis=0),
        P(None, "data", "model"),
    ),
    "experts": (
        (4, D, 2 * D),
        Rule(r"(?P<layer>\d+)", stack=2, dims=MuonDimensionNumbers(1, 2)),
        P("data", None, "model"),
    ),
    "fused parts across devices": (
        (D, 6 * D),
        Rule(r"(?P<layer>\d+)", stack=2, split=(2 * D, 2 * D, 2 * D)),
        P("model", "data"),
    ),
}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("case", LEAVES)
def test_leaves_of_every_layout(case, kind):
    shape, rule, spec = LEAVES[case]
    tree = {str(i): leaf for i, leaf in enumerate(normal(2, *shape))}
    mesh = mesh_of(kind, data=4, model=2)
    text = assert_sharded_update_is_the_same(tree, mesh, {"0": spec, "1": spec}, (rule,))
    if case == "layers that stay":
        assert not re.search(r" all-|collective|reduce-scatter", text)
