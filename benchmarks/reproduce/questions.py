"""The order of the questions: large batches, one reference, pairs by seed.

Each question is a configuration against the reference, our Muon (stack 1, `polar_express`):

1. noise: the reference twice, from first parameters that differ by rounding, on seed 0;
2. methods, TEON and optax's Muon at the same rate on the same seed: a first pair with the
   reference, and the first point of the sweeps of 6;
3. the learning rate of the reference's matrices, on seed 0: the one that was best with an eighth of
   the tokens a step, and twice that;
4. seeds 1 to 3 at the better one, seed by seed: first the methods that could become the default,
   so that the standard deviation of paired differences is known early, then TEON and optax's Muon,
   then what is chained before or behind `orthogonalize`;
5. the fallback's rate (it moved ends by .004 there, and the matrices' by .05), then the matrices'
   again, each until the best of three rates lies inside;
6. the rate of each configuration of its own, three points on seed 0;
7. seeds 1 to 6 of all, each at its own best rate.
"""

from collections.abc import Iterator, Sequence

from benchmarks.reproduce.configurations import ASKED, MUON_SCALE
from benchmarks.reproduce.records import Job, Record
from benchmarks.reproduce.schedule import best_inside, losses, neighbours

REFERENCE = f"stack-1{MUON_SCALE}"
SWEEP_SEED = 0
FIRST_SEEDS = (1, 2, 3)
SEEDS = (1, 2, 3, 4, 5, 6)
CENTRE, REST_CENTRE = 2, 4  # where runs of an eighth of the tokens a step were best
RATES, REST_RATES = (2, 4), (4, 6)
EARLY = 3  # groups of questions that get a first pair before any sweep


def wanted(records: Sequence[Record], steps: int) -> Iterator[Job]:
    """Lists all runs, done or not, until one whose result decides what comes next."""
    compared = [name for names in ASKED for name in names]
    for nudge in (0, 1):
        yield Job(REFERENCE, CENTRE, REST_CENTRE, SWEEP_SEED, steps, nudge)
    for name in (name for names in ASKED[:EARLY] for name in names):
        yield Job(name, CENTRE, REST_CENTRE, SWEEP_SEED, steps)
    yield from (Job(REFERENCE, k, REST_CENTRE, SWEEP_SEED, steps) for k in RATES)
    early = losses(records, "k", Job(REFERENCE, 0, REST_CENTRE, SWEEP_SEED, steps))
    if any(k not in early for k in RATES):
        return
    better = min(RATES, key=early.__getitem__)
    for number, names in enumerate(ASKED):
        for seed in FIRST_SEEDS:
            both = names if number else [REFERENCE, *names]
            yield from (Job(name, better, REST_CENTRE, seed, steps) for name in both)
    rest = losses(records, "rest_k", Job(REFERENCE, better, 0, SWEEP_SEED, steps))
    for k in [*REST_RATES, *neighbours(rest, REST_RATES)]:
        yield Job(REFERENCE, better, k, SWEEP_SEED, steps)
    rest_k = best_inside(rest, REST_RATES)
    if rest_k is None:
        return
    first = RATES
    own = {}
    for name in [REFERENCE, *compared]:
        swept = losses(records, "k", Job(name, 0, rest_k, SWEEP_SEED, steps))
        for k in [*first, *neighbours(swept, first)]:
            yield Job(name, k, rest_k, SWEEP_SEED, steps)
        best = best_inside(swept, first)
        if best is None:
            return
        own[name] = best
        first = own[REFERENCE], own[REFERENCE] + 2
    for seed in SEEDS:
        for name, k in own.items():
            yield Job(name, k, rest_k, seed, steps)
