"""Makes runs, each in a process of its own, a few at a time."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.reproduce.records import RUNS, Job, Record, Setup, read

PAUSE = 1.0  # seconds between two looks at the runs


def run(
    out: Path,
    setup: Setup,
    missing: Callable[[Sequence[Record]], list[Job]],
    workers: int,
    minutes: float = math.inf,
) -> None:
    """Makes the runs that are missing; each appends its record to `out / RUNS` itself.

    Args:
        out: The folder.
        setup: What all runs share.
        missing: Takes the records so far to what is to be run, the most important first.
        workers: How many runs are made at a time.
        minutes: No run is begun after so many.
    """
    end = time.monotonic() + 60 * minutes
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    while True:
        for job in missing(read(out)):
            free = [worker for worker in range(workers) if worker not in running]
            if not free or time.monotonic() > end:
                break
            if job not in [other for other, _ in running.values()]:
                running[free[0]] = job, start(job, setup, out, free[0], workers)
        if not running:
            return
        time.sleep(PAUSE)
        for worker, (job, process) in list(running.items()):
            if process.poll() is not None:
                del running[worker]
                if process.returncode:
                    raise SystemExit(f"{job} has failed; what has ended is kept")


def start(job: Job, setup: Setup, out: Path, worker: int, workers: int) -> subprocess.Popen[bytes]:
    """Begins a run, on a core of its own: small matrices gain little from a second core each."""
    text = json.dumps({"job": job, "setup": dataclasses.asdict(setup)})
    command = [sys.executable, "-m", "benchmarks.reproduce.training", text, str(out / RUNS)]
    if workers > 1:
        command += ["--core", str(worker % (os.cpu_count() or 1))]
    return subprocess.Popen(command)
