"""Odd quintics that drive singular values to one: published tables, and Polar Express."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

Triple = tuple[float, float, float]
MethodLike = str | Sequence[Sequence[float]]

# K. Jordan, Muon, 2024: the same triple in each of 5 steps (reprinted in arXiv 2601.23261).
_JORDAN: tuple[Triple, ...] = ((3.4445, -4.7750, 2.0315),) * 5

# J. You, 2024: numerators over 1024 (reprinted in arXiv 2601.23261).
_YOU: tuple[Triple, ...] = tuple(
    (a / 1024, b / 1024, c / 1024)
    for a, b, c in (
        (3955, -8306, 5008),
        (3735, -6681, 3463),
        (3799, -6499, 3211),
        (4019, -6385, 2906),
        (2677, -3029, 1162),
        (2172, -1833, 682),
    )
)

# arXiv 2505.16932, reference implementation: a quintic is never fitted below this share of the
# upper bound; a lower one would let the polynomial come near zero inside the interval.
_CUSHION = 0.02407327424182761
# Relative width of the interval from which the Taylor quintic is exact in float64.
_CONVERGED = 5e-6


class Method(NamedTuple):
    """Quintics in the order of use, and the norm that the matrix is divided by first."""

    coefficients: tuple[Triple, ...]
    norm: str = "frobenius"  # or "schatten4"


def _best_quintic(lower: float, upper: float) -> Triple:
    """The odd quintic that is nearest to 1 on [lower, upper], by Remez exchange."""
    if lower / upper >= 1 - _CONVERGED:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    inner = np.array([(3 * lower + upper) / 4, (lower + 3 * upper) / 4])
    a = b = c = error = math.inf
    for _ in range(100):  # six exchanges are typical
        points = np.array([lower, inner[0], inner[1], upper])
        system = np.stack([points, points**3, points**5, np.array([1, -1, 1, -1])], axis=1)
        a, b, c, new_error = np.linalg.solve(system, np.ones(4))
        if abs(error - new_error) < 1e-15:
            break
        error = new_error
        # The stationary points of a x + b x^3 + c x^5 are where the error is largest inside.
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return float(a), float(b), float(c)


def _quintic(triple: Triple, x: Any) -> Any:
    a, b, c = triple
    return a * x + b * x**3 + c * x**5


def polar_express(steps: int = 5, lower: float = 1e-3, safety: float = 1.01) -> tuple[Triple, ...]:
    """Coefficients of the Polar Express, the optimal composition of odd quintics.

    Step t maps the singular values by p_t(x) = a x + b x^3 + c x^5, where p_t is the quintic
    nearest to 1 on the interval that step t - 1 left. It grows steeply beyond that interval: of a
    small `lower`, a singular value that rounding lifts above the interval by 1e-7 is 1e-6 above the
    next one, and infinite some steps later. Hence the safety factor s, which makes of p_t

        p_t(x / s)      and of the first, whose matrix was divided by a rounded norm, p_1(x / s^2)

    The last quintic is not followed by another and does without, but for the norm's s where it is
    the first too. With s = 1.01, the default and the paper's, no finite matrix gives an infinite
    result, for any `steps` and `lower`. s = 1 is the published table, for those who apply a safety
    factor of their own, or none: `polar_express(10, 1e-6, 1)` overflows in float32 on matrices with
    a singular value that it maps to the end of an interval.

    Args:
      steps: Number of quintics.
      lower: Smallest singular value, relative to the largest, that the composition is made for.
      safety: The factor s, 1 or more.

    Returns:
      `steps` triples (a, b, c), for a matrix that was divided by its norm. A method takes them as
      they are: `method=polar_express(5)` is `method="polar_express"`.

    Raises:
      ValueError: If `steps` is not a positive integer, `lower` is not between 0 and 1, or `safety`
        is not a finite number from 1 on.

    Examples:
      >>> [round(a, 4) for a, b, c in polar_express(3)]
      [8.1239, 4.0664, 3.9487]
      >>> [round(a, 4) for a, b, c in polar_express(3, safety=1)]
      [8.2872, 4.1071, 3.9487]

    References:
      Amsel et al., The Polar Express, 2025, arXiv 2505.16932, algorithm 1 and theorem 3.1.
    """
    if not isinstance(steps, (int, np.integer)) or not _is_real(steps) or steps < 1:
        raise ValueError(f"`polar_express(steps={steps!r})`: steps should be a positive integer.")
    if not _is_real(lower) or not 0 < lower < 1:
        raise ValueError(f"`polar_express(lower={lower!r})`: lower should be between 0 and 1.")
    if not _is_real(safety) or safety < 1:
        raise ValueError(
            f"`polar_express(safety={safety!r})`: safety should be a number from 1 on, such as "
            "1.01, or 1 for the published table."
        )
    upper, triples = 1.0, []
    for _ in range(int(steps)):
        a, b, c = _best_quintic(max(lower, _CUSHION * upper), upper)
        if _CUSHION * upper > lower:
            # The fit did not see the bottom of the interval: centre its ends' values around 1.
            recentre = 2 / (_quintic((a, b, c), lower) + _quintic((a, b, c), upper))
            a, b, c = a * recentre, b * recentre, c * recentre
        triples.append((a, b, c))
        lower = _quintic((a, b, c), lower)
        upper = 2 - lower
    triples = [*(_of_quotient(triple, safety) for triple in triples[:-1]), triples[-1]]
    return (_of_quotient(triples[0], safety), *triples[1:])


def _is_real(number: Any) -> bool:
    """Whether it is one finite number of Python, NumPy or JAX, and no truth value."""
    if isinstance(number, (jax.Array, np.ndarray)) and not number.ndim:
        number = number.item()
    is_number = isinstance(number, (int, float, np.integer, np.floating))
    return is_number and not isinstance(number, bool) and math.isfinite(number)


def _of_quotient(triple: Triple, divisor: float) -> Triple:
    """The quintic of x / divisor."""
    a, b, c = triple
    return a / divisor, b / divisor**3, c / divisor**5


_METHODS: dict[str, Method | None] = {
    # arXiv 2601.23261: 5 steps, lower bound 1e-3, X0 = M / (1.01 |M|_F).
    "polar_express": Method(polar_express(5, 1e-3)),
    # The Schatten-4 norm is 3 to 4 times tighter than Frobenius on a Gaussian spectrum, so 4 steps
    # made for a larger lower bound are as accurate.
    "schatten": Method(polar_express(4, 5e-3), norm="schatten4"),
    "jordan": Method(_JORDAN),
    "you": Method(_YOU),
    "svd": None,
}


def resolve(method: MethodLike) -> Method | None:
    """The method behind a name or a sequence of triples; None is the exact factor by SVD.

    Triples are used as they are given, on M / |M|_F.
    """
    names = ", ".join(map(repr, _METHODS))
    if isinstance(method, str):
        if method not in _METHODS:
            raise ValueError(
                f"`method={method!r}` is unknown: write one of {names}, or a tuple of "
                "(a, b, c) triples such as `polar_express(6)`."
            )
        return _METHODS[method]
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(method)):
        raise ValueError(
            f"`method={method!r}` is traced, and coefficients are constants of the program: under "
            "`optax.inject_hyperparams`, which makes arrays of numbers, name it in `static_args`."
        )
    if isinstance(method, jax.Array):
        method = np.asarray(method).tolist()  # Inside `jax.jit`, parts of it would be traced.
    try:
        triples = tuple((a, b, c) for a, b, c in method)
    except (TypeError, ValueError):
        triples = ()
    if not triples or not all(_is_real(number) for triple in triples for number in triple):
        raise ValueError(
            f"`method={method!r}` should be a name ({names}) or a "
            "non-empty tuple of triples (a, b, c) of finite numbers, one per step."
        )
    return Method(tuple((float(a), float(b), float(c)) for a, b, c in triples))
