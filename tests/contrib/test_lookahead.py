"""`add_lookahead` against EMA-Nesterov as its paper writes it, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from teon_optax import contrib

CURVATURES = np.geomspace(1, 0.01, 6)
STEPS = 80


def ahead(count):
    """Nothing first, then less and less, and nothing at last."""
    inside = (count >= 5) & (count < 60)
    return inside * 0.6 * (1 - count / STEPS)


def rate(count):
    return 0.3 * (1 - count / STEPS)


def ema_nesterov(x, decay):
    """x_(t+1) = A(x_t + b_t m_t), m_(t+1) = g m_t + (1 - g)(x_(t+1) - x_t).

    A is a step of momentum with weight decay, from where it is given.
    """
    m, trace = np.zeros_like(x), np.zeros_like(x)
    for t in range(STEPS):
        y = x + ahead(t) * m
        trace = 0.9 * trace + CURVATURES * y
        new = y - rate(t) * (trace + 0.01 * y)
        m = decay * m + (1 - decay) * (new - x)
        x = new
    return x


@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_it_is_the_papers_lookahead_from_a_point_that_is_kept_ahead(decay):
    optimizer: Any = optax.chain(
        optax.trace(0.9),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(rate),
        contrib.add_lookahead(ahead, decay),
    )
    curvatures = jnp.asarray(CURVATURES, jnp.float32)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(curvatures * params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jnp.ones(6), optimizer.init(jnp.ones(6))
    for _ in range(STEPS):
        params, state = step(params, state)
    np.testing.assert_allclose(params, ema_nesterov(np.ones(6), decay), atol=1e-6)
    assert int(state[-1].count) == STEPS


def test_a_number_is_a_constant_schedule():
    updates = {"w": jnp.asarray([1.0, -2.0])}
    transform: Any = contrib.add_lookahead(0.5, 0.75)
    state = transform.init(updates)
    first, state = transform.update(updates, state)
    # m = .25 u, then .75 * .25 u + .25 (u + .5 * .25 u) = .46875 u
    np.testing.assert_array_equal(first["w"], np.array([1.0, -2.0]) * 1.125)
    second, state = transform.update(updates, state)
    np.testing.assert_array_equal(state.mean["w"], np.array([1.0, -2.0]) * 0.46875)
    np.testing.assert_array_equal(second["w"], np.array([1.0, -2.0]) * 1.234375)


def test_without_lookahead_updates_are_those_that_came():
    updates = {"w": jnp.asarray([1.0, -2.0])}
    transform: Any = contrib.add_lookahead(0.0)
    state = transform.init(updates)
    for _ in range(3):
        result, state = transform.update(updates, state)
        np.testing.assert_array_equal(result["w"], updates["w"])


def test_the_average_of_16_bit_params_is_in_32_and_updates_keep_their_dtype():
    params = {"w": jnp.ones(3, "bfloat16"), "frozen": None}
    transform: Any = contrib.add_lookahead(0.5)
    state = transform.init(params)
    assert state.mean["w"].dtype == "float32" and state.mean["frozen"] is None
    result, after = transform.update(params, state)
    assert result["w"].dtype == "bfloat16" and result["frozen"] is None
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_a_leaf_without_gradient_keeps_its_average():
    params = {"w": jnp.ones(3), "frozen": jnp.ones(2)}
    transform: Any = contrib.add_lookahead(0.5)
    state = transform.init(params)
    result, after = transform.update({"w": jnp.ones(3), "frozen": None}, state)
    assert result["frozen"] is None
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.promotes_dtypes
def test_the_step_size_may_be_injected():
    build = optax.inject_hyperparams(contrib.add_lookahead)
    optimizer: Any = build(0.5, decay=lambda count: 0.75)
    updates = {"w": jnp.ones(2)}
    result, _ = jax.jit(optimizer.update)(updates, optimizer.init(updates))
    np.testing.assert_allclose(result["w"], 1.125)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-0.1,), "`step_size=-0.1` should be a number, at least 0"),
        ((float("nan"),), "`step_size=nan` should be a number"),
        (("much",), "`step_size='much'` should be a number"),
        ((0.5, 1.0), "`decay=1.0` should be a number, at least 0 and less than 1"),
        ((0.5, lambda count: 0.9), r"inject_hyperparams\(add_lookahead\)\(\.\.\., decay=schedule"),
    ],
    ids=["negative", "no number", "text", "a decay of 1", "a schedule of decay"],
)
def test_what_is_no_number_in_range_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        contrib.add_lookahead(*arguments)


def test_a_state_of_another_model_is_refused():
    transform: Any = contrib.add_lookahead(0.5)
    state = transform.init({"w": jnp.ones((1, 3))})
    with pytest.raises(ValueError, match=r"`mean` has shape \(1, 3\) at 'w', where shape \(2"):
        transform.update({"w": jnp.ones((2, 3))}, state)
    with pytest.raises(ValueError, match="`mean` has no array at 'v'"):
        transform.update({"v": jnp.ones((2, 3))}, state)
