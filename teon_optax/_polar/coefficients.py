"""Odd quintics that drive singular values to one: published tables, and Polar Express."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

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

# arXiv 2505.16932: what every step but the last is slowed down by, so that rounding cannot push a
# singular value out of the interval on which the next quintic converges.
_SAFETY = 1.01
# arXiv 2505.16932, reference implementation: a quintic is never fitted below this share of the
# upper bound; a lower one would let the polynomial come near zero inside the interval.
_CUSHION = 0.02407327424182761
# A singular value that a converging composition never reaches.
_DIVERGED = 2.0
# Relative width of the interval from which the Taylor quintic is exact in float64.
_CONVERGED = 5e-6


class Method(NamedTuple):
    """Quintics in the order of use, and what the matrix is divided by first."""

    coefficients: tuple[Triple, ...]
    norm: str = "frobenius"  # or "schatten4"
    margin: float = 1.0  # the norm is multiplied by it


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


def polar_express(steps: int = 5, lower: float = 1e-3) -> tuple[Triple, ...]:
    """Coefficients of the Polar Express, the optimal composition of odd quintics.

    Step t maps the singular values by p_t(x) = a x + b x^3 + c x^5, where p_t is the quintic
    nearest to 1 on the interval that step t - 1 left. Raw coefficients, without the safety factor
    that `method="polar_express"` applies.

    Args:
      steps: Number of quintics.
      lower: Smallest singular value, relative to the largest, that the composition is made for.

    Returns:
      `steps` triples (a, b, c).

    Raises:
      ValueError: If `steps` is not a positive integer or `lower` is not between 0 and 1.

    Examples:
      >>> [round(a, 4) for a, b, c in polar_express(3)]
      [8.2872, 4.1071, 3.9487]

    References:
      Amsel et al., The Polar Express, 2025, arXiv 2505.16932, algorithm 1 and theorem 3.1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`polar_express(steps={steps!r})`: steps should be a positive integer.")
    if not 0 < lower < 1:
        raise ValueError(f"`polar_express(lower={lower!r})`: lower should be between 0 and 1.")
    upper, triples = 1.0, []
    for _ in range(steps):
        a, b, c = _best_quintic(max(lower, _CUSHION * upper), upper)
        if _CUSHION * upper > lower:
            # The fit did not see the bottom of the interval: centre its ends' values around 1.
            recentre = 2 / (_quintic((a, b, c), lower) + _quintic((a, b, c), upper))
            a, b, c = a * recentre, b * recentre, c * recentre
        triples.append((a, b, c))
        lower = _quintic((a, b, c), lower)
        upper = 2 - lower
    return tuple(triples)


def _safe(triples: tuple[Triple, ...]) -> tuple[Triple, ...]:
    """Every step but the last sees singular values divided by the safety factor."""
    slowed = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in triples[:-1])
    return slowed + triples[-1:]


def _tolerates_rounding(triples: tuple[Triple, ...]) -> bool:
    """Whether singular values that come out 1 % too large in every step stay bounded."""
    x = np.linspace(0, 1, 1001)
    for triple in triples:
        x = np.clip(_quintic(triple, _SAFETY * x), -_DIVERGED, _DIVERGED)
    return bool(np.abs(x).max() < _DIVERGED)


_METHODS: dict[str, Method | None] = {
    # arXiv 2601.23261: 5 steps, lower bound 1e-3, X0 = M / (1.01 |M|_F).
    "polar_express": Method(_safe(polar_express(5, 1e-3)), margin=_SAFETY),
    # The Schatten-4 norm is 3 to 4 times tighter than Frobenius on a Gaussian spectrum, so 4 steps
    # made for a larger lower bound are as accurate.
    "schatten": Method(_safe(polar_express(4, 5e-3)), norm="schatten4", margin=_SAFETY),
    "jordan": Method(_JORDAN),
    "you": Method(_YOU),
    "svd": None,
}


def resolve(method: MethodLike) -> Method | None:
    """The method behind a name or a sequence of triples; None is the exact factor by SVD.

    Triples are used as they stand, on M / |M|_F, if rounding cannot make them diverge (as Jordan's
    and You's); others (as Polar Express's) get the safety factor, so that `polar_express(5)` is
    "polar_express".
    """
    names = ", ".join(map(repr, _METHODS))
    if isinstance(method, str):
        if method not in _METHODS:
            raise ValueError(
                f"`method={method!r}` is unknown: write one of {names}, or a tuple of "
                "(a, b, c) triples such as `polar_express(6)`."
            )
        return _METHODS[method]
    try:
        triples = tuple((float(a), float(b), float(c)) for a, b, c in method)
    except (TypeError, ValueError):
        triples = ()
    if not triples or not np.isfinite(triples).all():
        raise ValueError(
            f"`method={method!r}` should be a name ({names}) or a "
            "non-empty tuple of triples (a, b, c) of finite numbers, one per step."
        )
    safe = Method(_safe(triples), margin=_SAFETY)
    return Method(triples) if _tolerates_rounding(triples) else safe
