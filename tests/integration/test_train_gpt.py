"""The main job, run as a user runs it: trains, stops, resumes, refuses."""

import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import SMALL, metrics

import teon_optax
from examples import optimizers, options, run_folder, training
from examples.command_line import UserError
from examples.train_gpt import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of six steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    command = start_command(corpus, out, "--steps", "6")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return out, result


def start_command(corpus, out, *flags):
    flags = ["--data", corpus, "--out", out, "--checkpoint-every", "2", *SMALL, *flags]
    return [sys.executable, "-m", "examples.train_gpt", *map(str, flags)]


def final_state(out):
    manager = ocp.CheckpointManager((out / "checkpoints").absolute())
    state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    manager.close()
    return jax.tree.map(np.asarray, state)


def test_a_run_leaves_a_metric_for_every_step(finished):
    records = metrics(finished[0])
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[0]["loss"] == pytest.approx(math.log(256), rel=0.05)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert records[-1]["val_loss"] < records[0]["loss"] - 0.5


def test_a_run_ends_with_validation_loss_and_perplexity(finished):
    out, result = finished
    pattern = r"validation loss ([\d.]+), perplexity ([\d.]+)"
    ((loss, perplexity),) = re.findall(pattern, result.stdout.splitlines()[-1])
    assert float(loss) == pytest.approx(metrics(out)[-1]["val_loss"], abs=1e-4)
    assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3)


def test_a_run_begins_with_its_plan(finished):
    output = finished[1].stdout
    assert re.search(r"block_\*/attn/query/kernel +0-3 +128 x 128 +2 +1", output)
    assert "4 files for training, 1 held out for validation" in output


def test_a_run_says_that_it_compiles(finished):
    assert "compiling the first step" in finished[1].stderr


def test_a_run_shows_loss_and_tokens_per_second(finished):
    assert re.search(r"\d tokens/s, step 6, loss \d", finished[1].stderr)


def test_a_run_draws_its_losses_and_keeps_checkpoints(finished):
    out, _ = finished
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"2", "4", "6"}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_finished_run_resumes_to_the_same_end(finished, capsys):
    out, result = finished
    before = metrics(out)
    assert main(["--resume", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert metrics(out) == before


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_changes_nothing(corpus, finished, tmp_path):
    out = tmp_path / "run"
    command = start_command(corpus, out, "--steps", "6")
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        while not any((out / "checkpoints").glob("4*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
    assert not (out / "checkpoints/6").exists()

    # Not by main: the eight devices of this process round sums in another order.
    command = [sys.executable, "-m", "examples.train_gpt", "--resume", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (out / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()
    jax.tree.map(np.testing.assert_array_equal, final_state(out), final_state(finished[0]))


def write_shard(path, tokens):
    header = np.zeros(256, np.int32)
    header[:3] = 20250401, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


def test_muon_learns_from_shards(tmp_path, small_model):
    tokens = np.minimum(np.random.default_rng(0).geometric(0.1, size=500), 299)
    write_shard(tmp_path / "fineweb_train_000001.bin", tokens)
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens[:100])
    flags = ["--optimizer", "muon", "--vocab-size", "300", "--steps", "2", *SMALL]
    out = tmp_path / "run"
    assert main(["--data", str(tmp_path), "--out", str(out), *flags]) == 0
    assert metrics(out)[0]["loss"] == pytest.approx(math.log(300), rel=0.05)


def test_ctrl_c_saves_and_resume_ends_the_same(corpus, tmp_path, small_model, capsys, monkeypatch):
    flags = ["--optimizer", "adamw", "--tokenizer", "bpe", "--vocab-size", "280", "--steps", "4"]
    flags = ["--data", str(corpus), *flags, *SMALL]
    whole, stopped = tmp_path / "whole", tmp_path / "a stopped one"
    assert main([*flags, "--out", str(whole)]) == 0

    def write_and_stop(file, record):
        write(file, record)
        if record["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    write = run_folder.write_metrics
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_metrics", write_and_stop)
        assert main([*flags, "--out", str(stopped)]) == 130
    assert f"python -m examples.train_gpt --resume --out '{stopped}'" in capsys.readouterr().out
    assert [record["step"] for record in metrics(stopped)] == [1, 2]
    assert main(["--resume", "--out", str(stopped)]) == 0
    assert metrics(stopped) == metrics(whole)
    jax.tree.map(np.testing.assert_array_equal, final_state(stopped), final_state(whole))


@pytest.mark.parametrize(
    ("optimizer", "matrices", "others"),
    [
        ("muon", "Muon at 0.02, weight decay 0.1", "AdamW at 0.01"),
        ("adamw", "AdamW at 0.0015, weight decay 0.1", "AdamW at 0.0015"),
    ],
)
def test_muon_and_adamw_say_what_they_do_to_each_parameter(
    optimizer, matrices, others, small_model
):
    given = options.resolve({"optimizer": optimizer})
    text = optimizers.describe(given, training.build(given, 256).shapes.params)
    heading, *rows = (re.split("  +", line) for line in text.splitlines())
    assert heading == ["parameter", "shape", "leaves", "optimizer"]
    treated = {path: row for path, *row in rows}
    assert len(rows) == len(treated) == 11
    assert treated["block_*/mlp/up/kernel"] == ["16 x 24", "2", matrices]
    assert treated["block_*/attn_norm/scale"] == ["16", "2", others]
    assert treated["embed/embedding"] == ["256 x 16", "1", others]


def test_what_muon_does_is_printed_before_the_first_step(
    corpus, tmp_path, small_model, capsys, monkeypatch
):
    monkeypatch.setattr(training, "train", lambda *_: 0)
    flags = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--optimizer", "muon", *SMALL]
    assert main(flags) == 0
    assert "Muon at 0.02, weight decay 0.1\n" in capsys.readouterr().out


def test_rules_method_and_dtype_reach_the_run(corpus, tmp_path, small_model, capsys):
    rules = [r"block_(?P<layer>\d+)/attn/(query|key):stack=2,mode=2", "block_:stack=1"]
    flags = ["--method", "schatten", "--dtype", "bfloat16", "--steps", "1", *SMALL]
    out = tmp_path / "run"
    assert main(["--data", str(corpus), "--out", str(out), *flags, "--rules", *rules]) == 0
    output = capsys.readouterr().out
    assert re.search(r"block_\*/attn/key/kernel +[-0-9]+ +16 x 16 +2 +2", output)
    assert re.search(r"block_\*/attn/value/kernel +16 x 16 +1 +1", output)


def test_a_loss_that_is_no_number_ends_the_run():
    training.check_learning({"step": 3, "loss": 1.0}, 9, 256)
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match="diverged .* try a lower --learning-rate"):
            training.check_learning({"step": 3, "loss": 1.0, "val_loss": value}, 9, 256)


@pytest.mark.parametrize(("step", "steps"), [(9, 9), (21, 100), (101, 1000)])
def test_a_model_that_does_no_better_than_a_guess_ends_the_run(step, steps):
    guess = math.log(256)
    training.check_learning({"step": step, "loss": 9.0, "val_loss": guess - 0.01}, steps, 256)
    for loss in (guess - 1e-5, guess, 6.0, 1e9):
        with pytest.raises(UserError, match=r"5\.5452 for a guess among 256 tokens: try a lower"):
            training.check_learning({"step": step, "loss": 1.0, "val_loss": loss}, steps, 256)
    # In the warm-up, whichever the schedule.
    early = {"step": max(20, steps // 10), "loss": 1.0, "val_loss": 6.0}
    training.check_learning(early, max(steps, 30), 256)


def test_a_rate_that_is_too_high_ends_with_an_error(corpus, tmp_path, small_model, capsys):
    out = tmp_path / "run"
    flags = ["--data", str(corpus), "--out", str(out), "--learning-rate", "50", *SMALL]
    assert main([*flags, "--steps", "30", "--checkpoint-every", "15"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the training has diverged: the validation loss is 5.5452 after step 30" in error
    assert not (out / "checkpoints/30").exists()


def test_the_default_folder_names_model_and_optimizer():
    assert options.parse([]).out == Path("runs/tiny-teon")
    command = options.parse(["--model", "gpt-small", "--optimizer", "muon"])
    assert command.out == Path("runs/gpt-small-muon")


def test_a_rule_keeps_the_colons_of_its_pattern():
    text = r"block_(?P<layer>\d+)/(?:attn|mlp)/up:stack=2,mode=3,split=4"
    expected = teon_optax.Rule(text.rpartition(":")[0], stack=2, mode=3, split=4)
    assert optimizers.parse_rule(text) == expected
    with pytest.raises(UserError, match="is not REGEX"):
        optimizers.parse_rule(text.rpartition(":")[0])


@pytest.mark.parametrize("steps", [1, 3, 10, 200, 1000])
def test_the_schedule_warms_up_stays_and_decays(steps):
    rates = np.array([optimizers.schedule(0.5, steps)(step) for step in range(steps)])
    assert np.all(rates > 0)
    assert rates.max() == 0.5
    peak = np.flatnonzero(rates == 0.5)
    assert peak[0] <= 20
    assert np.all(np.diff(rates[: peak[0] + 1]) > 0)
    assert np.all(np.diff(rates[peak[-1] :]) < 0)
    assert peak[-1] == pytest.approx(0.6 * steps, abs=1)


@pytest.mark.parametrize(
    ("before", "done", "words"),
    [
        (200, 200, "at a learning rate of 0.02: on that of 200 it had come to 0. This is no run"),
        (200, 119, "goes on at step 119, as a run of 400 steps from the start would"),
        (800, 280, "at a learning rate of 0.015: on that of 800 it had come to 0.02."),
    ],
)
def test_a_run_that_goes_on_for_another_number_of_steps_says_at_which_rate(before, done, words):
    given = options.resolve({"steps": 400})
    assert words in optimizers.describe_new_length(given, before, done)


def test_all_three_optimizers_leave_the_same_parameters_to_adamw():
    params = {
        "embed": {"embedding": jnp.ones((5, 4))},
        "block_0": {"query": {"kernel": jnp.eye(4)}, "norm": {"scale": jnp.ones(4)}},
        "lm_head": {"kernel": jnp.ones((4, 5))},
    }
    gradients = jax.tree.map(jnp.ones_like, params)

    def updates(optimizer: str, rate: float) -> dict[str, np.ndarray]:
        given = {"optimizer": optimizer, "learning_rate": rate, "weight_decay": 0.0}
        transform = optimizers.build(options.resolve(given))
        update, _ = transform.update(gradients, transform.init(params), params)
        leaves, _ = jax.tree_util.tree_flatten_with_path(update)
        return {jax.tree_util.keystr(path, simple=True): leaf for path, leaf in leaves}

    teon, muon, adamw = (
        updates("teon", 0.02),
        updates("muon", 0.02),
        updates("adamw", options.Options.adam_learning_rate),
    )
    for path, update in adamw.items():
        if "query" in path:
            assert not np.allclose(update, teon[path], rtol=0.1)
            assert not np.allclose(update, muon[path], rtol=0.1)
        else:
            np.testing.assert_allclose(teon[path], update)
            np.testing.assert_allclose(muon[path], update)
