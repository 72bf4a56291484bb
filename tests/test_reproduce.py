"""The grid: what it runs next, what it never runs twice, and what its table says."""

import dataclasses
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import corpus, reproduce, reproduce_report
from benchmarks.configurations import CONFIGURATIONS, build
from benchmarks.reproduce import Run, next_rate
from examples.data import Corpus
from examples.model import llama

pytestmark = [pytest.mark.promotes_dtypes, pytest.mark.promotes_ranks]
SETUP = reproduce.Setup("small", None, 300, 8, 2, 3, 32, "float32")
TEXT = Corpus([np.arange(400) % 300], [np.arange(100) % 300], 300, "numbers")


@pytest.fixture
def trained(monkeypatch):
    """Runs cost nothing: a valley at k = 3, a slope over seeds, TEON .05 better than Muon."""
    runs = []

    def train(configuration, program, run, setup, text):
        runs.append((configuration.name, run))
        loss = (
            5 + 0.01 * (run.k - 3) ** 2 + 0.1 * run.seed - 0.05 * (configuration.name == "teon-1")
        )
        record = {"k": run.k, "seed": run.seed, "val_loss": loss, "losses": [6.0, loss]}
        return record | {"rate": 0, "wall": 0, "cpu": 0}

    monkeypatch.setattr(reproduce, "train", train)
    monkeypatch.setattr(reproduce, "compiled", lambda *_: None)
    return runs


def finish(out, *names):
    return [reproduce.finish(CONFIGURATIONS[name], out, SETUP, TEXT, math.inf) for name in names]


def test_a_sweep_goes_on_until_the_best_lies_inside():
    losses = {}
    while (k := next_rate(CONFIGURATIONS["muon"], losses)) is not None:
        losses[k] = (k + 3.2) ** 2
    assert len(losses) >= 4
    assert min(losses) < min(losses, key=losses.__getitem__) == -3 < max(losses)


def test_a_sweep_does_not_go_on_for_ever():
    losses = {}
    while (k := next_rate(CONFIGURATIONS["muon"], losses)) is not None:
        losses[k] = -k
    assert len(losses) == reproduce.MOST_RATES


def test_a_configuration_is_swept_on_one_seed_and_run_on_others_at_its_best(trained, tmp_path):
    assert finish(tmp_path, "muon") == [True]
    runs = [run for _, run in trained]
    swept = [run.k for run in runs if run.seed == reproduce.SWEEP_SEED]
    assert len(swept) == len(set(swept)) >= 4 and {2, 3, 4} <= set(swept)
    assert [run for run in runs if run.seed != reproduce.SWEEP_SEED] == [
        Run(3, seed) for seed in range(1, 6)
    ]


def test_what_is_there_is_not_run_again_and_a_cut_line_is(trained, tmp_path):
    finish(tmp_path, "muon")
    path, count = tmp_path / "muon.jsonl", len(trained)
    assert finish(tmp_path, "muon") == [True] and len(trained) == count
    text = path.read_text()
    path.write_text(text[:-10] + "\n")
    assert finish(tmp_path, "muon") == [True]
    assert trained[count:] == [("muon", Run(3, 5))]


def test_a_variation_waits_for_the_rate_of_its_base(trained, tmp_path):
    assert finish(tmp_path, "muon-no-decay", "muon", "muon-no-decay") == [None, True, True]
    assert [run for name, run in trained if name == "muon-no-decay"] == [Run(3, 1), Run(3, 2)]


def test_no_run_begins_after_the_time(trained, tmp_path):
    end = -math.inf
    assert reproduce.finish(CONFIGURATIONS["muon"], tmp_path, SETUP, TEXT, end) is False
    assert trained == []


def test_the_headline_comes_first_and_a_few_seeds_of_it_before_all():
    names = ["teon-3", "muon", "teon-1"]
    found = [(each.name, len(each.seeds)) for each in reproduce.queue(names)]
    assert found == [("muon", 2), ("teon-1", 2), ("muon", 5), ("teon-1", 5), ("teon-3", 2)]


def test_runs_of_another_set_up_are_not_mixed(tmp_path):
    reproduce.keep_setup(tmp_path, SETUP)
    reproduce.keep_setup(tmp_path, SETUP)
    with pytest.raises(SystemExit, match="of another set-up"):
        reproduce.keep_setup(tmp_path, dataclasses.replace(SETUP, steps=4))


def test_aggregation_pairs_seeds_and_works_on_what_there_is(trained, tmp_path, capsys):
    reproduce.keep_setup(tmp_path, SETUP)
    finish(tmp_path, "muon", "teon-1")
    with open(tmp_path / "teon-2.jsonl", "w") as file:  # one run of a sweep
        file.write(json.dumps({"k": 0, "seed": 0, "val_loss": None, "losses": [1.0]}) + "\n")
    assert reproduce.main(["--aggregate", "--out", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "| TEON mode 1, `polar_express` | 0.028 | 5 | 5.2500 ± 0.1581 |" in page
    assert "| `teon-1` - `muon` | 5 | -0.0500 ± 0.0000 | -4.9 % |" in page
    assert "(sweep not done)" in page
    record = json.loads((tmp_path / "reproduce.json").read_text())
    assert record["configurations"]["muon"]["seeds"]["1"] == pytest.approx(5.1)
    assert (tmp_path / "reproduce.png").read_bytes().startswith(b"\x89PNG")


def test_a_difference_has_the_interval_of_students_t():
    def summary(values):
        losses = dict(enumerate(values, start=1))
        return reproduce_report.Summary(0, {}, True, losses, {})

    value = reproduce_report.difference(summary([1.0, 2.0, 4.0]), summary([1.0, 1.0, 2.0]))
    assert value is not None
    assert value.mean == pytest.approx(1.0)
    assert value.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)  # t of 2 at .975


def shapes():
    kernels = {name: {"kernel": (8, 8)} for name in ("query", "key", "value", "out")}
    blocks = {f"block_{i}": {"attn": kernels, "norm": {"scale": (8,)}} for i in range(2)}
    return blocks | {"embed": {"embedding": (20, 8)}}


def gradients():
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32),
        shapes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def norm(name, *projections):
    """Of the updates of all blocks' projections, together."""
    configuration = dataclasses.replace(CONFIGURATIONS[name], method="svd")
    tree = gradients()
    optimizer: Any = build(configuration, 100, 1.0, 1.0, 0.0)
    updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
    attention = [updates[block]["attn"] for block in tree if block.startswith("block")]
    return math.hypot(*(np.linalg.norm(own[p]["kernel"]) for own in attention for p in projections))


def test_the_control_makes_updates_as_long_as_teons():
    short, teon, muon = (norm(name, "query") for name in ("muon-short-qkv", "teon-1", "muon"))
    assert short == pytest.approx(teon, rel=1e-4)
    assert muon == pytest.approx(math.sqrt(2) * teon, rel=1e-4)


@pytest.mark.parametrize(
    "name", [n for n in CONFIGURATIONS if re.match("layers|siblings|heads", n)]
)
def test_couplings_move_queries_keys_and_values_as_far_as_muon(name):
    qkv = "query", "key", "value"
    assert norm(name, *qkv) == pytest.approx(norm("muon", *qkv), rel=1e-4)


@pytest.mark.slow
def test_a_grid_of_a_small_model_runs_to_its_end(tmp_path, monkeypatch):
    small = dataclasses.replace(llama(8, 12, 2, 2), tied=True)
    monkeypatch.setattr(reproduce, "SMALL", small)
    program = reproduce.compiled(CONFIGURATIONS["teon-1"], SETUP, 300)
    first, again, other = (
        reproduce.train(CONFIGURATIONS["teon-1"], program, run, SETUP, TEXT)
        for run in (Run(0, 1), Run(0, 1), Run(4, 1))
    )
    assert first["losses"] == again["losses"] and first["val_loss"] == again["val_loss"]
    assert first["losses"][0] == other["losses"][0]  # the same parameters and batch
    assert first["val_loss"] != other["val_loss"]
    assert first["losses"][0] == pytest.approx(math.log(300), rel=0.02)


def test_a_corpus_keeps_every_text_once(tmp_path):
    content, out = tmp_path / "content", tmp_path / "out"
    (content / "html").mkdir(parents=True)
    for name, text in {"a.rst": "one", "b.rst": "one", "c.md": "two", "html/d.txt": "3"}.items():
        (content / name).write_text(text)
    assert corpus.keep(content, (".rst", ".md", ".txt"), out) == (2, 6)
    assert sorted(path.name for path in out.iterdir()) == ["a.rst", "c.md"]
