"""How alike the momenta of neighbouring blocks are in the course of a run (`--alignment-every`)."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import optax

import teon_optax
from examples import metrics, run_folder
from examples.program import TrainState

# In the order of the figures that `measure` gives for a group.
FIGURES = ("overlap of left vectors", "overlap of right vectors", "r of mode 1", "r of mode 2")


def measure(state: TrainState) -> dict[str, list[float]]:
    """Overlaps of left and right leading vectors, r of modes 1 and 2, of every pair of layers.

    Candidates are all matrices of the blocks, whatever the run's own rules stack.
    """
    _, of_teon = state.opt_state
    momentum = optax.tree.get(of_teon.inner_states["teon"], "mu")
    pairs = teon_optax.rules.all_hidden(state.params)
    return {
        group.members[0]: [round(float(figure), 5) for figure in (*group.overlaps, *group.ratios)]
        for group in teon_optax.alignment(momentum, pairs)
    }


def plot(out: Path, title: str) -> None:
    """Draws the mean over pairs, for each type of matrix, if the metrics of a run have any."""
    from matplotlib.figure import Figure  # as in `metrics`: late

    records = [record for record in metrics.read(out) if "alignment" in record]
    if not records:
        return
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for number, (axes, name) in enumerate(zip(panels.flat, FIGURES, strict=True)):
        for kind in dict.fromkeys(_kind(path) for r in records for path in r["alignment"]):
            points = [(r["step"], _mean(r["alignment"], kind, number)) for r in records]
            axes.plot(*np.reshape(points, (-1, 2)).T, "o-", label=kind, linewidth=1, markersize=3)
        axes.set(title=name, ylim=(-0.03, 1.03) if number < 2 else (0.98, 2**0.5 + 0.02))
        axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set(xlabel="step")
    panels[0, 0].legend(fontsize="small")
    figure.suptitle(title)
    metrics.save_figure(figure, out / run_folder.ALIGNMENT)


def _kind(path: str) -> str:
    return re.sub(r"^block_\d+/|/kernel$", "", path)


def _mean(alignment: dict[str, Any], kind: str, number: int) -> float:
    return float(np.mean([fs[number] for path, fs in alignment.items() if _kind(path) == kind]))
