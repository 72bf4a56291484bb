"""What a run is known by, and the file that keeps what it found."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RUNS, SETUP = "runs.jsonl", "setup.json"

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Setup:
    """Holds what all runs of a folder have in common."""

    model: str
    data: str | None
    tokenizer: str
    vocab_size: int
    context: int
    batch_size: int
    microbatch: int
    eval_tokens: int
    dtype: str


class Job(NamedTuple):
    """Names a run.

    Attributes:
        configuration: Its name.
        k: The learning rate of the matrices is `rate_of(k)`.
        rest_k: That of embedding and norms.
        seed: Of first parameters and batches.
        steps: Length.
        nudge: Where not 0: first parameters differ by 1e-7, in a way numbered by it.
    """

    configuration: str
    k: int
    rest_k: int
    seed: int
    steps: int
    nudge: int = 0


def rate_of(k: float) -> float:
    """Gives the learning rate number k of every sweep."""
    return 0.01 * 2 ** (k / 2)


def keep_setup(out: Path, setup: Setup, steps: int, corpus: str) -> None:
    """Keeps what the runs of a folder share; refuses to mix in runs of anything else."""
    out.mkdir(parents=True, exist_ok=True)
    path, wanted = out / SETUP, dataclasses.asdict(setup) | {"steps": steps, "corpus": corpus}
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=1) + "\n")
    if json.loads(path.read_text()) != wanted:
        raise SystemExit(
            f"{path} is of another set-up: choose another --out, or its flags. Where only the "
            f"corpus differs ({corpus} here), the text is that of another Python."
        )


def append(runs: Path, record: Record) -> None:
    """Writes the record of a run that has ended at the end of the file `runs`."""
    with open(runs, "a") as file:
        file.write(json.dumps(record) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    """Reads the records of a folder; a line that was cut off is not one."""
    path = out / RUNS
    return list(_records(path.read_text().splitlines() if path.exists() else []))


def _records(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def job_of(record: Record) -> Job:
    """Names the job that a record is of."""
    return Job(*(record[field] for field in Job._fields))


def loss_of(record: Record) -> float:
    """Gives the validation loss of the averaged weights, infinite for a run that diverged."""
    return math.inf if record["val_loss"] is None else record["val_loss"]
