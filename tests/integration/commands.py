"""Runs `train_gpt` in this process, and looks at what it leaves."""

import json

from examples import train_gpt

SMALL = ["--batch-size", "2", "--context", "16", "--seed", "7"]


def refused(capsys, *flags, announced=False):
    """The one line of an error, without the program's name.

    announced: The job was described on stdout before.
    """
    assert train_gpt.main([str(flag) for flag in flags]) == 2
    captured = capsys.readouterr()
    assert announced or captured.out == ""
    assert captured.err.startswith("train_gpt: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("train_gpt: error: ")


def contents(folder):
    """The bytes of all files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics(out):
    """The records of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
