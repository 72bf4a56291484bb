"""Draws the losses of several runs of `train_gpt` in one plot, and prints the last ones.

python -m examples.compare_runs runs/tiny-teon runs/tiny-muon runs/tiny-adamw --out losses.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples import metrics, run_folder
from examples.command_line import Parser, exit_code, path
from examples.errors import UserError


class Curve(NamedTuple):
    """One run's losses by step; `validation` holds (step, loss) where it was evaluated."""

    optimizer: str
    seed: int
    learning_rate: float
    training: np.ndarray
    validation: np.ndarray


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""

    def run() -> int:
        parser = Parser(prog="python -m examples.compare_runs", description=__doc__)
        parser.add_argument("runs", nargs="+", type=path, help="folders that train_gpt wrote")
        parser.add_argument("--out", type=path, required=True, help="the PNG file to write")
        arguments = parser.parse_args(argv)
        if arguments.out.is_dir():
            raise UserError(f"--out {arguments.out} is a folder: write the name of a PNG file")
        curves = [read(run) for run in arguments.runs]
        plot(curves, arguments.out)
        print(table(curves))
        return 0

    return exit_code("compare_runs", run)


def read(run: Path) -> Curve:
    """The curve of one run folder."""
    options = run_folder.read_config(run)["options"]
    for name, wanted in (("optimizer", str), ("seed", int), ("learning_rate", float)):
        if not isinstance(options, dict) or type(options.get(name)) is not wanted:
            raise UserError(f"{run / run_folder.CONFIG} is damaged: it has no {name}")
    records = metrics.read(run)
    evaluated = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if not evaluated:
        raise UserError(f"{run} has no validation loss yet")
    training = np.array([(record["step"], record["loss"]) for record in records])
    return Curve(
        options["optimizer"],
        options["seed"],
        options["learning_rate"],
        training,
        np.array(evaluated),
    )


def table(curves: Sequence[Curve]) -> str:
    """Last validation loss of each run, as Markdown."""
    rows = ["| optimizer | seed | learning rate | step | validation loss | perplexity |"]
    rows += ["|---|---|---|---|---|---|"]
    for curve in curves:
        step, loss = curve.validation[-1]
        with np.errstate(over="ignore"):
            perplexity = np.exp(loss)
        rows.append(
            f"| {curve.optimizer} | {curve.seed} | {curve.learning_rate:g} | {step:.0f} "
            f"| {loss:.4f} | {perplexity:.3f} |"
        )
    return "\n".join(rows)


def plot(curves: Sequence[Curve], out: Path) -> None:
    """Training losses, smoothed, as lines and validation losses as points."""
    from matplotlib.figure import Figure  # as in `metrics`: late

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(c.optimizer for c in curves))}
    labelled = set()
    for curve in curves:
        steps, losses = curve.training.T
        window = min(10, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        label = None if curve.optimizer in labelled else curve.optimizer
        labelled.add(curve.optimizer)
        colour = colours[curve.optimizer]
        axes.plot(steps[window - 1 :], smooth, color=colour, linewidth=1, label=label)
        axes.plot(*curve.validation.T, "o", color=colour, markersize=4)
    last = max(curve.validation[-1, 1] for curve in curves)
    first = max(curve.validation[0, 1] for curve in curves)
    axes.set_ylim(top=first + 0.5 * (first - last))
    axes.set(xlabel="step", ylabel="loss (nats per token); points: held-out files")
    axes.legend()
    axes.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    metrics.save_figure(figure, out)


if __name__ == "__main__":
    sys.exit(main())
