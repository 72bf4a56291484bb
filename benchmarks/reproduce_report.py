"""Tables and plots of the runs of `reproduce`, of all that there are so far."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks import results
from benchmarks.configurations import CONFIGURATIONS
from benchmarks.reproduce import SWEEP_SEED, next_rate, rate_of, read, sweep_losses

ROOT = Path(__file__).parent.parent
PAGES = {
    "reproduce-headline": ROOT / "README.md",
    "reproduce": ROOT / "docs/results.md",
    "reproduce-couplings": ROOT / "docs/couplings.md",
}
REFERENCE = "muon"
CONFIDENCE = 0.95
SMOOTHED = 10  # steps
HEADLINE = {
    "adamw": "AdamW",
    "muon": "Muon, `polar_express`",
    "muon-schatten": "Muon, `schatten`",
    "teon-1": "TEON mode 1, `polar_express`",
    "teon-1-schatten": "TEON mode 1, `schatten`",
    "teon-2": "TEON mode 2, `polar_express`",
    "teon-2-schatten": "TEON mode 2, `schatten`",
    "muon-short-qkv": "Muon, Q K V updates / sqrt(2)",
}
# Title, and K of queries, keys and values.
COUPLINGS = {
    "muon": ("Muon: each alone", 1),
    "layers-1": ("2 layers, mode 1 (TEON)", 2),
    "layers-dct": ('2 layers, `"dct"` (`"dft"` and `"haar"` are the same)', 2),
    "layers-dct-4": ('4 layers, `"dct"`', 4),
    "layers-dft-4": ('4 layers, `"dft"`', 4),
    "layers-haar-4": ('4 layers, `"haar"`', 4),
    "siblings-1": ("Q, K, V, mode 1", 3),
    "siblings-2": ("Q, K, V, mode 2", 3),
    "siblings-dct": ('Q, K, V, `"dct"`', 3),
    "layers-siblings-1": ("Q, K, V of 2 layers, mode 1", 6),
    "heads-alone": ("each head alone", 1),
    "heads-1": ("4 heads, mode 1", 4),
    "heads-dct": ('4 heads, `"dct"`', 4),
    "siblings-heads-1": ("4 heads of Q, K, V, mode 1", 12),
    "muon-normalize": ("Muon, then `normalize_matrices`", 1),
    "muon-normuon": ("Muon, then `scale_by_normuon`", 1),
    "muon-cautious": ("Muon, `add_cautious_weight_decay`", 1),
    "teon-1": ("TEON mode 1 at its own length", 2),
    "teon-1-normalize": ("the same, then `normalize_matrices`", 2),
    "teon-1-normuon": ("the same, then `scale_by_normuon`", 2),
    "teon-1-cautious": ("the same, `add_cautious_weight_decay`", 2),
    "muon-short-qkv": ("Muon, updates of Q, K, V / sqrt(2)", 1),
}
# What is compared with what, seed by seed.
PAIRS = (
    ("teon-1", "muon"),
    ("teon-2", "muon"),
    ("teon-2", "teon-1"),
    ("teon-1-schatten", "muon-schatten"),
    ("teon-2-schatten", "muon-schatten"),
    ("teon-2-schatten", "teon-1-schatten"),
    ("muon-schatten", "muon"),
    ("teon-1-schatten", "teon-1"),
    ("teon-2-schatten", "teon-2"),
    ("muon-short-qkv", "muon"),
    ("teon-1", "muon-short-qkv"),
    ("teon-2", "muon-short-qkv"),
    ("adamw", "muon"),
    ("teon-3", "muon"),
    ("teon-1-k4", "teon-1"),
    ("teon-1-all-layers", "teon-1"),
    ("teon-1-everything", "teon-1"),
    ("muon-jordan", "muon"),
    ("teon-1-jordan", "teon-1"),
    ("muon-you", "muon"),
    ("adamw-one-rate", "adamw"),
    ("layers-dct", "layers-1"),
    ("siblings-dct", "siblings-1"),
    ("heads-dct", "heads-1"),
    ("heads-1", "heads-alone"),
    ("teon-1-normalize", "muon-normalize"),
    ("teon-1-normuon", "muon-normuon"),
    ("teon-1-normalize", "teon-1"),
    ("teon-1-normuon", "teon-1"),
    ("teon-1-cautious", "teon-1"),
)
BY_K = {"1": "muon", "2": "teon-1", "4": "teon-1-k4", "all": "teon-1-all-layers"}
BY_MODE = {"Muon": "muon", "1": "teon-1", "2": "teon-2", "3": "teon-3"}
BY_METHOD = {
    method: [
        f"{base}-{method}" if method != "polar_express" else base for base in ("muon", "teon-1")
    ]
    for method in ("polar_express", "schatten", "jordan", "you", "svd")
}


class Summary(NamedTuple):
    """A configuration at its best learning rate.

    Attributes:
        k: The rate is 0.01 * 2^(k / 2).
        swept: Validation loss by k, of the sweep's seed.
        inside: Whether the sweep went on until it knew both neighbours of the best.
        losses: Validation loss by seed at the best rate, without the sweep's seed.
        curves: Training losses by seed, of the same runs.
    """

    k: int
    swept: dict[int, float]
    inside: bool
    losses: dict[int, float]
    curves: dict[int, list[float]]

    @property
    def rate(self) -> float:
        return rate_of(self.k)

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.losses.values())))


class Difference(NamedTuple):
    """Mean of paired differences; `half` is half the width of its confidence interval."""

    mean: float
    half: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}" if self.pairs > 1 else f"{self.mean:+.4f}"


def report(out: Path, update_pages: bool = False) -> None:
    """Writes `reproduce.json`, `.md` and `.png` beside the runs."""
    found = {name: summary for name in CONFIGURATIONS if (summary := summarize(out, name))}
    if not found:
        raise SystemExit(f"no runs in {out}")
    setup = json.loads((out / "setup.json").read_text())
    count = sum(len(read(out, name)) for name in CONFIGURATIONS)
    headline = f"{headline_table(found)}\n\n{caption(setup, count)}"
    page = "\n\n".join([headline, pairs_table(found), rates_table(found), all_table(found)])
    record = {
        "benchmark": "reproduce",
        **setup,
        "runs": count,
        "configurations": {name: as_json(summary) for name, summary in found.items()},
    }
    results.write(out, "reproduce", record, page, plot(found))
    if update_pages:
        couplings = f"{couplings_table(found)}\n\n{caption(setup, count)}"
        for (name, path), text in zip(PAGES.items(), (headline, page, couplings), strict=True):
            results.update_readme(name, text, path)


def summarize(out: Path, name: str) -> Summary | None:
    """What is known of a configuration; None where nothing is."""
    configuration = CONFIGURATIONS[name]
    records = read(out, name)
    base = CONFIGURATIONS[configuration.base or name]
    swept = sweep_losses(read(out, base.name))
    if not records or not swept:
        return None
    best = min(swept, key=swept.__getitem__)
    chosen = {r["seed"]: r for r in records if r["k"] == best and r["seed"] != SWEEP_SEED}
    return Summary(
        best,
        swept if base is configuration else {},
        next_rate(base, swept) is None,
        {
            seed: math.inf if chosen[seed]["val_loss"] is None else chosen[seed]["val_loss"]
            for seed in sorted(chosen)
        },
        {seed: chosen[seed]["losses"] for seed in sorted(chosen)},
    )


def difference(ours: Summary, theirs: Summary) -> Difference | None:
    """Over the seeds that both have; None where there are none."""
    seeds = ours.losses.keys() & theirs.losses.keys()
    if not seeds:
        return None
    values = [ours.losses[seed] - theirs.losses[seed] for seed in seeds]
    count, half = len(values), math.nan
    if count > 1:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        half = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Difference(float(np.mean(values)), half, count)


def best_of_parabola(summary: Summary) -> float | None:
    """The learning rate at the vertex of the parabola through the best and its neighbours."""
    below = [k for k in summary.swept if k < summary.k]
    above = [k for k in summary.swept if k > summary.k]
    if not below or not above:
        return None
    ks = [max(below), summary.k, min(above)]
    losses = [summary.swept[k] for k in ks]
    if not all(map(math.isfinite, losses)):
        return None
    a, b, _ = np.polyfit(ks, losses, 2)
    return float(rate_of(-b / (2 * a))) if a > 0 else None


def caption(setup: Mapping[str, Any], runs: int) -> str:
    """What was run, under the headline."""
    tokens = setup["batch_size"] * setup["context"]
    return (
        "Mean ± standard deviation over seeds; differences of losses are paired by seed, with "
        f"their {CONFIDENCE:.0%} confidence interval. {runs} runs of {setup['steps']} steps of "
        f"{tokens} tokens, model `{setup['model']}`, {setup['vocab_size']} BPE tokens. "
        f"{results.caption(dict(setup))}"
    )


def headline_table(found: Mapping[str, Summary]) -> str:
    header = "optimizer", "learning rate", "seeds", "validation loss", "perplexity", "against Muon"
    rows = [_row(title, name, found) for name, title in HEADLINE.items() if name in found]
    return results.markdown(header, rows)


def couplings_table(found: Mapping[str, Summary]) -> str:
    header = "coupling", "K", "learning rate", "seeds", "validation loss", "against Muon"
    rows = []
    for name, (title, K) in COUPLINGS.items():
        if name in found:
            title, rate, seeds, loss, _, against = _row(title, name, found)
            rows.append([title, str(K), rate, seeds, loss, against])
    return results.markdown(header, rows)


def all_table(found: Mapping[str, Summary]) -> str:
    header = "run", "learning rate", "seeds", "validation loss", "perplexity", "against Muon"
    return results.markdown(header, [_row(f"`{name}`", name, found) for name in found])


def _row(title: str, name: str, found: Mapping[str, Summary]) -> list[str]:
    summary = found[name]
    rate = f"{summary.rate:.2g}" + ("" if summary.inside else " (sweep not done)")
    losses = list(summary.losses.values())
    if not losses:
        return [title, rate, "0", "", "", ""]
    spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
    against = difference(summary, found[REFERENCE]) if REFERENCE in found else None
    return [
        title,
        rate,
        str(len(losses)),
        f"{summary.mean:.4f}{spread}",
        f"{math.exp(summary.mean):.1f}",
        "" if against is None or name == REFERENCE else str(against),
    ]


def pairs_table(found: Mapping[str, Summary]) -> str:
    header = "paired, same seeds", "pairs", "difference of losses", "of perplexities"
    rows = []
    for ours, theirs in PAIRS:
        if ours in found and theirs in found:
            if (value := difference(found[ours], found[theirs])) is not None:
                percent = 100 * math.expm1(value.mean)
                row = f"`{ours}` - `{theirs}`", str(value.pairs), str(value), f"{percent:+.1f} %"
                rows.append(row)
    return results.markdown(header, rows)


def rates_table(found: Mapping[str, Summary]) -> str:
    """The sweeps: one column for each learning rate."""
    swept = {name: summary for name, summary in found.items() if summary.swept}
    ks = sorted({k for summary in swept.values() for k in summary.swept})
    header = "seed 0", *(f"{rate_of(k):.2g}" for k in ks), "vertex"
    rows = []
    for name, summary in swept.items():
        cells = [f"{summary.swept[k]:.4f}" if k in summary.swept else "" for k in ks]
        cells = [f"**{c}**" if k == summary.k else c for k, c in zip(ks, cells, strict=True)]
        vertex = best_of_parabola(summary)
        rows.append([f"`{name}`", *cells, "" if vertex is None else f"{vertex:.2g}"])
    return results.markdown(header, rows)


def as_json(summary: Summary) -> dict[str, Any]:
    return {
        "rate": float(f"{summary.rate:.4g}"),
        "inside": summary.inside,
        "sweep": {f"{rate_of(k):.4g}": summary.swept[k] for k in sorted(summary.swept)},
        "seeds": summary.losses,
    }


def plot(found: Mapping[str, Summary]) -> Figure:
    """Curves, sweeps, and perplexity by K, mode and method."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 3).flat
    draw_curves(next(panels), found)
    draw_rates(next(panels), found)
    draw_points(next(panels), found, HEADLINE, "against Muon, loss", HEADLINE.keys())
    draw_bars(next(panels), found, BY_K, "K (mode 1)")
    draw_bars(next(panels), found, BY_MODE, "mode (K = 2)")
    draw_methods(next(panels), found)
    return figure


def draw_curves(axes: Any, found: Mapping[str, Summary]) -> None:
    """Training losses, mean over seeds, smoothed."""
    for name, title in HEADLINE.items():
        if name in found and found[name].curves:
            mean = np.mean(list(found[name].curves.values()), axis=0)
            window = min(SMOOTHED, len(mean))
            smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
            axes.plot(np.arange(window, len(mean) + 1), smooth, linewidth=1, label=title)
    axes.set(xlabel="step", ylabel="training loss, mean of seeds", yscale="log")
    axes.legend(fontsize=7)


def draw_rates(axes: Any, found: Mapping[str, Summary]) -> None:
    for name, title in HEADLINE.items():
        if name in found and not name.startswith("adamw"):
            ks = sorted(found[name].swept)
            rates = [rate_of(k) for k in ks]
            axes.plot(rates, [found[name].swept[k] for k in ks], "o-", markersize=3, label=title)
    axes.set(xlabel="learning rate", ylabel="validation loss, seed 0", xscale="log")
    matrices = [s for name, s in found.items() if name in HEADLINE and not name.startswith("adamw")]
    if losses := [loss for summary in matrices for loss in summary.swept.values()]:
        best = min(losses)
        axes.set_ylim(best - 0.02, min(max(losses), best + 0.4) + 0.02)


def draw_points(
    axes: Any,
    found: Mapping[str, Summary],
    titles: Mapping[str, str],
    label: str,
    names: Iterable[str],
) -> None:
    """Paired differences from Muon with their confidence intervals; AdamW is far outside."""
    if REFERENCE not in found:
        return
    shown = [name for name in names if name in found and not name.startswith("adamw")]
    values = {name: difference(found[name], found[REFERENCE]) for name in shown}
    shown = [name for name in shown if name != REFERENCE and values[name] is not None]
    for place, name in enumerate(shown):
        value = values[name]
        assert value is not None
        half = 0.0 if math.isnan(value.half) else value.half
        axes.errorbar(value.mean, -place, xerr=half, fmt="o", color="C0", capsize=3)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks([-place for place in range(len(shown))], [titles[name] for name in shown])
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel=f"{label}, {CONFIDENCE:.0%} interval")


def common_perplexities(
    found: Mapping[str, Summary], names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Perplexity of each, over the seeds that all of them have.

    With the standard deviation of its difference from the first one's: that of the perplexity
    itself is the seeds', which all share.
    """
    present = [name for name in names if name in found and found[name].losses]
    if not present:
        return {}
    seeds = set.intersection(*(set(found[name].losses) for name in present))
    values = {name: np.exp([found[name].losses[seed] for seed in seeds]) for name in present}
    first = values[present[0]]
    return {
        name: (float(own.mean()), float((own - first).std()))
        for name, own in values.items()
        if own.size
    }


def draw_bars(
    axes: Any, found: Mapping[str, Summary], names: Mapping[str, str], label: str
) -> None:
    values = common_perplexities(found, list(names.values()))
    shown = {title: values[name] for title, name in names.items() if name in values}
    for place, (mean, spread) in enumerate(shown.values()):
        axes.errorbar(place, mean, yerr=spread, fmt="o", color="C0", capsize=3)
    axes.set_xticks(range(len(shown)), list(shown))
    axes.set(xlabel=label, ylabel="perplexity, seeds in common")


def draw_methods(axes: Any, found: Mapping[str, Summary]) -> None:
    names = [name for pair in BY_METHOD.values() for name in pair]
    values = common_perplexities(found, names)
    for which, title in enumerate(("Muon", "TEON mode 1")):
        points = [
            (p, values[pair[which]])
            for p, pair in enumerate(BY_METHOD.values())
            if pair[which] in values
        ]
        places = [place + 0.15 * which for place, _ in points]
        means, spreads = [v[0] for _, v in points], [v[1] for _, v in points]
        axes.errorbar(places, means, yerr=spreads, fmt="o", capsize=3, label=title)
    axes.set_xticks(range(len(BY_METHOD)), list(BY_METHOD), fontsize=7)
    axes.set(xlabel="method", ylabel="perplexity, seeds in common")
    axes.legend(fontsize=7)
