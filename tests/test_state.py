"""States keep their types, and those of another model are refused."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from teon_optax import Rule, polar_express, scale_by_teon, teon

# AdamW and the wrappers are Optax's.
pytestmark = pytest.mark.promotes_dtypes

QUICK = polar_express(1)
RULES = (Rule(r"block_(?P<layer>\d+)", stack=2),)


def params(dtypes):
    """Two layers and two leaves of the fallback, of two dtypes in turn."""
    one, other = dtypes
    return {
        "block_0": jnp.eye(4, 6, dtype=one),
        "block_1": jnp.ones((4, 6), other),
        "bias": jnp.ones(6, one),
        "embed": jnp.ones((3, 4), other),
    }


WRAPPERS = {
    "alone": lambda optimizer: optimizer,
    "apply_if_finite": lambda optimizer: optax.apply_if_finite(optimizer, 3),
    "MultiSteps": lambda optimizer: optax.MultiSteps(optimizer, 2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_float32_gradients_of_narrower_params_train_inside_a_scan(dtypes, wrapper):
    optimizer = WRAPPERS[wrapper](teon(0.02, RULES, method=QUICK, weight_decay=0.1))

    def step(carry, gradients):
        own, state = carry
        updates, state = optimizer.update(gradients, state, own)
        return (optax.apply_updates(own, updates), state), None

    own = params(dtypes)
    gradients = jax.tree.map(lambda leaf: jnp.ones((2, *leaf.shape)), own)
    before = own, optimizer.init(own)
    after, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, gradients))(before)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)


def remade(state, **mu):
    return state._replace(mu=state.mu | mu)


WRONG = {
    "shape": (
        lambda state: remade(state, block_0=jnp.zeros(6)),
        "The momentum `mu` of 'block_0' has shape (6,), and its update (4, 6): this is the state",
    ),
    "axis": (lambda state: remade(state, bias=jnp.zeros((1, 6))), "has shape (1, 6), and its upda"),
    "dtype": (
        lambda state: remade(state, bias=jnp.zeros(6, "int32")),
        "`mu` of 'bias' has dtype int32, which is not real floating",
    ),
    "leaf": (
        lambda state: remade(state, more=jnp.zeros(6)),
        "The momentum `mu` has 5 leaves, and updates 4; see ['more']",
    ),
    "count": (
        lambda state: state._replace(count=jnp.zeros(2, "int32")),
        "The state's `count` has shape (2,), and should be one number",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_restored_state_that_is_another_model_s_is_refused(case):
    own = params(("float32", "float32"))
    transform = scale_by_teon(RULES, method=QUICK)
    damage, words = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(words)):
        transform.update(own, damage(transform.init(own)))


@pytest.mark.parametrize("mu_dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 1e-2, 6e4])
def test_adam_of_float16_params_takes_the_steps_of_float32_ones(size, mu_dtype):
    """Its eps of 1e-8 and squares below 6e-8 would be zero in float16."""
    optimizer: Any = teon(0.5, RULES, mu_dtype=mu_dtype, method=QUICK)
    gradients = np.asarray([size, -size], np.float16)

    def second_step(dtype):
        tree = {"bias": jnp.ones(2, dtype)}
        state = optimizer.init(tree)
        for _ in range(2):
            updates, state = optimizer.update({"bias": jnp.asarray(gradients, dtype)}, state, tree)
        assert updates["bias"].dtype == dtype
        return np.float64(updates["bias"])

    np.testing.assert_allclose(second_step("float16"), second_step("float32"), rtol=2.0**-10)


@pytest.mark.promotes_ranks
def test_a_restored_state_of_the_fallback_is_not_broadcast():
    own = params(("float32", "float32"))
    optimizer = teon(0.02, RULES, method=QUICK)
    damaged = jax.tree.map(
        lambda leaf: leaf[0] if leaf.shape == (3, 4) else leaf, optimizer.init(own)
    )
    words = r"fallback's '.*mu/embed' has shape \(4,\) before and \(3, 4\) after an update: this is"
    with pytest.raises(ValueError, match=words):
        optimizer.update(own, damaged, own)
