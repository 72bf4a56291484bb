"""Updates of sharded leaves: the numbers of one device, in two all-to-alls."""

import functools
import math
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, contrib, orthogonalize, polar_express, teon
from tests.compiled import COLLECTIVES

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Many layouts, each compiled for eight devices; one of them is quick.
slow = pytest.mark.slow
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
RULES = (
    Rule(r"block_(?P<layer>\d+)/(query|key)", stack=2),
    Rule(r"block_(?P<layer>\d+)/(up|down)"),
)
D = 16
QUICK = polar_express(2)


def transformer(blocks=2, d=D):
    """Square pairs, wide and tall matrices, and a vector that no rule takes."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    def block():
        matrices = {"query": (d, d), "key": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
        return {name: normal(*shape) for name, shape in matrices.items()} | {"norm": normal(d)}

    return {f"block_{i}": block() for i in range(blocks)}


def mesh_of(kind: AxisType = AUTO, **sizes: int):
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
    alone = orthogonalize(rules, **arguments)
    single = jax.jit(alone.update)(tree, optax.EmptyState())[0]
    given = None if EXPLICIT in mesh.axis_types else specs
    transform = orthogonalize(rules, shardings=given, **arguments)
    update = jax.jit(lambda tree: transform.update(tree, optax.EmptyState())[0])
    compiled = update.lower(put(tree, mesh, specs)).compile()
    sharded = compiled(put(tree, mesh, specs))
    assert_same(sharded, single)
    for leaf, spec in zip(jax.tree.leaves(sharded), jax.tree.leaves(specs), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    return compiled.as_text() or ""


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


KINDS = [("two axes", AUTO)]
KINDS += [pytest.param(name, AUTO, marks=slow) for name in LAYOUTS if name != "two axes"]
KINDS += [
    pytest.param(name, EXPLICIT, marks=slow)
    for name in ("replicated", "fan_in", "two axes", "replicas of shards")
]


@pytest.mark.parametrize(("layout", "kind"), KINDS, ids=str)
def test_sharded_updates_are_those_of_one_device(layout, kind):
    sizes, spec = LAYOUTS[layout]
    tree = transformer()
    text = assert_sharded_update_is_the_same(tree, mesh_of(kind, **sizes), specs_of(tree, spec))
    assert text.count(" all-to-all(") == 2
    cut = math.prod(sizes[name] for names in spec if names for name in np.ravel(names))
    assert ("all-gather" in text) == (cut < 8)


@slow
@pytest.mark.parametrize(("mode", "kind"), [(1, AUTO), (2, EXPLICIT), (3, AUTO)], ids=str)
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


@slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("case", LEAVES)
def test_leaves_of_every_layout(case, kind):
    shape, rule, spec = LEAVES[case]
    tree = {str(i): leaf for i, leaf in enumerate(normal(2, *shape))}
    mesh = mesh_of(kind, data=4, model=2)
    text = assert_sharded_update_is_the_same(tree, mesh, {"0": spec, "1": spec}, (rule,))
    if case == "layers that stay":
        assert not re.search(r" all-|collective|reduce-scatter", text)


@slow
def test_layers_that_are_not_cut_go_to_devices_as_they_are():
    """A free axis of the mesh goes along layers, where no group is cut: nothing is exchanged."""
    tree = {"w": normal(16, D, D)}
    rules = (Rule(r"w", stack=2, layer_axis=0),)
    text = assert_sharded_update_is_the_same(tree, mesh_of(), {"w": P()}, rules)
    assert text.count(" all-gather(") == 1 and "all-to-all" not in text


@slow
def test_stages_of_a_pipeline_that_have_whole_groups_send_nothing():
    """A stage has 2 of 16 layers of a scanned leaf, which are a group."""
    tree = {"layers": {"w": normal(16, D, D)}}
    rules = (Rule("w", stack=2, layer_axis=0),)
    specs = specs_of(tree, P("stage"))
    text = assert_sharded_update_is_the_same(tree, mesh_of(stage=8), specs, rules)
    assert not any(f" {collective}(" in text for collective in COLLECTIVES)


@slow
def test_more_devices_than_groups_share_them():
    """One group on eight devices: the rows of its Gram matrix are all that they tell each other."""
    tree = {"block_0": {"up": normal(D, 8 * D)}}
    text = assert_sharded_update_is_the_same(
        tree, mesh_of(), {"block_0": {"up": P("data", None)}}, RULES
    )
    # The peak, the sum of the first step, and that in the loop over the other four.
    assert len(re.findall(r" all-reduce\(", text)) == 3 and " while(" in text


@slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_gradients_through_an_update_that_devices_share_are_those_of_one_device(kind):
    """Eight devices have one 16 x 16 kernel between them, so all share its group."""
    random = np.random.default_rng(0)
    kernel, weights = (jnp.asarray(random.normal(size=(16, 16)), jnp.float32) for _ in range(2))

    def loss(kernel, scale, shardings):
        transform: Any = orthogonalize([Rule("w")], method=QUICK, scale=scale, shardings=shardings)
        updates, _ = transform.update({"w": kernel}, optax.EmptyState())
        return jnp.sum(weights * updates["w"])

    def derivatives(kernel, shardings):
        scale, value = jnp.float32(0.3), functools.partial(loss, shardings=shardings)
        along = jax.jvp(value, (kernel, scale), (kernel + 1, scale))
        twice = jax.grad(lambda c: jnp.sum(weights * jax.grad(value)(c * kernel + 1, scale)))(scale)
        return *jax.grad(value, (0, 1))(kernel, scale), *along, twice

    alone = jax.jit(functools.partial(derivatives, shardings=None))(kernel)
    mesh, spec = mesh_of(kind), P("data", None)
    shardings = {"w": NamedSharding(mesh, spec)} if kind == AUTO else None
    with jax.set_mesh(mesh):
        of_mesh = jax.jit(functools.partial(derivatives, shardings=shardings))
        shared = of_mesh(jax.device_put(kernel, NamedSharding(mesh, spec)))
    assert_same(shared, alone)


@slow
@pytest.mark.parametrize("method", ["svd", "schatten"])
def test_every_method(method):
    mesh = mesh_of(data=4, model=2)
    tree = transformer()
    assert_sharded_update_is_the_same(tree, mesh, specs_of(tree, P("data", "model")), method=method)


@slow
@pytest.mark.parametrize("factor", [0.0, 1e-30])
def test_owners_and_sharers_scale_before_they_square(factor):
    tree = jax.tree.map(lambda leaf: factor * leaf, transformer())
    mesh, transform = mesh_of(), orthogonalize(RULES)
    sharded = orthogonalize(RULES, shardings=jax.tree.map(lambda _: P("data"), tree))
    with jax.set_mesh(mesh):
        ours = jax.jit(sharded.update)(tree, optax.EmptyState())[0]
    theirs = jax.jit(transform.update)(tree, optax.EmptyState())[0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


MESH_SIZES = {"data": 4, "model": 2}
SPEC = P("data", "model")


def sharded_optimizer(kind, **arguments):
    """An optimizer, its mesh, and parameters there."""
    mesh, tree = mesh_of(kind, **MESH_SIZES), transformer()
    specs = specs_of(tree, SPEC)
    given = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs) if kind == AUTO else None
    return teon(0.1, RULES, shardings=given, **arguments), mesh, put(tree, mesh, specs)


@functools.cache
def single_update():
    tree = transformer()
    optimizer = teon(0.1, RULES)
    return jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)[0]


@slow
@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_momentum_lies_as_params_do_and_its_memory_is_used_again(kind):
    optimizer, _, params = sharded_optimizer(kind)
    state = optimizer.init(params)
    lowered = jax.jit(optimizer.update, donate_argnums=1).lower(params, state, params)
    update: Any = lowered.compile()
    updates, new = update(params, state, params)
    assert_same(updates, single_update())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    for leaf, moment in zip(jax.tree.leaves(params), moments(new), strict=True):
        assert moment.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    size = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(new))
    assert update.memory_analysis().alias_size_in_bytes == size
    assert not re.search(r"callback|infeed|outfeed|\bsend\(", update.as_text())


PLACES = {
    "replicated": ({"data": 8}, P()),
    "cut along one axis of two": ({"data": 4, "model": 2}, P("data")),
}
CHAINS = {
    "teon": lambda given: teon(0.1, RULES, method=QUICK, weight_decay=0.1, shardings=given),
    "orthogonalize": lambda given: optax.chain(
        optax.trace(0.9), orthogonalize(RULES, method=QUICK, shardings=given)
    ),
    "orthogonalize_slices": lambda given: optax.chain(
        optax.trace(0.9),
        contrib.orthogonalize_slices(RULES, "dct", method=QUICK, shardings=given),
    ),
}


@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CHAINS)
def test_states_and_updates_leave_an_update_where_they_came_in(name, place):
    (sizes, spec), tree = PLACES[place], transformer(2, 8)
    mesh = mesh_of(AUTO, **sizes)
    params = put(tree, mesh, jax.tree.map(lambda _: spec, tree))
    optimizer: Any = CHAINS[name](jax.tree.map(lambda leaf: leaf.sharding, params))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update, donate_argnums=1)
    ahead: Any = update.lower(params, state, params).compile()
    assert ahead.memory_analysis().alias_size_in_bytes == sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)
    )
    for call in (ahead, ahead, update, update):
        before = [leaf.sharding for leaf in jax.tree.leaves(state)]
        updates, state = call(params, state, params)
        for leaf, own in zip(jax.tree.leaves(state), before, strict=True):
            assert leaf.sharding.is_equivalent_to(own, leaf.ndim) or leaf.ndim == 0
        for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


@pytest.mark.promotes_dtypes
def test_the_momentum_of_gradients_that_lie_elsewhere_lies_as_params_do():
    mesh, tree = mesh_of(data=4, model=2), transformer(2, 8)
    specs = specs_of(tree, P("data", None))
    params = put(tree, mesh, specs)
    gradients = put(tree, mesh, specs_of(tree, P(None, "model")))
    optimizer = teon(0.1, RULES, method=QUICK, shardings=specs)
    with jax.set_mesh(mesh):
        update: Any = jax.jit(optimizer.update)
        updates, state = update(gradients, optimizer.init(params), params)
    taken = state.inner_states["teon"].inner_state[0].mu
    for name in ("query", "up"):
        for leaf in (taken["block_0"][name], updates["block_0"][name]):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None)), 2)


@pytest.mark.promotes_dtypes
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(AUTO, {}), (AUTO, {"spmd_axis_name": "seed"}), (EXPLICIT, {})],
    ids=["Auto", "Auto, by name", "Explicit"],
)
def test_vmap_over_seeds_that_lie_on_a_mesh(kind, arguments):
    mesh, tree = mesh_of(kind, seed=2, data=4), transformer(2, 8)
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 - leaf]), tree)
    params = put(seeds, mesh, jax.tree.map(lambda _: P("seed"), seeds))
    given = jax.tree.map(lambda _: P(), tree) if kind == AUTO else None
    transform = orthogonalize(RULES, method=QUICK, shardings=given)

    def update(params):
        return transform.update(params, optax.EmptyState())[0]

    with jax.set_mesh(mesh):
        updates = jax.jit(jax.vmap(update, **arguments))(params)
    alone = orthogonalize(RULES, method=QUICK)
    for seed in range(2):
        own = jax.tree.map(lambda leaf, seed=seed: leaf[seed], seeds)
        expected, _ = alone.update(own, optax.EmptyState())
        found = jax.tree.map(lambda leaf, seed=seed: np.asarray(leaf)[seed], updates)
        assert_same(found, expected)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_leaves_that_one_axis_alone_cuts_inside_a_shard_map_over_another(kind):
    mesh, tree = mesh_of(kind, data=4, model=2), transformer(1, 8)
    transform = orthogonalize(RULES, method=QUICK)

    def update(tree):
        return transform.update(tree, optax.EmptyState())[0]

    mapped = jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"})
    with jax.set_mesh(mesh):
        updates = jax.jit(mapped)(put(tree, mesh, specs_of(tree, P(None, "model"))))
    assert_same(updates, update(tree))


@pytest.mark.promotes_dtypes
def test_two_steps_without_jit():
    tree = transformer(2, 8)
    optimizer = teon(0.1, RULES)
    state = optimizer.init(tree)
    with jax.disable_jit():
        for _ in range(2):
            updates, state = optimizer.update(tree, state, tree)
    compiled = jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)[0]
    assert_same(updates, compiled)


def moments(state):
    """Momenta of all leaves, in the order of params."""
    teons = state.inner_states["teon"].inner_state[0].mu
    adams = state.inner_states["fallback"].inner_state[0].mu
    merged = jax.tree.map(
        lambda a, b: b if isinstance(a, optax.MaskedNode) else a,
        teons,
        adams,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return jax.tree.leaves(merged)


@slow
@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_types_of_the_state_never_change(kind):
    optimizer, mesh, params = sharded_optimizer(kind, mu_dtype="bfloat16")
    with jax.set_mesh(mesh):
        state = optimizer.init(params)
        eager = optimizer.update(params, state, params)[1]
        compiled = jax.jit(optimizer.update)(params, state, params)[1]
    types = jax.tree.map(jax.typeof, state)
    assert types == jax.tree.map(jax.typeof, eager) == jax.tree.map(jax.typeof, compiled)


@slow
@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("context", ["set_mesh", "none"])
def test_partition_specs_find_the_mesh(context):
    mesh, tree = mesh_of(AUTO, **MESH_SIZES), transformer()
    specs = specs_of(tree, SPEC)
    params = put(tree, mesh, specs)
    optimizer = teon(0.1, RULES, shardings=specs)
    update = jax.jit(optimizer.update)
    if context == "set_mesh":  # arrays that lie on no mesh themselves
        with jax.set_mesh(mesh):
            updates, _ = update(tree, optimizer.init(tree), tree)
    else:
        updates, _ = update(params, optimizer.init(params), params)
    assert_same(updates, single_update())


@slow
@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_scan_and_vmap(kind):
    optimizer, mesh, params = sharded_optimizer(kind)

    def step(state, _):
        updates, state = optimizer.update(params, state, params)
        return state, updates

    def several(factor):
        gradients = jax.tree.map(lambda leaf: factor * leaf, params)
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    with jax.set_mesh(mesh):
        scan = jax.jit(lambda state: jax.lax.scan(step, state, None, length=2))
        _, scanned = scan(optimizer.init(params))
        mapped = jax.jit(jax.vmap(several))(jnp.ones(2))
    for updates in (scanned, mapped):
        assert_same(jax.tree.map(lambda leaf: leaf[0], updates), single_update())


@slow
@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_exported_update(kind):
    optimizer, _, params = sharded_optimizer(kind)

    def update(params):
        return optimizer.update(params, optimizer.init(params), params)[0]

    exported = jax.export.export(jax.jit(update))(params)
    restored = jax.export.deserialize(exported.serialize())
    assert_same(jax.jit(restored.call)(params), single_update())


@slow
@pytest.mark.promotes_dtypes
def test_wrong_specs_stay_correct():
    mesh, tree = mesh_of(AUTO, **MESH_SIZES), transformer()
    params = put(tree, mesh, specs_of(tree, SPEC))
    optimizer = teon(0.1, RULES, shardings=P(None, ("model", "data")))
    assert_same(
        jax.jit(optimizer.update)(params, optimizer.init(params), params)[0], single_update()
    )


@slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_what_cannot_be_cut_evenly_is_computed_everywhere(kind):
    tree = {f"block_{i}": {"query": leaf} for i, leaf in enumerate(normal(2, 9, 9))}
    mesh, specs = mesh_of(kind, data=2, model=4), specs_of(tree, P())
    assert_sharded_update_is_the_same(tree, mesh, specs)
    if kind == AUTO:
        uneven = orthogonalize(RULES, shardings=NamedSharding(mesh, P("model")))
        single = jax.jit(orthogonalize(RULES).update)(tree, optax.EmptyState())[0]
        assert_same(jax.jit(uneven.update)(tree, optax.EmptyState())[0], single)


@slow
@pytest.mark.promotes_dtypes
def test_unknown_shardings_are_left_to_the_compiler():
    tree = transformer()
    optimizer = teon(0.1, RULES, shardings={"block_0": None, "block_1": P()})
    assert_same(jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)[0], single_update())


@slow
@pytest.mark.promotes_dtypes
def test_hidden_shardings_are_noticed_once():
    mesh, tree = mesh_of(), transformer()
    params = put(tree, mesh, specs_of(tree, P("data", None)))
    optimizer = teon(0.1, RULES)
    with pytest.warns(UserWarning, match=r"8 leaves .* 'block_0/down', shape \(64, 16\)") as caught:
        state = optimizer.init(params)
        updates, state = jax.jit(optimizer.update)(params, state, params)
        optimizer.init(params)
    assert len(caught) == 1 and "shardings=jax.tree.map(" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert_same(updates, single_update())
    with pytest.warns(UserWarning, match="4 leaves"):
        orthogonalize([Rule("up|down")]).init(params)


def test_the_notice_names_the_line_that_called():
    tree = transformer(1, 8)
    params = put(tree, mesh_of(), specs_of(tree, P("data", None)))
    for transform in (orthogonalize(RULES), optax.chain(orthogonalize(RULES)), teon(0.1, RULES)):
        with pytest.warns(UserWarning, match="leaves are cut") as caught:
            transform.init(params)
        assert caught[0].filename == __file__


def test_no_notice_where_nothing_is_hidden():
    tree = transformer()
    for mesh, specs in ((mesh_of(), P()), (mesh_of(EXPLICIT), P("data"))):
        params = put(tree, mesh, jax.tree.map(lambda _, specs=specs: specs, tree))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            teon(0.1, RULES).init(params)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("shardings", [None, SPEC], ids=str)
def test_shards_of_a_shard_map_are_refused(checked, shardings):
    mesh, tree = mesh_of(AUTO, **MESH_SIZES), transformer()
    transform, specs = orthogonalize(RULES, shardings=shardings), specs_of(tree, SPEC)
    update = jax.shard_map(
        lambda tree: transform.update(tree, optax.EmptyState())[0],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs,
        check_vma=checked,
    )
    with pytest.raises(ValueError, match=r"inside a `jax.shard_map` over \('data', 'model'\)"):
        jax.eval_shape(update, tree)


@pytest.mark.parametrize("in_axes", [0, None], ids=["shards", "whole"])
def test_leaves_of_a_pmap_are_refused(in_axes):
    tree = {"block_0": {"query": jnp.ones((8, 16, 16))}}
    transform = orthogonalize([Rule("query", dims=MuonDimensionNumbers(-2, -1))])
    update = jax.pmap(
        lambda tree, _: transform.update(tree, optax.EmptyState())[0], in_axes=(in_axes, 0)
    )
    with pytest.raises(ValueError, match=r"\(or `jax.pmap`\), where 'block_0/query', shape "):
        jax.eval_shape(update, tree, jnp.ones(8))


def test_whole_leaves_inside_a_shard_map_are_updated():
    transform, tree = orthogonalize(RULES), transformer(1)
    update = jax.shard_map(
        lambda tree: transform.update(tree, optax.EmptyState())[0],
        mesh=mesh_of(),
        in_specs=P(),
        out_specs=P(),
    )
    jax.eval_shape(update, tree)


@pytest.mark.parametrize(
    ("shardings", "message"),
    [
        (P("data", None, None), r"'block_0/down', shape \(64, 16\): .* has 3 entries for 2 axes"),
        (P("layers"), "names an axis that the mesh {'data': 4, 'model': 2} does not have"),
        (P("data", "data"), "names an axis of the mesh twice"),
        ({"block_0": P()}, "'block_1/down', .*: nothing in `shardings` is at its path"),
        ({"block_0": "data"}, "`shardings` has 'data' at 'block_0', where a `PartitionSpec`"),
    ],
    ids=["too long", "unknown", "twice", "missing", "no spec"],
)
def test_shardings_that_do_not_fit_are_refused(shardings, message):
    mesh, tree = mesh_of(AUTO, **MESH_SIZES), transformer()
    params = put(tree, mesh, specs_of(tree, SPEC))
    with pytest.raises(ValueError, match=message) as caught:
        teon(0.1, RULES, shardings=shardings).init(params)
    assert re.search(r"[Ww]rite ", str(caught.value))


def test_another_mesh_is_refused():
    mesh, tree = mesh_of(AUTO, **MESH_SIZES), transformer()
    params = put(tree, mesh, specs_of(tree, SPEC))
    with pytest.raises(ValueError, match="its mesh {'data': 8} is not the other leaves'"):
        orthogonalize(RULES, shardings=NamedSharding(mesh_of(), P("data"))).init(params)


def test_specs_without_a_mesh_are_refused():
    tree = transformer()
    optimizer = orthogonalize(RULES, shardings=P("data"))
    state = optimizer.init(tree)
    with pytest.raises(ValueError, match=r"lie on no mesh .* `NamedSharding\(mesh, spec\)`"):
        optimizer.update(tree, state)
    with pytest.warns(DeprecationWarning), mesh_of():
        with pytest.raises(ValueError, match=r"`with mesh:` sets none\): call .*jax.set_mesh"):
            optimizer.update(tree, state)
