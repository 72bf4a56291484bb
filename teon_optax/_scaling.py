"""How long an orthogonalized update is."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

ScaleLike = str | jax.typing.ArrayLike
# (fan_in, fan_out, K, rank) of a group -> factor of its orthogonalized update.
ScaleFunction = Callable[[int, int, int, int], jax.typing.ArrayLike]


_SCALES: dict[str, ScaleFunction] = {
    # arXiv 2601.23261: the update's spectral norm is sqrt(fan_out / fan_in), one layer's.
    "spectral": lambda fan_in, fan_out, K, rank: math.sqrt(fan_out / fan_in),
    # K. Jordan, Muon, 2024: the same, but narrowing layers are not scaled down.
    "muon": lambda fan_in, fan_out, K, rank: math.sqrt(max(1, fan_out / fan_in)),
}


def _rms(rms: Any, fan_in: int, fan_out: int, K: int, rank: int) -> jax.typing.ArrayLike:
    """A joint factor of full rank has squared norm `rank`, over K fan_in fan_out entries."""
    return rms * math.sqrt(K * fan_in * fan_out / rank)


def scaling(scale: ScaleLike) -> ScaleFunction:
    """The factor of a group's update as a function of its (fan_in, fan_out, K, rank).

    Args:
      scale: "spectral", "muon", or the root mean square that updates of full rank get.

    Raises:
      ValueError: If it is none of these.
    """
    if isinstance(scale, str) and scale in _SCALES:
        return _SCALES[scale]
    number: Any = scale
    if not _is_number(number) or (_is_known(number) and not number > 0):
        raise ValueError(
            f"`scale={scale!r}` should be 'spectral' (sqrt(fan_out / fan_in), the paper's), 'muon' "
            "(sqrt(max(1, fan_out / fan_in))) or a positive number, the update's root mean square."
        )
    return functools.partial(_rms, scale)


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
    if _is_number(value) and (not _is_known(value) or 0 <= np.float32(value) < end):
        return
    remedy = ""
    if isinstance(value, jax.Array):
        remedy = (
            ". `optax.inject_hyperparams` rounds numbers to the dtype of params, unless it gets "
            "`hyperparam_dtype=jnp.float32`"
        )
    elif _is_number(value) and 0 <= value < end:
        remedy = f", also in float32, where it is {np.float32(value)}"
    raise ValueError(
        f"`{name}={value!r}` should be a number, at least 0 and less than {end}{remedy}."
    )


def _is_number(value: Any) -> bool:
    """Whether it is a real number, alone: a Python number, or an array without axes."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, (int, float)):
        return abs(value) <= float(jnp.finfo(jnp.float32).max)
    is_array = isinstance(value, (jax.Array, np.ndarray, np.number)) and jnp.ndim(value) == 0
    return is_array and not jnp.issubdtype(value.dtype, jnp.bool_) and not jnp.iscomplexobj(value)


def _is_known(value: Any) -> bool:
    """Whether a number is known now, and not traced."""
    return not isinstance(value, Tracer)
