"""The worst that one-pass products make of a matrix: evolutionary searches over its entries.

    python -m benchmarks.worst_case --methods polar_express fast --shapes 4x16 12x30 --seconds 60

prints, for each method and shape, the largest singular value that a polar factor of the library has
had, and by how much at least a direction above 3 % of a matrix's largest went, of all matrices that
were tried. Products are rounded by emulation. `--until-killed` begins again with another seed.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax import polar_express
from teon_optax._polar.coefficients import MethodLike, resolve
from teon_optax._polar.newton_schulz import orthogonalize_together
from teon_optax._polar.numerics import Numerics
from tests.emulation import FORMATS, with_products_in

# Directions above this share of the largest singular value are to be kept.
KEPT = 0.03
# Matrices of a generation, and how many numbers they may be; a fifth of them have children.
POPULATION, NUMBERS = 256, 2**20


def run_of(
    method: MethodLike, restarts: Sequence[int] | None = None, products: str = "bf16"
) -> Callable[[jax.Array], jax.Array]:
    """Compiles the library's polar factors of a batch, products rounded, for any restarts."""
    numerics = Numerics(resolve(method), jax.lax.Precision.DEFAULT)

    def together(batch: jax.Array) -> jax.Array:
        segments = restarts or numerics.restarts(*batch.shape[1:])
        return orthogonalize_together([batch], [1.0], numerics, segments)[0]

    return jax.jit(with_products_in(products, together))


def largest(matrices: np.ndarray, results: np.ndarray) -> np.ndarray:
    """Finds the largest singular value of each result; infinity where one is not finite."""
    finite = np.isfinite(results).all((1, 2)) & (np.abs(results).max((1, 2)) < 1e15)
    norms = np.full(len(results), np.inf)
    X = np.asarray(results[finite], np.float64)
    norms[finite] = np.sqrt(np.linalg.eigvalsh(X @ X.swapaxes(1, 2))[:, -1])
    return norms


def lost(matrices: np.ndarray, results: np.ndarray) -> np.ndarray:
    """Finds by how much the least kept direction of each falls short of one."""
    found = []
    for M, X in zip(np.asarray(matrices, np.float64), np.asarray(results, np.float64), strict=True):
        U, s, Vt = np.linalg.svd(M, full_matrices=False)
        large = s >= KEPT * s[0]
        along = U[:, large].T @ X @ Vt[large].T
        finite = np.isfinite(along).all()
        found.append(1 - np.linalg.eigvalsh((along + along.T) / 2)[0] if finite else np.inf)
    return np.array(found)


def first(rng: np.random.Generator, count: int, d: int, N: int) -> np.ndarray:
    """Makes matrices of many kinds: [count, d, N]."""
    kinds = (_gaussian, _few_levels, _sparse, _rank_one, _equal_rows, _powers)
    return np.stack([kinds[i % len(kinds)](rng, d, N) for i in range(count)]).astype(np.float32)


def _gaussian(rng: np.random.Generator, d: int, N: int) -> np.ndarray:
    return rng.normal(size=(d, N))


def _with_spectrum(rng: np.random.Generator, s: np.ndarray, N: int) -> np.ndarray:
    d = len(s)
    U, V = (np.linalg.qr(rng.normal(size=(size, d)))[0] for size in (d, N))
    return (U * s) @ V.T


def _few_levels(rng: np.random.Generator, d: int, N: int) -> np.ndarray:
    levels = np.r_[1, 10.0 ** rng.uniform(-3, -0.2, 3)]
    return _with_spectrum(rng, levels[np.sort(rng.integers(0, rng.integers(1, 5), d))], N)


def _powers(rng: np.random.Generator, d: int, N: int) -> np.ndarray:
    return _with_spectrum(rng, np.geomspace(1, 10.0 ** -rng.uniform(0.5, 8), d), N)


def _sparse(rng: np.random.Generator, d: int, N: int) -> np.ndarray:
    M = rng.normal(size=(d, N)) * (rng.random((d, N)) < rng.uniform(0.05, 0.6))
    return M + 10.0 ** rng.uniform(-8, -2) * rng.normal(size=(d, N))


def _rank_one(rng: np.random.Generator, d: int, N: int) -> np.ndarray:
    rank = rng.integers(1, max(2, d // 3))
    M = rng.normal(size=(d, rank)) @ rng.normal(size=(rank, N))
    return M + 10.0 ** rng.uniform(-9, -1) * rng.normal(size=(d, N))


def _equal_rows(rng: np.random.Generator, d: int, N: int) -> np.ndarray:
    rows = rng.normal(size=(rng.integers(1, max(2, d // 2)), N))
    M = rows[rng.integers(0, len(rows), d)]
    return M + 10.0 ** rng.uniform(-7, -1) * rng.normal(size=(d, N))


def children(rng: np.random.Generator, parents: np.ndarray, count: int) -> np.ndarray:
    """Changes matrices in a few entries, a row, a column, or their spectrum, or mixes two."""
    made = parents[rng.integers(0, len(parents), count)].copy()
    kinds = rng.integers(0, 7, count)
    for M, kind in zip(made, kinds, strict=True):
        d, N = M.shape
        size = np.abs(M).max() or 1.0
        spread = 10.0 ** rng.uniform(-4, 0)
        if kind == 0:
            where = rng.integers(0, d, 3), rng.integers(0, N, 3)
            M[where] += spread * size * rng.normal(size=3)
        elif kind == 1:
            M *= 1 + spread * rng.normal(size=M.shape)
        elif kind == 2:
            M[rng.integers(d)] *= np.exp(spread * 2 * rng.normal())
        elif kind == 3:
            M[:, rng.integers(N)] *= np.exp(spread * 2 * rng.normal())
        elif kind == 4:
            other = parents[rng.integers(len(parents))]
            rows = rng.random(d) < 0.5
            M[rows] = other[rows]
        elif kind == 5:
            U, s, Vt = np.linalg.svd(M.astype(np.float64), full_matrices=False)
            s *= np.exp(spread * rng.normal(size=s.shape))
            M[:] = (U * s) @ Vt
        else:
            M += spread * size * rng.normal(size=M.shape) * (rng.random(M.shape) < 0.2)
        M /= np.abs(M).max() or 1.0
    return made


def search(
    run: Callable[[jax.Array], jax.Array],
    fitness: Callable[[np.ndarray, np.ndarray], np.ndarray],
    shape: tuple[int, int],
    seed: int = 0,
    generations: int | None = None,
    seconds: float = np.inf,
) -> tuple[float, np.ndarray]:
    """Looks for the matrix whose result is worst.

    Args:
      run: From matrices [population, d, N] to their polar factors.
      fitness: From matrices and results to what is looked for, the larger the better.
      shape: (d, N).
      seed: Of random numbers.
      generations: After how many to end, if `seconds` do not end it.
      seconds: After how many to end.

    Returns:
      The largest fitness that was found, and its matrix.
    """
    rng, begin = np.random.default_rng(seed), time.monotonic()
    population = max(16, min(POPULATION, NUMBERS // (shape[0] * shape[1])))
    tried = first(rng, population, *shape)
    best, scores = np.empty((0, *shape), np.float32), np.empty(0)
    for generation in itertools.count(1):
        found = fitness(tried, np.asarray(run(jnp.asarray(tried))))
        best, scores = np.concatenate([best, tried]), np.concatenate([scores, found])
        order = np.argsort(-scores, kind="stable")[: population // 5]
        best, scores = best[order], scores[order]
        is_last = generation == generations or time.monotonic() - begin > seconds
        if is_last or not np.isfinite(scores[0]):
            break
        fresh = first(rng, population // 8, *shape)
        tried = np.concatenate([fresh, children(rng, best, population - len(fresh))])
    return float(scores[0]), best[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Searches as the command line says, a line for each method and shape."""
    options = parser().parse_args(argv)
    for seed in itertools.count(options.seed):
        for shape, method in itertools.product(options.shapes, options.methods):
            line = [method, "x".join(map(str, shape)), f"seed {seed}"]
            run = run_of(_method(method), options.restarts, options.products)
            for name, fitness in (("largest", largest), ("kept", lost)):
                worst, _ = search(run, fitness, shape, seed, seconds=options.seconds)
                line.append(f"{name} {worst if fitness is largest else 1 - worst:.3f}")
            print(*line, sep="  ", flush=True)
        if not options.until_killed:
            break


def _method(text: str) -> MethodLike:
    """Reads "schatten", or "7,1e-4" as `polar_express(7, 1e-4)`."""
    steps, *lower = text.split(",")
    return polar_express(int(steps), *map(float, lower)) if steps.isdigit() else text


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.worst_case", description=__doc__)
    add = functools.partial(parser.add_argument)
    sizes: Any = lambda text: tuple(map(int, text.split("x")))  # noqa: E731
    add("--methods", nargs="+", default=["polar_express", "schatten", "fast"])
    add("--shapes", nargs="+", type=sizes, default=[(4, 16), (12, 30), (32, 128)])
    add("--products", choices=FORMATS, default="bf16")
    add("--restarts", nargs="+", type=int, help="steps after each start, if not the default")
    add("--seconds", type=float, default=60, help="of a search; default: 60")
    add("--seed", type=int, default=0)
    add("--until-killed", action="store_true", help="begin again, with the next seed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
