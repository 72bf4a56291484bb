"""Does L_TEON <= L_Muon <= K L_TEON say how many steps each needs? Quadratics where L is known.

    python -m benchmarks.theory

The paper measures smoothness in two norms, max_k |X_k|_op for Muon and |[X_1|...|X_K]|_op for TEON
in mode 1. For curvatures h[k, i] of layer k and output i,

    f(X) = 1/2 sum_k sum_i h[k, i] |X_k[i, :]|^2        (X_k is m x n, m <= n, as in the paper)

both constants are sums: rows of a matrix of norm 1 are at most 1 long, and can all be,

    L_Muon = sum_i sum_k h[k, i]        L_TEON = sum_i max_k h[k, i]

so that the ratio is 1 where no output is curved in two layers, and K where all layers are curved
alike. Each method then steps as that theory allows: `sharp` is the steepest descent of its norm,
`X - |G|_* / L Q` with the dual (nuclear) norm, which lowers f by |G|_*^2 / 2 L at least; `fixed`
is its step of one length for T steps, `sqrt(2 f(X_0) / (L T)) Q`, with the smallest T that does.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks import results
from teon_optax import mode_orthogonalize, polar

PAGE = Path(__file__).parent.parent / "docs/results.md"
SIZE, CONDITION = 16, 100.0
TOLERANCE = 1e-2  # of |gradient|_F, from its first value
MOST_STEPS = 100_000


class Problem(NamedTuple):
    """A quadratic and where to start on it.

    Attributes:
        curvature: (K, m).
        start: (m, n, K).
    """

    curvature: np.ndarray
    start: np.ndarray

    @property
    def constants(self) -> dict[str, float]:
        """Computes L of both norms."""
        return {
            "muon": float(self.curvature.sum()),
            "teon": float(self.curvature.max(axis=0).sum()),
        }

    @property
    def gradient(self) -> np.ndarray:
        """Computes the gradient at the start."""
        return self.curvature.T[:, None, :] * self.start


class Outcome(NamedTuple):
    """Steps of Muon per step of TEON: as constants, as constants and gradients predict, and found.

    Attributes:
        constants: L_Muon / L_TEON.
        bound: The same over r^2, r = sum_k |G_k|_* / |[G_1|...|G_K]|_* of the first gradient.
        sharp: Steps of Muon and of TEON by steepest descent.
        fixed: The same with steps of one length.
    """

    constants: float
    bound: float
    sharp: tuple[int, int]
    fixed: tuple[int, int]


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser("theory", __doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4], help="K; default: 2 4")
    options = parser.parse_args(argv)
    outcomes = {
        (name, count): outcome(problem)
        for count in options.layers
        for name, problem in problems(count).items()
    }
    record = {
        "benchmark": "theory",
        "environment": results.environment(),
        "outcomes": {f"{name}, K = {k}": value._asdict() for (name, k), value in outcomes.items()},
    }
    results.publish(options, "theory", record, table(outcomes), plot(outcomes), PAGE)


def problems(count: int, size: int = SIZE) -> dict[str, Problem]:
    """Makes both ends of the inequality; at K, three ways in which layers may be alike."""
    curvature = np.geomspace(1, 1 / CONDITION, size)
    alike = np.broadcast_to(curvature, (count, size))
    owner = np.arange(size) % count == np.arange(count)[:, None]
    generator = np.random.default_rng(0)
    layers = generator.normal(size=(count, size, size))
    rotations = np.linalg.qr(generator.normal(size=(count, size, size)))[0]
    return {
        "no output curved in two layers": Problem(curvature * owner, _stack(layers)),
        "all alike, gradients alike": Problem(alike, _stack(layers[0] @ rotations)),
        "all alike, gradients at random": Problem(alike, _stack(layers)),
        "all alike, gradients disjoint": Problem(alike, _stack(layers * owner[:, :, None])),
    }


def _stack(layers: np.ndarray) -> np.ndarray:
    return np.moveaxis(layers, 0, -1)


def outcome(problem: Problem) -> Outcome:
    """Runs both methods in both ways."""
    muon, teon = (dual_norm(name, problem.gradient) for name in METHODS)
    ratio = problem.constants["muon"] / problem.constants["teon"]
    return Outcome(
        ratio,
        ratio * (teon / muon) ** 2,
        (sharp_steps(problem, "muon"), sharp_steps(problem, "teon")),
        (fixed_steps(problem, "muon"), fixed_steps(problem, "teon")),
    )


METHODS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "muon": lambda tensor: jnp.moveaxis(polar(jnp.moveaxis(tensor, -1, 0), "svd"), 0, -1),
    "teon": lambda tensor: mode_orthogonalize(tensor, 1, "svd"),
}


def dual_norm(name: str, gradient: Any) -> float:
    """Computes the nuclear norm of every layer, or of the joint matrix."""
    gradient = jnp.asarray(gradient, jnp.float32)
    return float(jnp.sum(METHODS[name](gradient) * gradient))


def sharp_steps(problem: Problem, name: str) -> int:
    """Descends most steeply until the gradient is small, and counts steps."""
    return _run(problem, name, 0.0, MOST_STEPS)


def fixed_steps(problem: Problem, name: str) -> int:
    """Finds the smallest T, to 2 %, whose step length makes the gradient small in T steps."""
    first = 0.5 * float(np.sum(problem.gradient * problem.start))

    def enough(total: int) -> bool:
        length = math.sqrt(2 * first / (problem.constants[name] * total))
        return _run(problem, name, length, total) <= total

    high = 1
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > max(1, 0.02 * high):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _run(problem: Problem, name: str, length: float, most: int) -> int:
    numbers = problem.start, problem.curvature, problem.constants[name], length
    return int(_steps(name, *(jnp.asarray(x, jnp.float32) for x in numbers), jnp.int32(most)))


@functools.partial(jax.jit, static_argnums=0)
def _steps(
    name: str,
    start: jax.Array,
    curvature: jax.Array,
    constant: jax.Array,
    length: jax.Array,
    most: jax.Array,
) -> jax.Array:
    """Steps until the gradient is small, or most + 1; a length of 0 is steepest descent."""

    def gradient(point: jax.Array) -> jax.Array:
        return curvature.T[:, None, :] * point

    small = TOLERANCE * jnp.linalg.norm(gradient(start))

    def going_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        point, step = state
        return (jnp.linalg.norm(gradient(point)) > small) & (step <= most)

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        point, step = state
        factor = METHODS[name](gradient(point))
        sharp = jnp.sum(factor * gradient(point)) / constant
        return point - jnp.where(length > 0, length, sharp) * factor, step + 1

    return jax.lax.while_loop(going_on, body, (start, jnp.int32(0)))[1]


def table(outcomes: Mapping[tuple[str, int], Outcome]) -> str:
    """Steps of Muon per step of TEON: predicted, then found."""
    header = "set-up", "K", "L_Muon / L_TEON", "K / r^2", "sharp", "steps", "fixed", "steps "
    rows = [
        [
            name,
            str(count),
            f"{value.constants:.2f}",
            f"{value.bound:.2f}",
            *_found(value.sharp),
            *_found(value.fixed),
        ]
        for (name, count), value in outcomes.items()
    ]
    return results.markdown(header, rows)


def _found(steps: tuple[int, int]) -> tuple[str, str]:
    return f"{steps[0] / steps[1]:.2f}", f"{steps[0]} / {steps[1]}"


def plot(outcomes: Mapping[tuple[str, int], Outcome]) -> Figure:
    """Draws what was found against what was predicted."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, prediction in zip(panels, ("constants", "bound"), strict=True):
        for number, name in enumerate(dict.fromkeys(name for name, _ in outcomes)):
            values = [value for (own, _), value in outcomes.items() if own == name]
            for kind, marker in (("sharp", "o"), ("fixed", "s")):
                found = [steps[0] / steps[1] for steps in (getattr(v, kind) for v in values)]
                axes.plot(
                    [getattr(value, prediction) for value in values],
                    found,
                    marker,
                    color=f"C{number}",
                    label=f"{name}, {kind}",
                )
        top = max(value.constants for value in outcomes.values())
        axes.plot([1, top], [1, top], color="grey", linewidth=1)
    panels[0].set(xlabel="predicted: L_Muon / L_TEON", ylabel="steps of Muon per step of TEON")
    panels[1].set(xlabel="predicted: K / r^2 of the first gradient")
    panels[0].legend(fontsize=6)
    return figure


if __name__ == "__main__":
    main()
