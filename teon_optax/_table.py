"""A plan as text that a person can check in a minute."""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

_WIDTH = 100


def table(groups: Sequence[Any], untouched: Sequence[Any], unused: Sequence[Any]) -> str:
    """A plan's table; rows that differ in the numbers of their paths alone are one row."""
    taken: Counter[tuple[str, ...]] = Counter()
    for group in groups:
        K, shape = len(group.members), f"{group.fan_in} x {group.fan_out}"
        row = (
            _anonymous(group.members[0]),
            shape,
            str(K),
            str(group.rule.mode),
            str(min(group.joint)),
        )
        taken[row] += group.batch
    left = Counter(
        (_anonymous(leaf.path), " x ".join(map(str, leaf.shape)), leaf.reason) for leaf in untouched
    )
    lines = columns(
        [("orthogonalized jointly", "fan_in x fan_out", "K", "mode", "Gram", "groups")]
        + [(*row, str(count)) for row, count in taken.items()]
    )
    lines += columns(
        [("fallback", "shape", "why", "leaves")]
        + [(*row, str(count)) for row, count in left.items()]
    )
    lines += [f"takes no leaf: {rule}" for rule in unused]
    return "\n".join([*lines, _totals(groups, untouched)])


def _anonymous(path: str) -> str:
    return re.sub(r"(?<![:\d])\d+", "*", path)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned columns; a path that is too wide for its column goes on in the next line."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    first = min(widths[0], _WIDTH - sum(widths[1:]) - 2 * len(widths[1:]))
    lines = []
    for path, *cells in rows:
        head, *rest = textwrap.wrap(path, first) or [""]
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines += ["  ".join([head.ljust(first), *cells]), *("  " + line for line in rest)]
    return [*lines, ""]


def _totals(groups: Sequence[Any], untouched: Sequence[Any]) -> str:
    sizes = Counter({"TEON": 0, "Muon": 0, "fallback": 0})
    for group in groups:
        name = "TEON" if len(group.members) > 1 or group.rule.mode == 3 else "Muon"
        sizes[name] += len(group.members) * group.fan_in * group.fan_out * group.batch
    sizes["fallback"] += sum(math.prod(leaf.shape) for leaf in untouched)
    total = max(1, sizes.total())
    return (
        ", ".join(f"{name} {size:,} ({size / total:.0%})" for name, size in sizes.items())
        + " of the parameters"
    )
