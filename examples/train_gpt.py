"""Trains a GPT with TEON, Muon or AdamW.

    python -m examples.train_gpt

takes about two minutes on two CPU cores and needs no download: it learns the source of Python's
standard library, byte by byte. `--help` lists models, corpora and optimizers. Ctrl-C saves, and
`--resume` goes on bit for bit as if nothing had happened, after a kill -9 too (on GPUs with
`XLA_FLAGS=--xla_gpu_deterministic_ops=true`).
"""

import sys
from collections.abc import Sequence

from examples import jobs
from examples.command_line import exit_code
from examples.options import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""

    def run() -> int:
        with jobs.claimed(parse(argv)) as job:
            # JAX and Flax take seconds to load: whatever the user can mend is refused before.
            from examples import training

            return training.run(job)

    return exit_code("train_gpt", run)


if __name__ == "__main__":
    sys.exit(main())
