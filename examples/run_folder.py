"""The folder of a run: who holds it, its configuration, tokenizer and metrics.

`lock` is held by the process that trains, and by none once it ended, however it did. Metrics are a
line of JSON for every step, flushed before its checkpoint is saved. Checkpoints are Orbax's: see
`checkpoints.py`.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from examples.command_line import UserError
from examples.data import Corpus
from examples.options import Options

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, TOKENIZER, METRICS = "config.json", "tokenizer.json", "metrics.jsonl"
PLOT, ALIGNMENT = "loss.png", "alignment.png"
FILES = (CONFIG, TOKENIZER, METRICS, PLOT, ALIGNMENT)
CHECKPOINTS, LOCK = "checkpoints", "lock"
BEGINNING = '{"step": '
LARGEST = float(np.finfo(np.float32).max)
FIGURES_OF_A_GROUP = 4  # of `training.measure_alignment`

Metrics = dict[str, Any]


class Job(NamedTuple):
    """What is to be trained, and where.

    Attributes:
        options: All that the result depends on.
        corpus: What it learns from.
        config: What `config.json` has to say of both.
        out: The folder for this process' files.
        checkpoints: The folder for checkpoints, which all processes of a run share.
        resumed: Whether it goes on with what is in the folder.
        steps_before: Length of the run that it goes on with, which `--steps` may have changed.
    """

    options: Options
    corpus: Corpus
    config: dict[str, Any]
    out: Path
    checkpoints: Path
    resumed: bool
    steps_before: int


@contextlib.contextmanager
def claimed(out: Path, resume: bool) -> Iterator[None]:
    """Holds the folder for this process: a new one, or with `resume` that of a run.

    Raises:
        UserError: If another process holds it, it cannot be written, it has no run to resume, or a
            new run would write over something.
    """
    check(out, resume)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK, "a")
    except OSError as error:
        _remove(made)
        reason = "not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"cannot write into --out {out}: {reason}") from error
    with file:
        _lock(file, out)
        try:
            check(out, resume)  # Again: another process may have been here since.
            yield
        finally:
            # A run that was refused before it began leaves no trace.
            if not (out / CONFIG).exists():
                (out / LOCK).unlink(missing_ok=True)
                _remove(made)


def check(out: Path, resume: bool) -> None:
    """Raises UserError where there is no run to resume, or a new one would write over something."""
    is_run = (out / CONFIG).exists()
    if resume and not is_run:
        raise UserError(f"nothing to --resume: {out} holds no run (no {CONFIG})")
    if not resume and is_run:
        raise UserError(
            f"{out} holds a run ({CONFIG}): go on with it by --resume, or choose another --out"
        )
    for name in (*FILES, CHECKPOINTS):
        if not resume and os.path.lexists(out / name):
            raise UserError(
                f"{out} has {name} already, which a new run would write over: choose another --out"
            )
        if resume and name in FILES and (out / name).is_dir():
            raise UserError(
                f"{out / name} is a folder, where the run has a file: move it away, or choose "
                "another --out"
            )


def _lock(file: TextIO, out: Path) -> None:
    """Locks the file for this process, or says that this cannot be done here."""
    if fcntl is None:
        return
    try:
        # Of the open file: the system ends it with the process, after a kill too.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is training in {out}: wait until it ends, or choose another --out"
        ) from None
    except OSError as error:
        print(
            f"{file.name} cannot be locked here ({error.strerror}): start no other run in this "
            "folder until this one ends",
            file=sys.stderr,
        )


def _remove(folders: list[Path]) -> None:
    """Removes folders, the innermost first, that hold nothing else."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


# Configuration and tokenizer.


def create(out: Path, config: dict[str, Any], tokenizer: str | None) -> None:
    """Writes all that --resume needs, last what tells that there is a run."""
    try:
        if tokenizer is not None:
            write_atomically(out / TOKENIZER, tokenizer)
        write_config(out, config)
    except OSError as error:
        (out / TOKENIZER).unlink(missing_ok=True)
        raise UserError(f"cannot write into --out {out}: {error.strerror}") from error


def write_config(out: Path, config: dict[str, Any]) -> None:
    """Writes the run's configuration."""
    write_atomically(out / CONFIG, json.dumps(config, indent=2) + "\n")


def read_config(out: Path) -> dict[str, Any]:
    """Reads the run's configuration; raises UserError where there is none."""
    try:
        config = read_json((out / CONFIG).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{out} holds no run (no {CONFIG})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{out / CONFIG} is damaged: {error}") from error
    if not isinstance(config, dict) or set(config) != {"options", "corpus"}:
        raise UserError(f"{out / CONFIG} is damaged: expected `options` and `corpus`")
    return config


def read_tokenizer(out: Path) -> str:
    """Reads the BPE tokenizer that the run was started with."""
    try:
        return (out / TOKENIZER).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of the run cannot be read: {error}") from error


# Metrics.


def read_metrics(out: Path) -> list[Metrics]:
    """Reads the records of a run, of steps one after another; none where there is no file.

    A last line that a kill has cut off is left out.

    Raises:
        UserError: If the file is not what `write_metrics` writes.
    """
    path = out / METRICS
    try:
        *lines, rest = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if rest and not _is_cut_off(rest):
        lines.append(rest)
    records: list[Metrics] = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            raise _damaged(path, f"line {number} is not the record of a step")
        if records and record["step"] != records[-1]["step"] + 1:
            before = records[-1]["step"]
            raise _damaged(path, f"step {record['step']} follows step {before} in line {number}")
        records.append(record)
    return records


def read_metrics_until(out: Path, step: int) -> list[Metrics]:
    """Reads the records of the steps up to a checkpoint; later ones a kill left behind.

    Raises:
        UserError: If the file is damaged, or lacks steps before the checkpoint. If it was deleted,
            records begin with the step after that.
    """
    records, path = read_metrics(out), out / METRICS
    kept = [record for record in records if record["step"] <= step]
    has_content = path.exists() and path.stat().st_size > 0
    begins_later = records[0]["step"] == step + 1 if records else not has_content
    if step > 0 and not begins_later and (not kept or kept[-1]["step"] < step):
        raise _damaged(path, f"it has no record of step {step}, of which there is a checkpoint")
    return kept


def open_metrics(out: Path, records: Sequence[Metrics]) -> TextIO:
    """Opens the file for further records, with these alone in it."""
    path = out / METRICS
    write_atomically(path, "".join(_line(record) for record in records))
    return open(path, "a", encoding="utf-8")


def write_metrics(file: TextIO, record: Metrics) -> None:
    """Appends one step; it survives a kill of the process from here on."""
    file.write(_line(record))
    file.flush()


def _line(record: Metrics) -> str:
    return json.dumps(record) + "\n"


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}; mend it, or delete it to go on without it")


def _is_cut_off(line: str) -> bool:
    """Tells the beginning of a record, and no more than that, from other text."""
    try:
        read_json(line)
    except ValueError:
        return line.startswith(BEGINNING[: len(line)])
    return False


def _record(line: str) -> Metrics | None:
    """Reads the record of a line; None where it is none."""
    try:
        record = read_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"step", "loss"} <= set(record):
        return None
    losses = [record[name] for name in ("loss", "val_loss") if name in record]
    alignment = record.get("alignment", {})
    if not isinstance(alignment, dict):
        return None
    groups = alignment.values()
    is_valid = (
        type(record["step"]) is int
        and record["step"] > 0
        and all(map(_is_number, losses))
        and all(isinstance(group, list) and len(group) == FIGURES_OF_A_GROUP for group in groups)
        and all(_is_number(figure) for group in groups for figure in group)
    )
    return record if is_valid else None


def _is_number(value: Any) -> bool:
    """Tells a number that float32 holds from anything else, booleans included."""
    return type(value) in (int, float) and abs(value) <= LARGEST


# Files.


def read_json(text: str) -> Any:
    """Reads JSON; raises ValueError for whatever is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_atomically(path: Path, text: str) -> None:
    """Writes the whole file or nothing, whenever the process ends."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write, which then takes the place of that of `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
