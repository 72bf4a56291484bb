"""One run in several processes: they find each other, and none waits for one that was refused."""

import argparse
import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

from examples import jobs, run_folder
from examples.errors import UserError
from examples.options import Command

Result = TypeVar("Result")


def connect(options: argparse.Namespace) -> None:
    """Makes the devices of all processes known to each, before JAX looks for its own."""
    try:
        if options.coordinator is not None:
            jax.distributed.initialize(options.coordinator, options.processes, options.process)
        elif options.distributed:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes do not find each other ({error}): write --coordinator HOST:PORT "
            "--processes N --process I"
        ) from error


@contextlib.contextmanager
def claimed(command: Command) -> Iterator[jobs.Job]:
    """The job, with the folder of this process: the run's for the first, one to forget for others.

    Raises:
        UserError: In all processes, if one was refused.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        out = command.out if first else stack.enter_context(_forgotten_folder())

        def claim() -> None:
            if first:
                stack.enter_context(run_folder.claimed(command.out, command.resume))

        def read() -> jobs.Job:
            if command.resume and not first:
                ignored = shutil.ignore_patterns(run_folder.CHECKPOINTS, run_folder.LOCK, ".*")
                shutil.copytree(command.out, out, ignore=ignored, dirs_exist_ok=True)
            own = dataclasses.replace(command, out=out)
            return jobs.read(own, command.out / run_folder.CHECKPOINTS)

        _agreed(claim)
        yield _agreed(read)


@contextlib.contextmanager
def _forgotten_folder() -> Iterator[Path]:
    """A folder for a while, in which nothing is printed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield Path(folder)


def _agreed(function: Callable[[], Result]) -> Result:
    """What the function returns; raises UserError in all processes if it does in one."""
    try:
        result = function()
    except (UserError, OSError):
        _any(True)
        raise
    if _any(False):
        raise UserError("another process of this run was refused: it says why")
    return result


def _any(refused: bool) -> bool:
    """Whether any process was refused."""
    if jax.process_count() == 1:
        return refused
    return bool(multihost_utils.process_allgather(refused).any())
