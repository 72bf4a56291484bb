"""`examples.compare_runs`: losses of several runs of `train_gpt` in one table and plot."""

import json
import shutil
from pathlib import Path

import pytest

from examples import compare_runs

OPTIONS = {"optimizer": "teon", "seed": 3, "learning_rate": 0.02}


@pytest.fixture
def run(tmp_path):
    """A folder as `train_gpt` leaves it after four steps, evaluated at the second and last."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"options": OPTIONS, "corpus": {}}))
    records = [{"step": step, "loss": 4.0 - step} for step in (1, 2, 3, 4)]
    records[1]["val_loss"] = 2.5
    records[3]["val_loss"] = 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_the_table_has_the_last_validation_loss_and_its_perplexity(run, tmp_path, capsys):
    assert compare_runs.main([str(run), "--out", str(tmp_path / "plots" / "losses.png")]) == 0
    assert "| teon | 3 | 0.02 | 4 | 1.0000 | 2.718 |" in capsys.readouterr().out
    assert (tmp_path / "plots" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_few_runs_says_what_it_cannot_tell(run, tmp_path, capsys):
    options = {"optimizer": "muon", "seed": 3, "learning_rate": 0.02}
    muon = Path(shutil.copytree(run, tmp_path / "muon"))
    (muon / "config.json").write_text(json.dumps({"options": options, "corpus": {}}))
    out = ["--out", str(tmp_path / "losses.png")]
    assert compare_runs.main([str(run), str(muon), *out]) == 0
    assert "do not tell Muon from TEON" in " ".join(capsys.readouterr().out.split())
    for runs in ([run], [muon], [run] * 5 + [muon] * 5):
        assert compare_runs.main([*map(str, runs), *out]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("| ")


def test_a_run_that_was_not_evaluated_yet_is_refused_in_one_line(run, tmp_path, capsys):
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    assert compare_runs.main([str(run), "--out", str(tmp_path / "losses.png")]) == 2
    assert capsys.readouterr().err.startswith("compare_runs: error:")
    assert not (tmp_path / "losses.png").exists()


def refused(capsys, *flags):
    assert compare_runs.main([str(flag) for flag in flags]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("compare_runs: error: ")
    return captured.err


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    assert "holds no run" in refused(capsys, tmp_path, "--out", tmp_path / "losses.png")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"\xff"),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"options": [], "corpus": ""}'),
        ("config.json", b'{"options": {"optimizer": "teon", "seed": 3}, "corpus": ""}'),
        ("metrics.jsonl", b"\xff"),
        ("metrics.jsonl", b"[]\n"),
        ("metrics.jsonl", b'{"step": 1, "val_loss": 1.0}\n'),
        ("metrics.jsonl", b'{"step": 1, "loss": NaN, "val_loss": 1.0}\n'),
        ("metrics.jsonl", b'{"step": 1, "loss": 1.0, "val_loss": "x"}\n'),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(file, content, run, tmp_path, capsys):
    (run / file).write_bytes(content)
    assert f"{file} is damaged" in refused(capsys, run, "--out", tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()


def test_a_plot_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "file" / "losses.png", "/proc/losses.png"):
        refused(capsys, run, "--out", out)
    for out in (tmp_path, ".", "..", "/"):
        assert "is a folder: write the name of a PNG file" in refused(capsys, run, "--out", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_losses_as_large_as_float32_are_drawn(run, tmp_path, capsys):
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3e38, "val_loss": 3e38}\n')
    assert compare_runs.main([str(run), "--out", str(tmp_path / "losses.png")]) == 0
    assert " inf |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [[], ["run"], ["--out", "x"], ["a\0b", "--out", "x"], ["run", "--out", ""]]
)
def test_wrong_flags_are_one_line(flags, capsys):
    refused(capsys, *flags)
