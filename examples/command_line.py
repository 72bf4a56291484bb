"""What the programs share of their command lines: flags, errors of one line, exit codes."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np

from examples.errors import UserError

REFUSED, INTERRUPTED = 2, 130


def exit_code(program: str, run: Callable[[], int]) -> int:
    """That of `run`; what the user can put right becomes a line on stderr and 2."""
    try:
        return run()
    except (UserError, OSError) as error:
        print(f"{program}: error:", one_line(str(error)), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{program}: interrupted before training began", file=sys.stderr)
        return INTERRUPTED


def one_line(text: str) -> str:
    """The text with single spaces, and escapes for what a terminal would not show."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class Parser(argparse.ArgumentParser):
    """Raises UserError where `ArgumentParser` prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Called by `parse_args`."""
        raise UserError(message)


def path(text: str) -> Path:
    """A path that every library can write to: Orbax names files in UTF-8."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} has a NUL character, which no path can have")
    try:
        os.path.realpath(text).encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not UTF-8, or lies in a folder whose name is not: rename it"
        ) from None
    return Path(text)


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        digits = text.isascii() and text.isdecimal() and len(text) < 20
        if digits and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} to {high}")

    return parse


def real(positive: bool, below: float = math.inf) -> Callable[[str], float]:
    """A parser of numbers from 0 on, or above it, and `below` a limit, in float32 as in float64."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        with np.errstate(over="ignore"):
            single = np.float32(value)
        if single < below and (single > 0 or (value == 0 and not positive)):
            return value
        wanted = "a positive number" if positive else "zero or a positive number"
        wanted += "" if below == math.inf else f" below {below:g}"
        raise argparse.ArgumentTypeError(f"{text} is not {wanted} in float32")

    return parse
