"""What `--resume` makes of a folder that is damaged: one line, exit code 2, and nothing changed."""

import json
import shutil
from pathlib import Path

import pytest
from commands import SMALL, contents, metrics, refused

from examples import checkpoints, data, run_folder
from examples.command_line import UserError
from examples.train_gpt import main

DEEP = "[" * 100_000
LINES = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]


@pytest.fixture(scope="module")
def finished(corpus, small_model, tmp_path_factory):
    """A run of six steps, with checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--data", str(corpus), "--out", str(out), *SMALL, "--tokenizer", "bpe"]
    flags += ["--vocab-size", "280", "--checkpoint-every", "2", "--steps", "6"]
    assert main(flags) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def unchanged(copied):
    """That no file of the folder differs at the end from what the test has made of it."""
    folder = {}
    yield lambda: folder.update(contents(copied))
    assert contents(copied) == folder


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
    before = contents(finished)
    assert message in refused(capsys, "--resume", "--out", finished, *flags)
    assert contents(finished) == before


def test_resume_refuses_a_folder_without_a_run(tmp_path, capsys):
    assert "nothing to --resume" in refused(capsys, "--resume", "--out", tmp_path)
    assert "nothing to --resume" in refused(capsys, "--resume", "--out", tmp_path / "no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        DEEP.encode(),
        b'{"options": {}, "corpus": ""}',
    ],
)
def test_resume_refuses_a_damaged_config(config, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(config)
    assert "config.json is damaged" in refused(capsys, "--resume", "--out", tmp_path)


@pytest.mark.parametrize("name", run_folder.FILES)
def test_resume_refuses_a_folder_where_a_file_should_be(name, tmp_path, capsys):
    (tmp_path / "config.json").touch()
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    line = refused(capsys, "--resume", "--out", tmp_path)
    assert f"{name} is a folder, where the run has a file" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", None),
        ("steps", -1),
        ("steps", 2.0),
        ("steps", "6"),
        ("steps", True),
        ("steps", [6]),
        ("steps", {"a": 6}),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", []),
        ("rules", []),
        ("rules", [1]),
        ("rules", ["x"]),
        ("rules", 3),
        ("data", 5),
        ("data", "a\0b"),
        ("data", "\ud800"),
        ("model", "huge"),
        ("batch_size", "x"),
        ("microbatches", 4),
        ("checkpoint_every", None),
    ],
)
def test_resume_refuses_a_config_with_a_wrong_value(name, value, copied, unchanged, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["options"][name] = value
    (copied / "config.json").write_text(json.dumps(config))
    unchanged()
    line = refused(capsys, "--resume", "--out", copied)
    assert "config.json is damaged" in line and f"--{name.replace('_', '-')}" in line


def test_resume_refuses_what_means_nothing_to_the_optimizer(copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["options"]["optimizer"] = "muon"
    (copied / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "--resume", "--out", copied, "--alignment-every", "1")
    assert "--alignment-every means nothing to --optimizer muon" in line


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\x00",
        b"garbage",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b"3\n",
        b'{"step": "a"}\n',
        b'{"step": "a"}',
        b'{"step": 1}\n',
        b'{"loss": 1.0}\n',
        b'{"step": true, "loss": 1.0}\n',
        b'{"step": 1.0, "loss": 1.0}\n',
        b'{"step": 0, "loss": 1.0}\n',
        b'{"step": 1, "loss": NaN}\n',
        b'{"step": 1, "loss": 1e999}\n',
        b'{"step": 1, "loss": ' + b"1" * 400 + b"}\n",
        b'{"step": 1, "loss": ' + b"1" * 5000 + b"}\n",
        b'{"step": 1, "loss": null}\n',
        b'{"step": 1, "loss": 1.0, "val_loss": "x"}\n',
        b'{"step": 1, "loss": 1.0, "val_loss": Infinity}\n',
        b'{"step": 1, "loss": 1.0, "alignment": []}\n',
        b'{"step": 1, "loss": 1.0, "alignment": {"a": [1, 2, 3]}}\n',
        b'{"step": 1, "loss": 1.0, "alignment": {"a": [1, 2, 3, null]}}\n',
        b'{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n',
        "".join(LINES[:1] + LINES[2:]).encode(),
        "".join(LINES[:1] * 2).encode(),
        "".join(reversed(LINES)).encode(),
        DEEP.encode(),
        DEEP.encode() + b"\n",
        b'{"step": ' + DEEP.encode() + b"\n",
    ],
    ids=range(30),
)
def test_resume_refuses_damaged_metrics(text, copied, unchanged, capsys):
    (copied / "metrics.jsonl").write_bytes(text)
    unchanged()
    line = refused(capsys, "--resume", "--out", copied)
    assert "metrics.jsonl is damaged: " in line
    assert "mend it, or delete it to go on without it" in line


@pytest.mark.parametrize("text", ["".join(LINES), "".join(LINES) + '{"step": 4, "lo', '{"step": 1'])
def test_resume_refuses_metrics_that_end_before_the_checkpoint(text, copied, unchanged, capsys):
    (copied / "metrics.jsonl").write_text(text)
    unchanged()
    line = refused(capsys, "--resume", "--out", copied, announced=True)
    assert "it has no record of step 6, of which there is a checkpoint" in line


def test_resume_goes_on_without_metrics_that_were_deleted(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints/6")
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").touch()  # As after a kill before the next step.
    assert main(["--resume", "--out", str(out)]) == 0
    assert metrics(out) == metrics(finished)[4:]
    assert main(["--resume", "--out", str(out)]) == 0


def test_resume_says_what_more_steps_make_of_the_schedule(copied, finished, capsys):
    assert main(["--resume", "--out", str(copied), "--steps", "8"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("goes on at"))
    assert "step 6 on the schedule of 8 steps, at a learning rate of 0.0133: on that of 6 " in line
    assert "had come to 0. This is no run of 8 steps" in line and "write --steps 8 with" in line
    assert metrics(copied)[:6] == metrics(finished)
    assert main(["--resume", "--out", str(copied)]) == 0
    assert "goes on at" not in capsys.readouterr().out


def test_metrics_drop_steps_after_the_checkpoint_and_a_line_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(LINES) + '{"step": 4, "lo')
    assert run_folder.read_metrics_until(tmp_path, 2) == [json.loads(line) for line in LINES[:2]]
    with run_folder.open_metrics(tmp_path, run_folder.read_metrics_until(tmp_path, 2)) as file:
        run_folder.write_metrics(file, {"step": 3, "loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES)


@pytest.mark.parametrize("content", ["folder", "empty folder", "folder of files", "file", "no"])
def test_resume_refuses_to_begin_again_where_checkpoints_are_gone(
    content, copied, unchanged, capsys
):
    shutil.rmtree(copied / "checkpoints")
    if "folder" in content:
        (copied / "checkpoints").mkdir()
    if content == "folder":
        (copied / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
        (copied / "loss.png").unlink()
    if content == "folder of files":
        (copied / "checkpoints" / "6").touch()
    if content == "file":
        (copied / "checkpoints").write_text("mine")
    if content == "no":
        (copied / "loss.png").unlink()
    unchanged()
    line = refused(capsys, "--resume", "--out", copied)
    assert ("is no folder" if content == "file" else "has no checkpoint any more") in line
    assert "another --out" in line


def test_resume_begins_again_after_a_kill_before_the_first_checkpoint(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints")
    (out / "loss.png").unlink()
    # With the second step's metrics, but killed while its checkpoint was saved.
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    (out / "checkpoints").mkdir()
    assert main(["--resume", "--out", str(out)]) == 0
    assert "no checkpoint was saved yet: beginning at step 0" in capsys.readouterr().out
    assert metrics(out) == metrics(finished)


@pytest.mark.parametrize("checksums", [b"", b"\xff", b"[]", DEEP.encode(), None])
def test_resume_refuses_damaged_checksums(checksums, copied, unchanged, capsys):
    path = copied / "checkpoints/6/sha256.json"
    path.unlink()
    path.mkdir() if checksums is None else path.write_bytes(checksums)
    unchanged()
    line = refused(capsys, "--resume", "--out", copied, announced=True)
    assert "checkpoints/6 is damaged" in line


def test_resume_refuses_a_damaged_checkpoint(copied, unchanged, capsys):
    largest = max((copied / "checkpoints/6").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    unchanged()
    line = refused(capsys, "--resume", "--out", copied, announced=True)
    assert "checkpoints/6 is damaged" in line


def test_resume_refuses_an_empty_checkpoint(copied, unchanged, capsys):
    (copied / "checkpoints/8").mkdir()
    unchanged()
    line = refused(capsys, "--resume", "--out", copied, "--steps", "9", announced=True)
    assert "checkpoints/8 is not a checkpoint of this model" in line


def test_resume_refuses_a_checkpoint_of_another_optimizer(copied, unchanged, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["options"]["optimizer"] = "adamw"
    (copied / "config.json").write_text(json.dumps(config))
    unchanged()
    line = refused(capsys, "--resume", "--out", copied, announced=True)
    assert "is not a checkpoint of this model" in line


def test_resume_refuses_fewer_steps_than_are_done(copied, unchanged, capsys):
    unchanged()
    line = refused(capsys, "--resume", "--out", copied, "--steps", "5", announced=True)
    assert "has a checkpoint at step 6 already" in line


def test_resume_refuses_another_corpus(copied, corpus, tmp_path, capsys):
    config = json.loads((copied / "config.json").read_text())
    changed = Path(shutil.copytree(corpus, tmp_path / "changed"))
    (changed / "0.py").write_text((changed / "0.py").read_text().replace("x", "z"))
    config["options"]["data"] = str(changed)
    (copied / "config.json").write_text(json.dumps(config))
    assert "not the corpus that this run began with" in refused(capsys, "--resume", "--out", copied)


def test_resume_refuses_a_corpus_that_is_gone(copied, tmp_path, capsys):
    config = json.loads((copied / "config.json").read_text())
    config["options"]["data"] = str(tmp_path / "gone")
    (copied / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "--resume", "--out", copied)
    assert f"--data: no file or folder: {tmp_path / 'gone'}" in line


def without(tokenizer, token):
    """A tokenizer whose tokens are not numbered in a row."""
    changed = json.loads(tokenizer)
    changed["model"]["vocab"][token] = 70_000
    return json.dumps(changed).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"\xff",
        lambda _: b"{}",
        lambda _: DEEP.encode(),
        lambda text: without(text, "a"),
        lambda _: data.train_bpe([b"another text " * 9], 280).encode(),
        lambda _: b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}',
    ],
    ids=["bytes", "object", "deep", "numbers", "another", "words"],
)
def test_resume_refuses_a_damaged_tokenizer(damage, copied, unchanged, capsys):
    path = copied / "tokenizer.json"
    path.write_bytes(damage(path.read_text()))
    unchanged()
    line = refused(capsys, "--resume", "--out", copied)
    assert "tokenizer" in line or "not the corpus that this run began with" in line


def test_resume_refuses_a_tokenizer_that_is_gone(copied, capsys):
    (copied / "tokenizer.json").unlink()
    line = refused(capsys, "--resume", "--out", copied)
    assert "the tokenizer of the run cannot be read" in line


def test_a_checkpoint_that_cannot_be_saved_is_one_line(tmp_path, monkeypatch):
    with checkpoints.opened(tmp_path / "checkpoints") as manager:

        def fail(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand more")

        monkeypatch.setattr(manager, "save", fail)
        with pytest.raises(UserError, match="cannot save step 3 in .*: RESOURCE_EXHAUSTED: No sp"):
            checkpoints.save(manager, 3, {})


def test_the_folder_of_a_refused_run_can_be_taken_at_once(tmp_path):
    for _ in range(2):
        with (
            pytest.raises(UserError, match="wrong"),
            run_folder.claimed(tmp_path / "run", resume=False),
        ):
            raise UserError("wrong")
        assert list(tmp_path.iterdir()) == []
