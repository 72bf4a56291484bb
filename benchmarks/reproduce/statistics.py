"""What the runs of the comparison say: pairs, their intervals, tokens, noise."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.reproduce import schedule
from benchmarks.reproduce.configurations import CONFIGURATIONS
from benchmarks.reproduce.records import Job, Record, job_of, loss_of, rate_of

REFERENCE = "muon"
CONFIDENCE = 0.95


class Series(NamedTuple):
    """Holds the runs of one length of one configuration, at its learning rate.

    Attributes:
        title: Of the configuration.
        rate: Peak learning rate of the matrices.
        runs: Records by seed.
    """

    title: str
    rate: float
    runs: dict[int, Record]

    def losses(self, seeds: Sequence[int]) -> np.ndarray:
        """Lists validation losses of the averaged weights."""
        return np.array([loss_of(self.runs[seed]) for seed in seeds])


class Difference(NamedTuple):
    """Holds a mean of paired differences and half its interval's width, nan for one seed."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:+.4f} (one seed)"
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def series(records: Sequence[Record], steps: int) -> dict[str, Series]:
    """Collects the runs of that length, in the order of the configurations."""
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


def pooled(found: Mapping[str, Mapping[int, float]]) -> tuple[float, int]:
    """Estimates what is left of one run once means of optimizers and seeds are taken out.

    Args:
        found: Losses by seed of each optimizer; they need not have the same seeds.

    Returns:
        Its standard deviation, and its degrees of freedom, by least squares. Chaos is the same for
        all of them, so that one estimate from all pairs is better than one from each pair alone.
    """
    names, seeds = list(found), sorted({seed for losses in found.values() for seed in losses})
    runs = [(name, seed) for name, losses in found.items() for seed in losses]
    design = np.zeros((len(runs), len(names) + len(seeds)))
    for row, (name, seed) in zip(design, runs, strict=True):
        row[names.index(name)] = row[len(names) + seeds.index(seed)] = 1
    losses = np.array([found[name][seed] for name, seed in runs])
    means, _, rank, _ = np.linalg.lstsq(design, losses)
    freedom = len(runs) - int(rank)
    if freedom < 1:
        return math.nan, 0
    return float(np.linalg.norm(losses - design @ means)) / math.sqrt(freedom), freedom


def half_width(deviation: float, freedom: int, pairs: int) -> float:
    """Gives half the width of Student's interval for the mean of so many paired differences.

    Args:
        deviation: Standard deviation of one run, of which a pair has two.
        freedom: Degrees of freedom that the deviation was estimated with; 0 gives nan.
        pairs: Number of pairs.
    """
    if not freedom:
        return math.nan
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    return quantile * deviation * math.sqrt(2 / pairs)


def difference(found: Mapping[str, Series], ours: str, theirs: str) -> Difference | None:
    """Compares two over the seeds that both have, with the pooled interval; None without any."""
    if ours not in found or theirs not in found or ours == theirs:
        return None
    seeds = sorted(found[ours].runs.keys() & found[theirs].runs.keys())
    if not seeds:
        return None
    common = set.intersection(*(set(each.runs) for each in found.values()))
    losses = {
        name: {seed: loss_of(each.runs[seed]) for seed in common} for name, each in found.items()
    }
    half = half_width(*pooled(losses), len(seeds)) if len(seeds) > 1 else math.nan
    values = found[ours].losses(seeds) - found[theirs].losses(seeds)
    return Difference(float(values.mean()), half, len(seeds))


def tokens_to_reach(found: Mapping[str, Series], name: str) -> float | None:
    """Finds the share of tokens after which the mean curve is at the end of the reference's."""
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
    """Averages validation curves over seeds: tokens and losses."""
    curves = [curve_of(own.runs[seed]) for seed in seeds]
    return curves[0][0], np.mean([losses for _, losses in curves], axis=0)


def curve_of(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Moves a run's validation curve so that it ends at the run's validation loss.

    Points of the curve are losses on a part of the held-out text, always the same one, and the
    validation loss is that of all of it: the part is a little harder or easier than the whole.
    Returns tokens and losses.
    """
    tokens, losses = np.array(record["validation"], float).T
    return tokens, losses + (loss_of(record) - losses[-1])


def noise(records: Sequence[Record]) -> dict[Job, list[Record]]:
    """Collects runs that differ by rounding alone, by the job that is not nudged."""
    nudged = {job_of(record)._replace(nudge=0) for record in records if record["nudge"]}
    equal = {
        job: [record for record in records if job_of(record)._replace(nudge=0) == job]
        for job in sorted(nudged, key=lambda job: job.steps)
    }
    return {job: runs for job, runs in equal.items() if len(runs) > 1}


def sweep(records: Sequence[Record], name: str, steps: int) -> dict[int, float]:
    """Collects losses by k at the fallback's best rate, as far as it is known."""
    rest = schedule.rest_losses(records, steps)
    if not rest:
        return {}
    rest_k = min(rest, key=rest.__getitem__)
    return schedule.sweep_losses(records, name, rest_k, steps)


def best_of_sweeps(records: Sequence[Record], steps: int) -> dict[str, Series]:
    """Takes of each sweep the best run so far."""
    found = {}
    for name, configuration in CONFIGURATIONS.items():
        losses = sweep(records, name, steps)
        if losses:
            k = min(losses, key=losses.__getitem__)
            rest = schedule.rest_losses(records, steps)
            rest_k = min(rest, key=rest.__getitem__)
            job = Job(name, k, rest_k, schedule.SWEEP_SEED, steps)
            run = next(record for record in records if job_of(record) == job)
            found[name] = Series(configuration.title, rate_of(k), {job.seed: run})
    return found
