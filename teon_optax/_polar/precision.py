"""How a polar factor is computed here: precision of products, restarts, chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._polar.coefficients import Method

_HIGHEST = jax.lax.Precision.HIGHEST

# Steps that one segment holds in float32 on any input, rank-deficient included: rounding makes
# eigenvalues of a Gram matrix slightly negative, and each further step multiplies them by a^2.
_LONGEST_SEGMENT = 5
# Joint length over d below which matrices in every step (4 S + S (2 r - 3) products of d x d) cost
# less than Gram matrices throughout.
_DIRECT_BELOW = 1.5
# Joint length over d up to which a segment more (2 r - 3 products) costs one product at most.
_ODD_STEP_ALONE_UP_TO = 2
# A quintic made for singular values up to u reaches far beyond 1 a little above u: 7 % above, Polar
# Express in its last two steps ends at 1e3. The safety factor of its coefficients, 1.01, is for the
# errors of one step; those of several steps between two Gram matrices came to 1.3 %.
_SHRINKAGE = 1.03
# Bytes of matrices that are worked on at a time. A CPU wants them in its cache; an accelerator
# wants enough to fill it, and gains nothing from more.
_CHUNK_BYTES = {"cpu": 2**20}
_ACCELERATOR_CHUNK_BYTES = 2**28


def default_precision(backend: str, dtype: jnp.dtype) -> jax.lax.PrecisionLike:
    """Precision of every product: exact on CPU and in float64, one pass on accelerators.

    One pass is bf16 on TPU and TF32 on GPU. At HIGHEST a product costs six passes on a TPU, and the
    restarts below make one pass accurate enough.
    """
    is_float32 = backend == "cpu" or dtype == jnp.float64
    return _HIGHEST if is_float32 else jax.lax.Precision.DEFAULT


def restarts(steps: int, ratio: float, precision: jax.lax.PrecisionLike) -> tuple[int, ...]:
    """How many steps follow each start from the matrices themselves.

    | products | ratio   | segments                | for 5 steps | for 4 |
    |----------|---------|-------------------------|-------------|-------|
    | any      | < 1.5   | 1+1+...                 | 1+1+1+1+1   |       |
    | exact    | >= 1.5  | equal, of at most 5     | 5           | 4     |
    | one-pass | to 2    | of 2, an odd one second | 2+1+2       | 2+2   |
    | one-pass | above   | of 2, the last of 3     | 2+3         | 2+2   |

    A segment iterates on Gram matrices alone and keeps the rounding errors of its products; the
    next one starts from the matrices themselves and corrects them, if their singular values are
    where its quintics converge. Under bf16 products and on any input, 2+1+2 leaves singular values
    in .80 to 1.16 and 2+3 in .80 to 1.27; 3+2 reaches 1e7 where few coordinates carry the gradient,
    since its first three steps enlarge the errors 134 times.

    Args:
      steps: Number of quintic steps.
      ratio: Joint length of a group divided by d.
      precision: Of the products.
    """
    if ratio < _DIRECT_BELOW:
        return (1,) * steps
    if is_exact(precision):
        count = -(-steps // _LONGEST_SEGMENT)
        return tuple(steps // count + (i < steps % count) for i in range(count))
    pairs = (2,) * (steps // 2)
    if steps % 2 == 0:
        return pairs
    if ratio > _ODD_STEP_ALONE_UP_TO and steps > 3:
        return (*pairs[:-1], 3)
    return (*pairs[:1], 1, *pairs[1:])


class Numerics(NamedTuple):
    """By which polynomial, None for the SVD, and in which precision of every product."""

    method: Method | None
    precision: jax.lax.PrecisionLike = None  # None is for `of` to choose

    def of(self, dtype: jnp.dtype) -> "Numerics":
        """With the default precision for arrays of a dtype where none is given."""
        chosen = default_precision(jax.default_backend(), np.promote_types(dtype, np.float32))
        return self if self.precision is not None else self._replace(precision=chosen)

    def restarts(self, m: int, n: int) -> tuple[int, ...]:
        """How many steps follow each start, for m x n matrices; none for the SVD."""
        if self.method is None:
            return ()
        return restarts(len(self.method.coefficients), max(m, n) / min(m, n), self.precision)


def shrinkage(steps: int, precision: jax.lax.PrecisionLike) -> float:
    """What matrices are divided by between a segment of so many steps and the next."""
    return 1 if steps == 1 or is_exact(precision) else _SHRINKAGE


def is_exact(precision: jax.lax.PrecisionLike) -> bool:
    """Whether products of float32 operands are those of float32."""
    return precision in (_HIGHEST, "highest", "float32")


def product_count(restarts: tuple[int, ...], ratio: float) -> float:
    """Products of d x d matrices that one group takes, with these restarts.

    Args:
      restarts: Steps after each start.
      ratio: Columns that a device holds of a joint matrix, divided by d; below 1 if it shares the
        matrix with others.
    """
    steps = sum(restarts)
    if len(restarts) == steps and ratio < 1:
        return 3 * ratio * steps
    return 4 * steps + len(restarts) * (2 * ratio - 3)


def chunk_bytes(backend: str) -> int:
    """Bytes of matrices that are worked on at a time."""
    return _CHUNK_BYTES.get(backend, _ACCELERATOR_CHUNK_BYTES)


def chunk_size(count: int, most: int) -> int:
    """How many of `count` matrices to take at a time: a divisor if one is near `most`.

    `jax.lax.map` compiles its function a second time for a remainder.
    """
    most = max(1, min(most, count))
    sizes = range(most, most // 2, -1)
    return next((size for size in sizes if count % size == 0), most)
