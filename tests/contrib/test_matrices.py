"""What sees each matrix of a leaf: rules, and meshes that cut them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from teon_optax import Rule, contrib, orthogonalize


@pytest.mark.promotes_dtypes
def test_all_of_them_chain():
    rng = np.random.default_rng(4)
    params = {name: jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for name in ("q", "k")}
    params["bias"] = jnp.ones(4)
    coupling = [Rule("(?P<slice>q|k)")]
    optimizer = optax.chain(
        optax.trace(0.95, nesterov=True),
        contrib.orthogonalize_slices(coupling, "dct"),
        contrib.normalize_matrices(coupling),
        contrib.scale_by_normuon(coupling, rms=0.2),
        contrib.add_cautious_weight_decay(0.1),
        optax.scale_by_learning_rate(0.02),
    )

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    new, after = step(*step(params, state))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("transform", [contrib.normalize_matrices, contrib.scale_by_normuon])
def test_rules_may_be_a_generator_and_are_checked_at_once(transform):
    tree = {"w": 1.0 + jnp.arange(24.0).reshape(4, 6)}
    once = transform(rule for rule in [Rule("w")])
    first, state = once.update(tree, once.init(tree))
    second, _ = once.update(tree, state)
    assert not jnp.array_equal(first["w"], tree["w"])
    assert not jnp.array_equal(second["w"], tree["w"])
    with pytest.raises(ValueError, match="`rules='w'` should be a tuple of `Rule`"):
        transform("w")


def assert_same_on(mesh, specs, rule, shape):
    """Updates and all states, which stay where they lay and keep their types."""
    transform = optax.chain(
        contrib.normalize_matrices([rule]),
        contrib.scale_by_normuon([rule]),
        contrib.scale_to_param_norm([rule]),
        optax.scale_by_learning_rate(0.1),
        contrib.project_to_sphere([rule]),
        contrib.add_lookahead(0.5),
    )
    rng = np.random.default_rng(3)
    tree = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    alone, _ = jax.jit(transform.update)(tree, transform.init(tree), tree)
    for spec in specs:
        put = {"w": jax.device_put(tree["w"], NamedSharding(mesh, spec))}
        with jax.set_mesh(mesh):
            state = transform.init(put)
            result, after = jax.jit(transform.update)(put, state, put)
        assert jax.tree.map(jax.typeof, (result, after)) == jax.tree.map(jax.typeof, (put, state))
        for before, now in zip(*map(jax.tree.leaves, ((put, state), (result, after))), strict=True):
            assert now.sharding.is_equivalent_to(before.sharding, now.ndim)
        np.testing.assert_allclose(result["w"], alone["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("rule", [Rule("w"), Rule("w", split=2)], ids=str)
def test_what_follows_is_the_same_on_a_mesh(axis_type, rule):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    assert_same_on(mesh, (P("data", None), P(None, "data")), rule, (8, 16))


@pytest.mark.slow
@pytest.mark.parametrize("split", [8, (11, 5)], ids=str)
def test_a_mesh_may_cut_through_parts(split):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = P(None, ("data", "model")), P("data", "model")
    assert_same_on(mesh, specs, Rule("w", split=split), (4, 16))


@pytest.mark.parametrize("transform", [contrib.normalize_matrices, contrib.scale_by_normuon])
@pytest.mark.parametrize("eps", [0, 0.0, -1e-7, 1e-60])
def test_an_eps_that_lets_zero_be_divided_by_zero_is_refused(transform, eps):
    with pytest.raises(ValueError, match=r"`eps=.*` should be a number, at least 1.17"):
        transform([Rule("w")], eps=eps)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P(), P("model"), P(None, "data"), P("data", "model")], ids=str)
@pytest.mark.parametrize("joint", ["orthogonalize", "orthogonalize_slices"])
def test_all_states_of_a_chain_stay_where_they_lay_on_a_mesh_of_type_auto(joint, spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = [Rule(r"block_(?P<layer>\d)", 2)]
    rng = np.random.default_rng(5)
    params = {
        f"block_{i}": jax.device_put(
            jnp.asarray(rng.normal(size=(8, 16)), jnp.float32), NamedSharding(mesh, spec)
        )
        for i in range(2)
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    orthogonalized = {
        "orthogonalize": orthogonalize(rules, shardings=shardings),
        "orthogonalize_slices": contrib.orthogonalize_slices(rules, "dct", shardings=shardings),
    }
    optimizer = optax.chain(
        optax.trace(0.95),
        contrib.normalize_matrices(rules),
        orthogonalized[joint],
        contrib.scale_by_normuon(rules),
        contrib.scale_to_param_norm(rules),
        contrib.project_to_sphere(rules),
        contrib.add_lookahead(0.5),
    )
    state = optimizer.init(params)
    moved = jax.jit(optimizer.update)(params, state, params)
    for before, now in zip(*map(jax.tree.leaves, ((params, state), moved)), strict=True):
        # A count is a number on no mesh yet.
        assert before.ndim == 0 or now.sharding.is_equivalent_to(before.sharding, now.ndim)
