"""Trains a GPT with TEON, Muon or AdamW.

    python -m examples.train_gpt

takes about two minutes on two CPU cores and needs no download: it learns the source of Python's
standard library, byte by byte. `--help` lists models, corpora and optimizers. Ctrl-C saves, and
`--resume` goes on bit for bit as if nothing had happened, after a kill -9 too (on GPUs with
`XLA_FLAGS=--xla_gpu_deterministic_ops=true`).

Whatever is wrong with a command shows before JAX is loaded, in the order of what the answer costs:
flags, the folder, the corpus.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from examples import data, run_folder
from examples.command_line import UserError, exit_code
from examples.options import Command, Options, parse, resolve, resolve_resumed
from examples.run_folder import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""

    def run() -> int:
        command = parse(argv)
        check(command)
        with run_folder.claimed(command.out, command.resume):
            job = read(command, command.out / run_folder.CHECKPOINTS)
            # JAX and Flax take seconds to load.
            from examples import training

            return training.run(job)

    return exit_code("train_gpt", run)


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
    """Reads the corpus, and with `--resume` what the run has left; nothing is written yet.

    Args:
        command: What the user wrote; its folder is held by this process.
        checkpoints: The folder for checkpoints, which all processes of a run share.

    Raises:
        UserError: If anything is wrong with options, folder or corpus.
    """
    if not command.resume:
        return _job(resolve(command.given), None, command, checkpoints)
    config = run_folder.read_config(command.out)
    options = resolve_resumed(config["options"], command.given)
    _check_checkpoints(command.out, checkpoints, config["options"]["checkpoint_every"])
    saved = run_folder.read_tokenizer(command.out) if options.tokenizer == "bpe" else None
    job = _job(options, saved, command, checkpoints)
    if job.config["corpus"] != config["corpus"]:
        raise UserError(f"not the corpus that this run began with: {job.corpus.description}")
    return job._replace(steps_before=config["options"]["steps"])


def _job(options: Options, tokenizer: str | None, command: Command, checkpoints: Path) -> Job:
    path = None if options.data is None else Path(options.data)
    corpus = data.load(path, options.tokenizer, options.vocab_size, tokenizer)
    data.check_length(corpus, options.context)
    config = {"options": dataclasses.asdict(options), "corpus": data.fingerprint(corpus)}
    return Job(options, corpus, config, command.out, checkpoints, command.resume, options.steps)


def _check_checkpoints(out: Path, checkpoints: Path, every: int) -> None:
    """Raises UserError where there are none although the run has saved some.

    A run that was killed before its first one begins again. One that ended has drawn its losses,
    and one that went on after a checkpoint has metrics of later steps.
    """
    records = run_folder.read_metrics(out)
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


if __name__ == "__main__":
    sys.exit(main())
