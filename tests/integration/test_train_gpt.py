"""The main job, run as a user runs it: trains, stops, resumes, refuses."""

import dataclasses
import json
import math
import re
import shutil
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

import teon_optax
from examples import optimizers, options, run_folder
from examples.errors import UserError
from examples.model import MODELS
from examples.train_gpt import check_finite, main

ROOT = Path(__file__).parents[2]
SMALL = ["--batch-size", "2", "--context", "16", "--seed", "7"]


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


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def final_state(out):
    manager = ocp.CheckpointManager((out / "checkpoints").absolute())
    state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    manager.close()
    return jax.tree.map(np.asarray, state)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *flags):
    """The one line of an error, without the program's name."""
    assert main([str(flag) for flag in flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("train_gpt: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("train_gpt: error: ")


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


@pytest.fixture
def small_model(monkeypatch):
    """A tiny model that compiles in a second or two."""
    small = dataclasses.replace(MODELS["tiny"], width=16, depth=2, heads=2, hidden=24)
    monkeypatch.setitem(MODELS, "tiny", small)


def write_shard(path, tokens):
    header = np.zeros(256, np.int32)
    header[:3] = 20250401, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


def test_muon_learns_from_shards(tmp_path, small_model):
    tokens = np.random.default_rng(0).integers(300, size=500)
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
        write_metrics(file, record)
        if record["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    write_metrics = run_folder.write_metrics
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_metrics", write_and_stop)
        assert main([*flags, "--out", str(stopped)]) == 130
    assert f"python -m examples.train_gpt --resume --out '{stopped}'" in capsys.readouterr().out
    assert [record["step"] for record in metrics(stopped)] == [1, 2]
    assert main(["--resume", "--out", str(stopped)]) == 0
    assert metrics(stopped) == metrics(whole)
    jax.tree.map(np.testing.assert_array_equal, final_state(stopped), final_state(whole))


def test_rules_method_and_dtype_reach_the_run(corpus, tmp_path, small_model, capsys):
    rules = [r"block_(?P<layer>\d+)/attn/(query|key):stack=2,mode=2", "block_:stack=1"]
    flags = ["--method", "schatten", "--dtype", "bfloat16", "--steps", "1", *SMALL]
    out = tmp_path / "run"
    assert main(["--data", str(corpus), "--out", str(out), *flags, "--rules", *rules]) == 0
    output = capsys.readouterr().out
    assert re.search(r"block_\*/attn/key/kernel +[-0-9]+ +16 x 16 +2 +2", output)
    assert re.search(r"block_\*/attn/value/kernel +16 x 16 +1 +1", output)


def test_a_loss_that_is_no_number_ends_the_run():
    check_finite({"step": 3, "loss": 1.0})
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match="diverged"):
            check_finite({"step": 3, "loss": 1.0, "val_loss": value})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps: 0 is not a whole number from 1"),
        (["--steps", "-3"], "--steps: -3 is not a whole number"),
        (["--batch-size", "2.5"], "--batch-size: 2.5 is not a whole number"),
        (["--context", "no"], "--context: no is not a whole number"),
        (["--seed", "-1"], "--seed: -1 is not a whole number from 0"),
        (["--eval-every", "0"], "--eval-every: 0 is not"),
        (["--checkpoint-every", "0"], "--checkpoint-every: 0 is not"),
        (["--learning-rate", "nan"], "--learning-rate: nan is not a positive number"),
        (["--learning-rate", "0"], "--learning-rate: 0 is not a positive number"),
        (["--weight-decay", "-1"], "--weight-decay: -1 is not zero or a positive number"),
        (["--model", "huge"], "--model: invalid choice: 'huge'"),
        (["--method", "qr"], "--method: invalid choice: 'qr'"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
        (["--data", ""], "--data: an empty path"),
        (["--data", "/nowhere"], "no file or folder: /nowhere"),
        (["--vocab-size", "300"], "--vocab-size means nothing to --tokenizer byte"),
        (["--tokenizer", "shards"], "--tokenizer shards does not fit --data"),
        (["--optimizer", "muon", "--rules", "x:stack=1"], "--rules means nothing to"),
        (["--optimizer", "adamw", "--adam-learning-rate", "1"], "--adam-learning-rate means"),
        (["--rules", "x"], "--rules 'x' is not REGEX:stack=K"),
        (["--rules", ":stack=1"], "is not REGEX:stack=K"),
        (["--rules", "x:stack=one"], "is not REGEX:stack=K"),
        (["--rules", "x:stack=1,depth=3"], "is not REGEX:stack=K"),
        (["--rules", "(:stack=1"], "'(:stack=1': "),
        (["--rules", "x:stack=2"], "cannot tell which layer"),
        (["--rules", "x:stack=1,mode=4"], "mode"),
        (["--rules", "query:stack=1,split=7"], "--rules: "),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert message in refused(capsys, "--out", out, *flags)
    assert not out.exists()


def test_a_corpus_that_is_too_small_is_refused(corpus, tmp_path, capsys):
    line = refused(capsys, "--data", corpus, "--context", "100000", "--out", tmp_path / "run")
    assert "the corpus is too small" in line
    assert not (tmp_path / "run").exists()


def test_a_wrong_shard_is_refused(tmp_path, capsys):
    path = tmp_path / "train.bin"
    path.write_bytes(b"text" * 1000)
    assert "is no FineWeb shard" in refused(capsys, "--data", path, "--out", tmp_path / "run")
    assert "does not fit" in refused(
        capsys, "--data", path, "--tokenizer", "bpe", "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_refused(out, corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["--data", str(corpus), "--out", str(tmp_path / out), *SMALL]) == 2
    assert capsys.readouterr().err.startswith("train_gpt: error: cannot write into --out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_run_into_a_folder_is_refused(corpus, finished, capsys):
    out, before = finished[0], contents(finished[0])
    assert "holds a run (config.json)" in refused(capsys, "--data", corpus, "--out", out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "gpt-small"], "cannot change --model from tiny to gpt-small"),
        (["--optimizer", "adamw"], "cannot change --optimizer"),
        (["--seed", "8"], "cannot change --seed from 7 to 8"),
        (["--rules", "x:stack=1"], "cannot change --rules from its default"),
        (["--data", "/nowhere"], "cannot change --data"),
        (["--steps", "0"], "--steps: 0 is not"),
    ],
)
def test_resume_refuses_flags_of_another_run(flags, message, finished, capsys):
    out, before = finished[0], contents(finished[0])
    assert message in refused(capsys, "--resume", "--out", out, *flags)
    assert contents(out) == before


def test_resume_refuses_a_folder_without_a_run(tmp_path, capsys):
    assert "nothing to --resume" in refused(capsys, "--resume", "--out", tmp_path)
    assert "nothing to --resume" in refused(capsys, "--resume", "--out", tmp_path / "no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", ["", "{", "[]", "{}", '{"options": {}, "corpus": ""}'])
def test_resume_refuses_a_damaged_config(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    assert "damaged" in refused(capsys, "--resume", "--out", tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", None), ("steps", -1), ("model", "huge"), ("batch_size", "x")]
)
def test_resume_refuses_a_config_with_a_wrong_value(name, value, finished, tmp_path, capsys):
    config = json.loads((finished[0] / "config.json").read_text())
    config["options"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "config.json is damaged" in refused(capsys, "--resume", "--out", tmp_path)


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def last_line(capsys, out, *flags):
    """The error of a resume that has announced itself on stdout already."""
    assert main(["--resume", "--out", str(out), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_resume_refuses_a_damaged_checkpoint(copied, capsys):
    largest = max((copied / "checkpoints/6").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    before = contents(copied)
    assert "checkpoints/6 is damaged" in last_line(capsys, copied)
    assert contents(copied) == before


def test_resume_refuses_a_checkpoint_of_another_optimizer(copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["options"]["optimizer"] = "adamw"
    (copied / "config.json").write_text(json.dumps(config))
    before = contents(copied)
    assert "is not a checkpoint of this model" in last_line(capsys, copied)
    assert contents(copied) == before


def test_resume_refuses_fewer_steps_than_are_done(copied, capsys):
    before = contents(copied)
    assert "has a checkpoint at step 6 already" in last_line(capsys, copied, "--steps", "5")
    assert contents(copied) == before


def test_resume_refuses_another_corpus(copied, corpus, tmp_path, capsys):
    config = json.loads((copied / "config.json").read_text())
    changed = Path(shutil.copytree(corpus, tmp_path / "changed"))
    (changed / "0.py").write_text((changed / "0.py").read_text().replace("x", "z"))
    config["options"]["data"] = str(changed)
    (copied / "config.json").write_text(json.dumps(config))
    assert "not the corpus that this run began with" in refused(capsys, "--resume", "--out", copied)


def test_metrics_drop_steps_after_the_checkpoint_and_a_line_cut_off(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    run_folder.open_metrics(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])


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
        updates("adamw", options.ADAM_LEARNING_RATE),
    )
    for path, update in adamw.items():
        if "query" in path:
            assert not np.allclose(update, teon[path], rtol=0.1)
            assert not np.allclose(update, muon[path], rtol=0.1)
        else:
            np.testing.assert_allclose(teon[path], update)
            np.testing.assert_allclose(muon[path], update)
