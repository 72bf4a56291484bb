"""How a polar factor is computed here: precision of products, restarts, chunks."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._polar.coefficients import Function, Method, Step

_HIGHEST = jax.lax.Precision.HIGHEST
_BF16 = jax.lax.DotAlgorithmPreset.BF16_BF16_F32

# How much a segment of exact products may enlarge a small singular value: see `restarts`.
_LARGEST_GROWTH = 256
_LARGEST_GROWTH_OF_THE_LAST = 1100
# Joint length over d below which matrices in every step (4 S + S (2 r - 3) products of d x d) cost
# less than Gram matrices throughout.
_DIRECT_BELOW = 1.5
# By how much of itself a number changes when it becomes an operand of bf16.
_ROUNDING = 2.0**-8
# By how much a factor that enlarges by 1 errs then: at most twice as much, if all of its numbers
# change by the most, and in such a way that they add up.
_SHARE_OF_ROUNDING = 1.5 * _ROUNDING
# How much a segment of one-pass products may enlarge a small singular value, and how much the last
# two steps of a segment of three may.
_LARGEST_GROWTH_OF_TWO = 40
_LARGEST_GROWTH_AFTER_THE_FIRST = 8
# Where a segment more costs 2 r - 3 products, and three steps in one segment one product: joint
# length over d up to which they cost the same, and d below which neither is worth a thought.
_ODD_STEP_ALONE_UP_TO = 2
_ODD_STEP_ALONE_BELOW = 64
# What singular values are divided by, at least, after each step of one-pass products but the last.
_SLOWED_BY = 1.05
# Bytes of matrices up to which all are worked on at once, and of a chunk where they are more. A CPU
# wants a chunk in its cache, but a loop over a few of them, one for each shape, saves no time and
# compiles for a second of the processor. An accelerator wants enough to fill it, and gains nothing
# from more.
_CPU_BYTES = 2**22, 2**20
_ACCELERATOR_BYTES = 2**28, 2**28


def default_precision(
    backend: str, dtype: jnp.dtype, of_leaf: jnp.dtype | None = None
) -> jax.lax.PrecisionLike:
    """Chooses the precision of every product: exact on CPU and in float64, or else one pass.

    One pass is bf16 on a TPU. On a GPU it is bf16 for leaves of bf16 where the device multiplies
    these, or else TF32. At HIGHEST a product costs six passes on a TPU, and restarts make one pass
    accurate enough. `jax.default_matmul_precision` is for the model and has no say here: what an
    optimizer does is not to change with how a loss is computed.

    Args:
      backend: Where products are computed, by the name that jax gives it.
      dtype: Dtype of the matrices.
      of_leaf: Dtype of the parameters that matrices belong to, if it is another: momentum may be
        wider.
    """
    of_leaf = dtype if of_leaf is None else of_leaf
    if backend == "cpu" or jnp.float64 in (dtype, of_leaf):
        return _HIGHEST
    if backend == "gpu" and of_leaf == jnp.bfloat16 and _has_bf16_products():
        return _BF16
    return jax.lax.Precision.DEFAULT


@functools.cache
def _has_bf16_products() -> bool:
    """Reads once whether all GPUs are of NVIDIA's compute capability 8 or above, Ampere or later.

    XLA refuses a product of bf16 by name on earlier ones; others do not have a number there.
    """
    capabilities = [getattr(device, "compute_capability", None) for device in jax.devices()]
    try:
        return min(float(str(capability)) for capability in capabilities) >= 8
    except ValueError:
        return False


def restarts(
    steps: Sequence[Step], shape: Sequence[int], precision: jax.lax.PrecisionLike
) -> tuple[int, ...]:
    """Decides how many steps follow each start from the matrices themselves.

    | products | ratio          | segments                   | for 5 steps | for 4   |
    |----------|----------------|----------------------------|-------------|---------|
    | any      | < 1.5          | 1+1+...                    | 1+1+1+1+1   | 1+1+1+1 |
    | exact    | >= 1.5         | as few as growth allows    | 5           | 4       |
    | one-pass | to 2, or small | of 2, an odd one second    | 2+1+2       | 2+2     |
    | one-pass | above 2        | of 2, the last of 3 if odd | 2+3         | 2+2     |

    A segment knows its matrices by their Gram matrix G alone, and keeps the rounding errors of its
    products. The next one starts from the matrices themselves and corrects what is left, if all
    singular values are where its quintics converge. How much a segment bears follows from its
    growth g, by which it enlarges a small singular value: the product of its a.

    *Exact products.* Rounding moves the eigenvalues of G, squares of singular values s, by E of
    about eps |G|. Where G has s^2 - E, steps are chosen for a smaller s than there is, and s comes
    out too large by the share E / (2 s^2). That is worst where s reaches the upper end u of an
    interval, at s = u / g, and it is eps g^2 / 2 there, since |G| is at most u^2. Quintics that
    follow bear 1 %, the safety factor, so g should be below 1 / sqrt(50 eps) = 410; we take 256.
    After the last segment nothing can diverge: 1100, for which eps g^2 / 2 is 7 %. A search over
    spectra of few levels, d of 8 to 1024, up to 2048 columns, found singular values .05 % too large
    at g = 70, .6 % at 290, 2 % at 970 (Polar Express in one segment of 5), 9 % at 1200 and twice as
    large at 5000, which the next segment makes infinite.

    *One-pass products* of bf16 change each operand by a share eps of up to 2^-8. What matters are
    two of them. The factor P of a segment has norm g, and each of its numbers changes by eps of
    itself: P by up to 2 eps g, since numbers without their signs make a norm of 2 (1 - 1 / d) g of
    g (I - v v^T), which nearly equal rows have for P. It meets singular values of 1, so two steps
    of Polar Express, g = 33, may end 26 % too large. Numbers do not all change by the most: the
    worst that a search has found is 1.4 eps g. What a segment leaves is therefore divided by
    1 + 1.5 eps g, which costs nothing but as much of the reach, and two steps are a segment up to
    g = 40. (Divided by 1.05 alone, nearly equal rows ended at 5,700 and, of long methods, at
    infinity.) G itself is that of the rounded matrices, exactly, so that the bound of exact
    products holds from the second step on: a segment of three steps errs by eps g^2 / 2, g being
    the growth of the last two. We take 8, which is 12 %, and nothing may follow. Where a segment
    more costs little, there is no third step. 3+2 has 12 in place of 8, and g = 130.

    Args:
      steps: Coefficients of the steps.
      shape: Shape of the matrices; the ratio is that of the longer side to d, the shorter one.
      precision: Precision of the products.
    """
    count, d, ratio = len(steps), min(shape), max(shape) / min(shape)
    if ratio < _DIRECT_BELOW:
        return (1,) * count
    if is_exact(precision):
        splits = (_equal_parts(count, parts) for parts in range(1, count + 1))
        return next((split for split in splits if _is_stable(steps, split)), (1,) * count)
    is_dear = ratio > _ODD_STEP_ALONE_UP_TO and d >= _ODD_STEP_ALONE_BELOW
    may_join = is_dear and _growth(steps[-2:]) <= _LARGEST_GROWTH_AFTER_THE_FIRST
    segments: list[int] = []
    while left := count - sum(segments):
        pair = steps[count - left :][:2]
        is_odd = bool(segments) and left % 2 == 1
        if is_odd and left == 3 and may_join:
            segments.append(3)
        elif _growth(pair) > _LARGEST_GROWTH_OF_TWO or (is_odd and not may_join):
            segments.append(1)
        else:
            segments.append(len(pair))
    return tuple(segments)


def _equal_parts(steps: int, count: int) -> tuple[int, ...]:
    """Divides `steps` into `count` numbers that differ by 1 at most, larger ones first."""
    return tuple(steps // count + (i < steps % count) for i in range(count))


def _is_stable(steps: Sequence[Step], lengths: tuple[int, ...]) -> bool:
    """Tells whether no segment of so many steps grows beyond what float32 products allow."""
    ends = np.cumsum(lengths)
    *others, last = [
        _growth(steps[end - length : end]) for end, length in zip(ends, lengths, strict=True)
    ]
    return max(others, default=0) <= _LARGEST_GROWTH and last <= _LARGEST_GROWTH_OF_THE_LAST


def _growth(steps: Sequence[Step]) -> float:
    """Computes how much steps enlarge an error that enters at one of them, at the most."""
    growth = 1.0
    for a, *_ in steps:
        growth = max(growth, 1) * abs(a)
    return growth


def _slowed(steps: Sequence[Step], restarts: Sequence[int]) -> tuple[Step, ...]:
    """Divides the results of all steps but the last, so that the next ones bear their errors.

    A quintic that is made for singular values up to u reaches far beyond 1 a little above u: 7 %
    above, Polar Express in its last two steps ends at 1e3. Its safety factor is for the errors of
    float32; those of a step of bf16 products come to some percent, and those of a segment to its
    growth times that of a number (see `restarts`).
    """
    factors = np.full(len(steps), _SLOWED_BY)
    ends = np.cumsum(restarts)
    for length, end in zip(restarts, ends, strict=True):
        error = _SHARE_OF_ROUNDING * _growth(steps[end - length : end])
        factors[end - 1] = max(_SLOWED_BY, 1 + error)
    factors[-1] = 1
    slowed: Any = [
        tuple(number / factor for number in step)
        for step, factor in zip(steps, factors.tolist(), strict=True)
    ]
    return tuple(slowed)


class Numerics(NamedTuple):
    """Says which method computes polar factors, and in which precision its products are.

    Attributes:
      method: A polynomial, a function, or None for the SVD.
      precision: None is for `of` to choose.
    """

    method: Method | Function | None
    precision: jax.lax.PrecisionLike = None

    @property
    def polynomial(self) -> Method | None:
        """Gives the method if it is a polynomial, else None: all else is done to whole matrices."""
        return self.method if isinstance(self.method, Method) else None

    def of(self, dtype: jnp.dtype, of_leaf: jnp.dtype | None = None) -> "Numerics":
        """Fills in the default precision for arrays of this dtype, if none is given.

        `of_leaf` is the dtype of the parameters that they belong to, if it is another.
        """
        if self.precision is not None:
            return self
        return self._replace(precision=default_precision(jax.default_backend(), dtype, of_leaf))

    def restarts(self, m: int, n: int) -> tuple[int, ...]:
        """Decides how many steps follow each start, for m x n matrices; none without steps."""
        if self.polynomial is None:
            return ()
        return restarts(self.polynomial.coefficients, (m, n), self.precision)

    def steps(self, restarts: Sequence[int]) -> tuple[Step, ...]:
        """Gives the method's coefficients; of one-pass products, all but the last step slowed."""
        if self.polynomial is None:
            return ()
        steps = self.polynomial.coefficients
        return steps if is_exact(self.precision) else _slowed(steps, restarts)

    def product_count(self, restarts: Sequence[int], ratio: float) -> float:
        """Counts the products of d x d matrices that one group takes, with these restarts.

        Args:
          restarts: Steps after each start.
          ratio: Columns that a device holds of a joint matrix, divided by d; below 1 if it shares
            the matrix with others.
        """
        assert self.polynomial is not None
        squares = sum(len(step) == 3 for step in self.polynomial.coefficients)
        steps = sum(restarts)
        if len(restarts) == steps and ratio < 1:
            return ratio * (2 * steps + squares)
        more = sum(takes_one_more(length, self.precision) for length in restarts)
        return 3 * steps + squares + len(restarts) * (2 * ratio - 3) + more


def check_precision(precision: jax.lax.PrecisionLike) -> None:
    """Raises what jax raises for a precision that it does not know, before any update."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    jax.eval_shape(lambda M: jnp.matmul(M, M, precision=precision), one)


def is_exact(precision: jax.lax.PrecisionLike) -> bool:
    """Tells whether products of float32 operands are those of float32."""
    return precision in (_HIGHEST, "highest", "float32")


def rounds_operands(precision: jax.lax.PrecisionLike) -> bool:
    """Tells whether products take operands of bf16: asked for by that name, and not on a CPU.

    A CPU rounds operands of float32 in each product, and has no product of others in float32.
    """
    return precision in (_BF16, _BF16.name) and jax.default_backend() != "cpu"


def takes_one_more(steps: int, precision: jax.lax.PrecisionLike) -> bool:
    """Tells whether a segment of so many steps takes a product more, to be accurate."""
    return steps > 2 and not is_exact(precision)


def byte_limits(backend: str) -> tuple[int, int]:
    """Gives the bytes of matrices up to which there are no chunks, and those of a chunk."""
    return _CPU_BYTES if backend == "cpu" else _ACCELERATOR_BYTES


def chunk_size(count: int, most: int) -> int:
    """Chooses how many of `count` matrices to take at a time: a divisor if one is near `most`.

    A remainder is a chunk of another size, for which the function is compiled a second time.
    """
    most = max(1, min(most, count))
    sizes = range(most, most // 2, -1)
    return next((size for size in sizes if count % size == 0), most)
