"""The first rate: which runs are made, and what the table says of them."""

import numpy as np
import pytest

from benchmarks import first_rate
from benchmarks.first_rate import ADAMW, CHEAP, MUON, SAME, Run
from examples.data import Corpus

pytestmark = [pytest.mark.promotes_dtypes, pytest.mark.promotes_ranks]


def all_losses():
    """A loss for every run, in the order of the runs: lowest at a rate of .01."""
    losses = {}
    while runs := [run for run in first_rate.wanted(losses) if run not in losses]:
        losses[runs[0]] = 2 + abs(runs[0].rate - 0.01) + 0.1 * runs[0].seed
    return losses


def test_both_models_are_run_at_two_lengths_with_teon_muon_and_adamw():
    lengths = {(run.task, run.steps) for run in all_losses()}
    assert lengths == {(CHEAP, 100), (CHEAP, 50), ("train_gpt", 200), ("train_gpt", 100)}
    for task, steps in lengths:
        found = {run.optimizer for run in all_losses() if run[:2] == (task, steps)}
        assert {SAME, MUON, ADAMW} <= found


def test_more_seeds_are_of_the_best_rate_of_the_first():
    more = [run for run in all_losses() if run.seed]
    assert {run.rate for run in more if run.optimizer == SAME} == {0.01}
    assert {run.rate for run in more if run.optimizer == ADAMW} == {0.008}
    assert {run.seed for run in more} == {1, 2}


def test_what_was_run_is_kept_and_the_table_marks_the_best(tmp_path):
    losses = all_losses()
    first_rate.save(tmp_path, losses)
    assert first_rate.read(tmp_path) == pytest.approx(losses)
    first_rate.main(["--out", str(tmp_path)])  # there is nothing left to run
    text = (tmp_path / "first_rate.md").read_text()
    assert "| `teon(rate)` |  |  |  | 2.005 |  | **2.000** | 2.010 | 2.030 | 2.100 |" in text
    assert (tmp_path / "first_rate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_few_steps_lower_the_loss(monkeypatch):
    text = np.arange(4000) % 7
    monkeypatch.setattr(first_rate, "corpus", lambda: Corpus([text], [text], 256, "numbers"))
    monkeypatch.setattr(first_rate, "HELD_OUT", first_rate.BATCH_SIZE)
    one, ten = (first_rate.train(Run(CHEAP, steps, SAME, 0.01, 0)) for steps in (1, 10))
    assert ten < one - 0.5
