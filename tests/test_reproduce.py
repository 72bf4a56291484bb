"""The grid: what it runs next, what it never runs twice, and what its tables say."""

import dataclasses
import itertools
import json
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from benchmarks import corpus, results
from benchmarks.reproduce import __main__ as command
from benchmarks.reproduce import answers, questions, schedule, statistics, training, workers
from benchmarks.reproduce import records as kept
from benchmarks.reproduce.configurations import (
    ASKED,
    CONFIGURATIONS,
    PARTS,
    PER_HEAD,
    WEIGHT_DECAY,
    build,
)
from benchmarks.reproduce.records import Job, Setup, job_of

pytestmark = [pytest.mark.promotes_dtypes, pytest.mark.promotes_ranks]
SETUP = Setup("small", None, "byte", 300, 8, 2, 1, 64, "float32")
TEXT = training.data.Corpus([np.arange(400) % 300], [np.arange(100) % 300], 300, "numbers")
STEPS = 8


def missing(records, steps):
    return schedule.missing(schedule.wanted(records, steps), records)


def loss(job):
    """A valley at k = 2, rest_k = 4; a slope over seeds; chaos; mode 2 ahead by .05."""
    better = {"teon-2-muon-scale": -0.05, "stack-1-muon-scale": -0.01}
    chaos = 0.001 * ((7 * job.seed + len(job.configuration)) % 3)
    valley = 0.01 * (job.k - 2) ** 2 + 0.01 * (job.rest_k - 4) ** 2
    return 2 + valley + chaos + 0.1 * job.seed + better.get(job.configuration, 0) + 1e-4 * job.nudge


def record_of(job):
    end = loss(job)
    ours = job.configuration not in ("muon", "adamw")
    return job._asdict() | {
        "val_loss": end,
        "val_loss_last": end + 0.01,
        "cpu_per_step": 0.5,
        "validation": [[500, end + 1], [750, end + 0.05], [1000, end]],
        "alignment": [[250 * i, 1.1, 1.2] for i in (1, 2, 3, 4)] if ours else [],
        "environment": {"commit": "abc", "date": "2026-11-26", "device": "cpu", "machine": "one"}
        | {"load": 0, "python": "3", "versions": {}},
    }


@pytest.fixture(scope="module")
def grid():
    """All records, in the order in which one worker makes them."""
    records = []
    while jobs := missing(records, STEPS):
        records.append(record_of(jobs[0]))
    return records


def jobs_of(records, **fields):
    return [
        job
        for job in map(job_of, records)
        if all(getattr(job, key) == value for key, value in fields.items())
    ]


def test_the_noise_comes_first_and_is_half_as_long():
    assert missing([], STEPS)[:2] == [Job("muon", 2, 2, 0, STEPS // 2, nudge) for nudge in (0, 1)]


def test_no_run_is_made_twice(grid):
    assert len({job_of(record) for record in grid}) == len(grid)


def test_the_fallbacks_rate_is_found_once_and_shared(grid):
    found = [job.rest_k for job in jobs_of(grid, configuration="muon", k=2, nudge=0, seed=0)]
    assert found == [2, 0, 4, 6]
    assert {job.rest_k for job in jobs_of(grid) if job.configuration != "muon"} == {4}


def test_a_sweep_goes_on_until_the_best_lies_inside(grid):
    swept = [job.k for job in jobs_of(grid, configuration="adamw", seed=0)]
    assert swept == [-3, -5, -1, 1, 3]
    best = schedule.best_rate(grid, "adamw", 4, STEPS // 2)
    assert best is not None and min(swept) < best < max(swept)


def test_a_sweep_does_not_go_on_for_ever():
    losses = {2: 0.0, 0: 0.1, 4: -0.1}
    while ks := schedule.neighbours(losses, (2, 0, 4)):
        losses |= {k: -k for k in ks}
    assert len(losses) == schedule.MOST_RATES


def test_teon_is_compared_in_the_scale_that_is_better_for_stack_1(grid):
    full = {job.configuration for job in jobs_of(grid, steps=STEPS)} - {
        name for name, each in CONFIGURATIONS.items() if each.base
    }
    assert full == {"muon", "adamw", *(f"{n}-muon-scale" for n in ("stack-1", "teon-1", "teon-2"))}


def test_every_optimizer_is_swept_at_one_rate_before_any_at_the_next(grid):
    swept = jobs_of(grid, seed=0, rest_k=4, nudge=0)
    first = {job.configuration for job in swept[:6]}
    assert first == {"muon", "stack-1", "teon-1", "teon-2", "adamw", "stack-1-muon-scale"}


def test_rounding_is_measured_at_full_length_too(grid):
    assert jobs_of(grid, steps=STEPS, nudge=1) == [Job("muon", 2, 4, 1, STEPS, 1)]


def test_headline_runs_are_made_seed_by_seed_at_the_best_rate(grid):
    full = [
        job
        for job in jobs_of(grid, steps=STEPS, nudge=0)
        if CONFIGURATIONS[job.configuration].base is None
    ]
    assert [job.seed for job in full] == [seed for seed in (1, 2, 3, 4, 5) for _ in range(5)]
    assert {job.k for job in full} == {2, 1}  # AdamW's grid has odd numbers


def test_parts_take_over_the_rate_of_their_base(grid):
    parts = {f"{part.name}-muon-scale" for part in PARTS}
    found = [job for job in jobs_of(grid, steps=STEPS) if job.configuration in parts]
    assert len(found) == 3 * len(PARTS) and {job.k for job in found} == {2}


def test_the_headline_without_adamw_and_schatten_are_run_half_as_long_on_eight_seeds(grid):
    short = [job for job in jobs_of(grid, steps=STEPS // 2) if job.seed]
    schatten = {f"{name}-schatten-muon-scale" for name in ("stack-1", "teon-1")}
    headline = {"muon", *(f"{n}-muon-scale" for n in ("stack-1", "teon-1", "teon-2"))}
    assert {job.configuration for job in short} == schatten | headline
    assert [job.seed for job in short] == [seed for seed in range(1, 9) for _ in range(6)]
    assert {job.k for job in short} == {2}


def test_what_is_there_is_not_run_again_and_a_cut_line_is(grid, tmp_path):
    for record in grid:
        training.keep(tmp_path / kept.RUNS, record | {"rate": 0, "rest_rate": 0, "wall": 0})
    assert missing(kept.read(tmp_path), STEPS) == []
    path = tmp_path / kept.RUNS
    path.write_text(path.read_text()[:-10] + "\n")
    assert missing(kept.read(tmp_path), STEPS) == [job_of(grid[-1])]


def test_a_few_sequences_at_a_time_give_the_gradients_of_the_whole_batch():
    def loss(params, batch):
        return jnp.square(batch @ params["w"] - params["b"]).mean()

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4,))}
    batch = jax.random.normal(keys[2], (6, 3))
    value_and_grad = jax.value_and_grad(loss)
    whole = value_and_grad(params, batch)
    for microbatch in (1, 2, 6):
        parts = training.accumulated(value_and_grad, params, batch, microbatch)
        chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("microbatch", ["5", "0", "-2"])
def test_a_microbatch_that_does_not_divide_the_batch_is_refused(capsys, microbatch):
    with pytest.raises(SystemExit):
        command.main(["--batch-size", "32", "--microbatch", microbatch])
    assert "--microbatch must divide --batch-size" in capsys.readouterr().err


def test_questions_have_large_batches_and_a_folder_of_their_own(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(command, "FRESH", tmp_path)
    monkeypatch.setattr(training, "corpus_of", lambda _: TEXT)
    monkeypatch.setattr(workers, "run", lambda *arguments: begun.append(arguments))
    monkeypatch.setitem(
        command.SCHEDULES,
        "questions",
        command.SCHEDULES["questions"]._replace(report=lambda *_: None),
    )
    assert command.main(["--schedule", "questions"]) == 0
    ((out, setup, wanted, *_),) = begun
    assert out == tmp_path / "questions" and setup.batch_size * setup.context == 32_768
    assert json.loads((out / kept.SETUP).read_text())["steps"] == 160
    assert wanted([])[0] == Job(questions.REFERENCE, 2, 4, 0, 160)


class Ended:
    """A process that has ended."""

    def __init__(self, returncode):
        self.returncode = returncode

    def poll(self):
        return self.returncode


def run(out, monkeypatch, start, minutes=math.inf):
    monkeypatch.setattr(workers, "start", start)
    monkeypatch.setattr(workers, "PAUSE", 0.0)
    workers.run(out, SETUP, lambda records: missing(records, STEPS), 2, minutes)


def test_workers_make_every_run_once_and_each_on_a_core_of_its_own(grid, tmp_path, monkeypatch):
    cores = []

    def start(job, setup, out, worker, count):
        record = record_of(job) | {"rate": 0, "rest_rate": 0, "wall": 0}
        training.keep(out / kept.RUNS, record)
        cores.append(worker)
        return Ended(0)

    run(tmp_path, monkeypatch, start)
    jobs = [job_of(record) for record in kept.read(tmp_path)]
    assert sorted(jobs) == sorted(job_of(record) for record in grid)
    assert set(cores) == {0, 1}


def test_no_run_begins_after_the_time_and_a_failed_one_is_told(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, lambda *_: pytest.fail("begun"), minutes=-1.0)
    with pytest.raises(SystemExit, match="has failed; what has ended is kept"):
        run(tmp_path, monkeypatch, lambda *_: Ended(1))


def test_runs_of_another_set_up_are_not_mixed(tmp_path):
    kept.keep_setup(tmp_path, SETUP, STEPS, "a text")
    kept.keep_setup(tmp_path, SETUP, STEPS, "a text")
    with pytest.raises(SystemExit, match="of another set-up"):
        kept.keep_setup(tmp_path, SETUP, STEPS + 1, "a text")
    with pytest.raises(SystemExit, match="that of another Python"):
        kept.keep_setup(tmp_path, SETUP, STEPS, "another text")


def test_a_clone_runs_into_a_folder_of_its_own_and_aggregates_what_is_committed():
    assert command.parser().parse_args([]).out is None
    assert command.FRESH.name == "runs"  # which git ignores
    for each in command.SCHEDULES.values():
        assert (results.FOLDER / each.folder / kept.RUNS).exists()


@pytest.fixture
def written(grid, tmp_path):
    """A folder with a set-up; a function that puts records into it and gives the page."""
    kept.keep_setup(tmp_path, SETUP, STEPS, "a text")

    def page(records):
        (tmp_path / kept.RUNS).write_text("".join(json.dumps(r) + "\n" for r in records))
        assert command.main(["--aggregate", "--out", str(tmp_path)]) == 0
        return (tmp_path / "reproduce.md").read_text()

    return page


def test_the_report_says_in_its_first_line_what_it_can_tell(grid, written, tmp_path):
    text = written(grid)
    first = text.splitlines()[0]
    assert first.startswith("The 95 % interval of a difference from Muon is ± 0.00")
    assert "TEON mode 2" in first and "TEON mode 1" not in first
    assert re.search(r"\| TEON mode 2, Muon's scale \| 0.02 \| 5 \| 2.\d+ \| -0.0\d+ ± 0.00", text)
    assert re.search(r"\| Muon \(optax.contrib.muon\) \| 0.02 \| 5 \| \d.\d+ \|  \| 100% \|", text)
    assert (tmp_path / "reproduce.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "reproduce.json").read_text())
    in_json = record["headline"]["teon-2-muon-scale"]["minus"]["muon"]
    assert in_json["mean"] == pytest.approx(-0.05, abs=2e-3)
    assert f" {in_json['mean']:+.4f} ± {in_json['half']:.4f} " in text
    of_part = record["parts"]["teon-1-schatten-muon-scale"]["minus"]
    assert f" {of_part['teon-1-muon-scale']['mean']:+.4f} ± " in text


def test_the_report_compares_half_as_long_runs_without_the_seed_of_the_sweeps(grid, written):
    off = [r | {"val_loss": r["val_loss"] + 10} if not r["seed"] else r for r in grid]
    text, number = written(off), r"[+-]0.00\d+ ± 0.00\d+"
    row = rf"\| mode 1, schatten, Muon's scale \| 8 \| 2.\d+ \| {number} \| {number} \|"
    assert re.search(row, text)


@pytest.mark.parametrize("seeds", [0, 1])
def test_a_report_of_too_few_runs_says_so_and_shows_what_there_is(grid, written, seeds):
    text = written([record for record in grid if record["seed"] <= seeds])
    assert text.startswith("**These runs cannot tell the optimizers apart yet**")
    assert "equal but for rounding" in text and "learning rate of the fallback" in text
    assert ("(one seed)" in text) == bool(seeds)


def test_a_wide_interval_is_the_first_thing_said(grid, written):
    noisy = [
        r | {"val_loss": r["val_loss"] + 0.1 * ((5 * r["seed"] + len(r["configuration"])) % 4)}
        for r in grid
    ]
    assert written(noisy).startswith("**This table cannot tell differences below 0.")


def asked(records):
    return schedule.missing(questions.wanted(records, STEPS), records)


@pytest.fixture(scope="module")
def questioned():
    """All records of the questions, in the order in which one worker makes them."""
    records = []
    while jobs := asked(records):
        records.append(record_of(jobs[0]))
    return records


def test_the_questions_begin_with_rounding_and_a_first_pair_of_each_method(questioned):
    own = questions.REFERENCE
    early = [name for names in ASKED[: questions.EARLY] for name in names]
    assert jobs_of(questioned)[: 3 + len(early)] == [
        Job(own, 2, 4, 0, STEPS, 0),
        Job(own, 2, 4, 0, STEPS, 1),
        *(Job(name, 2, 4, 0, STEPS) for name in early),
        Job(own, 4, 4, 0, STEPS, 0),
    ]


def test_first_pairs_come_seed_by_seed_with_the_methods_in_front(questioned):
    compared = [name for names in ASKED for name in names]
    first = [job for job in jobs_of(questioned) if job.seed][: 3 * (1 + len(compared))]
    methods = [job for job in first if job.configuration in (questions.REFERENCE, *ASKED[0])]
    assert first[: len(methods)] == methods
    assert [job.seed for job in methods] == [s for s in (1, 2, 3) for _ in (0, *ASKED[0])]
    assert {(job.configuration, job.seed) for job in first} == {
        (name, seed) for name in [questions.REFERENCE, *compared] for seed in (1, 2, 3)
    }
    assert {(job.k, job.rest_k) for job in first} == {(2, 4)}


def test_every_question_ends_with_six_seeds_and_three_rates_at_least(questioned):
    for name in [questions.REFERENCE, *(name for names in ASKED for name in names)]:
        assert {job.seed for job in jobs_of(questioned, configuration=name, k=2)} == set(range(7))
        swept = [job.k for job in jobs_of(questioned, configuration=name, seed=0, nudge=0)]
        assert {0, 2, 4} <= set(swept)
    assert len(set(jobs_of(questioned))) == len(questioned)


def pairs_of(*differences):
    """Records of the reference and of `jordan`, which ends so much above it."""
    jobs = [Job(questions.REFERENCE, 2, 4, seed + 1, STEPS) for seed in range(len(differences))]
    others = [job._replace(configuration="stack-1-jordan-muon-scale") for job in jobs]
    ends = [2.0 + seed for seed in range(len(differences))]
    return [record_of(job) | {"val_loss": end} for job, end in zip(jobs, ends, strict=True)] + [
        record_of(job) | {"val_loss": end + more}
        for job, end, more in zip(others, ends, differences, strict=True)
    ]


def test_an_answer_is_the_mean_of_its_pairs_with_students_interval():
    (found,) = answers.answers(pairs_of(0.001, 0.003, 0.002), STEPS)
    assert found.name == "stack-1-jordan-muon-scale"
    assert found.mean == pytest.approx(0.002)
    assert found.half == pytest.approx(4.3027 * 0.001 / math.sqrt(3), rel=1e-4)
    assert str(found) == "+0.0020 ± 0.0025"


def test_all_pairs_together_say_how_far_chance_moves_a_run():
    jordan = pairs_of(0.001, 0.003, 0.002)
    fast = [
        r | {"configuration": "stack-1-fast-muon-scale", "val_loss": r["val_loss"] + 0.01}
        for r in jordan[-3:]
    ]
    schatten = [fast[0] | {"configuration": "stack-1-schatten-muon-scale"}]
    found = {each.name: each for each in answers.answers([*jordan, *fast, *schatten], STEPS)}
    # By hand: `fast` keeps its distance to `jordan`, and both move against the reference by -.001,
    # .001 and 0. Of these a third is left in each of their runs and two thirds in the reference's.
    # The one pair of `schatten` is fitted exactly. Degrees of freedom: 10 runs less 4 + 3 - 1.
    variance = 2 * 0.001**2 * (2 * (1 / 3) ** 2 + (2 / 3) ** 2) / 4
    quantile = 2.7764  # of Student's distribution with 4 degrees, in its tables
    assert found["stack-1-fast-muon-scale"].half == pytest.approx(
        quantile * math.sqrt(2 * variance / 3), rel=1e-4
    )
    assert found["stack-1-schatten-muon-scale"].half == pytest.approx(
        quantile * math.sqrt(2 * variance), rel=1e-4
    )


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (0.006, 0.005, "loses"),
        (math.inf, 0.005, "loses"),
        (-0.006, 0.005, "gains"),
        (0.001, 0.004, "equal within 0.005"),
        (-0.002, 0.004, "not told"),
        (0.001, math.nan, "not told"),
    ],
)
def test_an_interval_says_what_can_be_concluded(mean, half, verdict):
    assert answers.Answer("jordan", 0.02, {1: mean}, half).verdict == verdict


def test_pairs_at_another_rate_are_no_pairs_of_the_same_answer():
    other = [r | {"k": 4, "val_loss": 9.0} for r in pairs_of(0.0) if r["configuration"] != "muon"]
    (found,) = answers.answers([*pairs_of(0.001, 0.003, 0.002), *other], STEPS)
    assert found.mean == pytest.approx(0.002)


@pytest.mark.parametrize(("more", "rate"), [(-0.1, 0.04), (0.1, 0.02), (math.inf, 0.02)])
def test_of_two_rates_with_as_many_pairs_the_better_counts(more, rate):
    runs = pairs_of(0.001, 0.003)
    again = [r | {"k": 4, "val_loss": r["val_loss"] + more} for r in runs[2:]]
    for each in again:
        each["val_loss"] = each["val_loss"] if math.isfinite(each["val_loss"]) else None
    (found,) = answers.answers([*runs, *again], STEPS)
    assert found.rate == pytest.approx(rate)


def test_a_pair_on_the_seed_of_the_sweeps_counts_until_there_are_others():
    of_sweep = [r | {"seed": 0} for r in pairs_of(0.004)]
    (found,) = answers.answers(of_sweep, STEPS)
    assert str(found) == "+0.0040 (no interval)"
    (found,) = answers.answers([*of_sweep, *pairs_of(0.001)], STEPS)
    assert str(found) == "+0.0010 (no interval)"


def test_the_page_of_the_questions_has_what_was_run_alone(tmp_path):
    setup = dataclasses.replace(SETUP, vocab_size=256)
    kept.keep_setup(tmp_path, setup, STEPS, "a text")

    def page(records):
        (tmp_path / kept.RUNS).write_text("".join(json.dumps(r) + "\n" for r in records))
        argv = ["--schedule", "questions", "--aggregate", "--out", str(tmp_path)]
        assert command.main(argv) == 0
        return (tmp_path / "questions.md").read_text()

    text = page(pairs_of(0.001))
    assert text.startswith("**These runs cannot tell differences with an interval yet**")
    text = page(pairs_of(0.001, 0.003, 0.002))
    assert text.startswith("**These runs tell differences beyond 0.0025 with 3 pairs**")
    assert "| `jordan` | +0.0020 ± 0.0025 | equal within 0.005 | 3 | 0.02 | 1.00 | 1.00 |" in text
    assert "schatten" not in text and "TEON" not in text
    assert (tmp_path / "questions.png").read_bytes().startswith(b"\x89PNG")


def test_what_stands_before_orthogonalize_gets_the_momentum_of_the_others():
    own = dataclasses.replace(CONFIGURATIONS["stack-1"], before=lambda _: optax.identity())
    chex.assert_trees_all_close(
        updates_of(build(own, 100, 1.0, 1.0)),
        updates_of(build(CONFIGURATIONS["stack-1"], 100, 1.0, 1.0)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", [name for names in ASKED for name in names])
def test_every_question_changes_the_update_of_the_reference_in_the_blocks_alone(name):
    one, two = (
        updates_of(build(CONFIGURATIONS[each], 4, 1.0, 1.0)) for each in (questions.REFERENCE, name)
    )
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), two))
    chex.assert_trees_all_equal(one["embed"], two["embed"])
    assert not np.allclose(
        one["block_0"]["attn"]["query"]["kernel"], two["block_0"]["attn"]["query"]["kernel"], 1e-3
    )


@pytest.mark.parametrize("name", [name for names in ASKED for name in names])
def test_a_run_of_every_question_finds_its_momentum(name):
    params = jax.tree.map(jnp.ones, shapes(), is_leaf=lambda x: isinstance(x, tuple))
    state = build(CONFIGURATIONS[name], 4, 1.0, 1.0).init(params)
    ratios = training.alignments(Job(name, 2, 4, 0, 4), state)
    assert len(ratios) == (0 if name == "muon" else 2)


def series(losses):
    runs: dict[int, Any] = {seed: {"val_loss": value} for seed, value in enumerate(losses)}
    return statistics.Series("", 0.1, runs)


def test_the_interval_of_two_optimizers_is_that_of_students_t_of_their_pairs():
    found = {"muon": series([1.0, 1.0, 2.0]), "teon-1": series([1.0, 2.0, 4.0])}
    value = statistics.difference(found, "teon-1", "muon")
    assert value is not None
    assert value.mean == pytest.approx(1.0)
    assert value.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)  # t of 2 at .975


def test_tokens_are_counted_to_where_the_curve_crosses_the_end_of_muons():
    def own(*losses):
        points = [[tokens, loss] for tokens, loss in zip((10, 20, 40), losses, strict=True)]
        return statistics.Series("", 0.1, {1: {"validation": points, "val_loss": losses[-1]}})

    found = {"muon": own(3.0, 2.5, 2.0), "teon-1": own(3.0, 2.5, 1.5), "adamw": own(4.0, 3.0, 2.1)}
    share = [statistics.tokens_to_reach(found, name) for name in found]
    assert share == [1.0, pytest.approx(0.75), math.inf]


@pytest.mark.parametrize(("name", "millions"), [("small", 1.02), ("medium", 10.30)])
def test_models_have_the_size_that_is_said(name, millions):
    setup = dataclasses.replace(SETUP, model=name, vocab_size=256)
    config = training.model_of(setup, 256)
    model = training.GPT(config)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    assert config.heads == PER_HEAD[0].split


def test_a_curve_ends_at_the_loss_of_the_table_and_keeps_its_shape():
    record = {"validation": [[10, 3.0], [20, 2.5], [40, 2.0]], "val_loss": 1.9}
    tokens, losses = statistics.curve_of(record)
    assert tokens.tolist() == [10, 20, 40]
    np.testing.assert_allclose(losses, [2.9, 2.4, 1.9])


def shapes():
    square = {name: {"kernel": (8, 8)} for name in ("query", "key", "value", "out")}
    mlp = {"up": {"kernel": (8, 16)}, "down": {"kernel": (16, 8)}}
    block = {"attn": square, "mlp": mlp, "norm": {"scale": (8,)}}
    return {f"block_{i}": block for i in range(2)} | {"embed": {"embedding": (20, 8)}}


def updates_of(optimizer, decayed=1.0) -> Any:
    generator = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32),
        shapes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    params = jax.tree.map(lambda x: decayed * x, tree)
    updates, _ = optimizer.update(tree, optimizer.init(params), params)
    return updates


def test_muon_is_that_of_optax_and_what_is_left_gets_a_rate_of_its_own():
    first = CONFIGURATIONS["muon"]
    updates = updates_of(build(first, 100, 1.0, 0.0))
    alone = updates_of(contrib.muon(0.1, weight_decay=WEIGHT_DECAY))  # the first step of a warm-up
    for path in itertools.product(("block_0", "block_1"), ("attn", "mlp")):
        ours, theirs = updates[path[0]][path[1]], alone[path[0]][path[1]]
        for name in ours:
            np.testing.assert_allclose(ours[name]["kernel"], theirs[name]["kernel"], atol=1e-5)
    assert not updates["embed"]["embedding"].any()


@pytest.mark.parametrize(
    ("short", "long"), [("stack-1-short", "stack-1"), ("teon-1", "teon-1-long")]
)
def test_a_factor_reaches_queries_keys_and_values_alone(short, long):
    one, two = (updates_of(build(CONFIGURATIONS[n], 100, 1.0, 0.0), 0.0) for n in (short, long))
    for name in ("query", "key", "value", "out"):
        lengths = [np.linalg.norm(tree["block_0"]["attn"][name]["kernel"]) for tree in (one, two)]
        expected = 1.0 if name == "out" else math.sqrt(2)
        assert lengths[1] / lengths[0] == pytest.approx(expected, rel=1e-4)


def test_a_nudge_differs_by_rounding_alone():
    params = {"a": jnp.linspace(1.0, 2.0, 1000), "b": jnp.zeros(3)}
    nudged = training.nudged(params, 1)
    assert 0 < float(jnp.abs(nudged["a"] - params["a"]).max()) < 1e-5
    assert not nudged["b"].any()
    assert (nudged["a"] != training.nudged(params, 2)["a"]).any()


def test_points_divide_a_run_into_equal_parts():
    assert [step for step in range(8) if training.is_point(step, 8, 4)] == [1, 3, 5, 7]
    assert sum(training.is_point(step, 640, 16) for step in range(640)) == 16


@pytest.mark.slow
def test_a_run_of_a_small_model_gives_a_record_that_repeats(monkeypatch):
    small = dataclasses.replace(training.llama(8, 12, 2, 2), tied=True)
    monkeypatch.setitem(training.SIZES, "small", small)
    monkeypatch.setattr(training, "corpus_of", lambda _: TEXT)
    job = Job("teon-1", 0, 0, 1, STEPS)
    first, again, other = (training.train(each, SETUP) for each in (job, job, job._replace(k=4)))
    same = "training", "validation", "val_loss", "val_loss_last", "alignment"
    assert all(first[key] == again[key] for key in same)
    assert first["training"][0] == other["training"][0]  # the same parameters and batch
    assert first["val_loss"] != other["val_loss"]
    assert first["training"][0] == pytest.approx(math.log(300), rel=0.02)
    assert len(first["validation"]) == STEPS and len(first["alignment"]) == 4
    assert first["tokens"] == STEPS * 16 and json.dumps(first)


def test_a_corpus_keeps_every_text_once(tmp_path):
    content, out = tmp_path / "content", tmp_path / "out"
    (content / "html").mkdir(parents=True)
    for name, text in {"a.rst": "one", "b.rst": "one", "c.md": "two", "html/d.txt": "3"}.items():
        (content / name).write_text(text)
    assert corpus.keep(content, (".rst", ".md", ".txt"), out) == (2, 6)
    assert sorted(path.name for path in out.iterdir()) == ["a.rst", "c.md"]
