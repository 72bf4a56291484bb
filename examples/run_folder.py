"""The folder of a run: its configuration, tokenizer, metrics and figures.

The checkpoints beside them are Orbax's (see `checkpoints.py`). `lock` is held by the process that
trains, and by none once it ended, however it did.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from examples.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, TOKENIZER, METRICS = "config.json", "tokenizer.json", "metrics.jsonl"
PLOT, ALIGNMENT = "loss.png", "alignment.png"
FILES = (CONFIG, TOKENIZER, METRICS, PLOT, ALIGNMENT)
CHECKPOINTS, LOCK = "checkpoints", "lock"


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


def _lock(file: TextIO, out: Path) -> None:
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
    """The run's configuration; raises UserError where there is none."""
    try:
        config = read_json((out / CONFIG).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{out} holds no run (no {CONFIG})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{out / CONFIG} is damaged: {error}") from error
    if not isinstance(config, dict) or set(config) != {"options", "corpus"}:
        raise UserError(f"{out / CONFIG} is damaged: expected `options` and `corpus`")
    return config


def read_json(text: str) -> Any:
    """What the text says; raises ValueError for whatever is no JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_tokenizer(out: Path) -> str:
    """The BPE tokenizer that the run was started with."""
    try:
        return (out / TOKENIZER).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of the run cannot be read: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes the whole file or nothing, whenever the process ends."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of that of `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
