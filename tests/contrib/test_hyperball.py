"""`project_to_sphere` and `scale_to_param_norm` against Hyperball in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from weights import WEIGHTS

from teon_optax import Rule, contrib

RATE = 0.1


def hyperball(W, u):
    """W <- R Norm(W - rate R Norm(u)) with R = |W|_F."""
    R = np.linalg.norm(W)
    moved = W - RATE * R * u / np.linalg.norm(u)
    return R * moved / np.linalg.norm(moved)


def gaussians(shape, seed):
    rng = np.random.default_rng(seed)
    params = rng.normal(size=shape).astype(np.float32)
    return params, rng.normal(size=shape).astype(np.float32) * rng.uniform(0.1, 10)


@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("holding", WEIGHTS)
def test_both_around_the_learning_rate_are_hyperball_on_each_matrix(holding):
    shape, rule, to_weights, back = WEIGHTS[holding]
    params, update = gaussians(shape, 7)
    optimizer: Any = optax.chain(
        contrib.scale_to_param_norm([rule]),
        optax.scale_by_learning_rate(RATE),
        contrib.project_to_sphere([rule]),
    )
    tree = {"w": jnp.asarray(params), "bias": jnp.ones(3)}
    state = optimizer.init(tree)
    updates, _ = optimizer.update({"w": jnp.asarray(update), "bias": jnp.ones(3)}, state, tree)
    pairs = zip(to_weights(np.float64(params)), to_weights(np.float64(update)), strict=True)
    expected = back([hyperball(W, u) for W, u in pairs])
    np.testing.assert_allclose(updates["w"] + params, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updates["bias"], -RATE, rtol=1e-6)


@pytest.mark.parametrize("holding", WEIGHTS)
def test_a_relative_update_is_as_long_as_its_matrix(holding):
    shape, rule, to_weights, _ = WEIGHTS[holding]
    params, update = gaussians(shape, 8)
    transform: Any = contrib.scale_to_param_norm([rule])
    updates, _ = transform.update({"w": jnp.asarray(update)}, None, {"w": jnp.asarray(params)})
    for W, u, new in zip(*map(to_weights, (params, update, updates["w"])), strict=True):
        expected = np.float64(u) * np.linalg.norm(W) / np.linalg.norm(u)
        np.testing.assert_allclose(new, expected, rtol=1e-5)


def test_of_a_leaf_that_is_one_matrix_it_is_optax_trust_ratio():
    params, update = ({"w": jnp.asarray(each)} for each in gaussians((4, 6), 9))
    ours: Any = contrib.scale_to_param_norm([Rule("w")])
    theirs: Any = optax.scale_by_trust_ratio()
    expected, _ = theirs.update(update, theirs.init(params), params)
    np.testing.assert_allclose(ours.update(update, None, params)[0]["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_the_norm_stays_for_a_thousand_steps(size):
    params, _ = gaussians((6, 5), 10)
    transform: Any = contrib.project_to_sphere([Rule("w")])

    def step(params, key):
        update = size * jax.random.normal(key, params["w"].shape)
        updates, _ = transform.update({"w": update}, optax.EmptyState(), params)
        return optax.apply_updates(params, updates), None

    steps = jax.random.split(jax.random.key(0), 1000)
    new, _ = jax.jit(lambda start: jax.lax.scan(step, start, steps))({"w": jnp.asarray(params)})
    # In each step, two norms, their quotient and the product are rounded, by eps / 2 at most each,
    # and all entries have these in common: a random walk of 1,000 steps of 2 eps.
    error = np.linalg.norm(np.float64(new["w"])) / np.linalg.norm(np.float64(params)) - 1
    assert abs(error) < 1000**0.5 * 2 * np.finfo(np.float32).eps
    assert np.abs(new["w"] - params).max() > size * 0.1 or size == 100


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_whose_squares_are_no_numbers_do_not_matter(size):
    params, update = (np.float32(size) * each for each in gaussians((4, 6), 11))
    for build in (contrib.project_to_sphere, contrib.scale_to_param_norm):
        transform: Any = build([Rule("w")])
        result, _ = transform.update({"w": jnp.asarray(update)}, None, {"w": jnp.asarray(params)})
        one, _ = transform.update(
            {"w": jnp.asarray(update / np.float32(size))},
            None,
            {"w": jnp.asarray(params / np.float32(size))},
        )
        np.testing.assert_allclose(result["w"] / np.float32(size), one["w"], rtol=1e-5, atol=1e-6)


def test_no_update_stays_none_and_a_step_to_zero_is_not_taken():
    params = {"w": jnp.ones((2, 3))}
    for build in (contrib.project_to_sphere, contrib.scale_to_param_norm):
        transform: Any = build([Rule("w")])
        updates, _ = transform.update({"w": jnp.zeros((2, 3))}, None, params)
        np.testing.assert_array_equal(updates["w"], 0)
    transform = contrib.project_to_sphere([Rule("w")])
    updates, _ = transform.update({"w": -jnp.ones((2, 3))}, None, params)
    np.testing.assert_array_equal(updates["w"], 0)


@pytest.mark.parametrize("build", [contrib.project_to_sphere, contrib.scale_to_param_norm])
def test_updates_keep_their_dtype_where_params_have_another(build):
    params = {"w": jnp.ones((2, 3), "float32"), "frozen": jnp.ones(2)}
    updates = {"w": jnp.ones((2, 3), "bfloat16"), "frozen": None}
    result, _ = build([Rule("w")]).update(updates, optax.EmptyState(), params)
    assert result["w"].dtype == "bfloat16" and result["frozen"] is None


@pytest.mark.parametrize("name", ["project_to_sphere", "scale_to_param_norm"])
def test_matrices_of_zeros_and_absent_params_are_refused(name):
    transform: Any = getattr(contrib, name)([Rule("up|down")])
    params = {"up": jnp.ones((2, 3)), "down": jnp.zeros((3, 2)), "bias": jnp.zeros(3)}
    with pytest.raises(ValueError, match=rf"`contrib.{name}` would keep .*: 1 of .* of 'down'\."):
        transform.init(params)
    jax.eval_shape(transform.init, params)
    with pytest.raises(ValueError, match=rf"`{name}` measures params: write `optimizer.update"):
        transform.update(params, optax.EmptyState())


@pytest.mark.parametrize("build", [contrib.project_to_sphere, contrib.scale_to_param_norm])
@pytest.mark.parametrize(
    ("rule", "zeros"),
    [
        (Rule("w", layer_axis=0), np.s_[1]),
        (Rule("w", dims=MuonDimensionNumbers(1, 2)), np.s_[2]),
        (Rule("w", layer_axis=0, split=(2, 1, 3)), np.s_[1, :, :2]),
        (Rule("w", layer_axis=0, view=(4, 3, 2), dims=MuonDimensionNumbers(0, 2)), np.s_[0, :, :2]),
    ],
    ids=["layer", "expert", "fused part", "head of a view"],
)
def test_one_matrix_of_zeros_in_a_leaf_is_refused_as_well(rule, zeros, build):
    weights = np.ones((3, 4, 6), np.float32)
    transform: Any = build([rule])
    transform.init({"w": jnp.asarray(weights)})
    weights[zeros] = 0
    with pytest.raises(ValueError, match="at zero: 1 of the matrices of 'w'"):
        transform.init({"w": jnp.asarray(weights)})
    jax.jit(transform.init)({"w": jnp.asarray(weights)})
