"""Moves arrays to the memory of the device to compute, and back to where they are kept."""

from typing import Any

import jax


def on_device(leaf: jax.typing.ArrayLike) -> Any:
    """The leaf in the memory of its device: accelerators compute with nothing else."""
    return _in_memory(leaf, jax.memory.Space.Device)


def kept_beside(leaf: jax.Array, other: jax.typing.ArrayLike) -> jax.Array:
    """The leaf in the memory that another one is kept in."""
    return _in_memory(leaf, jax.typeof(other).memory_space)


def _in_memory(leaf: Any, space: Any) -> Any:
    return leaf if jax.typeof(leaf).memory_space == space else jax.device_put(leaf, space)
