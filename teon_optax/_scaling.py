"""How large an orthogonalized update is."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from teon_optax._arguments import is_number, refuse_schedule

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
    """Gives the factor by which an update has a root mean square.

    A joint factor of full rank has squared norm `rank`, over K fan_in fan_out entries.
    """
    return rms * math.sqrt(K * fan_in * fan_out / rank)


def scaling(scale: ScaleLike) -> ScaleFunction:
    """Makes a function from (fan_in, fan_out, K, rank) of a group to the factor of its update.

    Args:
      scale: "spectral", "muon", or the root mean square that updates of full rank get.

    Raises:
      ValueError: If it is none of these.
    """
    if isinstance(scale, str) and scale in _SCALES:
        return _SCALES[scale]
    refuse_schedule("scale", scale)
    # A smaller number would be zero on devices that have no denormal ones.
    if not is_number(scale, float(jnp.finfo(jnp.float32).tiny), math.inf):
        raise ValueError(
            f"`scale={scale!r}` should be 'spectral' (sqrt(fan_out / fan_in), the paper's), 'muon' "
            "(sqrt(max(1, fan_out / fan_in))) or a positive number, the update's root mean square."
        )
    return functools.partial(_rms, scale)
