"""The program of `train_gpt` on a mesh of devices, in one process or several."""

import contextlib
import functools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from examples import run_folder, train_gpt, training
from examples.command_line import UserError
from examples.options import Command, Options
from examples.run_folder import Job
from examples.sharded_training import Flags

BATCH_AXES = ("replica", "data")
# What is found in a path first says along which axes of the mesh the leaf's axes are cut. Matrices
# that write to the residual stream are cut the other way round than those that read from it. The
# path of a moment ends as that of its parameter does.
SHARDING_RULES = (
    (r"attn/(query|key|value)/kernel$|mlp/(gate|up)/kernel$", ("data", "model")),
    (r"attn/out/kernel$|mlp/down/kernel$", ("model", "data")),
    (r"(embed|positions)/embedding$", ("model", "data")),
    (r"lm_head/kernel$", ("data", "model")),
)

Result = TypeVar("Result")


def make(sizes: dict[str, int] | None) -> Mesh:
    """Makes the mesh of these axes, or of the axis `data`, over all devices of all processes."""
    count = jax.device_count()
    sizes = sizes or {"data": count}
    if math.prod(sizes.values()) != count:
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"--mesh {text} is not made of {count} devices, which is what there is")
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def build(mesh: Mesh, options: Options, vocab_size: int) -> training.Program:
    """Builds the program of `train_gpt` with its state and its batches on the mesh."""
    along = tuple(name for name in BATCH_AXES if name in mesh.shape)
    pieces = int(np.prod([mesh.shape[name] for name in along]))
    if options.batch_size % pieces:
        raise UserError(
            f"--batch-size {options.batch_size} cannot be cut for {pieces} devices of the axes "
            f"{', '.join(along)}"
        )
    single = training.build(options, vocab_size, functools.partial(place, mesh))
    on_mesh = NamedSharding(mesh, PartitionSpec(along or None))

    def with_batch(function: Callable[[Any, Any], Any]) -> Callable[[Any, np.ndarray], Any]:
        """Gives the devices of this process their part of the batch, which every process has."""
        return lambda state, batch: function(
            state, jax.make_array_from_callback(batch.shape, on_mesh, batch.__getitem__)
        )

    return single._replace(
        train_step=with_batch(single.train_step), eval_step=with_batch(single.eval_step)
    )


def place(mesh: Mesh, tree: Any) -> Any:
    """Finds shardings by the rules above; an axis that does not divide evenly stays whole."""

    def of_leaf(keys: Any, leaf: Any) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        names = next((names for pattern, names in SHARDING_RULES if re.search(pattern, path)), ())
        sizes = [mesh.shape.get(name, 0) for name in names]
        cut = [
            name if size and length % size == 0 else None
            for name, size, length in zip(names, sizes, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*cut))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


# Several processes: they find each other, and none waits for one that was refused.


def connect(flags: Flags) -> None:
    """Makes the devices of all processes known to each, before JAX looks for its own."""
    try:
        if flags.coordinator is not None:
            jax.distributed.initialize(flags.coordinator, flags.processes, flags.process)
        elif flags.distributed:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes do not find each other ({error}): write --coordinator HOST:PORT "
            "--processes N --process I"
        ) from error


@contextlib.contextmanager
def claimed(command: Command) -> Iterator[Job]:
    """Reads the job and holds its folder: the run's in the first process, else one to forget.

    Raises:
        UserError: In all processes, if one was refused.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        out = command.out if first else stack.enter_context(_forgotten_folder())

        def claim() -> None:
            if first:
                stack.enter_context(run_folder.claimed(command.out, command.resume))

        def read() -> Job:
            if command.resume and not first:
                ignored = shutil.ignore_patterns(run_folder.CHECKPOINTS, run_folder.LOCK, ".*")
                shutil.copytree(command.out, out, ignore=ignored, dirs_exist_ok=True)
            own = command._replace(out=out)
            return train_gpt.read(own, command.out / run_folder.CHECKPOINTS)

        _agreed(claim)
        yield _agreed(read)


@contextlib.contextmanager
def _forgotten_folder() -> Iterator[Path]:
    """Gives a folder for a while, in which nothing is printed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield Path(folder)


def _agreed(function: Callable[[], Result]) -> Result:
    """Calls the function; raises UserError in all processes if it does in one."""
    try:
        result = function()
    except (UserError, OSError):
        _any(True)
        raise
    if _any(False):
        raise UserError("another process of this run was refused: it says why")
    return result


def _any(refused: bool) -> bool:
    """Asks whether any process was refused."""
    if jax.process_count() == 1:
        return refused
    return bool(multihost_utils.process_allgather(refused).any())
