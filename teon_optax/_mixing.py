"""Orthonormal transforms along the K matrices of a group, as weights of these in each slice."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from teon_optax._polar.newton_schulz import weighted_sums


class Mix(NamedTuple):
    """Some slices of K matrices: those of one array of `slices`."""

    transform: str | None
    K: int
    index: int

    @property
    def weights(self) -> np.ndarray:
        """Of the K matrices, in each slice: [slices, K]."""
        return slices(self.transform, self.K)[self.index]


@functools.cache
def slices(transform: str | None, K: int) -> tuple[np.ndarray, ...]:
    """Weights [slices, K] of real slices, then of complex ones, of two conjugates one.

    There are none of a single matrix.
    """
    k = np.arange(K)
    if transform is None or K == 1:
        return ()
    if transform == "haar":
        return (_haar(K),)
    if transform == "dct":
        cosines = np.cos(np.pi / K * np.outer(k, k + 0.5))
        return (cosines * np.sqrt(np.where(k == 0, 1, 2) / K)[:, None],)
    waves = np.exp(-2j * np.pi / K * np.outer(k, k)) / np.sqrt(K)
    is_real = 2 * k % K == 0  # frequencies 0 and K / 2, since the matrices are real
    return tuple(filter(len, (waves[is_real].real, waves[~is_real & (2 * k < K)])))


def mixed(mix: Mix, matrices: jax.Array) -> jax.Array:
    """Slices of real matrices, [B x K, m, n] to [B, slices, m, n], in float32 at least."""
    weights = mix.weights
    stack = matrices.reshape(-1, mix.K, *matrices.shape[1:])
    stack = stack.astype(np.promote_types(stack.dtype, np.float32))
    real = weighted_sums(np.real(weights), stack)
    if not np.iscomplexobj(weights):
        return real
    return jax.lax.complex(real, weighted_sums(np.imag(weights), stack))


def unmixed(mix: Mix, matrices: jax.Array) -> jax.Array:
    """What slices add to the K matrices, [B x slices, m, n] to [B, K, m, n]."""
    weights = mix.weights
    stack = matrices.reshape(-1, len(weights), *matrices.shape[1:])
    real = weighted_sums(np.real(weights).T, stack.real)
    if not np.iscomplexobj(weights):
        return real
    return 2 * (real + weighted_sums(np.imag(weights).T, stack.imag))


def _haar(K: int) -> np.ndarray:
    """The mean, the first half against the second, and so on in each half.

    Where K is no power of two a first half is longer by one, and weights make up for that.
    """
    if K == 1:
        return np.ones((1, 1))
    more, less = K - K // 2, K // 2
    split = np.repeat([less, -more], [more, less]) / np.sqrt(more * less * K)
    first, second = ((0, 0), (0, less)), ((0, 0), (more, 0))
    halves = [np.pad(_haar(more)[1:], first), np.pad(_haar(less)[1:], second)]
    return np.concatenate([np.full((1, K), K**-0.5), split[None], *halves])
