"""The folder of a run: `config.json`, `tokenizer.json`, `metrics.jsonl` and `loss.png`.

The checkpoints beside them are Orbax's (see `checkpoints.py`).
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from examples.errors import UserError

CONFIG, TOKENIZER, METRICS, PLOT = "config.json", "tokenizer.json", "metrics.jsonl", "loss.png"
CHECKPOINTS = "checkpoints"


def refuse_occupied(out: Path) -> None:
    """Raises UserError where a new run would write over something."""
    for name in (CONFIG, TOKENIZER, METRICS, PLOT, CHECKPOINTS):
        if (out / name).exists():
            raise UserError(
                f"{out} holds a run ({name}): go on with it by --resume, or choose another --out"
            )


def create(out: Path, config: dict[str, Any], tokenizer: str | None) -> None:
    """Makes the folder with all that --resume needs, or leaves no trace."""
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            write_atomically(out / TOKENIZER, tokenizer)
        write_config(out, config)
    except OSError as error:
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        reason = "not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"cannot write into --out {out}: {reason}") from error


def write_config(out: Path, config: dict[str, Any]) -> None:
    """Replaces the run's configuration."""
    write_atomically(out / CONFIG, json.dumps(config, indent=2) + "\n")


def read_config(out: Path) -> dict[str, Any]:
    """The run's configuration; raises UserError where there is none."""
    try:
        config = json.loads((out / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"nothing to --resume: {out} holds no run (no {CONFIG})") from None
    except ValueError as error:
        raise UserError(f"{out / CONFIG} is damaged: {error}") from error
    if not isinstance(config, dict) or set(config) != {"options", "corpus"}:
        raise UserError(f"{out / CONFIG} is damaged: expected `options` and `corpus`")
    return config


def read_tokenizer(out: Path) -> str:
    """The BPE tokenizer that the run was started with."""
    try:
        return (out / TOKENIZER).read_text()
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"the tokenizer of the run cannot be read: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes the whole file or nothing, whenever the process ends."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def open_metrics(out: Path, step: int) -> TextIO:
    """Opens the metrics for the steps after `step`, and drops those that a kill left behind."""
    path = out / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= step]
    write_atomically(path, "".join(line + "\n" for line in kept))
    return open(path, "a")


def write_metrics(file: TextIO, record: dict[str, float]) -> None:
    """Appends one step; it survives a kill of the process from here on."""
    file.write(json.dumps(record) + "\n")
    file.flush()


def _step_of(line: str) -> float:
    """The step of a line, or infinity where the line was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def plot(out: Path, title: str) -> None:
    """Draws training and validation loss."""
    # Its first import builds a font cache, and says so on stderr: not where an error is reported.
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
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
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
