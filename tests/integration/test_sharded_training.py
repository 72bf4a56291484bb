"""The GPT on meshes: losses of one device, in two processes and after a change of meshes too."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import sharded_training, train_gpt
from examples.model import MODELS

ROOT = Path(__file__).parents[2]
LAST = 3
MODEL = {"width": 16, "hidden": 32, "depth": 2}
# The program, with a model for which there is no flag.
PROCESS = f"""
import dataclasses, sys
from examples import options, sharded_training
options.MODELS["tiny"] = dataclasses.replace(options.MODELS["tiny"], **{MODEL})
sys.exit(sharded_training.main())
"""
SMALL = f"--batch-size 8 --context 16 --seed 7 --checkpoint-every 1 --steps {LAST}".split()


@pytest.fixture(scope="module", autouse=True)
def small_model(quick_compilation):
    """In place of the tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", dataclasses.replace(MODELS["tiny"], **MODEL))
        yield


@pytest.fixture(scope="module")
def flags(corpus):
    """Of a small run."""
    return ["--data", str(corpus), *SMALL]


@pytest.fixture(scope="module")
def single(flags, tmp_path_factory):
    """A run of one process and one device."""
    out = tmp_path_factory.mktemp("single") / "run"
    assert train_gpt.main(["--out", str(out), *flags]) == 0
    return metrics(out)


@pytest.fixture(scope="module")
def on_eight(flags, tmp_path_factory):
    """The folder of a run on eight devices."""
    out = tmp_path_factory.mktemp("eight") / "run"
    assert sharded_training.main(["--mesh", "data=8", "--out", str(out), *flags]) == 0
    return out


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def back_to(step, folder, out):
    """A copy of a run's folder without what came after a step."""
    shutil.copytree(folder, out)
    for later in range(step + 1, LAST + 1):
        shutil.rmtree(out / "checkpoints" / str(later))
    return out


def assert_equal_losses(ours, theirs):
    assert len(theirs) == LAST
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_run_goes_on_on_another_mesh_and_then_on_one_device(on_eight, single, tmp_path):
    assert_equal_losses(metrics(on_eight), single)
    second = back_to(1, on_eight, tmp_path / "second")
    mesh = ["--mesh", "data=4,model=2"]
    assert sharded_training.main(["--resume", "--out", str(second), *mesh]) == 0
    assert_equal_losses(metrics(second), single)
    third = back_to(2, second, tmp_path / "third")
    assert train_gpt.main(["--resume", "--out", str(third)]) == 0
    assert_equal_losses(metrics(third), single)


def test_two_processes_have_the_losses_of_one(flags, single, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    out = tmp_path / "run"
    command = [sys.executable, "-c", PROCESS, "--mesh", "data=2,model=2"]
    command += ["--coordinator", address, "--processes", "2", "--out", str(out), *flags]
    fast = {"JAX_NUM_CPU_DEVICES": "2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    processes = [
        subprocess.Popen(
            [*command, "--process", str(index)],
            cwd=ROOT,
            env=os.environ | fast,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert_equal_losses(metrics(out), single)
    assert "validation loss" in outputs[0] and "validation loss" not in outputs[1]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"1", "2", "3"}
