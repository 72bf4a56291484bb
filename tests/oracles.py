"""What results are compared with: float64, the paper's layout, no code of the library."""

import numpy as np

EPS = float(np.finfo(np.float32).eps)


def reshaped_spectrum(matrix, function=np.ones_like):
    """U f(S) V^T of M = U S V^T; the polar factor for f = 1."""
    U, singular_values, Vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (U * function(singular_values)) @ Vt


def unfolding(kernels, mode):
    """Of T[:, :, k] = W_k = kernel_k^T, m x n x K: m x nK, n x mK or K x mn."""
    weights = [np.asarray(kernel, np.float64).T for kernel in kernels]
    if mode == 3:
        return np.stack([W.ravel() for W in weights])
    return np.hstack(weights if mode == 1 else [W.T for W in weights])


def joint(kernels, mode, function=np.ones_like):
    """The paper's steps 2 to 5 for kernels (fan_in, fan_out): stack, unfold, Ortho, fold."""
    fan_in, fan_out = kernels[0].shape
    Q = reshaped_spectrum(unfolding(kernels, mode), function)
    if mode == 3:
        return [row.reshape(fan_out, fan_in).T for row in Q]
    parts = np.hsplit(Q, len(kernels))
    return [part.T for part in parts] if mode == 1 else parts


def composed(singular_values, steps, norm):
    """p_S(... p_1(s / norm)) for quintics a x + b x^3 + c x^5 and cubics a x + b x^3."""
    x = np.asarray(singular_values, np.float64) / norm
    for a, b, *c in steps:
        x = a * x + b * x**3 + sum(c) * x**5
    return x


def polynomial(triples, norm):
    """The function of singular values that quintics are, on M / |M|."""
    order = {"frobenius": 2, "schatten4": 4}[norm]
    return lambda s: composed(s, triples, np.linalg.norm(s, order))


def with_spectrum(rng, m, n, singular_values):
    """U diag(s) V^T with random orthonormal columns, m x n; leading axes of s are a batch."""
    *batch, rank = np.shape(singular_values)
    U, V = (np.linalg.qr(rng.normal(size=(*batch, size, rank)))[0] for size in (m, n))
    return (U * np.asarray(singular_values)[..., None, :]) @ np.swapaxes(V, -1, -2)


def rounding(singular_values, squared=True, eps=EPS):
    """How far a polar factor is moved by errors of eps d in the matrix and in every product.

    Squared: by way of the Gram matrix, with 4 products in each of 5 steps.
    """
    s = np.asarray(singular_values, np.float64)
    condition = s.max() / s.min()
    return eps * len(s) * (condition**2 + 20 if squared else condition + 1)


def distance(a, b):
    """Largest singular value of the difference."""
    return np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64), 2)
