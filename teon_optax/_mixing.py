"""Orthonormal transforms along the K matrices of a group, as rows of weights."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from teon_optax._polar import weighted_sums


class Mix(NamedTuple):
    """Some of the K slices that a transform makes of K matrices."""

    transform: str
    K: int
    is_complex: bool  # each slice then stands for itself and its conjugate

    @property
    def rows(self) -> np.ndarray:
        """Weights of the K matrices in each slice: [slices, K]."""
        k = np.arange(self.K)
        if self.transform == "haar":
            return _haar(self.K)
        if self.transform == "dct":
            cosines = np.cos(np.pi / self.K * k[:, None] * (k[None] + 0.5))
            return cosines * np.sqrt(np.where(k == 0, 1, 2) / self.K)[:, None]
        own_conjugate = 2 * k % self.K == 0  # frequencies 0 and K / 2 of real matrices are real
        chosen = k[(2 * k < self.K) & ~own_conjugate if self.is_complex else own_conjugate]
        waves = np.exp(-2j * np.pi / self.K * chosen[:, None] * k[None]) / np.sqrt(self.K)
        return waves if self.is_complex else waves.real

    def dtype(self, dtype: np.typing.DTypeLike) -> np.dtype:
        """Of slices of matrices of a dtype."""
        return np.promote_types(
            np.promote_types(dtype, np.float32), "c8" if self.is_complex else dtype
        )


def mixes(transform: str | None, K: int) -> list[Mix]:
    """All slices of a transform of K matrices, of conjugates one; none for a single matrix."""
    if transform is None or K == 1:
        return []
    kinds = (False, True) if transform == "dft" and K > 2 else (False,)
    return [Mix(transform, K, is_complex) for is_complex in kinds]


def mixed(mix: Mix, stack: jax.Array) -> jax.Array:
    """Slices of real matrices: [B, K, ...] to [B, slices, ...]."""
    rows = mix.rows
    if mix.is_complex:
        return jax.lax.complex(weighted_sums(rows.real, stack), weighted_sums(rows.imag, stack))
    return weighted_sums(rows, stack)


def unmixed(mix: Mix, slices: jax.Array) -> jax.Array:
    """What slices add to the K matrices when the transform is undone: [B, K, ...]."""
    rows = mix.rows.T
    if mix.is_complex:
        real, imag = slices.real, slices.imag
        return 2 * (weighted_sums(rows.real, real) + weighted_sums(rows.imag, imag))
    return weighted_sums(rows, slices)


@functools.cache
def _haar(K: int) -> np.ndarray:
    """The mean, the first half against the second, and so on in each half.

    Where K is no power of two a first half is longer by one, and weights make up for that.
    """
    if K == 1:
        return np.ones((1, 1))
    a, b = K - K // 2, K // 2
    split = np.concatenate([np.full(a, b), np.full(b, -a)]) / np.sqrt(a * b * K)
    inner = [np.pad(_haar(a)[1:], ((0, 0), (0, b))), np.pad(_haar(b)[1:], ((0, 0), (a, 0)))]
    return np.concatenate([np.full((1, K), K**-0.5), split[None], *inner])
