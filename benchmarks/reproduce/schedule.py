"""The comparison's order: what to run, as far as it is known, the most important first.

1. noise: one configuration from first parameters that differ by rounding;
2. the learning rate of what AdamW keeps (embedding, norms), with Muon; all share it;
3. a sweep over learning rates for each optimizer, until both neighbours of the best are known; in
   the paper's scale, and in Muon's where that is better for our Muon;
4. the headline: each optimizer at its best, five seeds;
5. parts: one thing changed, three seeds;
6. Muon, stack 1, TEON in both modes and `schatten` in half-length runs, eight seeds: rounding has
   not moved these apart yet.

1 to 3 are half-length runs on seed 0.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.reproduce.configurations import CONFIGURATIONS, MUON_SCALE, PARTS, STACKED
from benchmarks.reproduce.records import Job, Record, job_of, loss_of

SWEEP_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
PART_SEEDS = (1, 2, 3)
HALF_SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
NOISE_RUNS = 2
FIRST_REST = 2
REST_RATES = (2, 0, 4)
SPACING = 2  # of a sweep, in k: a factor of 2
MOST_RATES = 7


def missing(wanted: Iterable[Job], records: Sequence[Record]) -> list[Job]:
    """Lists the wanted jobs that have no record, each once."""
    done = {job_of(record) for record in records}
    return [job for job in dict.fromkeys(wanted) if job not in done]


def wanted(records: Sequence[Record], steps: int) -> Iterator[Job]:
    """Lists all runs, done or not, until one whose result decides what comes next."""
    k, half = CONFIGURATIONS["muon"].first_rates[0], steps // 2
    yield from (Job("muon", k, FIRST_REST, SWEEP_SEED, half, n) for n in range(NOISE_RUNS))
    rest = rest_losses(records, half)
    yield from (Job("muon", k, each, SWEEP_SEED, half) for each in REST_RATES)
    rest_k = best_inside(rest, REST_RATES)
    if rest_k is None:
        yield from (Job("muon", k, each, SWEEP_SEED, half) for each in neighbours(rest, REST_RATES))
        return
    yield from sweeps(records, rest_k, half)
    names = headline(records, rest_k, half)
    known = {name: best_rate(records, name, rest_k, half) for name in names}
    best = {name: k for name, k in known.items() if k is not None}
    if not names or best.keys() != known.keys():
        return
    for seed in SEEDS:
        yield from (Job(name, k, rest_k, seed, steps) for name, k in best.items())
        if seed == SEEDS[0]:  # rounding again, at full length
            yield Job("muon", best["muon"], rest_k, seed, steps, 1)
    scale = MUON_SCALE if names[1].endswith(MUON_SCALE) else ""
    for seed in PART_SEEDS:
        for part in PARTS:
            yield Job(part.name + scale, best[f"{part.base}{scale}"], rest_k, seed, steps)
    for seed in HALF_SEEDS:
        yield from (Job(name, k, rest_k, seed, half) for name, k in best.items() if name != "adamw")
        for part in PARTS:
            if part.method == "schatten":
                yield Job(part.name + scale, best[f"{part.base}{scale}"], rest_k, seed, half)


def sweeps(records: Sequence[Record], rest_k: int, steps: int) -> Iterator[Job]:
    """Sweeps every optimizer: all at the rate that they begin with before any at the next."""
    both = [f"stack-1{scale}" for scale in ("", MUON_SCALE)]
    for names in (
        ["muon", *(each.name for each in STACKED), "adamw", both[1]],
        headline(records, rest_k, steps),
    ):
        rates = []
        for name in names:
            first = CONFIGURATIONS[name].first_rates
            found = sweep_losses(records, name, rest_k, steps)
            rates.append([*first, *neighbours(found, first)])
        for ks in itertools.zip_longest(*rates):
            for name, k in zip(names, ks, strict=True):
                if k is not None:
                    yield Job(name, k, rest_k, SWEEP_SEED, steps)


def headline(records: Sequence[Record], rest_k: int, steps: int) -> list[str]:
    """Names the headline's configurations; none until the scale is known."""
    found = {}
    for scale in ("", MUON_SCALE):
        name = f"stack-1{scale}"
        if (k := best_rate(records, name, rest_k, steps)) is None:
            return []
        found[scale] = sweep_losses(records, name, rest_k, steps)[k]
    better = min(found, key=found.__getitem__)
    return ["muon", *(each.name + better for each in STACKED), "adamw"]


def best_rate(records: Sequence[Record], name: str, rest_k: int, steps: int) -> int | None:
    """Finds the k of the best learning rate; None while its sweep goes on."""
    found = sweep_losses(records, name, rest_k, steps)
    return best_inside(found, CONFIGURATIONS[name].first_rates)


def best_inside(found: Mapping[int, float], first: Sequence[int]) -> int | None:
    """Finds the best k; None until all that a sweep begins with, and its neighbours, are known."""
    if any(k not in found for k in [*first, *neighbours(found, first)]):
        return None
    return min(found, key=found.__getitem__)


def neighbours(found: Mapping[int, float], first: Sequence[int]) -> list[int]:
    """Lists the neighbours of the best k that are not known, once the first are."""
    if any(k not in found for k in first) or len(found) >= MOST_RATES:
        return []
    best = min(found, key=found.__getitem__)
    return [k for k in (best - SPACING, best + SPACING) if k not in found]


def sweep_losses(records: Sequence[Record], name: str, rest_k: int, steps: int) -> dict[int, float]:
    """Collects validation losses by k, infinite for runs that diverged."""
    return losses(records, "k", Job(name, 0, rest_k, SWEEP_SEED, steps))


def rest_losses(records: Sequence[Record], steps: int) -> dict[int, float]:
    """Collects validation losses of Muon by the k of what AdamW keeps."""
    k = CONFIGURATIONS["muon"].first_rates[0]
    return losses(records, "rest_k", Job("muon", k, 0, SWEEP_SEED, steps))


def losses(records: Sequence[Record], field: str, job: Job) -> dict[int, float]:
    """Collects validation losses by `field`, of the runs that are `job` in everything else."""
    return {
        record[field]: loss_of(record)
        for record in records
        if job_of(record) == job._replace(**{field: record[field]})
    }
