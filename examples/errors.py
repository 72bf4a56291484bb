"""What the user can put right, and how a program says so: one line and an exit code."""

import sys
from collections.abc import Callable

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
