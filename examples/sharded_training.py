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
import functools
import re
import sys
from collections.abc import Sequence

from examples import jobs
from examples.command_line import Parser, exit_code, whole
from examples.errors import UserError
from examples.options import parse

AXES = ("replica", "data", "model")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""

    def run() -> int:
        options, others = parser().parse_known_args(argv)
        sizes = None if options.mesh is None else axis_sizes(options.mesh)
        check_processes(options)
        command = parse(others)
        jobs.check(command)
        # As in `train_gpt`: after all that is quick to refuse.
        from examples import mesh, processes, training

        processes.connect(options)
        devices = mesh.make(sizes)
        with processes.claimed(command) as job:
            return training.run(job, functools.partial(mesh.build, devices))

    return exit_code("sharded_training", run)


def parser() -> argparse.ArgumentParser:
    """The flags that `train_gpt` does not have."""
    parser = Parser(
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
    add("--processes", type=whole(1), metavar="N", help="how many there are")
    add("--process", type=whole(0), metavar="I", help="which one this is, from 0")
    return parser


def axis_sizes(text: str) -> dict[str, int]:
    """The sizes of `--mesh` by their axes."""
    if not re.fullmatch(r"[a-z]+=[1-9][0-9]{0,8}(,[a-z]+=[1-9][0-9]{0,8})*", text):
        raise UserError(f"--mesh {text!r} is not AXIS=SIZE,AXIS=SIZE, as in data=4,model=2")
    sizes = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", text)}
    if not set(sizes) <= set(AXES) or len(sizes) <= text.count(","):
        raise UserError(f"--mesh {text}: axes are {', '.join(AXES)}, each once")
    return sizes


def check_processes(options: argparse.Namespace) -> None:
    """Raises UserError for flags that do not say which processes there are."""
    given = options.coordinator, options.processes, options.process
    if given == (None, None, None):
        return
    if None in given:
        raise UserError("--coordinator, --processes and --process go together")
    if options.distributed:
        raise UserError("--distributed finds what --coordinator, --processes and --process say")
    address = re.fullmatch(r"\S+:([0-9]{1,5})", options.coordinator)
    if address is None or not 0 < int(address[1]) < 2**16:
        raise UserError(
            f"--coordinator {options.coordinator!r} is not HOST:PORT, with a port below 65536"
        )
    if options.process >= options.processes:
        raise UserError(
            f"--process {options.process} is not one of --processes {options.processes}, which "
            "are counted from 0"
        )


if __name__ == "__main__":
    sys.exit(main())
