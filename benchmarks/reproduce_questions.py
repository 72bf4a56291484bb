"""What to run to tell small differences: large batches, pairs by seed, one reference.

    python -m benchmarks.reproduce --schedule questions --batch-size 256 --steps 160 \
        --workers 1 --out benchmarks/results/questions

The order, so that what is known at any moment can be used:

1. noise: the reference twice, from first parameters that differ by rounding, on seed 0;
2. the learning rate of the reference's matrices, on seed 0: the one that was best with an eighth of
   the tokens a step, and twice that;
3. seeds 1 to 3 at the better one, seed by seed: first the methods that could become the default,
   so that the standard deviation of paired differences is known early, then the others;
4. the fallback's rate (it moved ends by .004 there, and the matrices' by .05), then the matrices'
   again, each until the best of three rates lies inside;
5. the rate of each method of its own, three points on seed 0;
6. seeds 1 to 6 of all, each at its own best rate.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.configurations import MUON_SCALE
from benchmarks.training import Job

Record = Mapping[str, Any]

REFERENCE = f"stack-1{MUON_SCALE}"
# Compared with the reference, the most asked first.
FIRST = [f"stack-1-schatten{MUON_SCALE}"]
OTHERS = [f"teon-1{MUON_SCALE}", f"stack-1-jordan{MUON_SCALE}", "muon"]
COMPARED = [*FIRST, *OTHERS]
SWEEP_SEED = 0
FIRST_SEEDS = (1, 2, 3)
SEEDS = (1, 2, 3, 4, 5, 6)
CENTRE, REST_CENTRE = 2, 4  # where runs of an eighth of the tokens a step were best
RATES, REST_RATES = (2, 4), (4, 6)


def wanted(records: Sequence[Record], steps: int) -> Iterator[Job]:
    """All runs, done or not, until one whose result decides what comes next."""
    from benchmarks.reproduce import best_inside, neighbours

    for nudge in (0, 1):
        yield Job(REFERENCE, CENTRE, REST_CENTRE, SWEEP_SEED, steps, nudge)
    early = _losses(records, "k", Job(REFERENCE, 0, REST_CENTRE, SWEEP_SEED, steps))
    yield from (Job(REFERENCE, k, REST_CENTRE, SWEEP_SEED, steps) for k in RATES)
    if any(k not in early for k in RATES):
        return
    better = min(RATES, key=early.__getitem__)
    for names in ([REFERENCE, *FIRST], OTHERS):
        for seed in FIRST_SEEDS:
            yield from (Job(name, better, REST_CENTRE, seed, steps) for name in names)
    rest = _losses(records, "rest_k", Job(REFERENCE, better, 0, SWEEP_SEED, steps))
    for k in [*REST_RATES, *neighbours(rest, REST_RATES)]:
        yield Job(REFERENCE, better, k, SWEEP_SEED, steps)
    rest_k = best_inside(rest, REST_RATES)
    if rest_k is None:
        return
    swept = {
        name: _losses(records, "k", Job(name, 0, rest_k, SWEEP_SEED, steps))
        for name in [REFERENCE, *COMPARED]
    }
    for k in [*RATES, *neighbours(swept[REFERENCE], RATES)]:
        yield Job(REFERENCE, k, rest_k, SWEEP_SEED, steps)
    shared = best_inside(swept[REFERENCE], RATES)
    if shared is None:
        return
    own = {REFERENCE: shared}
    first = (shared, shared + 2)
    for name in COMPARED:
        for k in [*first, *neighbours(swept[name], first)]:
            yield Job(name, k, rest_k, SWEEP_SEED, steps)
        best = best_inside(swept[name], first)
        if best is None:
            return
        own[name] = best
    for seed in SEEDS:
        for name, k in own.items():
            yield Job(name, k, rest_k, seed, steps)


def _losses(records: Sequence[Record], field: str, job: Job) -> dict[int, float]:
    """Validation loss by `field` of the runs that are `job` in everything else."""
    from benchmarks.reproduce import job_of, loss_of

    return {
        record[field]: loss_of(record)
        for record in records
        if job_of(record) == job._replace(**{field: record[field]})
    }
