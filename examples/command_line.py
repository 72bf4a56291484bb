"""Command lines: flags read by tyro into dataclasses, errors in one line, exit codes.

What a flag may be is said by the annotation of its field, such as `Annotated[int, whole(1)]`, and
checked wherever its value was written.
"""

import contextlib
import io
import itertools
import math
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import tyro

REFUSED, INTERRUPTED = 2, 130


class UserError(Exception):
    """Tells the user of a wrong flag, corpus or folder, without a traceback."""


def exit_code(program: str, run: Callable[[], int]) -> int:
    """Runs a program; what the user can put right becomes a line on stderr and the exit code 2."""
    try:
        return run()
    except (UserError, OSError) as error:
        print(f"{program}: error:", one_line(str(error)), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{program}: interrupted before training began", file=sys.stderr)
        return INTERRUPTED


def one_line(text: str) -> str:
    """Puts a text on one line, and writes escapes for what a terminal would not show."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


# What a value may be, wherever it was written: a function that raises ValueError.


def whole(low: int, high: int = 2**31 - 1) -> Callable[[Any], None]:
    """Makes a check for whole numbers from `low` to `high`."""

    def check(value: Any) -> None:
        # Not isinstance: True is an int, too.
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{_shown(value)} is not a whole number from {low} to {high}")

    return check


def real(positive: bool, below: float = math.inf) -> Callable[[Any], None]:
    """Makes a check for numbers from 0 on, or above it, and `below` a limit, as float32 too."""
    wanted = "a positive number" if positive else "zero or a positive number"
    wanted += "" if below == math.inf else f" below {below:g}"
    largest = float(np.finfo(np.float32).max)

    def check(value: Any) -> None:
        if type(value) in (int, float) and 0 <= value <= largest:
            single = np.float32(value)
            if single < below and (single > 0 or (value == 0 and not positive)):
                return
        raise ValueError(f"{_shown(value)} is not {wanted} in float32")

    return check


def writable_path(value: Any) -> None:
    """Checks a path that every library can write to: Orbax names files in UTF-8."""
    if type(value) is not str:
        raise ValueError(f"{_shown(value)} is not a string")
    if not value:
        raise ValueError("an empty path")
    if "\0" in value:
        raise ValueError(f"{value!r} has a NUL character, which no path can have")
    try:
        os.path.realpath(value).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{value!r} is not UTF-8, or lies in a folder whose name is not: rename it"
        ) from None


def texts(value: Any) -> None:
    """Checks a tuple of strings."""
    if type(value) is not tuple or not value or not all(type(text) is str for text in value):
        raise ValueError(f"{_shown(value)} is not a string or a list of strings")


def _shown(value: Any) -> str:
    return reprlib.repr(value)


Count = Annotated[int, whole(1)]
Index = Annotated[int, whole(0)]
Interval = Annotated[int, whole(1), tyro.conf.arg(metavar="STEPS")]
Rate = Annotated[float, real(positive=True)]
Momentum = Annotated[float, real(positive=False, below=1.0)]
PathText = Annotated[str, writable_path]
RuleTexts = Annotated[tuple[str, ...], texts]


def shown_as(metavar: str | None = None, default: str = "the model's") -> Any:
    """Tells tyro how --help shows a flag."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def check_fields(flags: Any) -> None:
    """Raises UserError unless every field of a dataclass is what its annotation allows."""
    for name, hint in typing.get_type_hints(type(flags), include_extras=True).items():
        check(name, getattr(flags, name), hint)


def check(name: str, value: Any, hint: Any) -> None:
    """Raises UserError unless the annotation of a field allows the value."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    try:
        if kind is Annotated:
            for raise_unless_allowed in filter(callable, hint.__metadata__):
                raise_unless_allowed(value)
            check(name, value, arguments[0])
        elif kind in (types.UnionType, typing.Union) and value is not None:
            check(name, value, arguments[0])
        elif kind is Literal and value not in arguments:
            raise ValueError(f"{_shown(value)} is not one of {', '.join(arguments)}")
    except ValueError as error:
        raise UserError(f"{flag(name)}: {error}") from None


def flag(name: str) -> str:
    """Writes the name of a field as that of its flag."""
    return "--" + name.replace("_", "-")


# Reading.

Kind = TypeVar("Kind")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NUMBERS = tyro.constructors.ConstructorRegistry()


@_NUMBERS.primitive_rule
def _number_or_text(
    of: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Reads numbers, and leaves what is none to the check of its field, which says so better."""
    if of.type not in (int, float):
        return None

    def read(words: list[str]) -> Any:
        with contextlib.suppress(ValueError):
            return of.type(words[0])
        return words[0]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=of.type.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, of.type),
        str_from_instance=lambda value: [str(value)],
    )


def read_flags(
    kind: type[Kind], argv: Sequence[str] | None, program: str, description: str | None
) -> Kind:
    """Has tyro make a dataclass of flags; its complaint becomes a UserError of one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                prog=f"python -m {program}",
                description=description,
                args=argv,
                registry=_NUMBERS,
            )
    except SystemExit as end:
        if not end.code:  # after --help
            raise
    # tyro has drawn a box: a title, a paragraph that says what is wrong, then what might help.
    lines = [line.strip("│ ") for line in _COLOURS.sub("", complaint.getvalue()).splitlines()[1:]]
    below_title = itertools.dropwhile(_is_rule, lines)
    raise UserError(" ".join(itertools.takewhile(lambda line: not _is_rule(line), below_title)))


def _is_rule(line: str) -> bool:
    return not line.strip("─-╰╯")
