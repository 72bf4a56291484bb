"""Checks of the arguments that several functions take."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

INJECTED = "under `optax.inject_hyperparams`, which calls every callable, name it in `static_args`"


def check_number(name: str, value: Any, end: float = math.inf) -> None:
    """Raises unless the argument is a number, at least 0 and less than `end` in float32.

    Traced numbers are taken as they are: what they are is not known.
    """
    if callable(value):
        raise ValueError(
            f"`{name}={value!r}` is a function, perhaps a schedule: "
            f"`optax.inject_hyperparams(teon)(learning_rate, {name}=schedule)` calls it in each "
            "step."
        )
    if is_number(value) and (not is_known(value) or 0 <= np.float32(value) < end):
        return
    remedy = ""
    if isinstance(value, jax.Array):
        remedy = (
            ". `optax.inject_hyperparams` rounds numbers to the dtype of params, unless it gets "
            "`hyperparam_dtype=jnp.float32`"
        )
    elif is_number(value) and 0 <= value < end:
        remedy = f", also in float32, where it is {np.float32(value)}"
    raise ValueError(
        f"`{name}={value!r}` should be a number, at least 0 and less than {end}{remedy}."
    )


def is_number(value: Any) -> bool:
    """Whether it is a real number, alone: a Python number, or an array without axes."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, (int, float)):
        return abs(value) <= float(jnp.finfo(jnp.float32).max)
    is_array = isinstance(value, (jax.Array, np.ndarray, np.number)) and jnp.ndim(value) == 0
    return is_array and not jnp.issubdtype(value.dtype, jnp.bool_) and not jnp.iscomplexobj(value)


def is_known(value: Any) -> bool:
    """Whether a number is known now, and not traced."""
    return not isinstance(value, Tracer)


def checked_mu_dtype(mu_dtype: Any) -> jnp.dtype | None:
    """`mu_dtype` as a dtype.

    Raises:
      ValueError: If it is no real floating dtype of 16 bits or more.
    """
    if mu_dtype is None:
        return None
    if isinstance(mu_dtype, (jax.Array, np.ndarray)):
        raise ValueError(
            f"`mu_dtype={mu_dtype!r}` is an array: {INJECTED}, or write its name, 'bfloat16'."
        )
    try:
        dtype = jnp.dtype(mu_dtype)
    except TypeError as error:
        raise ValueError(
            f"`mu_dtype={mu_dtype!r}` is no dtype: write 'bfloat16' or 'float32'."
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        raise ValueError(
            f"`mu_dtype={mu_dtype!r}` should be a real floating dtype of 16 bits or more, such as "
            "'bfloat16'."
        )
    return dtype
