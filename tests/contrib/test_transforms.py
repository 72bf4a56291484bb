"""Weights of slices, against the transforms' definitions."""

import math

import numpy as np
import pytest

from teon_optax.contrib._transforms import TRANSFORMS, real_weights


def basis(transform, K):
    """Rows of the orthonormal transform, complex for the DFT, from its definition."""
    k = np.arange(K)
    if transform == "dft":
        return np.exp(-2j * np.pi * np.outer(k, k) / K) / math.sqrt(K)
    if transform == "dct":
        rows = np.cos(np.pi * np.outer(k, k + 0.5) / K)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows = [np.ones(K)]  # of Haar: each interval's first half, the longer, against its second

    def add(start, stop):
        if stop - start > 1:
            middle = start + (stop - start + 1) // 2
            row = np.zeros(K)
            row[start:middle], row[middle:stop] = 1 / (middle - start), -1 / (stop - middle)
            rows.append(row)
            add(start, middle)
            add(middle, stop)

    add(0, K)
    return np.array([row / np.linalg.norm(row) for row in rows])


@pytest.mark.parametrize("K", range(1, 10))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_weights_are_those_of_an_orthonormal_transform(transform, K):
    F = basis(transform, K)
    np.testing.assert_allclose(F @ F.conj().T, np.eye(K), atol=1e-12)
    if K == 2:  # A + B and A - B over the root of 2, for all three
        np.testing.assert_allclose(F, np.array([[1, 1], [1, -1]]) / math.sqrt(2), atol=1e-12)
    weights = real_weights(transform, K)
    is_real = np.abs(F.imag).max(axis=1) < 1e-12
    np.testing.assert_allclose(weights[1][:, 0, 0], F[is_real].real, atol=1e-12)
    # Of conjugate rows, the first; each of them as [[A, -B], [B, A]].
    waves = F[~is_real][: sum(~is_real) // 2]
    assert (2 in weights) == (len(waves) > 0)
    for tiles, row in zip(weights.get(2, ()), waves, strict=True):
        np.testing.assert_allclose(tiles[:, 0], [row.real, row.imag], atol=1e-12)
        np.testing.assert_allclose(tiles[:, 1], [-row.imag, row.real], atol=1e-12)


@pytest.mark.parametrize("K", range(1, 10))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transposed_weights_undo_the_transform(transform, K):
    rows = np.concatenate([own.reshape(-1, K) for own in real_weights(transform, K).values()])
    np.testing.assert_allclose(rows.T @ rows, np.eye(K), atol=1e-12)
