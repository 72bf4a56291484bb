"""The command for a lent accelerator runs, at small sizes, and goes on where it was stopped."""

import json
import subprocess
import sys

import pytest

from benchmarks import device


@pytest.mark.slow
def test_every_part_writes_its_results_and_is_not_run_again(tmp_path):
    command = [sys.executable, "-m", "benchmarks.device", "--tiny", "--out", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    names = {path.stem for path in tmp_path.glob("*.json")}
    assert names >= {
        "update_cost-gpt-2x64-bfloat16-cpu",
        "update_cost-gpt-2x64-float32-cpu",
        "accuracy",
        "device-share",
        "device-symmetric",
    }
    seconds = json.loads((tmp_path / "device-share.json").read_text())["seconds"]
    assert {"no optimizer", "optax muon", "teon polar_express"} <= set(seconds)
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")


def test_parts_come_in_the_order_of_their_worth(tmp_path):
    options = device.parser().parse_args(["--out", str(tmp_path)])
    names = [name for name, _ in device.commands(options, device.SIZES["full"])]
    assert names == [
        "update_cost-llama-1b-bfloat16",
        "update_cost-llama-1b-float32",
        "update_cost-gpt-small-bfloat16",
        "update_cost-gpt-small-float32",
        "accuracy",
        "share",
        "symmetric",
    ]
