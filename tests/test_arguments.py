"""Arguments that are one number are that, and what is none is refused when it is given."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from teon_optax import orthogonalize, scale_by_teon, teon

TAKE_A_NUMBER = {
    "learning_rate": lambda value: teon(value),
    "weight_decay": lambda value: teon(0.02, weight_decay=value),
    "beta": lambda value: scale_by_teon(beta=value),
    "scale": lambda value: orthogonalize(scale=value),
}
NO_NUMBERS = [
    True,
    np.bool_(True),
    jnp.array(True),
    np.array([0.5]),
    np.array([0.5, 0.6]),
    jnp.array([0.5]),
    0.5 + 0j,
    jnp.array(0.5 + 0j),
    np.array("0.5"),
    np.array(None, dtype=object),
    "a",
    None,
    [0.5],
    float("nan"),
    jnp.array(jnp.nan),
    np.float32("inf"),
    1e300,
    10**400,
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize("name", TAKE_A_NUMBER)
def test_what_is_no_number_in_range_is_refused(name, value):
    with pytest.raises(ValueError, match=re.escape(f"`{name}={value!r}` should be")):
        TAKE_A_NUMBER[name](value)


NUMBERS = [0.5, np.float16(0.5), np.array(0.5), jnp.bfloat16(0.5), jnp.float32(0.5)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("name", TAKE_A_NUMBER)
def test_numbers_of_python_numpy_and_jax_are_numbers(name, value):
    TAKE_A_NUMBER[name](value)


@pytest.mark.parametrize("name", TAKE_A_NUMBER)
def test_what_is_negative_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"`{name}=-0.5` should be")):
        TAKE_A_NUMBER[name](-0.5)


def test_a_learning_rate_may_be_zero():
    teon(0.0, weight_decay=0.0)


def test_a_scale_that_devices_flush_to_zero_is_refused():
    with pytest.raises(ValueError, match=r"`scale=1e-42` should be"):
        orthogonalize(scale=1e-42)


@pytest.mark.parametrize("name", ["beta", "scale"])
def test_a_schedule_is_told_who_calls_it(name):
    schedule = optax.linear_schedule(0.8, 0.95, 100)
    with pytest.raises(ValueError, match=rf"inject_hyperparams\(teon\)\(learning_rate, {name}=sc"):
        TAKE_A_NUMBER[name](schedule)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_optax_calls_schedules_of_the_learning_rate_and_of_weight_decay(name):
    TAKE_A_NUMBER[name](optax.linear_schedule(0.8, 0.95, 100))
