"""Every product of the library: polar factors of batches of matrices, by Newton-Schulz iteration.

TEON takes the momenta of K layers as one matrix, the d x N joint matrix M = [M_1 | .. | M_K], and
each layer goes along its part of the polar factor:

    U V^T = (M_1 M_1^T + .. + M_K M_K^T)^(-1/2) [M_1 | .. | M_K]

The inverse root is not computed. From X = M / |M| on, each step is an odd quintic of X,

    A = X X^T        X <- a X + (b A + c A^2) X

or, with c = 0, a cubic. It maps a singular value x to a x + b x^3 + c x^5, and coefficients are
such that all come near 1. Matrices are not higher than wide, so that every product is on the left
of one. Steps run on Gram matrices, d x d: those of a segment are one matrix P before P X is formed.
Equal d share one polynomial.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._memory import widened
from teon_optax._polar.coefficients import Function, Method, Step
from teon_optax._polar.numerics import (
    Numerics,
    byte_limits,
    chunk_size,
    is_exact,
    rounds_operands,
    takes_one_more,
)


def _operand(M: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """Rounds a matrix once for all products of bf16 that read it; of others it is left as it is."""
    return M.astype(jnp.bfloat16) if rounds_operands(precision) and M.dtype == jnp.float32 else M


def _product(A: jax.Array, B: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """Multiplies A and B, which may be operands already; of bf16 sums are in float32."""
    A, B = _operand(A, precision), _operand(B, precision)
    wider = jnp.float32 if A.dtype == jnp.bfloat16 else None
    return jnp.matmul(A, B, precision=precision, preferred_element_type=wider)


def _gram(M: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """Multiplies a matrix that is not higher than wide by its transpose, M M^T: [d, d].

    Both factors are contracted as they lie: `M.T` would be copied, and M^T M of a higher matrix
    takes 1.4 times as long on a CPU.
    """
    M = _operand(M, precision)
    wider = jnp.float32 if M.dtype == jnp.bfloat16 else None
    return jax.lax.dot_general(
        M, M, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=wider
    )


def _scaled(
    M: jax.Array, largest: Callable[[jax.Array], jax.Array] = lambda peak: peak
) -> tuple[jax.Array, jax.Array]:
    """Divides M by its largest magnitude, in float32 at least: its squares are in range.

    Returns that magnitude too, 1 for zero. `largest` is that of the magnitudes that several devices
    found, each in its columns of M.
    """
    M = widened(M)
    # The polar factor does not depend on the norm of M, so neither does its derivative. `pmax`,
    # which finds the largest of several devices, has no derivative in jax.
    peak = largest(jax.lax.stop_gradient(jnp.max(jnp.abs(M))))
    # XLA may multiply by the reciprocal: that of numbers beyond 8e37 is subnormal and becomes 0,
    # and so would M.
    shift = jnp.where(peak > 1, 2.0**-4, 1).astype(M.dtype)
    return (M * shift) / jnp.where(peak == 0, 1, peak * shift), jnp.where(peak == 0, 1, peak)


def _norm(G: jax.Array, method: Method) -> jax.Array:
    """Computes what M is divided by, from its Gram matrix; 1 for zero."""
    frobenius = method.norm == "frobenius"
    total = jnp.trace(G) if frobenius else jnp.sum(jnp.square(G))
    # Before the root, whose derivative at zero would be infinite.
    root = jnp.sqrt(jnp.where(total == 0, 1, total))
    return root if frobenius else jnp.sqrt(root)


def _factor(precision: jax.lax.PrecisionLike, steps: Sequence[Step], G: jax.Array) -> jax.Array:
    """Multiplies a segment's steps out, from one Gram matrix alone: their product P, [d, d].

    Step j maps M to Q_j M with Q_j = a I + Z and Z = b G + c G^2, or Z = b G of a cubic, so

        P <- Q_j P = Z P + a P          G <- Q_j G Q_j = Z W + a W,  W = G Z + a G

    The identity is never rounded: it is no part of an operand. G and, of one-pass products, W are
    made symmetric, which takes a third off the errors of three steps. P begins as a I + Z with Z as
    it is, and the first G Z is to agree with that: of three steps or more, its Z is taken in two
    parts, a product more, without which some singular values come out at 1.4. P is not quite
    symmetric once rounded: P M is the matrix that has the Gram matrix with which the segment ended,
    and P^T M is not (with bf16 products it reached 1e13).
    """
    multiply = functools.partial(_product, precision=precision)
    operand = functools.partial(_operand, precision=precision)

    def next_gram(
        G: jax.Array,
        a: jax.typing.ArrayLike,
        rounded: jax.Array,
        Z: jax.Array,
        parts: Sequence[jax.Array],
    ) -> jax.Array:
        GZ = functools.reduce(jnp.add, [multiply(rounded, part) for part in parts])
        W = (GZ if is_exact(precision) else (GZ + GZ.T) / 2) + a * G
        G = multiply(Z, W) + a * W
        return (G + G.T) / 2

    def step(
        carry: tuple[jax.Array, jax.Array], coefficients: Sequence[Any]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        P, G = carry
        rounded = operand(G)
        a, Z = _polynomial(coefficients, G, rounded, multiply)
        Z = operand(Z)
        return (multiply(Z, P) + a * P, next_gram(G, a, rounded, Z, [Z])), None

    # The first step needs no product with P, the last none for G; the others are loops.
    rounded = operand(G)
    a, Z = _polynomial(steps[0], G, rounded, multiply)
    P = Z + a * jnp.eye(len(G), dtype=G.dtype)
    if len(steps) > 1:
        taken = operand(Z)
        parts = [taken]
        if takes_one_more(len(steps), precision):
            first, second = _two_parts(Z)
            parts = [taken if rounds_operands(precision) else first, second]
        G = next_gram(G, a, rounded, taken, parts)
        P, G = _loops(step, (P, G), steps[1:-1], G.dtype)
        a, Z = _polynomial(steps[-1], G, operand(G), multiply)
        P = multiply(Z, P) + a * P
    return P


def _polynomial(
    coefficients: Sequence[Any],
    G: jax.Array,
    rounded: jax.Array,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[Any, jax.Array]:
    """Computes a and Z of the step M <- a M + Z M: by one product, of a cubic by none."""
    a, b, *c = coefficients
    return a, b * G + c[0] * multiply(rounded, rounded) if c else b * G


def _loops(
    step: Callable[[Any, Any], tuple[Any, None]],
    carry: Any,
    coefficients: Sequence[Step],
    dtype: jnp.dtype,
) -> Any:
    """Takes steps one after the other: a loop for each run of equal degrees."""
    for _, run in itertools.groupby(coefficients, key=len):
        same = list(run)
        if len(same) == 1:
            carry, _ = step(carry, same[0])
        else:
            carry, _ = jax.lax.scan(step, carry, jnp.asarray(same, dtype))
    return carry


def _two_parts(Z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits Z into two that add up to it, the first in bf16, which every one-pass format holds."""
    first = jax.lax.reduce_precision(Z, exponent_bits=8, mantissa_bits=7)
    return first, Z - first


@jax.custom_jvp
def _svd_orthogonalize(M: jax.Array) -> jax.Array:
    """Computes U V^T; directions of a zero singular value stay zero.

    An SVD of the Gram matrix would lose half of the digits.
    """
    U, s, Vt = _kept_svd(M)
    return jnp.matmul(U * (s > 0).astype(M.dtype)[None], Vt, precision=jax.lax.Precision.HIGHEST)


def _kept_svd(M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes the SVD with zeros for those singular values that are zero but for rounding."""
    U, s, Vt = jnp.linalg.svd(M, full_matrices=False)
    floor = max(M.shape) * jnp.finfo(M.dtype).eps * s[0]
    return U, jnp.where(s > floor, s, jnp.zeros_like(s)), Vt


@_svd_orthogonalize.defjvp
def _svd_derivative(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Derives U V^T, which equal singular values leave smooth, while U and V have no derivative.

    With A = U^T dM V, entry (i, j) of U^T dQ V is (A_ij - A_ji) / (s_i + s_j), without A_ji where
    one of the two is zero, and zero where both are. Beyond the rows of V^T, dQ is A / s_i.
    """
    (M,), (dM,) = primals, tangents
    multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    U, s, Vt = _kept_svd(M)
    kept = (s > 0).astype(M.dtype)
    rows = multiply(U.T, dM)
    A = multiply(rows, Vt.T)
    sums = s[:, None] + s[None]
    inner = (A - jnp.outer(kept, kept) * A.T) / jnp.where(sums > 0, sums, jnp.inf)
    outer = (rows - multiply(A, Vt)) / jnp.where(s > 0, s, jnp.inf)[:, None]
    return multiply(U * kept[None], Vt), multiply(U, multiply(inner, Vt) + outer)


def _applied(function: Function, batch: jax.Array) -> jax.Array:
    """Calls a user's method with matrices [B, d, N], and checks what it makes of them."""
    result = function(batch)
    if jnp.shape(result) != batch.shape or jnp.result_type(result) != batch.dtype:
        raise ValueError(
            f"`method={function!r}` made of matrices of {batch.dtype}{list(batch.shape)} what has "
            f"{jnp.result_type(result)}{list(jnp.shape(result))}. A method takes [B, d, N], "
            "d <= N, in float32 at least, and returns the same shape and dtype."
        )
    return jnp.asarray(result)


def orthogonalize_together(
    batches: Sequence[jax.Array],
    scales: Sequence[jax.typing.ArrayLike],
    numerics: Numerics,
    restarts: Sequence[int],
    eps: jax.typing.ArrayLike | None = None,
) -> list[jax.Array]:
    """Makes scaled polar factors of batches of equal d; their Gram matrices share one polynomial.

    Arguments and result are those of `orthogonalize_batches`; `restarts` has the steps after each
    start. A function has the matrices as they are, all else has them in a range that bears squares.
    """
    high = [batch.shape[1] > batch.shape[2] for batch in batches]
    given = _turned(batches, high)
    scaled = [jax.vmap(_scaled)(batch) for batch in given]
    wide = [M for M, _ in scaled]
    if numerics.polynomial is not None:
        done, norms = _newton_schulz(wide, numerics, numerics.polynomial, restarts)
    else:
        norms = [] if eps is None else [jnp.linalg.norm(batch, axis=(1, 2)) for batch in wide]
        if callable(numerics.method):
            done = [
                _applied(numerics.method, batch.astype(M.dtype))
                for batch, M in zip(given, wide, strict=True)
            ]
        else:
            done = [jax.vmap(_svd_orthogonalize)(batch) for batch in wide]
    sizes = [jnp.asarray(scale, M.dtype) for scale, M in zip(scales, done, strict=True)]
    if eps is not None:
        sizes = [
            (size * _damping(norm, peak, eps))[:, None, None]
            for size, norm, (_, peak) in zip(sizes, norms, scaled, strict=True)
        ]
    return _turned([size * M for size, M in zip(sizes, done, strict=True)], high)


def nonzero(eps: jax.typing.ArrayLike | None) -> jax.typing.ArrayLike | None:
    """Makes None of the Python number 0, for which no program is made: every magnitude is alike."""
    return None if isinstance(eps, (int, float)) and eps == 0 else eps


def _damping(norm: jax.Array, peak: jax.Array, eps: Any) -> jax.Array:
    """Divides n by n + eps, n being the norm of a matrix that was divided by `peak` first."""
    # Not peak * norm, which may be infinite.
    return norm / (norm + jnp.asarray(eps, norm.dtype) / peak)


def _turned(batches: Sequence[jax.Array], high: Sequence[bool]) -> list[jax.Array]:
    """Transposes the matrices of those batches for which `high` is true."""
    return [M.swapaxes(1, 2) if turn else M for M, turn in zip(batches, high, strict=True)]


def _newton_schulz(
    batches: list[jax.Array],
    numerics: Numerics,
    method: Method,
    restarts: Sequence[int],
    total: Callable[[jax.Array], jax.Array] = lambda grams: grams,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Takes all steps on batches [B, d, N] of matrices, and says by what it divided them: [B] each.

    Each segment forms Gram matrices of the (half-done) matrices and multiplies these once. Where
    every step is a segment, all but the first are one loop: a third less to compile, and .6 of the
    memory. Batches hold whole matrices that are not higher than wide, or some of their columns:
    `total` then adds up the Gram matrices of all devices that have others, [all B, d, d]. One step
    alone multiplies the columns twice, `X <- a X + G (b X + c G X)`, where these are fewer than d.
    """
    operand = functools.partial(_operand, precision=numerics.precision)
    multiply = functools.partial(_product, precision=numerics.precision)
    gram = functools.partial(_gram, precision=numerics.precision)
    ends = np.cumsum([len(batch) for batch in batches])[:-1]
    narrow = batches[0].shape[2] < batches[0].shape[1]

    def segment(
        batches: list[jax.Array], steps: Sequence[Any], norm: Callable[[jax.Array], Any]
    ) -> tuple[list[jax.Array], Any]:
        """Divides matrices by their norms, takes some steps, and returns the norms too."""
        operands = [operand(M) for M in batches]
        grams = total(jnp.concatenate([jax.vmap(gram)(M) for M in operands]))
        norms = norm(grams)
        grams = grams / jnp.square(norms)
        if len(steps) == 1 and narrow:
            (a, b, *c), (G,), (M,) = steps[0], grams, batches[0] / norms
            G = operand(G)
            inner = b * M + c[0] * multiply(G, M) if c else b * M
            return [(a * M + multiply(G, inner))[None]], norms
        factors = jax.vmap(functools.partial(_factor, numerics.precision, steps))(grams) / norms
        split = zip(jnp.split(factors, ends), operands, strict=True)
        return [multiply(P, M) for P, M in split], norms

    def further(batches: list[jax.Array], steps: Sequence[Any]) -> tuple[list[jax.Array], None]:
        return segment(batches, steps, lambda _: 1)[0], None

    steps, norm = numerics.steps(restarts), functools.partial(_norm, method=method)
    batches, norms = segment(
        batches, steps[: restarts[0]], lambda G: jax.vmap(norm)(G)[:, None, None]
    )
    if set(restarts) == {1}:
        batches = _loops(
            lambda batches, step: further(batches, [step]), batches, steps[1:], batches[0].dtype
        )
    else:
        for start, count in zip(itertools.accumulate(restarts), restarts[1:], strict=False):
            batches, _ = further(batches, steps[start : start + count])
    return batches, jnp.split(norms[:, 0, 0], ends)


def _in_chunks(
    together: Callable[..., list[jax.Array]],
    batch: jax.Array,
    scale: jax.typing.ArrayLike,
    budget: int,
) -> jax.Array:
    """Replaces a batch by its scaled polar factors, `budget` bytes at a time, in its own memory."""
    B, m, n = batch.shape
    size = chunk_size(B, budget // batch[0].nbytes)

    def one_chunk(start: jax.typing.ArrayLike, count: int, rows: jax.Array) -> jax.Array:
        chunk = jax.lax.dynamic_slice_in_dim(rows, start, count * m).reshape(count, m, n)
        (factors,) = together([chunk], [scale])
        done = factors.astype(rows.dtype).reshape(count * m, n)
        return jax.lax.dynamic_update_slice_in_dim(rows, done, start, axis=0)

    # Rows, since a leaf is read from these without a reshape in its own kernel.
    rows = batch.reshape(B * m, n)
    rows = jax.lax.fori_loop(
        0, B // size, lambda i, rows: one_chunk(i * size * m, size, rows), rows
    )
    if B % size:
        rows = one_chunk((B - B % size) * m, B % size, rows)
    return rows.reshape(B, m, n)


def weighted_sums(weights: np.ndarray, stack: jax.Array) -> jax.Array:
    """Adds K arrays up with each row of weights [rows, K]: [B, K, ...] becomes [B, rows, ...]."""
    # In one pass, rounding of A and B would be all that is left of a small A - B.
    exact, weights = jax.lax.Precision.HIGHEST, np.asarray(weights, stack.dtype)
    return jnp.moveaxis(jnp.tensordot(weights, stack, (1, 1), precision=exact), 0, 1)


def orthogonalize_batches(
    batches: Sequence[jax.Array],
    scales: Sequence[jax.typing.ArrayLike],
    numerics: Numerics,
    eps: jax.typing.ArrayLike | None = None,
    dtypes: Sequence[Any] | None = None,
) -> list[jax.Array]:
    """Makes scaled polar factors of batches of matrices.

    Batches that agree in d, dtype and restarts share one polynomial if they fit into the memory
    that is worked on at a time; otherwise each is worked off in chunks.

    Args:
      batches: Arrays [B, m, n], of any floating dtypes.
      scales: Factor of each batch's result.
      numerics: The method, and the precision of its products.
      eps: What bounds tiny matrices: the factor of a matrix is multiplied by n / (n + eps), n being
        the norm that the method divides it by, Frobenius or Schatten-4; Frobenius too for the SVD
        and a function. None or 0 takes every magnitude alike.
      dtypes: Dtypes of the parameters that batches are updates of, which decide on the precision of
        products where none is given; None is the batches' own. A momentum is in float32 at least.

    Returns:
      Arrays of the same shapes, in the dtype of the batch or in float32 at least.
    """
    # The backend decides on precisions and memory, and is no part of what a jit is cached by.
    whole, chunk = byte_limits(jax.default_backend())
    dtypes = [batch.dtype for batch in batches] if dtypes is None else dtypes
    chosen = tuple(
        numerics.of(batch.dtype, leaf) for batch, leaf in zip(batches, dtypes, strict=True)
    )
    return _by_restarts(batches, scales, nonzero(eps), chosen, whole, chunk)


@functools.partial(jax.jit, static_argnames=("numerics", "whole", "chunk"))
def _by_restarts(
    batches: Sequence[jax.Array],
    scales: Sequence[jax.typing.ArrayLike],
    eps: jax.typing.ArrayLike | None,
    numerics: tuple[Numerics, ...],
    whole: int,
    chunk: int,
) -> list[jax.Array]:
    """Works off together, up to `whole` bytes, what agrees in d and restarts, or else in chunks."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, (batch, used) in enumerate(zip(batches, numerics, strict=True)):
        (m, n), dtype = batch.shape[1:], np.promote_types(batch.dtype, np.float32)
        alike.setdefault((min(m, n), dtype, used, used.restarts(m, n)), []).append(index)
    done: dict[int, jax.Array] = {}
    for (_, _, used, restarts), indices in alike.items():
        together = functools.partial(
            orthogonalize_together, numerics=used, restarts=restarts, eps=eps
        )
        some, factors = [batches[i] for i in indices], [scales[i] for i in indices]
        if sum(batch.nbytes for batch in some) <= whole:
            results = together(some, factors)
        else:
            results = [
                _in_chunks(together, batch, scale, chunk)
                for batch, scale in zip(some, factors, strict=True)
            ]
        done |= zip(indices, results, strict=True)
    return [done[index] for index in range(len(batches))]


def orthogonalize_columns(
    M: jax.Array,
    scale: jax.typing.ArrayLike,
    total: Callable[[jax.Array], jax.Array],
    largest: Callable[[jax.Array], jax.Array],
    numerics: Numerics,
    eps: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Makes some columns of a matrix's scaled polar factor; the others are on other devices.

    Args:
      M: [d, columns], of a matrix that is not higher than wide.
      scale: Factor of the result.
      total: Sum over the devices of a symmetric matrix.
      largest: Maximum over the devices of a number.
      numerics: A polynomial, no SVD, with a precision. A segment costs one `total`.
      eps: What bounds tiny matrices, as in `orthogonalize_batches`; the norm is that of the
        whole matrix.
    """
    assert numerics.polynomial is not None
    d, N = M.shape
    M, peak = _scaled(M, largest)
    (columns,), (norm,) = _newton_schulz(
        [M[None]],
        numerics,
        numerics.polynomial,
        numerics.restarts(d, max(d, N)),
        total=lambda grams: total(grams[0])[None],
    )
    size = jnp.asarray(scale, M.dtype)
    if nonzero(eps) is not None:
        size = size * _damping(norm[0], peak, eps)
    return size * columns[0]
