"""Tables and figure of the runs of `reproduce`, of all that there are so far."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks import reproduce, results
from benchmarks.configurations import CONFIGURATIONS, PARTS
from benchmarks.reproduce import Record, job_of, loss_of
from benchmarks.reproduce_figure import draw
from benchmarks.training import Job, rate_of

ROOT = Path(__file__).parent.parent
PAGES = {"reproduce-headline": ROOT / "README.md", "reproduce": ROOT / "docs/results.md"}
REFERENCE = "muon"
CONFIDENCE = 0.95
WANTED = 0.005  # half the width of an interval that tells what users ask
IN_PART = {part.name for part in PARTS}


class Series(NamedTuple):
    """The full-length runs of one configuration at its learning rate.

    Attributes:
        title: Of the configuration.
        rate: Peak learning rate of the matrices.
        runs: Records by seed.
    """

    title: str
    rate: float
    runs: dict[int, Record]

    def losses(self, seeds: Sequence[int]) -> np.ndarray:
        """Validation losses of the averaged weights."""
        return np.array([loss_of(self.runs[seed]) for seed in seeds])


class Difference(NamedTuple):
    """Mean of paired differences; `half` is half the width of its interval, nan for one seed."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:+.4f} (one seed)"
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def report(out: Path, update_readme: bool = False) -> None:
    """Writes `reproduce.json`, `.md` and `.png` beside the runs."""
    records = reproduce.read(out)
    if not records:
        raise SystemExit(f"no runs in {out}")
    setup = json.loads((out / reproduce.SETUP).read_text())
    found = series(records, setup["steps"])
    headline = {name: each for name, each in found.items() if name not in IN_PART}
    tables = [verdict(headline)]
    if headline:
        tables.append(headline_table(headline))
    tables.append(caption(setup, records))
    summary = "\n\n".join(tables)
    page = "\n\n".join([summary, *details(records, found, setup)])
    record = {
        "benchmark": "reproduce",
        **setup,
        "runs": len(records),
        "verdict": verdict(headline),
        "noise": [
            {**job._asdict(), "val_losses": [record["val_loss"] for record in runs]}
            for job, runs in noise(records).items()
        ],
        "headline": {name: as_json(name, found) for name in found},
        "environment": records[-1]["environment"],
    }
    swept = {name: sweep(records, name, setup["steps"] // 2) for name in CONFIGURATIONS}
    against = {name: difference(headline, name, REFERENCE) for name in headline}
    results.write(out, "reproduce", record, page, draw(headline, swept, against))
    if update_readme:
        for (name, path), text in zip(PAGES.items(), (summary, page), strict=True):
            results.update_readme(name, text, path)


def series(records: Sequence[Record], steps: int) -> dict[str, Series]:
    """The full-length runs, in the order of the configurations."""
    found = {}
    for name, configuration in CONFIGURATIONS.items():
        runs = [
            record
            for record in records
            if (record["configuration"], record["steps"], record["nudge"]) == (name, steps, 0)
        ]
        if runs:
            k, rest_k = runs[-1]["k"], runs[-1]["rest_k"]
            by_seed = {r["seed"]: r for r in runs if (r["k"], r["rest_k"]) == (k, rest_k)}
            found[name] = Series(configuration.title, rate_of(k), dict(sorted(by_seed.items())))
    return found


def pooled(found: Mapping[str, Series]) -> tuple[float, int]:
    """Standard deviation of one run once means of optimizers and seeds are taken out.

    Returns:
        It, and its degrees of freedom; over the seeds that all have. Chaos is the same for all of
        them, so that one estimate from all pairs is better than one from each pair alone.
    """
    seeds = sorted(set.intersection(*(set(each.runs) for each in found.values())))
    freedom = (len(seeds) - 1) * (len(found) - 1)
    if freedom < 1:
        return math.nan, 0
    table = np.array([each.losses(seeds) for each in found.values()])
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    return float(np.sqrt((rest**2).sum() / freedom)), freedom


def difference(found: Mapping[str, Series], ours: str, theirs: str) -> Difference | None:
    """Over the seeds that both have, with the pooled interval; None where there are none."""
    if ours not in found or theirs not in found or ours == theirs:
        return None
    seeds = sorted(found[ours].runs.keys() & found[theirs].runs.keys())
    if not seeds:
        return None
    spread, freedom = pooled(found)
    half = math.nan
    if freedom and len(seeds) > 1:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
        half = quantile * spread * math.sqrt(2 / len(seeds))
    values = found[ours].losses(seeds) - found[theirs].losses(seeds)
    return Difference(float(values.mean()), half, len(seeds))


def verdict(found: Mapping[str, Series]) -> str:
    """The first line: what these runs can tell."""
    values = {
        name: value
        for name in found
        if name != "adamw" and (value := difference(found, name, REFERENCE)) is not None
    }
    halves = [value.half for value in values.values() if not math.isnan(value.half)]
    if not halves:
        return (
            "**These runs cannot tell the optimizers apart yet**: the headline needs two seeds or "
            "more of each, and has fewer. What is there, one run each, is below."
        )
    reached = max(halves)
    told = [found[name].title for name, value in values.items() if abs(value.mean) > value.half]
    names = f"beyond it: {', '.join(told)}" if told else "none is beyond it"
    start = (
        f"The 95 % interval of a difference from Muon is ± {reached:.3f}"
        if reached <= WANTED
        else f"**This table cannot tell differences below {reached:.3f}** "
        f"(the 95 % interval reached; {WANTED} was wanted)"
    )
    return f"{start}; {names}."


def headline_table(found: Mapping[str, Series]) -> str:
    """One row for each optimizer."""
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


def tokens_to_reach(found: Mapping[str, Series], name: str) -> float | None:
    """Share of a run's tokens after which the mean curve is at the end of the reference's."""
    if name not in found or REFERENCE not in found:
        return None
    seeds = sorted(found[name].runs.keys() & found[REFERENCE].runs.keys())
    if not seeds:
        return None
    tokens, ours = mean_curve(found[name], seeds)
    goal = mean_curve(found[REFERENCE], seeds)[1][-1]
    below = np.flatnonzero(ours <= goal)
    if not below.size:
        return math.inf
    first = int(below[0])
    if first == 0:
        return float(tokens[0] / tokens[-1])
    between = slice(first - 1, first + 1)
    crossing = np.interp(goal, ours[between][::-1], tokens[between][::-1])
    return float(crossing / tokens[-1])


def mean_curve(own: Series, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validation loss, mean over seeds."""
    curves = np.array([own.runs[seed]["validation"] for seed in seeds], float)
    return curves[0, :, 0], curves[:, :, 1].mean(0)


def caption(setup: Mapping[str, Any], records: Sequence[Record]) -> str:
    """What was run, under the headline."""
    tokens = setup["batch_size"] * setup["context"]
    commits = sorted({record["environment"]["commit"] for record in records})
    where = dict(records[-1]["environment"]) | {"commit": " and ".join(commits)}
    return (
        f"Runs of {setup['steps']} steps of {tokens:,} tokens ({setup['steps'] * tokens / 1e6:.2f} "
        f"million), model `{setup['model']}`; losses are those of the averaged weights on "
        f"{setup['eval_tokens']:,} held-out tokens. Differences are paired by seed, with a "
        f"{CONFIDENCE:.0%} interval from what is left of the losses once means of optimizers and "
        "seeds are taken out. Tokens to Muon's end: where the mean validation curve crosses the "
        "end of Muon's. A step: processor time on one core, median. "
        f"{len(records)} runs in all. {results.caption({'environment': where})}"
    )


def details(
    records: Sequence[Record], found: Mapping[str, Series], setup: Mapping[str, Any]
) -> list[str]:
    """What is beyond the headline, as far as there are runs of it."""
    half = setup["steps"] // 2
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
    pages.append(alignment_table(records))
    return [page for page in pages if page]


def _part_row(name: str, found: Mapping[str, Series]) -> list[str]:
    base = str(CONFIGURATIONS[name].base)
    base = next((each for each in found if each.startswith(base) and each not in IN_PART), base)
    value = difference({key: found[key] for key in (name, base) if key in found}, name, base)
    return [] if value is None else [found[name].title, str(value.seeds), str(value)]


def noise(records: Sequence[Record]) -> dict[Job, list[Record]]:
    """Runs that differ in first parameters by rounding alone, by the job that is not nudged."""
    nudged = {job_of(record)._replace(nudge=0) for record in records if record["nudge"]}
    equal = {
        job: [record for record in records if job_of(record)._replace(nudge=0) == job]
        for job in sorted(nudged, key=lambda job: job.steps)
    }
    return {job: runs for job, runs in equal.items() if len(runs) > 1}


def noise_table(records: Sequence[Record]) -> str:
    """How far equal algorithms end from each other."""
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
    """The sweep over the fallback's learning rate."""
    losses = reproduce.rest_losses(records, steps)
    if not losses:
        return ""
    return _sweeps_of("learning rate of the fallback", {"Muon": losses})


def sweep(records: Sequence[Record], name: str, steps: int) -> dict[int, float]:
    """Losses by k at the fallback's best rate, as far as it is known."""
    rest = reproduce.rest_losses(records, steps)
    if not rest:
        return {}
    rest_k = min(rest, key=rest.__getitem__)
    return reproduce.sweep_losses(records, name, rest_k, steps)


def sweep_table(records: Sequence[Record], steps: int) -> str:
    """One column for each learning rate, one row for each optimizer."""
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
        cells = [f"{losses[k]:.4f}" if k in losses else "" for k in ks]
        rows.append(
            [name, *(f"**{c}**" if k == best else c for k, c in zip(ks, cells, strict=True))]
        )
    return results.markdown((title, *(f"{rate_of(k):.2g}" for k in ks)), rows)


def alignment_table(records: Sequence[Record]) -> str:
    """r of both modes in the course of the longest runs of each configuration."""
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
    """What the tables say of one configuration."""
    own, against = found[name], difference(found, name, REFERENCE)
    return {
        "rate": float(f"{own.rate:.4g}"),
        "losses": {seed: loss_of(run) for seed, run in own.runs.items()},
        "minus_muon": None if against is None else round(against.mean, 5),
        "half": None if against is None or math.isnan(against.half) else round(against.half, 5),
    }
