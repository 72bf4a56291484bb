"""The benchmark of small networks runs end to end, and its peers train the same leaves."""

import json

import jax
import numpy as np
import pytest

from benchmarks import small

pytestmark = [pytest.mark.promotes_dtypes, pytest.mark.promotes_ranks]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(small, "NETWORKS", {"tiny": lambda: small.mlp(3, 4, 2)})
    monkeypatch.setattr(small, "SHAPES", {"two": [(2, 3), (4, 5)]})
    monkeypatch.setattr(small, "STEPS", 2)
    monkeypatch.setattr(small, "FEWEST_TURNS", 1)


def test_small_writes_json_tables_and_plot(tiny, tmp_path):
    flags = ["--networks", "tiny", "--seconds", "0", "--compilations", "1"]
    small.main([*flags, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "small.json").read_text())
    peers = ["optax muon", "teon", "optax adamw"]
    assert list(record["steps"]["tiny"]) == list(record["compiled"]["two"]) == peers
    assert record["steps"]["tiny"]["optax muon"]["time_ratio_median"] == 1
    assert record["parameters"] == {"two": 26, "tiny": 26}
    page = (tmp_path / "small.md").read_text()
    assert "| tiny | 26 |" in page
    assert all(f"| {tree} | {peer} |" in page for tree in ("two", "tiny") for peer in peers)
    assert (tmp_path / "small.png").exists()


def test_no_time_trains_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "training", None)
    small.main(["--no-time", "--networks", "tiny", "--compilations", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "small.json").read_text())
    assert not record["steps"] and set(record["compiled"]) == {"two", "tiny"}


def test_each_call_trains_the_network_some_steps_further(tiny):
    network = small.mlp(3, 4, 2)
    train = small.training(network, small.optimizers(network.params, network.rules)["teon"])
    (first, _), (second, _) = train(), train()
    moved = jax.tree.map(lambda a, b: np.any(a != b), first, second)
    assert all(jax.tree.leaves(moved))
    assert network.loss(second) < network.loss(network.params)
