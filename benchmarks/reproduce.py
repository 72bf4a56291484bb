"""AdamW, Muon and TEON, each at its own best learning rate: the paper's comparison, at small scale.

    python -m benchmarks.reproduce                                     # all, into runs/reproduce
    python -m benchmarks.reproduce --out benchmarks/results/reproduce  # go on with the committed
    python -m benchmarks.reproduce --aggregate --update-readme          # tables, figure of these
    python -m benchmarks.reproduce --model llama-60m --data fineweb10B --context 1024 \
        --batch-size 512 --microbatch 64 --steps 2100 --dtype bfloat16 \
        --workers 1                                                     # the paper's scale

Every run appends one JSON line to `runs.jsonl` in the folder `--out` when it ends; what is there is
not run again, so that the command may be killed and repeated. The order, so that what is known
when time runs out can be used:

1. noise: one configuration from first parameters that differ by rounding;
2. the learning rate of what AdamW keeps (embedding, norms), with Muon; all share it;
3. a sweep over learning rates for each optimizer, until both neighbours of the best are known; in
   the paper's scale, and in Muon's where that is better for our Muon;
4. the headline: each optimizer at its best, five seeds;
5. parts: one thing changed, three seeds;
6. Muon, stack 1, TEON in both modes and `schatten`, half as long, eight seeds: rounding has not
   moved these runs apart yet.

1 to 3 are on seed 0, also half as long. Runs of one seed share first parameters, batches and
held-out sequences, and differ in nothing but the optimizer.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import reproduce_questions, results, training
from benchmarks.configurations import CONFIGURATIONS, MUON_SCALE, PARTS, STACKED
from benchmarks.training import Job, Setup
from examples import data

COMMITTED = results.FOLDER / "reproduce"
FRESH = Path(__file__).parent.parent / "runs" / "reproduce"
RUNS, SETUP = "runs.jsonl", "setup.json"
SWEEP_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
PART_SEEDS = (1, 2, 3)
HALF_SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
NOISE_RUNS = 2
FIRST_REST = 2
REST_RATES = (2, 0, 4)
SPACING = 2  # of a sweep, in k: a factor of 2
MOST_RATES = 7
SCHEDULES = ("comparison", "questions")
PAUSE = 1.0  # seconds between two looks at the runs

Record = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then says what there is."""
    options = parser().parse_args(argv)
    if options.microbatch < 1 or options.batch_size % options.microbatch:
        parser().error("--microbatch must divide --batch-size")
    out = options.out or (COMMITTED if options.aggregate else FRESH)
    if not options.aggregate:
        setup = Setup(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Setup)})
        corpus = training.corpus_of(setup)  # into the cache, before the runs ask for it
        keep_setup(out, setup, options.steps, data.fingerprint(corpus))
        run(out, setup, options)
    if options.schedule == "questions":
        return 0
    from benchmarks import reproduce_report  # matplotlib and scipy only where they are needed

    reproduce_report.report(out, options.update_readme)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, help="default: runs/reproduce; to aggregate, the committed runs")
    add("--aggregate", action="store_true", help="run nothing")
    add("--update-readme", action="store_true", help="put tables into README and docs, too")
    add("--workers", type=int, default=os.cpu_count() or 1, help="default: one for each core")
    add("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    add("--schedule", choices=SCHEDULES, default="comparison", help="what to run, in what order")
    add("--model", choices=["small", *training.MODELS], default="small")
    add("--data", help="as for examples.train_gpt; default: the standard library's source")
    add("--tokenizer", choices=("byte", "bpe"), default="byte", help="default: byte")
    add("--vocab-size", type=int, default=256, help="default: 256")
    add("--context", type=int, default=128, help="default: 128")
    add("--batch-size", type=int, default=32, help="sequences per step; default: 32")
    add("--steps", type=int, default=640, help="of a headline run; default: 640")
    add(
        "--microbatch",
        type=int,
        default=2,
        help="sequences through the network at a time; default: 2",
    )
    add("--eval-tokens", type=int, default=262_144, help="held out; default: 262144")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def keep_setup(out: Path, setup: Setup, steps: int, corpus: str) -> None:
    """Runs of one folder are comparable: refuses to add others, or any on another text."""
    out.mkdir(parents=True, exist_ok=True)
    path, wanted = out / SETUP, dataclasses.asdict(setup) | {"steps": steps, "corpus": corpus}
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=1) + "\n")
    if json.loads(path.read_text()) != wanted:
        raise SystemExit(
            f"{path} is of another set-up: choose another --out, or its flags. Where only the "
            f"corpus differs ({corpus} here), the text is that of another Python."
        )


def run(out: Path, setup: Setup, options: argparse.Namespace) -> None:
    """Runs what is missing, each run in a process of its own, which appends its record itself."""
    end = time.monotonic() + 60 * options.minutes
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    while True:
        for job in missing(read(out), options.steps, options.schedule):
            free = [worker for worker in range(options.workers) if worker not in running]
            if not free or time.monotonic() > end:
                break
            if job not in [other for other, _ in running.values()]:
                running[free[0]] = job, start(job, setup, out, free[0], options.workers)
        if not running:
            return
        time.sleep(PAUSE)
        for worker, (job, process) in list(running.items()):
            if process.poll() is not None:
                del running[worker]
                if process.returncode:
                    raise SystemExit(f"{job} has failed; what has ended is kept")


def start(job: Job, setup: Setup, out: Path, worker: int, workers: int) -> subprocess.Popen[bytes]:
    """A run on a core of its own: small matrices gain little from a second core each."""
    text = json.dumps({"job": job, "setup": dataclasses.asdict(setup)})
    command = [sys.executable, "-m", "benchmarks.training", text, str(out / RUNS)]
    if workers > 1:
        command += ["--core", str(worker % (os.cpu_count() or 1))]
    return subprocess.Popen(command)


def read(out: Path) -> list[dict[str, Any]]:
    """The records of a folder; a line that was cut off is not one."""
    path = out / RUNS
    return list(_records(path.read_text().splitlines() if path.exists() else []))


def _records(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def job_of(record: Record) -> Job:
    """The job that a record is of."""
    return Job(*(record[field] for field in Job._fields))


def missing(records: Sequence[Record], steps: int, schedule: str = "comparison") -> list[Job]:
    """What is to be run, as far as it is known by now, the most important first."""
    done = {job_of(record) for record in records}
    order = {"comparison": wanted, "questions": reproduce_questions.wanted}[schedule]
    return [job for job in dict.fromkeys(order(records, steps)) if job not in done]


def wanted(records: Sequence[Record], steps: int) -> Iterator[Job]:
    """All runs, done or not, until one whose result decides what comes next."""
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
    """Of every optimizer: all at the rate that they begin with before any at the next."""
    both = [f"stack-1{scale}" for scale in ("", MUON_SCALE)]
    for names in (
        ["muon", *(each.name for each in STACKED), "adamw", both[1]],
        headline(records, rest_k, steps),
    ):
        rates = []
        for name in names:
            first = CONFIGURATIONS[name].first_rates
            losses = sweep_losses(records, name, rest_k, steps)
            rates.append([*first, *neighbours(losses, first)])
        for ks in itertools.zip_longest(*rates):
            for name, k in zip(names, ks, strict=True):
                if k is not None:
                    yield Job(name, k, rest_k, SWEEP_SEED, steps)


def headline(records: Sequence[Record], rest_k: int, steps: int) -> list[str]:
    """Its configurations; none until the scale is known."""
    losses = {}
    for scale in ("", MUON_SCALE):
        name = f"stack-1{scale}"
        if (k := best_rate(records, name, rest_k, steps)) is None:
            return []
        losses[scale] = sweep_losses(records, name, rest_k, steps)[k]
    better = min(losses, key=losses.__getitem__)
    return ["muon", *(each.name + better for each in STACKED), "adamw"]


def best_rate(records: Sequence[Record], name: str, rest_k: int, steps: int) -> int | None:
    """The k of the best learning rate; None while its sweep goes on."""
    losses = sweep_losses(records, name, rest_k, steps)
    return best_inside(losses, CONFIGURATIONS[name].first_rates)


def best_inside(losses: Mapping[int, float], first: Sequence[int]) -> int | None:
    """The best k; None until all that a sweep begins with, and its neighbours, are known."""
    if any(k not in losses for k in [*first, *neighbours(losses, first)]):
        return None
    return min(losses, key=losses.__getitem__)


def neighbours(losses: Mapping[int, float], first: Sequence[int]) -> list[int]:
    """Of the best, those that are not known, once the first are."""
    if any(k not in losses for k in first) or len(losses) >= MOST_RATES:
        return []
    best = min(losses, key=losses.__getitem__)
    return [k for k in (best - SPACING, best + SPACING) if k not in losses]


def sweep_losses(records: Sequence[Record], name: str, rest_k: int, steps: int) -> dict[int, float]:
    """Validation loss by k, infinite for runs that diverged."""
    return {
        record["k"]: loss_of(record)
        for record in records
        if job_of(record) == Job(name, record["k"], rest_k, SWEEP_SEED, steps)
    }


def rest_losses(records: Sequence[Record], steps: int) -> dict[int, float]:
    """Validation loss of Muon by the k of what AdamW keeps."""
    k = CONFIGURATIONS["muon"].first_rates[0]
    return {
        record["rest_k"]: loss_of(record)
        for record in records
        if job_of(record) == Job("muon", k, record["rest_k"], SWEEP_SEED, steps)
    }


def loss_of(record: Record) -> float:
    """Validation loss of the averaged weights."""
    return math.inf if record["val_loss"] is None else record["val_loss"]


if __name__ == "__main__":
    sys.exit(main())
