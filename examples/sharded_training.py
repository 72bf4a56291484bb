"""Trains the GPT of `train_gpt` on a mesh of devices, in one process or several.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
        python -m examples.sharded_training --mesh data=4,model=2

`--mesh` names the axes: `data` cuts batches and parameters (FSDP), `model` cuts parameters only
(tensor parallelism), `replica` cuts batches only (with `data`, HSDP). Every flag of `train_gpt` is
one of this program too. A run may go on on another mesh, or by `train_gpt` on one device.

For several processes start the same command in each. Where JAX can find out who they are (Cloud
TPU, Slurm, Open MPI) add `--distributed`; elsewhere `--coordinator HOST:PORT --processes N
--process I`, with the first process' host. All must see the folder of `--out`, where the first one
writes.
"""

import argparse
import contextlib
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from examples import program, run_folder
from examples.errors import UserError
from examples.options import Command, Options, parse
from examples.train_gpt import exit_code, resume, start

BATCH_AXES = ("replica", "data")
AXES = (*BATCH_AXES, "model")
# What is found in a path first says along which axes of the mesh the leaf's axes are cut. Matrices
# that write to the residual stream are cut the other way round than those that read from it. The
# path of a moment ends as that of its parameter does.
SHARDING_RULES = (
    (r"attn/(query|key|value)/kernel$|mlp/(gate|up)/kernel$", ("data", "model")),
    (r"attn/out/kernel$|mlp/down/kernel$", ("model", "data")),
    (r"(embed|positions)/embedding$", ("model", "data")),
    (r"lm_head/kernel$", ("data", "model")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""

    def run() -> int:
        options, others = parser().parse_known_args(argv)
        command = parse(others)
        connect(options)
        mesh = make_mesh(options.mesh)
        with own_folder(command) as own:
            begin = resume if command.resume else start
            return begin(own, functools.partial(build, mesh), command.out / run_folder.CHECKPOINTS)

    return exit_code("sharded_training", run)


def parser() -> argparse.ArgumentParser:
    """The flags that `train_gpt` does not have."""
    parser = argparse.ArgumentParser(
        "examples.sharded_training",
        description=__doc__,
        epilog="And all flags of examples.train_gpt.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--mesh", metavar="AXIS=SIZE,..", help="default: data=DEVICES")
    add("--distributed", action="store_true", help="find the other processes by the cluster")
    add("--coordinator", metavar="HOST:PORT", help="of the first process")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which one this is, from 0")
    return parser


def connect(options: argparse.Namespace) -> None:
    """Makes the devices of all processes known to each, before JAX looks for its own."""
    given = options.coordinator, options.processes, options.process
    if None not in given:
        jax.distributed.initialize(*given)
    elif given != (None, None, None):
        raise UserError("--coordinator, --processes and --process go together")
    elif options.distributed:
        jax.distributed.initialize()


def make_mesh(text: str | None) -> Mesh:
    """The mesh of `--mesh`, over all devices of all processes."""
    count = jax.device_count()
    text = f"data={count}" if text is None else text
    if not re.fullmatch(r"[a-z]+=[1-9]\d*(,[a-z]+=[1-9]\d*)*", text):
        raise UserError(f"--mesh {text!r} is not AXIS=SIZE,AXIS=SIZE")
    sizes = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", text)}
    if not set(sizes) <= set(AXES) or len(sizes) <= text.count(","):
        raise UserError(f"--mesh {text}: axes are {', '.join(AXES)}, each once")
    if np.prod(list(sizes.values())) != count:
        raise UserError(f"--mesh {text} is not made of {count} devices, which is what there is")
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


@contextlib.contextmanager
def own_folder(command: Command) -> Iterator[Command]:
    """The command with the folder that this process writes to; all but the first forget theirs."""
    if jax.process_index() == 0:
        yield command
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        out = Path(folder, "run")
        if command.resume:
            run_folder.read_config(command.out)
            shutil.copytree(
                command.out, out, ignore=shutil.ignore_patterns(run_folder.CHECKPOINTS, ".*")
            )
        yield Command(out, command.resume, command.given)


def build(mesh: Mesh, options: Options, vocab_size: int) -> program.Program:
    """The program of `train_gpt` with its state and its batches on the mesh."""
    along = tuple(name for name in BATCH_AXES if name in mesh.shape)
    pieces = int(np.prod([mesh.shape[name] for name in along]))
    if options.batch_size % pieces:
        raise UserError(
            f"--batch-size {options.batch_size} cannot be cut for {pieces} devices of the axes "
            f"{', '.join(along)}"
        )
    single = program.build(options, vocab_size, functools.partial(place, mesh))
    on_mesh = NamedSharding(mesh, PartitionSpec(along or None))

    def with_batch(function: Callable[[Any, Any], Any]) -> Callable[[Any, np.ndarray], Any]:
        """Every process has the whole batch, and gives its devices their part."""
        return lambda state, batch: function(
            state, jax.make_array_from_callback(batch.shape, on_mesh, batch.__getitem__)
        )

    return single._replace(
        train_step=with_batch(single.train_step), eval_step=with_batch(single.eval_step)
    )


def place(mesh: Mesh, tree: Any) -> Any:
    """Shardings by the rules above; an axis that does not divide evenly stays whole."""

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


if __name__ == "__main__":
    sys.exit(main())
