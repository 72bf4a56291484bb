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

import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from examples import options, train_gpt
from examples.command_line import Count, Index, UserError, exit_code, read_flags, shown_as

AXES = ("replica", "data", "model")


@dataclasses.dataclass(frozen=True)
class Flags(options.Flags):
    """The flags of `train_gpt`, and those of meshes and processes."""

    mesh: Annotated[str | None, shown_as("AXIS=SIZE,..", "data=DEVICES")] = None
    """The axes of the mesh."""
    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    """Find the other processes by the cluster."""
    coordinator: Annotated[str | None, shown_as("HOST:PORT", "one process")] = None
    """Address of the first process."""
    processes: Annotated[Count | None, shown_as("N", "one")] = None
    """How many there are."""
    process: Annotated[Index | None, shown_as("I", "the only one")] = None
    """Which one this is, from 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""

    def run() -> int:
        words = sys.argv[1:] if argv is None else argv
        flags = read_flags(Flags, words, "examples.sharded_training", __doc__)
        sizes = None if flags.mesh is None else axis_sizes(flags.mesh)
        check_processes(flags)
        command = options.command(flags, words)
        train_gpt.check(command)
        # As in `train_gpt`: after all that is quick to refuse.
        from examples import mesh, training

        mesh.connect(flags)
        devices = mesh.make(sizes)
        with mesh.claimed(command) as job:
            return training.run(job, functools.partial(mesh.build, devices))

    return exit_code("sharded_training", run)


def axis_sizes(text: str) -> dict[str, int]:
    """Reads the sizes of `--mesh` by their axes."""
    if not re.fullmatch(r"[a-z]+=[1-9][0-9]{0,8}(,[a-z]+=[1-9][0-9]{0,8})*", text):
        raise UserError(f"--mesh {text!r} is not AXIS=SIZE,AXIS=SIZE, as in data=4,model=2")
    sizes = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", text)}
    if not set(sizes) <= set(AXES) or len(sizes) <= text.count(","):
        raise UserError(f"--mesh {text}: axes are {', '.join(AXES)}, each once")
    return sizes


def check_processes(flags: Flags) -> None:
    """Raises UserError for flags that do not say which processes there are."""
    coordinator, processes, process = flags.coordinator, flags.processes, flags.process
    if coordinator is None and processes is None and process is None:
        return
    if coordinator is None or processes is None or process is None:
        raise UserError("--coordinator, --processes and --process go together")
    if flags.distributed:
        raise UserError("--distributed finds what --coordinator, --processes and --process say")
    address = re.fullmatch(r"\S+:([0-9]{1,5})", coordinator)
    if address is None or not 0 < int(address[1]) < 2**16:
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT, with a port below 65536")
    if process >= processes:
        raise UserError(
            f"--process {process} is not one of --processes {processes}, which are counted from 0"
        )


if __name__ == "__main__":
    sys.exit(main())
