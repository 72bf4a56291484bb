"""AdamW, Muon and TEON, each at its own best learning rate: the paper's comparison, at small scale.

    python -m benchmarks.reproduce                                     # all, into runs/reproduce
    python -m benchmarks.reproduce --out benchmarks/results/reproduce  # go on with the committed
    python -m benchmarks.reproduce --aggregate --update-readme          # tables, figure of these
    python -m benchmarks.reproduce --model llama-60m --data fineweb10B --context 1024 \
        --batch-size 512 --microbatch 64 --steps 2100 --dtype bfloat16 \
        --workers 1                                                     # the paper's scale
    python -m benchmarks.reproduce --schedule questions                 # what each part is worth

Every run appends one JSON line to `runs.jsonl` in the folder `--out` when it ends; what is there is
not run again, so that the command may be killed and repeated. Two schedules say what is run, in an
order in which what is known when time runs out can be used: `comparison` (benchmarks/reproduce/
schedule.py) and `questions` (questions.py), with batches eight times as large, which can tell
smaller differences. Runs of one seed share first parameters, batches and held-out sequences, and
differ in nothing but the optimizer.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.reproduce import answers, questions, report, schedule, training, workers
from benchmarks.reproduce.records import Job, Record, Setup, keep_setup
from examples import data

FRESH = Path(__file__).parents[2] / "runs"


class Schedule(NamedTuple):
    """Says what is run, and what is written of it.

    Attributes:
        folder: Where its runs are, in `benchmarks/results` the committed, in `runs` others.
        batch_size: Sequences a step, unless the command line says otherwise.
        steps: Of its longest runs, unless the command line says otherwise.
        wanted: Takes the records so far and steps to all jobs, in their order.
        report: Writes tables and a figure into a folder.
    """

    folder: str
    batch_size: int
    steps: int
    wanted: Callable[[Sequence[Record], int], Any]
    report: Callable[[Path, bool], None]


SCHEDULES = {
    "comparison": Schedule("reproduce", 32, 640, schedule.wanted, report.report),
    "questions": Schedule("questions", 256, 160, questions.wanted, answers.report),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, then says what there is."""
    options = parser().parse_args(argv)
    chosen = SCHEDULES[options.schedule]
    options.batch_size = options.batch_size or chosen.batch_size
    steps = options.steps or chosen.steps
    if options.microbatch < 1 or options.batch_size % options.microbatch:
        parser().error("--microbatch must divide --batch-size")
    base = results.FOLDER if options.aggregate else FRESH
    out = options.out or base / chosen.folder
    if not options.aggregate:
        setup = Setup(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Setup)})
        corpus = training.corpus_of(setup)  # into the cache, before the runs ask for it
        keep_setup(out, setup, steps, data.fingerprint(corpus))

        def missing(records: Sequence[Record]) -> list[Job]:
            return schedule.missing(chosen.wanted(records, steps), records)

        workers.run(out, setup, missing, options.workers, options.minutes)
    chosen.report(out, options.update_readme)
    return 0


def parser() -> argparse.ArgumentParser:
    """Makes the command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, help="default: runs/reproduce; to aggregate, the committed runs")
    add("--aggregate", action="store_true", help="run nothing")
    add("--update-readme", action="store_true", help="put tables into the docs, too")
    add("--workers", type=int, default=os.cpu_count() or 1, help="default: one for each core")
    add("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    add("--schedule", choices=SCHEDULES, default="comparison", help="default: comparison")
    add("--model", choices=training.SIZES, default="small")
    add("--data", help="as for examples.train_gpt; default: the standard library's source")
    add("--tokenizer", choices=("byte", "bpe"), default="byte", help="default: byte")
    add("--vocab-size", type=int, default=256, help="default: 256")
    add("--context", type=int, default=128, help="default: 128")
    add("--batch-size", type=int, help="sequences per step; default: 32, of questions 256")
    add("--steps", type=int, help="of a headline run; default: 640, of questions 160")
    add(
        "--microbatch",
        type=int,
        default=2,
        help="sequences through the network at a time; default: 2",
    )
    add("--eval-tokens", type=int, default=262_144, help="held out; default: 262144")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


if __name__ == "__main__":
    sys.exit(main())
