"""Odd polynomials that drive singular values to one: published tables, and greedy minimax ones."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

Pair = tuple[float, float]  # (a, b), the cubic a x + b x^3
Triple = tuple[float, float, float]  # (a, b, c), the quintic a x + b x^3 + c x^5
Step = Pair | Triple
# From matrices [B, d, N], d <= N, to what takes the place of their polar factors.
Function = Callable[[jax.Array], jax.Array]
MethodLike = str | Sequence[Sequence[float]] | Function

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

# K. Ahn and others, Dion, 2025, as `optax.contrib.muon(ns_coeffs="dion")` of optax 0.2.8 has them.
_DION: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# arXiv 2505.16932, reference implementation: a quintic is never fitted below this share of the
# upper bound; a lower one would let the polynomial come near zero inside the interval.
_CUSHION = 0.02407327424182761
# Of float32, in which coefficients are used.
_LARGEST = float(np.finfo(np.float32).max)
_MOST_STEPS = 1000  # Any method has converged long before, and any program is too large.
_LARGEST_SAFETY = 10.0
# Relative width of the interval from which the Taylor quintic is exact in float64.
_CONVERGED = 5e-6


class Method(NamedTuple):
    """Steps in the order of use, and the norm that the matrix is divided by first.

    Attributes:
      coefficients: A triple (a, b, c) for each quintic, a pair (a, b) for each cubic.
      norm: "frobenius" or "schatten4", of the singular values.
    """

    coefficients: tuple[Step, ...]
    norm: str = "frobenius"


def _best_quintic(lower: float, upper: float) -> Triple:
    """Finds the odd quintic that is nearest to 1 on [lower, upper], by Remez exchange."""
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


def _best_cubic(lower: float, upper: float) -> Pair:
    """Finds the odd cubic that is nearest to 1 on [lower, upper].

    Its error is the same at both ends, which gives a = -b q with q = l^2 + l u + u^2, and as large
    with the other sign at sqrt(q / 3), the maximum between them.
    """
    q = lower**2 + lower * upper + upper**2
    b = -2 / (2 * (q / 3) ** 1.5 + lower * upper * (lower + upper))
    return -b * q, b


def _value(step: Step, x: float) -> float:
    return sum(number * x ** (2 * i + 1) for i, number in enumerate(step))


def greedy(degrees: Sequence[int], lower: float, safety: float) -> tuple[Step, ...]:
    """Composes polynomials of the degrees 3 and 5, each nearest to 1 on what the last one left.

    The first one's interval is [lower, 1]. Quintics are those of the Polar Express, with its safety
    factor: see `polar_express`. Nothing can lie between zero and the ends of a cubic, so none is
    kept from the bottom of its interval.
    """
    upper, steps = 1.0, []
    for degree in degrees:
        cushion = _CUSHION * upper if degree == 5 else 0.0
        best = _best_quintic if degree == 5 else _best_cubic
        step: Step = best(max(lower, cushion), upper)
        if cushion > lower:
            # The fit did not see the bottom of the interval: centre its ends' values around 1.
            recentre = 2 / (_value(step, lower) + _value(step, upper))
            step = _times(step, recentre)
        steps.append(step)
        lower = _value(step, lower)
        upper = 2 - lower
    steps = [*(of_quotient(step, safety) for step in steps[:-1]), steps[-1]]
    return (of_quotient(steps[0], safety), *steps[1:])


def _times(step: Step, factor: float) -> Any:
    return tuple(number * factor for number in step)


def of_quotient(step: Step, divisor: float) -> Any:
    """Makes the polynomial of x / divisor."""
    return tuple(number / divisor ** (2 * i + 1) for i, number in enumerate(step))


def polar_express(steps: int = 5, lower: float = 1e-3, safety: float = 1.01) -> tuple[Triple, ...]:
    """Makes the coefficients of the Polar Express, the optimal composition of odd quintics.

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
      safety: The factor s, from 1 to 10.

    Returns:
      `steps` triples (a, b, c), for a matrix that was divided by its norm. A method takes them as
      they are: `method=polar_express(5)` is `method="polar_express"`.

    Raises:
      ValueError: If `steps` is not an integer from 1 to 1,000, `lower` is not between 0 and 1, or
        `safety` is not a number from 1 to 10.

    Examples:
      >>> [round(a, 4) for a, b, c in polar_express(3)]
      [8.1239, 4.0664, 3.9487]
      >>> [round(a, 4) for a, b, c in polar_express(3, safety=1)]
      [8.2872, 4.1071, 3.9487]

    References:
      Amsel et al., The Polar Express, 2025, arXiv 2505.16932, algorithm 1 and theorem 3.1.
    """
    is_integer = isinstance(steps, (int, np.integer)) and not isinstance(steps, bool)
    if not is_integer or not 1 <= steps <= _MOST_STEPS:
        raise ValueError(
            f"`polar_express(steps={steps!r})`: steps should be a positive integer, "
            f"{_MOST_STEPS} at most."
        )
    if not _is_real(lower) or not 0 < lower < 1:
        raise ValueError(f"`polar_express(lower={lower!r})`: lower should be between 0 and 1.")
    if not _is_real(safety) or not 1 <= safety <= _LARGEST_SAFETY:
        raise ValueError(
            f"`polar_express(safety={safety!r})`: safety should be a number from 1 to "
            f"{_LARGEST_SAFETY:g}, such as 1.01, or 1 for the published table."
        )
    steps_of_five: Any = greedy((5,) * int(steps), float(lower), float(safety))
    return steps_of_five


def _is_real(number: Any) -> bool:
    """Tells whether it is one finite number of Python, NumPy or JAX, and no truth value."""
    if isinstance(number, (jax.Array, np.ndarray)) and not number.ndim:
        number = number.item()
    is_number = isinstance(number, (int, float, np.integer, np.floating))
    # Not `math.isfinite`, which overflows on an integer of 400 digits.
    return is_number and not isinstance(number, bool) and bool(-math.inf < number < math.inf)


_METHODS: dict[str, Method | None] = {
    # arXiv 2601.23261: 5 steps, lower bound 1e-3, X0 = M / (1.01 |M|_F).
    "polar_express": Method(polar_express(5, 1e-3)),
    # The Schatten-4 norm is tighter than Frobenius, 3 to 4 times on a Gaussian spectrum and 1.3 to
    # 2.2 times on the momentum of a small GPT, so 4 steps are made for a larger lower bound.
    "schatten": Method(polar_express(4, 5e-3), norm="schatten4"),
    # The same for an error of .12: two cubics, which need no square of a Gram matrix, at its end.
    "fast": Method(greedy((5, 5, 3, 3), 0.0115, 1.01), norm="schatten4"),
    "jordan": Method(_JORDAN),
    "dion": Method(_DION),
    "you": Method(_YOU),
    "svd": None,
}


def resolve(method: MethodLike) -> Method | Function | None:
    """Finds the method behind a name or a sequence of coefficients; None is the SVD's exact factor.

    Coefficients are used as they are given, on M / |M|_F. A quintic with c = 0 is a cubic. A
    function is a method of its own.
    """
    names = ", ".join(map(repr, _METHODS))
    if isinstance(method, str):
        if method not in _METHODS:
            raise ValueError(
                f"`method={method!r}` is unknown: write one of {names}, or a tuple of "
                "(a, b, c) triples such as `polar_express(6)`."
            )
        return _METHODS[method]
    if callable(method):
        return method
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(method)):
        raise ValueError(
            f"`method={method!r}` is traced, and coefficients are constants of the program: under "
            "`optax.inject_hyperparams`, which makes arrays of numbers, name it in `static_args`."
        )
    coefficients: Any = method
    if isinstance(method, jax.Array):
        coefficients = np.asarray(method).tolist()  # Inside `jax.jit`, parts of it would be traced.
    try:
        steps: Any = tuple(tuple(step) for step in coefficients)
    except TypeError:
        steps = ()
    is_coefficients = all(len(step) in (2, 3) and all(map(_is_real, step)) for step in steps)
    if not steps or not is_coefficients:
        raise ValueError(
            f"`method={method!r}` should be a name ({names}), a non-empty tuple of triples "
            "(a, b, c) or pairs (a, b) of finite numbers, one per step, or a function of matrices "
            "[B, d, N]."
        )
    infinite = [number for step in steps for number in step if abs(number) > _LARGEST]
    if infinite:
        raise ValueError(
            f"`method={method!r}` has the coefficient {infinite[0]}, which is infinite in float32, "
            f"whose largest number is {_LARGEST:.2e}."
        )
    return Method(tuple(_as_step(*map(float, step)) for step in steps))


def _as_step(a: float, b: float, c: float = 0.0) -> Step:
    return (a, b, c) if c else (a, b)
