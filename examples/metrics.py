"""The metrics of a run: a line of JSON for every step, flushed before its checkpoint is saved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from examples.errors import UserError
from examples.run_folder import METRICS, PLOT, read_json, replacing, write_atomically

BEGINNING = '{"step": '
LARGEST = float(np.finfo(np.float32).max)
FIGURES_OF_A_GROUP = 4  # of `alignments.measure`


def read(out: Path) -> list[dict[str, Any]]:
    """The records of a run, of steps one after another; none where there is no file.

    A last line that a kill has cut off is left out.

    Raises:
        UserError: If the file is not what `write` writes.
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
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            raise _damaged(path, f"line {number} is not the record of a step")
        if records and record["step"] != records[-1]["step"] + 1:
            before = records[-1]["step"]
            raise _damaged(path, f"step {record['step']} follows step {before} in line {number}")
        records.append(record)
    return records


def read_until(out: Path, step: int) -> list[dict[str, Any]]:
    """The records of the steps up to that of a checkpoint; later ones a kill left behind.

    Raises:
        UserError: If the file is damaged, or lacks steps before the checkpoint. If it was deleted,
            records begin with the step after that.
    """
    records, path = read(out), out / METRICS
    kept = [record for record in records if record["step"] <= step]
    begins_later = records[0]["step"] == step + 1 if records else not _has_content(path)
    if step > 0 and not begins_later and (not kept or kept[-1]["step"] < step):
        raise _damaged(path, f"it has no record of step {step}, of which there is a checkpoint")
    return kept


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}; mend it, or delete it to go on without it")


def _is_cut_off(line: str) -> bool:
    """Whether it is the beginning of a record, and no more than that."""
    try:
        read_json(line)
    except ValueError:
        return line.startswith(BEGINNING[: len(line)])
    return False


def _record(line: str) -> dict[str, Any] | None:
    """The record of a line, or None where it is none."""
    try:
        record = read_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"step", "loss"} <= set(record):
        return None
    losses = [record[name] for name in ("loss", "val_loss") if name in record]
    is_step = type(record["step"]) is int and record["step"] > 0
    is_alignment = _is_alignment(record.get("alignment", {}))
    return record if is_step and all(map(_is_number, losses)) and is_alignment else None


def _is_alignment(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(figures, list)
        and len(figures) == FIGURES_OF_A_GROUP
        and all(map(_is_number, figures))
        for figures in value.values()
    )


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds, and not a boolean."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def opened(out: Path, records: Sequence[dict[str, Any]]) -> TextIO:
    """The file, with these records, for those that follow; what else it held is dropped."""
    path = out / METRICS
    write_atomically(path, "".join(_line(record) for record in records))
    return open(path, "a", encoding="utf-8")


def write(file: TextIO, record: dict[str, Any]) -> None:
    """Appends one step; it survives a kill of the process from here on."""
    file.write(_line(record))
    file.flush()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def plot(out: Path, title: str) -> None:
    """Draws training and validation loss."""
    # Its first import builds a font cache, and says so on stderr: not where an error is reported.
    from matplotlib.figure import Figure

    records = read(out)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        axes.plot(*np.reshape(points, (-1, 2)).T, style, label=key, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, out / PLOT)


def save_figure(figure: Any, path: Path) -> None:
    """Writes the whole PNG or nothing."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
