"""`examples/minimal.py`: short, quick to learn something, and the program of the first page."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "minimal.py"
PAGE = (ROOT / "docs" / "getting_started.md").read_text("utf-8")
# `py`, not `python`: tests/test_docs.py would run them again, and compare the last digit of a loss.
BLOCKS = re.findall(r"^```py\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", PAGE, re.M | re.S)
LOSS = re.compile(r"^step +(\d+), loss (\d\.\d\d)$", re.M)


@pytest.fixture(scope="module")
def output(quick_compilation):
    """What the program prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(PROGRAM))
    return printed.getvalue()


def code(text):
    return [line for line in text.splitlines() if line]


def test_it_is_the_program_of_the_first_page():
    docstring, *program = code(PROGRAM.read_text("utf-8"))
    assert docstring.startswith('"""')
    assert code("".join(block for block, _ in BLOCKS)) == program


def test_it_has_at_most_60_lines():
    assert len(PROGRAM.read_text("utf-8").splitlines()) <= 60


def test_its_plan_is_that_of_the_page(output):
    ((_, shown),) = BLOCKS
    assert LOSS.sub(r"step \1", output) == LOSS.sub(r"step \1", shown)


def test_it_learns(output):
    losses = [float(loss) for _, loss in LOSS.findall(output)]
    assert len(losses) == 6
    assert losses[-1] < 3.0 < 5.5 < losses[0]
