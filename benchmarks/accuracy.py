r"""How orthogonal an update is: by method, format of the products, restarts, and spectrum.

    python -m benchmarks.accuracy                                    # made-up spectra alone
    python -m examples.train_gpt --out runs/tiny-teon
    python -m benchmarks.accuracy --momentum runs/tiny-teon          # and that run's momentum
    python -m benchmarks.accuracy --momentum runs/tiny-teon --save-momentum momentum.npz

README.md says what each figure means. Products are rounded by emulation, so every device gives
the same figures but for the last digits; `--products device "device bf16"` asks the device itself.
"""

import argparse
import functools
import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from matplotlib.figure import Figure

from benchmarks import results
from examples import checkpoints, run_folder
from teon_optax import plan
from teon_optax._polar.coefficients import resolve
from teon_optax._polar.newton_schulz import orthogonalize_together
from teon_optax._polar.numerics import Numerics
from tests.emulation import FORMATS, with_products_in

METHODS = ("polar_express", "schatten", "fast", "jordan", "dion", "you")
PRODUCTS = ("float32", *FORMATS)
# Not emulated: as the device computes one pass by default, and as bf16.
ON_DEVICE = {
    "device": jax.lax.Precision.DEFAULT,
    "device bf16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
}
# Directions above this share of the largest singular value are to be kept.
KEPT = 0.03
RATIOS = (1, 2)
MATRICES = 4
RESTARTS = ("default", "direct", "whole")
SHOWN = ("largest", "kept", "rms")


class Inputs(NamedTuple):
    """Matrices of one shape, and their singular values."""

    matrices: np.ndarray  # (count, m, n)
    singular_values: np.ndarray  # (count, min(m, n))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for, and writes it."""
    options = parser().parse_args(argv)
    spectra = made_up(options.size)
    if options.momentum:
        momentum = read_momentum(options.momentum)
        if options.save_momentum:
            arrays: Any = momentum
            np.savez(options.save_momentum, **arrays)
        spectra["momentum"] = joint_matrices(momentum)
    record: dict[str, Any] = {"benchmark": "accuracy", "environment": results.environment()}
    record["spectra"] = {name: describe(inputs) for name, inputs in spectra.items()}
    record["rows"] = measure(spectra, options.methods, options.products)
    figure = plot(spectra, options.methods, options.products)
    backend = record["environment"]["backend"]
    name = "accuracy" if backend == "cpu" else f"accuracy-{backend}"
    results.publish(options, name, record, table(record), figure)


def parser() -> argparse.ArgumentParser:
    parser = results.parser("accuracy", __doc__)
    add = parser.add_argument
    add("--momentum", type=Path, help="a run's folder (of --optimizer teon), or an .npz of leaves")
    add("--save-momentum", type=Path, help="write that momentum to an .npz, a leaf per path")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--products", nargs="+", choices=(*PRODUCTS, *ON_DEVICE), default=PRODUCTS)
    add("--size", type=int, default=256, help="d of the made-up matrices; default: 256")
    return parser


def made_up(d: int) -> dict[str, list[Inputs]]:
    """Makes Gaussian matrices, and those with singular values 1, 1/2, ...; square and 2:1."""
    rng = np.random.default_rng(0)
    gaussian, power_law = [], []
    for ratio in RATIOS:
        matrices = rng.normal(size=(MATRICES, ratio * d, d))
        U, s, Vt = np.linalg.svd(matrices, full_matrices=False)
        gaussian.append(Inputs(matrices, s))
        power = np.broadcast_to(1 / np.arange(1, d + 1), (MATRICES, d))
        power_law.append(Inputs((U * power[:, None]) @ Vt, power))
    return {"gaussian": gaussian, "power law": power_law}


def read_momentum(path: Path) -> dict[str, np.ndarray]:
    """Reads the momentum's leaves by path, from a run's newest checkpoint or from an .npz."""
    if path.is_file():
        with np.load(path) as file:
            return dict(file)
    with checkpoints.opened(path / run_folder.CHECKPOINTS) as manager:
        step = manager.latest_step()
        if step is None:
            raise SystemExit(f"accuracy: error: {path} holds no checkpoint")
        state = manager.restore(step, args=ocp.args.StandardRestore())
    momentum = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if found := re.search("/teon/.*/mu/(.*)", name):
            momentum[found[1]] = np.asarray(leaf)
    if not momentum:
        raise SystemExit(f"accuracy: error: {path} is no run of --optimizer teon")
    return momentum


def joint_matrices(momentum: Mapping[str, np.ndarray]) -> list[Inputs]:
    """Joins what the default rules orthogonalize together, by shape; all of it is of mode 1."""
    by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
    for group in plan(dict(momentum)).groups:
        joint = np.concatenate([momentum[path] for path in group.members])
        by_shape.setdefault(joint.shape, []).append(joint)
    stacked = [np.stack(matrices).astype(np.float64) for matrices in by_shape.values()]
    return [Inputs(M, np.linalg.svd(M, compute_uv=False)) for M in stacked]


def describe(spectrum: Sequence[Inputs]) -> dict[str, Any]:
    """Shapes, and how much of the spectrum lies above two shares of its largest value."""
    relative = np.concatenate(
        [(inputs.singular_values / inputs.singular_values[:, :1]).ravel() for inputs in spectrum]
    )
    return {
        "matrices": [list(inputs.matrices.shape) for inputs in spectrum],
        "above 3e-2": float(np.mean(relative > KEPT)),
        "above 1e-3": float(np.mean(relative > 1e-3)),
    }


def measure(
    spectra: Mapping[str, list[Inputs]], methods: Sequence[str], formats: Sequence[str]
) -> list[dict[str, Any]]:
    """Measures a row for each method, format and restarts, with figures for each spectrum."""
    rows = []
    for method, products in itertools.product(methods, formats):
        # Exact products tolerate any restarts; bf16, the coarsest, shows what the default is for.
        for restarts in RESTARTS if products == "bf16" else RESTARTS[:1]:
            row: dict[str, Any] = {"method": method, "products": products, "restarts": restarts}
            for name, spectrum in spectra.items():
                row[name] = errors(spectrum, method, products, restarts)
            rows.append(row)
    return rows


def errors(
    spectrum: Sequence[Inputs], method: str, products: str, restarts: str
) -> dict[str, float]:
    """Sums errors up: `largest` and `kept` are the worst matrix's, `rms` and `distance` means."""
    largest, kept, squares, distances = 0.0, np.inf, [], []
    for M, singular_values in spectrum:
        X = orthogonalized(M, method, products, restarts)
        if not np.isfinite(X).all():
            return dict.fromkeys((*SHOWN, "distance"), float("inf"))
        s = np.linalg.svd(X, compute_uv=False)
        largest = max(largest, s.max())
        count = np.sum(singular_values >= KEPT * singular_values[:, :1], axis=1, keepdims=True)
        kept = min(kept, np.take_along_axis(s, count - 1, axis=1).min())
        squares.append(np.square(s - 1).mean())
        U, _, Vt = np.linalg.svd(M, full_matrices=False)
        distances.append(np.linalg.norm(X - U @ Vt, axis=(1, 2)).mean() / np.sqrt(s.shape[1]))
    return {
        "largest": float(largest),
        "kept": float(kept),
        "rms": float(np.sqrt(np.mean(squares))),
        "distance": float(np.mean(distances)),
    }


def orthogonalized(matrices: np.ndarray, method: str, products: str, restarts: str) -> np.ndarray:
    """Orthogonalizes matrices as the library does, with products rounded to a format."""
    steps = steps_of(method, matrices.shape[1:], products, restarts)
    function = polynomial(method, products, steps)
    return np.asarray(function(jnp.float32(matrices)), np.float64)


def steps_of(method: str, shape: Sequence[int], products: str, restarts: str) -> tuple[int, ...]:
    """Chooses the default restarts, or an end: every step direct, all in one segment."""
    m, n = shape
    default = Numerics(resolve(method), precision(products)).restarts(m, n)
    return {"default": default, "direct": (1,) * sum(default), "whole": (sum(default),)}[restarts]


def precision(products: str) -> jax.lax.PrecisionLike:
    """Finds the precision of products that are computed like this."""
    exact = jax.lax.Precision.HIGHEST if products == "float32" else jax.lax.Precision.DEFAULT
    return ON_DEVICE.get(products, exact)


@functools.cache
def polynomial(
    method: str, products: str, restarts: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    """Compiles the library's own function of a batch of matrices, once for each shape."""

    def run(batch: jax.Array) -> jax.Array:
        numerics = Numerics(resolve(method), precision(products))
        (result,) = orthogonalize_together([batch], [1.0], numerics, restarts)
        return result

    return jax.jit(with_products_in(products, run) if products in FORMATS else run)


def table(record: dict[str, Any]) -> str:
    """Shows for each method, format and restarts: largest / smallest kept / RMS of |sigma - 1|."""
    names = list(record["spectra"])
    rows = []
    for row in record["rows"]:
        cells = [" / ".join(f"{row[name][figure]:.3g}" for figure in SHOWN) for name in names]
        rows.append([row["method"], row["products"], row["restarts"], *cells])
    header = ["method", "products", "restarts", *names]
    notes = [
        f"{name}: {sum(shape[0] for shape in about['matrices'])} matrices, "
        f"{about['above 3e-2']:.0%} of the singular values above 3e-2 of the largest, "
        f"{about['above 1e-3']:.0%} above 1e-3"
        for name, about in record["spectra"].items()
    ]
    return "\n\n".join(
        [results.markdown(header, rows), "; ".join(notes) + ".", results.caption(record)]
    )


def plot(
    spectra: Mapping[str, list[Inputs]], methods: Sequence[str], formats: Sequence[str]
) -> Figure:
    """Draws singular values before and after, by method, in float32 and bf16 or all formats."""
    figure = Figure(figsize=(5 * len(spectra), 4), layout="constrained")
    panels = figure.subplots(1, len(spectra), sharey=True, squeeze=False)[0]
    shown = [products for products in ("float32", "bf16") if products in formats] or formats
    for axes, (name, spectrum) in zip(panels, spectra.items(), strict=True):
        M, singular_values = spectrum[-1]
        for method, products in itertools.product(methods, shown):
            after = np.linalg.svd(orthogonalized(M, method, products, "default"), compute_uv=False)
            axes.plot(
                singular_values[0] / singular_values[0, 0],
                after[0],
                "-" if products == shown[0] else ":",
                color=f"C{METHODS.index(method)}",
                label=f"{method}, {products}",
            )
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set(xscale="log", xlabel="singular value, by the largest", title=name)
    panels[0].set(ylabel="singular value of the update, by rank", ylim=(0, 1.5))
    panels[0].legend(fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(main())
