"""Checks of the arguments that several functions take."""

import inspect
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

INJECTED = "under `optax.inject_hyperparams`, which calls every callable, name it in `static_args`"

# Packages whose lines tell a user nothing; the last two are of decorators.
_PASSED_THROUGH = "teon_optax", "optax", "jax", "contextlib", "functools"


def check_number(
    name: str, value: Any, start: float = 0, end: float = math.inf, of: str = "teon"
) -> None:
    """Raises unless an argument of the function `of` is a number from `start` to below `end`.

    It should be so in float32. Traced numbers are taken as they are: what they are is not known.
    """
    refuse_schedule(name, value, of)
    if is_number(value, start, end):
        return
    remedy = ""
    if isinstance(value, jax.Array):
        remedy = (
            ". `optax.inject_hyperparams` rounds numbers to the dtype of params, unless it gets "
            "`hyperparam_dtype=jnp.float32`"
        )
    elif isinstance(value, float) and start <= value < end < math.inf:
        remedy = f", also in float32, where it is {np.float32(value)}"
    bounds = f", at least {start} and less than {end}" if start > -math.inf else ""
    raise ValueError(f"`{name}={value!r}` should be a number{bounds}{remedy}.")


def check_eps(eps: Any, of: str) -> None:
    """Raises unless the argument `eps` of the function `of` is a positive and normal number."""
    check_number("eps", eps, float(jnp.finfo(jnp.float32).tiny), of=of)


def check_rate(name: str, value: Any) -> None:
    """Raises unless it is a schedule or a number that is not negative, as of a learning rate."""
    if callable(value):
        return
    if not is_number(value, 0, math.inf):
        raise ValueError(
            f"`{name}={value!r}` should be a number, at least 0, or a schedule, a function of the "
            "number of updates."
        )


def check_flag(name: str, value: Any) -> None:
    """Raises unless it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}={value!r}` should be True or False.")


def check_mask(name: str, mask: Any) -> None:
    """Raises unless it is None, a function, or a tree of booleans."""
    is_bare = isinstance(mask, (bool, np.ndarray, jax.Array))
    leaves = [] if callable(mask) else jax.tree.leaves(mask)
    if is_bare or not all(isinstance(leaf, (bool, np.bool_)) for leaf in leaves):
        raise ValueError(
            f"`{name}={mask!r}` should be a tree of booleans or a function of params; {INJECTED}."
        )


def refuse_schedule(name: str, value: Any, of: str = "teon") -> None:
    """Raises if an argument of the function `of` is a schedule, and says who would call it."""
    if callable(value):
        first = "learning_rate" if of == "teon" else "..."
        raise ValueError(
            f"`{name}={value!r}` is a function, perhaps a schedule: "
            f"`optax.inject_hyperparams({of})({first}, {name}=schedule)` calls it in each step."
        )


def is_number(value: Any, start: float, end: float) -> bool:
    """Tells whether it is one real number, in float32 at least `start` and less than `end`.

    That is a Python number or an array without axes. How large a traced one is cannot be known.
    """
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        is_real = any(jnp.issubdtype(value.dtype, of) for of in (jnp.floating, jnp.integer))
        if jnp.ndim(value) or not is_real:
            return False
        if isinstance(value, Tracer):
            return True
        value = float(value)
    is_python = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NumPy warns of larger numbers.
    in_range = is_python and abs(value) <= float(jnp.finfo(jnp.float32).max)
    return in_range and bool(start <= np.float32(value) < end)


def checked_mu_dtype(mu_dtype: Any) -> jnp.dtype | None:
    """Makes a dtype of the argument `mu_dtype`; None stays None.

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


def warn_caller(text: str) -> None:
    """Warns in the name of the line that called the library, perhaps through Optax or jax."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and _package_of(frame.f_globals) in _PASSED_THROUGH:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)


def _package_of(names: dict[str, Any]) -> str:
    """Finds the package of a module from its global names."""
    return str(names.get("__name__", "")).partition(".")[0]
