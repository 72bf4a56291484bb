"""The comparison's figure: the same colours in all panels, a legend, bands over seeds."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.reproduce.configurations import CONFIGURATIONS
from benchmarks.reproduce.records import rate_of
from benchmarks.reproduce.statistics import curve_of

COLOURS = {"muon": "C0", "stack-1": "C1", "teon-1": "C2", "teon-2": "C3", "adamw": "C4"}


def draw(
    found: Mapping[str, Any],
    swept: Mapping[str, Mapping[int, float]],
    against: Mapping[str, Any],
    which: str,
) -> Figure:
    """Draws curves, their end, sweeps and paired differences.

    Args:
        found: Runs whose curves are drawn, by name.
        swept: Losses by k, by name.
        against: Differences from Muon, by name.
        which: What runs the curves are of.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    (curves, ends), (sweeps, differences) = figure.subplots(2, 2)
    draw_curves(curves, found)
    curves.set_title(f"{which}: the whole run")
    draw_curves(ends, found, last=0.5)
    ends.set_title("its second half")
    draw_sweeps(sweeps, swept)
    draw_differences(differences, found, against)
    lines = {}
    for axes in figure.axes:
        handles, titles = axes.get_legend_handles_labels()
        lines |= dict(zip(titles, handles, strict=True))
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=3)
    return figure


def draw_curves(axes: Any, found: Mapping[str, Any], last: float = 1.0) -> None:
    """Draws validation losses of averaged weights: means over seeds, and a standard deviation."""
    lowest = []
    for name, series in found.items():
        curves = [curve_of(run) for run in series.runs.values()]
        tokens, losses = curves[0][0] / 1e6, np.array([losses for _, losses in curves])
        shown = tokens > tokens[-1] * (1 - last)
        mean = losses.mean(0)
        lowest.append((mean[shown].max(), mean.min(), name))
        axes.plot(tokens[shown], mean[shown], **style(name))
        if len(losses) > 1:
            spread = losses.std(0, ddof=1)[shown]
            band = mean[shown] - spread, mean[shown] + spread
            axes.fill_between(tokens[shown], *band, color=colour(name), alpha=0.2, linewidth=0)
    if last < 1 and (matrices := [each for each in lowest if each[2] != "adamw"]):
        axes.set_ylim(
            min(low for _, low, _ in matrices) - 0.02, max(high for high, _, _ in matrices) + 0.02
        )
    axes.set(xlabel="million tokens", ylabel="validation loss")


def draw_sweeps(axes: Any, swept: Mapping[str, Mapping[int, float]]) -> None:
    """Draws losses of half-length runs by learning rate."""
    for name, losses in swept.items():
        if losses and CONFIGURATIONS[name].base is None:
            ks = [k for k in sorted(losses) if math.isfinite(losses[k])]
            axes.plot([rate_of(k) for k in ks], [losses[k] for k in ks], marker="o", **style(name))
    ks = sorted({k for losses in swept.values() for k in losses})
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.01, high + 0.01)  # a few points should not look far apart
    axes.set_xscale("log")
    axes.set_xticks([rate_of(k) for k in ks], [f"{rate_of(k):.2g}" for k in ks], fontsize=8)
    axes.minorticks_off()
    axes.set(
        xlabel="learning rate of the matrices",
        ylabel="validation loss",
        title="sweeps: half-length runs, one seed",
    )
    axes.grid(alpha=0.3)


def draw_differences(axes: Any, found: Mapping[str, Any], against: Mapping[str, Any]) -> None:
    """Draws paired differences from Muon; AdamW is far outside and stands in the table."""
    names = [name for name in found if name != "adamw" and against.get(name) is not None]
    for place, name in enumerate(names):
        value = against[name]
        half = 0.0 if math.isnan(value.half) else value.half
        axes.errorbar(value.mean, -place, xerr=half, fmt="o", color=colour(name), capsize=4)
        # In the panel: beside it, names would take the width of the curves.
        side = axes.get_yaxis_transform()
        axes.text(0.02, 0.2 - place, found[name].title, transform=side, fontsize=9)
    axes.axvline(0, color=colour("muon"), linewidth=1)
    axes.set_yticks([])
    axes.set_ylim(-len(names), 1)
    axes.set(xlabel="validation loss minus Muon's, 95 % interval", title="paired by seed")
    if not names:
        axes.text(0.5, 0.5, "no pairs yet", ha="center", transform=axes.transAxes)


def colour(name: str) -> str:
    """Gives an optimizer one colour in all panels."""
    return next(own for key, own in COLOURS.items() if name.startswith(key))


def style(name: str) -> dict[str, Any]:
    """Gives its lines a style: Muon's scale is dashed."""
    return {
        "color": colour(name),
        "label": CONFIGURATIONS[name].title,
        "linestyle": "--" if name.endswith("-muon-scale") else "-",
        "linewidth": 1.5,
        "markersize": 4,
    }
