"""What `train_gpt` refuses before it trains: one line, exit code 2, and nothing left behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from commands import SMALL, contents, refused

from examples import command_line, mesh, options, run_folder, sharded_training, training
from examples.command_line import UserError, exit_code, one_line

ROOT = Path(__file__).parents[2]
NOT_UTF_8 = b"caf\xe9".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("program", "flags", "code"),
    [
        ("train_gpt", ["--steps", "0"], 2),
        ("train_gpt", ["--rules", "x:stack=2"], 2),
        ("train_gpt", ["--data", "/nowhere"], 2),
        ("train_gpt", ["--resume", "--out", "/nowhere"], 2),
        ("train_gpt", ["--help"], 0),
        ("sharded_training", ["--mesh", "data"], 2),
        ("sharded_training", ["--steps", "0"], 2),
        ("sharded_training", ["--help"], 0),
        ("compare_runs", [], 2),
        ("compare_runs", ["--help"], 0),
    ],
)
def test_the_answer_to_a_wrong_flag_and_to_help_does_not_wait_for_jax(program, flags, code):
    slow = ["jax", "flax", "optax", "orbax", "matplotlib"]
    script = f"""
import runpy, sys
sys.argv[1:] = {flags}
try:
    runpy.run_module("examples.{program}", run_name="__main__")
finally:
    print(*set({slow}) & set(sys.modules), file=sys.stderr)
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    *error, loaded = result.stderr.splitlines()
    assert (len(error), loaded) == (1 if code else 0, "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps: 0 is not a whole number from 1"),
        (["--steps", "-3"], "--steps: -3 is not a whole number"),
        (["--steps", "9" * 5000], "9' is not a whole number"),
        (["--batch-size", "2.5"], "--batch-size: '2.5' is not a whole number from 1"),
        (["--context", "no"], "--context: 'no' is not a whole number"),
        (["--depth", "100000"], "--depth: 100000 is not a whole number from 1 to 1024"),
        (["--seed", "-1"], "--seed: -1 is not a whole number from 0"),
        (["--eval-every", "0"], "--eval-every: 0 is not"),
        (["--checkpoint-every", "0"], "--checkpoint-every: 0 is not"),
        (["--learning-rate", "nan"], "--learning-rate: nan is not a positive number"),
        (["--learning-rate", "0"], "--learning-rate: 0.0 is not a positive number"),
        (["--learning-rate", "1e39"], "1e+39 is not a positive number in float32"),
        (["--learning-rate", "1e-50"], "1e-50 is not a positive number in float32"),
        (["--adam-b1", "0.99999999"], "is not zero or a positive number below 1 in float32"),
        (["--weight-decay", "-1"], "--weight-decay: -1.0 is not zero or a positive number"),
        (
            ["--model", "huge"],
            "invalid choice 'huge' for argument '--model'. Expected one of ('tiny', ",
        ),
        (["--method", "qr"], "invalid choice 'qr' for argument '--method'"),
        (["--step", "3"], "Unrecognized options: --step, 3"),
        (["--data", ""], "--data: an empty path"),
        (["--data", "a\0b"], r"--data: 'a\x00b' has a NUL character"),
        (["--out", "a\0b"], r"--out: 'a\x00b' has a NUL character"),
        (["--config", "a\0b"], r"--config: 'a\x00b' has a NUL character"),
        (["--data", NOT_UTF_8], r"--data: 'caf\udce9' is not UTF-8"),
        (["--out", NOT_UTF_8], r"--out: 'caf\udce9' is not UTF-8"),
        (["--config", NOT_UTF_8], r"--config: 'caf\udce9' is not UTF-8"),
        (["--data", "/nowhere"], "no file or folder: /nowhere"),
        (["--data", "/dev/null"], "no file or folder: /dev/null"),
        (["--data"], "Missing value for argument '--data'"),
        (["--no-resume"], "Unrecognized options: --no-resume"),
        (["--rules", "x:stack=1", "--rules", "y:stack=1"], "write all rules behind one --rules"),
        (["--vocab-size", "300"], "--vocab-size means nothing to --tokenizer byte"),
        (["--tokenizer", "shards"], "--tokenizer shards does not fit --data"),
        (["--optimizer", "muon", "--rules", "x:stack=1"], "--rules means nothing to"),
        (["--optimizer", "adamw", "--adam-learning-rate", "1"], "--adam-learning-rate means"),
        (["--batch-size", "6", "--microbatches", "4"], "--microbatches 4 does not divide"),
        (["--depth", "1", "--alignment-every", "1"], "--depth 1 has none"),
        (["--batch-size", "2000000000"], "make a batch of more than 2,147,483,647 tokens"),
        (["--rules", "x"], "--rules 'x' is not REGEX:stack=K"),
        (["--rules", ":stack=1"], "is not REGEX:stack=K"),
        (["--rules", "x:stack=one"], "is not REGEX:stack=K"),
        (["--rules", "x:stack=" + "1" * 5000], "is not REGEX:stack=K"),
        (["--rules", "x:stack=1,depth=3"], "is not REGEX:stack=K"),
        (["--rules", "x:stack=1,mode=1,mode=2"], "write each of stack, mode, split once"),
        (["--rules", "(:stack=1"], "'(:stack=1': no regular expression"),
        (["--rules", "(" * 5000 + ")" * 5000 + ":stack=1"], "no regular expression"),
        (["--rules", "x:stack=2"], "cannot tell which layer"),
        (["--rules", "x:stack=1,mode=4"], "mode is 1, 2 or 3"),
        (["--rules", "x:stack=1,split=0"], "split is a number of parts, from 1"),
        (["--rules", "query:stack=1,split=7"], "--rules: "),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert message in refused(capsys, "--out", out, *flags)
    assert not out.exists()


def test_a_flag_is_refused_before_the_folder(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    flags = ["--out", tmp_path, "--optimizer", "muon", "--rules", "x:stack=1"]
    assert "--rules means nothing to" in refused(capsys, *flags)
    assert "holds a run (config.json)" in refused(capsys, "--out", tmp_path)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["no_such:stack=1"], "--rules 'no_such:stack=1': no matrix is left for that; write a"),
        (["block_:stack=1", "mlp:stack=0"], "--rules 'mlp:stack=0': no matrix is left"),
        (["embed:stack=0"], "--rules leave every parameter to AdamW: that is --optimizer adamw"),
        (["norm:stack=1"], "--rules leave every parameter to AdamW"),
    ],
)
def test_rules_that_take_nothing_are_refused(rules, message, corpus, tmp_path, small_model, capsys):
    out = tmp_path / "run"
    line = refused(capsys, "--data", corpus, "--out", out, *SMALL, "--rules", *rules)
    assert message in line
    assert "no_such" not in message or "block_*/attn/key/kernel, " in line
    assert not out.exists()


def test_a_folder_whose_name_is_not_utf_8_is_refused(tmp_path, capsys, monkeypatch):
    folder = tmp_path / NOT_UTF_8
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "is not UTF-8" in refused(capsys)
    assert list(folder.iterdir()) == []


def test_a_folder_in_the_corpus_is_refused_unless_hidden(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert "--out runs/tiny-teon is in --data" in refused(capsys, "--data", ".")
    assert "is in --data" in refused(capsys, "--data", tmp_path, "--out", ".")
    for out in (".runs/a", "../other"):
        flags = ["--data", tmp_path, "--out", out, "--context", "1000"]
        assert "the corpus is too small" in refused(capsys, *flags)


def test_a_path_in_circles_is_refused(tmp_path, capsys):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    line = refused(capsys, "--data", tmp_path / "circle", "--out", tmp_path / "run")
    assert "no file or folder" in line


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


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run", "a" * 300])
def test_a_folder_that_cannot_be_written_is_refused(out, corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, "--data", corpus, "--out", tmp_path / out, *SMALL)
    assert "cannot write into --out" in line or "File name too long" in line
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["tokenizer.json", "metrics.jsonl", "loss.png", "checkpoints"])
def test_a_folder_with_files_that_a_run_would_write_over_is_refused(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    assert f"has {name} already" in refused(capsys, "--out", tmp_path)
    assert contents(tmp_path) == {tmp_path / name: b"mine"}


def test_a_disk_that_is_full_leaves_no_trace(corpus, tmp_path, small_model, capsys, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    flags = ["--data", corpus, "--out", tmp_path / "run", "--tokenizer", "bpe", *SMALL]
    line = refused(capsys, *flags, announced=True)
    assert "cannot write into --out" in line and "No space left on device" in line
    assert list(tmp_path.iterdir()) == []


CLAIM = """
import sys, time
from pathlib import Path
from examples import run_folder
from examples.command_line import exit_code

def run():
    with run_folder.claimed(Path(sys.argv[1]), resume=sys.argv[2] == "resume"):
        run_folder.create(Path(sys.argv[1]), {"options": {}, "corpus": ""}, None)
        print("claimed", flush=True)
        sys.stdin.read()
    return 0

sys.exit(exit_code("train_gpt", run))
"""


def claim(out, how):
    command = [sys.executable, "-c", CLAIM, str(out), how]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def test_of_runs_started_at_once_one_has_the_folder_until_it_ends(tmp_path, capsys):
    out = tmp_path / "runs" / "run"
    started = [claim(out, "new") for _ in range(4)]
    # Those that are refused end by themselves; the other one waits for its stdin.
    refusals = []
    while len(refusals) < 3:
        for process in [process for process in started if process.poll() is not None]:
            started.remove(process)
            refusals.append((process.returncode, *process.communicate()))
    (holder,) = started
    assert holder.stdout and holder.stdout.readline() == "claimed\n"
    for code, output, error in refusals:
        assert (code, output, error.count("\n")) == (2, "", 1)
        assert "another process is training in" in error or "holds a run" in error
    assert "another process is training in" in refused(capsys, "--resume", "--out", out)
    holder.kill()
    holder.communicate()

    again = claim(out, "resume")
    assert again.communicate()[0] == "claimed\n"
    assert again.returncode == 0


def test_a_folder_that_cannot_be_locked_is_used_with_a_word(tmp_path, capsys, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with run_folder.claimed(tmp_path / "run", resume=False):
        assert "cannot be locked here (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB"),
        jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 137438953408 bytes."),
        MemoryError(),
    ],
)
def test_a_step_that_needs_too_much_memory_names_flags(
    error, corpus, tmp_path, monkeypatch, capsys
):
    def describe(*_):
        raise error

    monkeypatch.setattr(training, "describe", describe)
    line = refused(capsys, "--data", corpus, "--out", tmp_path / "run", *SMALL)
    assert "out of memory with --batch-size 2, --microbatches 1 and --context 16" in line


def test_another_error_of_jax_is_not_called_out_of_memory():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        training.out_of_memory_explained(options.resolve({})),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


@pytest.mark.parametrize("microbatches", [1, 2])
def test_microbatches_make_evaluation_smaller_too(microbatches, small_model):
    given = {"batch_size": 4, "context": 16, "microbatches": microbatches}
    compiled: Any = training.build(options.resolve(given), 256)
    batch = jax.ShapeDtypeStruct((4, 17), "int32")
    text = compiled.eval_step.lower(compiled.shapes.params, batch).as_text()
    assert (f"tensor<{4 // microbatches}x16x256xf32>" in text, "tensor<4x16x256xf32>" in text) == (
        True,
        microbatches == 1,
    )


def test_an_error_is_one_line_of_what_a_terminal_shows(capsys):
    assert one_line("a\nb\x1b[31m\0\u2028c") == r"a b\x1b[31m\x00 c"

    def interrupted():
        raise KeyboardInterrupt

    assert exit_code("train_gpt", interrupted) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", ""], "--mesh '' is not AXIS=SIZE"),
        (["--mesh", "data=0"], "--mesh 'data=0' is not AXIS=SIZE"),
        (["--mesh", "data=" + "9" * 5000], "is not AXIS=SIZE"),
        (["--mesh", "data=2,data=4"], "axes are replica, data, model, each once"),
        (["--mesh", "rows=8"], "axes are replica, data, model, each once"),
        (["--mesh", "data=3"], "--mesh data=3 is not made of 8 devices, which is what there is"),
        (["--processes", "2"], "--coordinator, --processes and --process go together"),
        (["--processes", "two"], "--processes: 'two' is not a whole number"),
        (["--process", "-1"], "--process: -1 is not a whole number"),
        (
            ["--coordinator", "here:1", "--processes", "2", "--process", "2"],
            "--process 2 is not one of --processes 2",
        ),
        (
            ["--coordinator", "here", "--processes", "2", "--process", "0"],
            "--coordinator 'here' is not HOST:PORT",
        ),
        (
            ["--coordinator", "here:65536", "--processes", "2", "--process", "0"],
            "--coordinator 'here:65536' is not HOST:PORT, with a port below 65536",
        ),
        (
            ["--coordinator", "a:1", "--processes", "1", "--process", "0", "--distributed"],
            "--distributed finds what --coordinator",
        ),
        (["--batch-size", "6"], "--batch-size 6 cannot be cut for 8 devices"),
        (["--steps", "0"], "--steps: 0 is not a whole number"),
    ],
)
def test_a_mesh_that_makes_no_sense_is_refused(
    flags, message, corpus, tmp_path, small_model, capsys
):
    out = tmp_path / "run"
    flags = ["--out", str(out), "--data", str(corpus), *SMALL, *flags]
    assert sharded_training.main(flags) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("sharded_training: error: ") and message in captured.err
    assert not out.exists()


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    def initialize(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for flags in (["--distributed"], "--coordinator a:1 --processes 2 --process 0".split()):
        with pytest.raises(UserError, match="do not find each other .* write --coordinator"):
            mesh.connect(command_line.read_flags(sharded_training.Flags, flags, "", None))


def test_what_one_process_refuses_ends_the_others(monkeypatch, corpus, tmp_path):
    command = options.parse(["--data", str(corpus), "--out", str(tmp_path / "run"), *SMALL])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        mesh.multihost_utils, "process_allgather", lambda own: jax.numpy.array([own, True])
    )
    with pytest.raises(UserError, match="another process"), mesh.claimed(command):
        raise AssertionError("began")
    assert list(tmp_path.iterdir()) == []
