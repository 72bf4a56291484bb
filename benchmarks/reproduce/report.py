"""Tables and figure of the comparison, of all that there are so far."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.reproduce import schedule
from benchmarks.reproduce.configurations import CONFIGURATIONS, STACKED
from benchmarks.reproduce.figure import draw
from benchmarks.reproduce.records import SETUP, Record, loss_of, rate_of, read
from benchmarks.reproduce.statistics import (
    CONFIDENCE,
    REFERENCE,
    Series,
    best_of_sweeps,
    difference,
    noise,
    series,
    sweep,
    tokens_to_reach,
)
from benchmarks.reproduce.training import CURVE_TOKENS

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
WANTED = 0.005  # half the width of an interval that tells what users ask
IN_PART = {name for name, each in CONFIGURATIONS.items() if each.base is not None}


def report(out: Path, update_readme: bool = False) -> None:
    """Writes `reproduce.json`, `.md` and `.png` beside the runs."""
    records = read(out)
    if not records:
        raise SystemExit(f"no runs in {out}")
    setup = json.loads((out / SETUP).read_text())
    found = series(records, setup["steps"])
    shorter = half_as_long(records, setup["steps"] // 2)
    headline = {name: each for name, each in found.items() if name not in IN_PART}
    half = setup["steps"] // 2
    parts = [verdict(headline), headline_table(headline), caption(setup, records)]
    more = _joined(details(records, found, half))
    page = _joined([*parts, more])
    parts[1] = parts[1] or sweep_table(records, half)  # what is shown until then
    summary = _joined(parts)
    record = {
        "benchmark": "reproduce",
        **setup,
        "runs": len(records),
        "verdict": verdict(headline),
        "noise": [
            {**job._asdict(), "val_losses": [record["val_loss"] for record in runs]}
            for job, runs in noise(records).items()
        ],
        "headline": {name: as_json(name, headline) for name in headline},
        "parts": {name: as_json(name, found) for name in found if name in IN_PART},
        "half_as_long": {name: as_json(name, shorter) for name in shorter},
        "environment": records[-1]["environment"],
    }
    swept = {name: sweep(records, name, half) for name in CONFIGURATIONS}
    against = {name: difference(headline, name, REFERENCE) for name in headline}
    drawn = draw(
        headline or best_of_sweeps(records, half),
        swept,
        against,
        "headline" if headline else "half-length runs, one seed",
    )
    results.write(out, "reproduce", record, page, drawn)
    if update_readme:
        results.update_readme("reproduce-headline", summary, PAGE)
        results.update_readme("reproduce", more, PAGE)


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def verdict(found: Mapping[str, Series]) -> str:
    """Says what these runs can tell."""
    values = {
        name: value
        for name in found
        if name != "adamw" and (value := difference(found, name, REFERENCE)) is not None
    }
    halves = [value.half for value in values.values() if not math.isnan(value.half)]
    if not halves:
        have = sum(len(each.runs) for each in found.values())
        wanted = len(schedule.SEEDS) * (2 + len(STACKED))
        return (
            f"**These runs cannot tell the optimizers apart yet**: of the headline's {wanted} runs "
            f"there are {have}, too few for an interval."
        )
    reached = max(halves)
    told = [found[name].title for name, value in values.items() if abs(value.mean) > value.half]
    names = f"beyond it: {'; '.join(told)}" if told else "none is beyond it"
    start = (
        f"The 95 % interval of a difference from Muon is ± {reached:.3f}"
        if reached <= WANTED
        else f"**This table cannot tell differences below {reached:.3f}** "
        f"(the 95 % interval reached; {WANTED} was wanted)"
    )
    return f"{start}; {names}."


def headline_table(found: Mapping[str, Series]) -> str:
    """Draws one row for each optimizer."""
    if not found:
        return ""
    header = (
        "optimizer",
        "learning rate",
        "seeds",
        "validation loss",
        "minus Muon's",
        "tokens to Muon's end",
        "a step",
    )
    return results.markdown(header, [_row(name, found) for name in found])


def _row(name: str, found: Mapping[str, Series]) -> list[str]:
    own = found[name]
    seeds = list(own.runs)
    against = difference(found, name, REFERENCE)
    cpu = float(np.median([run["cpu_per_step"] for run in own.runs.values()]))
    share = tokens_to_reach(found, name)
    return [
        own.title,
        f"{own.rate:.2g}",
        str(len(seeds)),
        f"{own.losses(seeds).mean():.4f}",
        "" if against is None else str(against),
        "" if share is None else "not reached" if math.isinf(share) else f"{share:.0%}",
        f"{cpu:.3f} s",
    ]


def caption(setup: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Says what was run, under the headline."""
    tokens = setup["batch_size"] * setup["context"]
    lengths = Counter(record["steps"] for record in records)
    counts = " and ".join(
        f"{lengths[steps]} of {steps * tokens / 1e6:.2f} million tokens ({steps} steps)"
        for steps in sorted(lengths, reverse=True)
    )
    commits = sorted({record["environment"]["commit"] for record in records})
    where = dict(records[-1]["environment"]) | {"commit": " and ".join(commits)}
    return (
        f"{len(records)} runs: {counts}, of {tokens:,} tokens a step; model `{setup['model']}`. "
        f"Losses are those of the averaged weights on {setup['eval_tokens']:,} held-out tokens. "
        f"The figure's curves are on {CURVE_TOKENS:,} of these, moved to end at these losses. "
        f"Differences are paired by seed, with a {CONFIDENCE:.0%} interval from what is left of "
        "the losses once means of optimizers and seeds are taken out. Tokens to Muon's end: where "
        "the mean validation curve crosses the end of Muon's. A step: processor time on one core, "
        f"median. {results.caption({'environment': where})}"
    )


def details(records: Sequence[Record], found: Mapping[str, Series], half: int) -> list[str]:
    """Draws what is beyond the headline; empty where there are no runs of it."""
    headline = {name: each for name, each in found.items() if name not in IN_PART}
    pages = [noise_table(records), rest_table(records, half), sweep_table(records, half)]
    pairs = [
        [f"{found[a].title} - {found[b].title}", str(value.seeds), str(value)]
        for number, a in enumerate(headline)
        for b in list(headline)[:number]
        if b != REFERENCE and "adamw" not in (a, b)
        if (value := difference(headline, a, b)) is not None
    ]
    if pairs:
        pages.append(results.markdown(("paired, same seeds", "seeds", "difference"), pairs))
    rows = [_part_row(name, found) for name in found if name in IN_PART]
    if rows := [row for row in rows if row]:
        pages.append(results.markdown(("one thing changed", "seeds", "minus its base's"), rows))
    return [*pages, half_table(half_as_long(records, half)), alignment_table(records)]


def _part_row(name: str, found: Mapping[str, Series]) -> list[str]:
    value = difference(found, name, str(CONFIGURATIONS[name].base))
    return [] if value is None else [found[name].title, str(value.seeds), str(value)]


def half_as_long(records: Sequence[Record], half: int) -> dict[str, Series]:
    """Collects half-length runs, without those of the seed that rates were chosen on."""
    return series([run for run in records if run["seed"] != schedule.SWEEP_SEED], half)


def half_table(found: Mapping[str, Series]) -> str:
    """Draws one row for each configuration, against Muon and, of a part, against its base."""
    rows = []
    for name, own in found.items():
        bases = REFERENCE, str(CONFIGURATIONS[name].base)
        against = ["" if (v := difference(found, name, base)) is None else str(v) for base in bases]
        losses = own.losses(list(own.runs))
        rows.append([own.title, str(len(losses)), f"{losses.mean():.4f}", *against])
    header = "half-length runs", "seeds", "validation loss", "minus Muon's", "minus its base's"
    return results.markdown(header, rows) if rows else ""


def noise_table(records: Sequence[Record]) -> str:
    """Shows how far equal algorithms end from each other."""
    titles = {"val_loss": "averaged over the last 5 %", "val_loss_last": "as they ended"}
    rows = []
    for job, runs in noise(records).items():
        for key, title in titles.items():
            losses = [record[key] for record in runs]
            shown = ", ".join(f"{loss:.5f}" for loss in losses)
            apart = f"{max(losses) - min(losses):.5f}"
            rows.append([f"{job.steps} steps, weights {title}", shown, apart])
    header = "equal but for rounding", "validation losses", "apart by"
    return results.markdown(header, rows) if rows else ""


def rest_table(records: Sequence[Record], steps: int) -> str:
    """Draws the sweep over the fallback's learning rate."""
    losses = schedule.rest_losses(records, steps)
    if not losses:
        return ""
    return _sweeps_of("learning rate of the fallback", {"Muon": losses})


def sweep_table(records: Sequence[Record], steps: int) -> str:
    """Draws one column for each learning rate, one row for each optimizer."""
    swept = {
        configuration.title: losses
        for name, configuration in CONFIGURATIONS.items()
        if (losses := sweep(records, name, steps))
    }
    return _sweeps_of("learning rate of the matrices", swept) if swept else ""


def _sweeps_of(title: str, swept: Mapping[str, Mapping[int, float]]) -> str:
    ks = sorted({k for losses in swept.values() for k in losses})
    rows = []
    for name, losses in swept.items():
        best = min(losses, key=losses.__getitem__)
        cells = {k: f"{losses[k]:.4f}" if k in losses else "" for k in ks}
        cells[best] = f"**{cells[best]}**"
        rows.append([name, *cells.values()])
    header = title, *(f"{rate_of(k):.2g}" for k in ks)
    return results.markdown(header, rows)


def alignment_table(records: Sequence[Record]) -> str:
    """Shows r of both modes in the course of the longest runs of each configuration."""
    rows = []
    for name, configuration in CONFIGURATIONS.items():
        runs = [r for r in records if r["configuration"] == name and r["alignment"]]
        if name in IN_PART or not runs:
            continue
        steps = max(run["steps"] for run in runs)
        measured = np.array([run["alignment"] for run in runs if run["steps"] == steps])
        for mode in (1, 2):
            cells = [f"{value:.3f}" for value in measured[:, :, mode].mean(0)]
            rows.append([f"{configuration.title}: r of mode {mode}", str(len(measured)), *cells])
    header = "alignment of pairs of Q, K, V", "runs", "at 1/4", "1/2", "3/4", "end"
    return results.markdown(header, rows) if rows else ""


def as_json(name: str, found: Mapping[str, Series]) -> dict[str, Any]:
    """Gives as JSON what a table says of one: against Muon and, of a part, its base."""
    own = found[name]
    bases = [REFERENCE, *filter(None, [CONFIGURATIONS[name].base])]
    minus = {base: v for base in bases if (v := difference(found, name, base)) is not None}
    return {
        "rate": float(f"{own.rate:.4g}"),
        "losses": {seed: loss_of(run) for seed, run in own.runs.items()},
        "minus": {
            base: {
                "mean": round(v.mean, 5),
                "half": None if math.isnan(v.half) else round(v.half, 5),
            }
            for base, v in minus.items()
        },
    }
