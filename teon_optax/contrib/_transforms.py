"""Orthonormal transforms along a stack of K matrices, as weights of these in each slice."""

import functools

import numpy as np

TRANSFORMS = ("dct", "dft", "haar")


@functools.cache
def real_weights(transform: str, K: int) -> dict[int, np.ndarray]:
    """Makes the weights of K real matrices in the slices of their transform, by tiles of a slice.

    A real slice is one tile. A complex slice A + iB is the real matrix [[A, -B], [B, A]] of two by
    two tiles, whose polar factor [[C, -D], [D, C]] is that of the slice, C + iD. Of two conjugate
    slices one is computed, since the other's tiles would be the same with another sign of B.

    All weights as one matrix have orthonormal columns, so their transpose undoes the transform.

    Args:
      transform: One of `TRANSFORMS`.
      K: How many matrices there are.

    Returns:
      Arrays [slices, 1, 1, K] under 1 and [slices, 2, 2, K] under 2, those without slices left out.
    """
    k = np.arange(K)
    if transform == "haar":
        return {1: _haar(K)[:, None, None]}
    if transform == "dct":
        cosines = np.cos(np.pi / K * np.outer(k, k + 0.5))
        return {1: (cosines * np.sqrt(np.where(k == 0, 1, 2) / K)[:, None])[:, None, None]}
    waves = np.exp(-2j * np.pi / K * np.outer(k, k)) / np.sqrt(K)
    is_real = 2 * k % K == 0  # frequencies 0 and K / 2, since the matrices are real
    real, waves = waves[is_real].real, waves[~is_real & (2 * k < K)]
    A, B = waves.real, waves.imag
    tiles = np.stack([np.stack([A, -B], axis=1), np.stack([B, A], axis=1)], axis=1)
    return {1: real[:, None, None]} | ({2: tiles} if len(tiles) else {})


def _haar(K: int) -> np.ndarray:
    """Weighs the mean, the first half of a stack against the second, and so on in each half.

    Where a half cannot be equal, the first is longer by one and the weights make up for that.
    """
    if K == 1:
        return np.ones((1, 1))
    more, less = K - K // 2, K // 2
    split = np.repeat([less, -more], [more, less]) / np.sqrt(more * less * K)
    first, second = ((0, 0), (0, less)), ((0, 0), (more, 0))
    halves = [np.pad(_haar(more)[1:], first), np.pad(_haar(less)[1:], second)]
    return np.concatenate([np.full((1, K), K**-0.5), split[None], *halves])
