"""Draws the losses of several runs of `train_gpt` in one plot, and prints the last ones.

python -m examples.compare_runs runs/tiny-teon runs/tiny-muon runs/tiny-adamw --out losses.png
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from examples import plots, run_folder
from examples.command_line import PathText, UserError, check_fields, exit_code, read_flags

ENOUGH_SEEDS = 5
# Default runs with seeds 0 and 1 ended at 1.675 and 1.691 (Muon), 1.694 and 1.689 (TEON); AdamW's,
# with seed 0, at 1.887.
NOTE = """
What to expect: in small models Muon and TEON end close together, Muon often ahead, and AdamW far
behind (docs/results.md). A seed alone moves a loss by about 0.02, so that runs of few seeds do not
tell Muon from TEON: train more, with --seed 1, --seed 2, and compare those."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """What to compare."""

    runs: tyro.conf.Positional[tuple[PathText, ...]]
    """Folders that train_gpt wrote."""
    out: Annotated[PathText, tyro.conf.arg(metavar="FILE")]
    """The PNG file to write."""

    def __post_init__(self) -> None:
        """Raises UserError for what is no path."""
        check_fields(self)


class Run(NamedTuple):
    """What the table and the plot show of a run."""

    optimizer: str
    seed: int
    learning_rate: float
    records: Sequence[run_folder.Metrics]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""

    def run() -> int:
        flags = read_flags(Flags, argv, "examples.compare_runs", __doc__)
        out = Path(flags.out)
        if not flags.runs:
            raise UserError("write the folders of the runs to compare, as in runs/tiny-teon")
        if out.is_dir():
            raise UserError(f"--out {out} is a folder: write the name of a PNG file")
        runs = [read(Path(folder)) for folder in flags.runs]
        plots.losses([plots.Curve(run.optimizer, run.records) for run in runs], out)
        print(table(runs))
        seeds = Counter(run.optimizer for run in runs)
        if 0 < min(seeds["teon"], seeds["muon"]) < ENOUGH_SEEDS:
            print(NOTE)
        return 0

    return exit_code("compare_runs", run)


def read(folder: Path) -> Run:
    """Reads a run's folder; raises UserError where it has no validation loss."""
    options = run_folder.read_config(folder)["options"]
    for name, wanted in (("optimizer", str), ("seed", int), ("learning_rate", float)):
        if not isinstance(options, dict) or type(options.get(name)) is not wanted:
            raise UserError(f"{folder / run_folder.CONFIG} is damaged: it has no {name}")
    records = run_folder.read_metrics(folder)
    if not any("val_loss" in record for record in records):
        raise UserError(f"{folder} has no validation loss yet")
    return Run(options["optimizer"], options["seed"], options["learning_rate"], records)


def table(runs: Sequence[Run]) -> str:
    """Shows the last validation loss of each run, as Markdown."""
    rows = ["| optimizer | seed | learning rate | step | validation loss | perplexity |"]
    rows += ["|---|---|---|---|---|---|"]
    for optimizer, seed, rate, records in runs:
        last = next(record for record in reversed(records) if "val_loss" in record)
        with np.errstate(over="ignore"):
            perplexity = np.exp(last["val_loss"])
        rows.append(
            f"| {optimizer} | {seed} | {rate:g} | {last['step']} | {last['val_loss']:.4f} "
            f"| {perplexity:.3f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
