"""Figures of runs: losses of one or several, and how alike the momenta of neighbours are."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.run_folder import Metrics, replacing

SMOOTHED = 10  # steps, where several runs are compared
# In the order of the figures that a record has for a group.
FIGURES = ("overlap of left vectors", "overlap of right vectors", "r of mode 1", "r of mode 2")


class Curve(NamedTuple):
    """The records of a run, with the label that it may share with others."""

    label: str
    records: Sequence[Metrics]


def losses(curves: Sequence[Curve], path: Path, title: str = "") -> None:
    """Draws training losses as lines, and validation losses as points."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    colours = {label: f"C{n}" for n, label in enumerate(dict.fromkeys(c.label for c in curves))}
    for label, colour in colours.items():
        axes.plot([], [], color=colour, label=label)
    for label, records in curves:
        window = SMOOTHED if len(records) > SMOOTHED and len(curves) > 1 else 1
        steps, values = _points(records, "loss")
        smooth = np.convolve(values, np.ones(window) / window, "valid") if records else values
        axes.plot(steps[window - 1 :], smooth, color=colours[label], linewidth=1)
        axes.plot(*_points(records, "val_loss"), "o", color=colours[label], markersize=4)
    if len(curves) > 1:  # What tells them apart is below the first steps.
        validation = [_points(curve.records, "val_loss")[1] for curve in curves]
        first, last = (max(values[end] for values in validation) for end in (0, -1))
        axes.set_ylim(top=first + 0.5 * (first - last))
    axes.set(xlabel="step", ylabel="loss (nats per token); points: held out", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def alignment(records: Sequence[Metrics], path: Path, title: str) -> None:
    """Draws the mean over pairs of blocks for each type of matrix, if records have any."""
    records = [record for record in records if "alignment" in record]
    if not records:
        return
    figure = _figure(10, 7)
    panels = figure.subplots(2, 2, sharex=True)
    kinds = dict.fromkeys(_kind(path) for record in records for path in record["alignment"])
    for number, (axes, name) in enumerate(zip(panels.flat, FIGURES, strict=True)):
        for kind in kinds:
            values = [
                np.mean(
                    [own[number] for path, own in r["alignment"].items() if _kind(path) == kind]
                )
                for r in records
            ]
            steps = [record["step"] for record in records]
            axes.plot(steps, values, "o-", label=kind, linewidth=1, markersize=3)
        axes.set(title=name, ylim=(-0.03, 1.03) if number < 2 else (0.98, 2**0.5 + 0.02))
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set(xlabel="step")
    panels[0, 0].legend(fontsize="small")
    figure.suptitle(title)
    _save(figure, path)


def _kind(path: str) -> str:
    """Takes the number of the block, and what all matrices are called, out of a path."""
    return re.sub(r"^block_\d+/|/kernel$", "", path)


def _points(records: Sequence[Metrics], name: str) -> np.ndarray:
    """Collects (2, n): steps, and a figure that some of the records have."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return np.reshape(points, (-1, 2)).T


def _figure(width: float, height: float) -> Any:
    # Its first import builds a font cache, and says so on stderr: not where an error is reported.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """Writes the whole PNG or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
