"""From a command line to a job: whatever is wrong with it shows before JAX is loaded.

The order is that of what the answer costs: flags, the folder, the corpus.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from examples import data, metrics, run_folder
from examples.errors import UserError
from examples.options import Command, Options, resolve, resolve_resumed


class Job(NamedTuple):
    """What is to be trained, and where.

    Attributes:
        options: All that the result depends on.
        corpus: What it learns from.
        config: What `config.json` has to say of both.
        out: The folder for this process' files.
        checkpoints: The folder for checkpoints, which all processes of a run share.
        resumed: Whether it goes on with what is in the folder.
    """

    options: Options
    corpus: data.Corpus
    config: dict[str, Any]
    out: Path
    checkpoints: Path
    resumed: bool


@contextlib.contextmanager
def claimed(command: Command) -> Iterator[Job]:
    """The command's job, with its folder held for this process; nothing is written there yet.

    Raises:
        UserError: If anything is wrong with flags, folder or corpus.
    """
    check(command)
    with run_folder.claimed(command.out, command.resume):
        yield read(command, command.out / run_folder.CHECKPOINTS)


def check(command: Command) -> None:
    """Raises UserError for flags that contradict each other, or a folder for something else."""
    if not command.resume:
        _check_apart(resolve(command.given), command.out)
    run_folder.check(command.out, command.resume)


def _check_apart(options: Options, out: Path) -> None:
    """Raises UserError where the run would write texts into its corpus, which --resume refuses."""
    if options.data is None or options.tokenizer == "shards":
        return
    folder = Path(os.path.realpath(out))
    if folder.is_relative_to(options.data):
        hidden = any(name[0] == "." for name in folder.relative_to(options.data).parts)
        if not hidden:
            raise UserError(f"--out {out} is in --data, so it would be read: choose another --out")


def read(command: Command, checkpoints: Path) -> Job:
    """Reads the corpus, and with `--resume` what the run has left."""
    if not command.resume:
        return _job(resolve(command.given), None, command, checkpoints)
    config = run_folder.read_config(command.out)
    options = resolve_resumed(config["options"], command.given)
    _check_checkpoints(command.out, checkpoints, config["options"]["checkpoint_every"])
    saved = run_folder.read_tokenizer(command.out) if options.tokenizer == "bpe" else None
    job = _job(options, saved, command, checkpoints)
    if job.config["corpus"] != config["corpus"]:
        raise UserError(f"not the corpus that this run began with: {job.corpus.description}")
    return job


def _job(options: Options, tokenizer: str | None, command: Command, checkpoints: Path) -> Job:
    path = None if options.data is None else Path(options.data)
    corpus = data.load(path, options.tokenizer, options.vocab_size, tokenizer)
    data.check_length(corpus, options.context)
    config = {"options": dataclasses.asdict(options), "corpus": data.fingerprint(corpus)}
    return Job(options, corpus, config, command.out, checkpoints, command.resume)


def _check_checkpoints(out: Path, checkpoints: Path, every: int) -> None:
    """Raises UserError where there are none although the run has saved some.

    A run that was killed before its first one begins again. One that ended has drawn its losses,
    and one that went on after a checkpoint has metrics of later steps.
    """
    records = metrics.read(out)
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(f"{checkpoints} is no folder: move it away, or choose another --out")
    saved = checkpoints.iterdir() if checkpoints.is_dir() else ()
    if any(path.name.isdecimal() and path.is_dir() for path in saved):
        return
    went_on = bool(records) and (records[-1]["step"] > every or not checkpoints.exists())
    if went_on or (out / run_folder.PLOT).exists():
        raise UserError(
            f"{checkpoints} has no checkpoint any more: restore one, or start the run anew with "
            "another --out"
        )
