"""A plan as text that a person can check in a minute, and as a dict for logs."""

import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from teon_optax._plan.layout import joint_shape
from teon_optax._polar.coefficients import MethodLike, resolve
from teon_optax._polar.numerics import Numerics

_WIDTH = 100
_LEAST = 12  # columns for a path
_MOST = 24  # columns for layers
_NUMBER = re.compile(r"\d+")
_UNITS = (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")
_MUON = "jordan"


def table(
    groups: Sequence[Any], untouched: Sequence[Any], unused: Sequence[Any], method: MethodLike
) -> str:
    """Writes a plan's table; series that differ in the numbers of their paths alone are one row."""
    taken: dict[tuple[Any, ...], list[Any]] = {}
    for group in groups:
        K, shape = len(group.members), f"{group.fan_in} x {group.fan_out}"
        cells = shape, str(K), str(group.rule.mode), str(min(group.joint))
        # Layers of another dtype are coupled among themselves, so they are a row of their own.
        row = _NUMBER.sub("*", group.members[0]), group.dtype, *cells
        taken.setdefault(row, []).append(group)
    left: dict[tuple[str, ...], list[str]] = {}
    for leaf in untouched:
        cells = " x ".join(map(str, leaf.shape)), leaf.reason
        left.setdefault((_NUMBER.sub("*", leaf.path), *cells), []).append(leaf.path)
    members = {row: [m for group in alike for m in group.members] for row, alike in taken.items()}
    taken_names, left_names = row_names(members), row_names(left)
    lines = columns(
        [("orthogonalized", "layers", "fan_in x fan_out", "K", "mode", "Gram", "groups")]
        + [
            (taken_names[row], _layers(alike), *row[2:], str(sum(group.batch for group in alike)))
            for row, alike in taken.items()
        ],
        notes=["", *(_note(alike[0], method) for alike in taken.values())],
    )
    lines += columns(
        [("fallback", "shape", "why", "leaves")]
        + [(left_names[row], *row[1:], str(len(paths))) for row, paths in left.items()]
    )
    lines += [line for rule in unused for line in _wrapped(f"takes no leaf: {rule}", _WIDTH - 2)]
    return "\n".join([*lines, *_totals(groups, untouched, method)])


def _note(group: Any, method: MethodLike) -> str:
    """Says below a row what its columns cannot: the view of its leaves, and a cost above Muon's."""
    view = "" if group.rule.view is None else f"each layer seen as {group.rule.view}"
    return "; ".join(filter(None, [view, _dearer_than_alone(group, method)]))


def _layers(groups: Sequence[Any]) -> str:
    """Lists the layers of a row's groups, if its rule counts any."""
    return spans(n for group in groups if group.rule.counts_layers for n in group.layers)


def as_dict(
    groups: Sequence[Any], untouched: Sequence[Any], unused: Sequence[Any], method: MethodLike
) -> dict[str, Any]:
    """Writes a plan in lists, dicts, strings and integers."""
    flops, muon = _flops(groups, method)
    return {
        "groups": [
            {key: value for key, value in group._asdict().items() if key != "dtype"}
            | {
                "members": list(group.members),
                "layers": [list(n) if isinstance(n, tuple) else n for n in group.layers],
                "rule": str(group.rule),
                "mode": group.rule.mode,
                "gram": min(group.joint),
            }
            for group in groups
        ],
        "fallback": [leaf._asdict() | {"shape": list(leaf.shape)} for leaf in untouched],
        "unused": [str(rule) for rule in unused],
        "parameters": _parameters(groups, untouched),
        "flops": {"plan": flops, "muon": muon},
    }


def anonymous(path: str) -> str:
    """Writes a path with `*` for its numbers, but for that of a fused part."""
    return re.sub(r"(?<![:\d])\d+", "*", path)


def row_names(paths: Mapping[Any, Sequence[str]]) -> dict[Any, str]:
    """Names each row by its path, with `*` for a number that differs between its leaves.

    Numbers of fused parts are listed: `qkv:0-2`. So are, where rows would be called alike, the
    numbers that tell them apart: `fc{1, 3}`.

    Args:
      paths: The paths of each row, which differ in their numbers alone.
    """
    numbers = {row: _numbers(some) for row, some in paths.items()}
    longest = {row: max(some, key=_count_of_numbers) for row, some in paths.items()}
    names = {row: _named(longest[row], numbers[row], None) for row in paths}
    alike: dict[str, list[Any]] = {}
    for row, name in names.items():
        alike.setdefault(name, []).append(row)
    for rows in alike.values():
        if len(rows) > 1:
            common = [set.intersection(*each) for each in zip(*map(numbers.get, rows), strict=True)]
            names |= {row: _named(longest[row], numbers[row], common) for row in rows}
    return names


def _count_of_numbers(path: str) -> int:
    return len(_NUMBER.findall(path))


def _numbers(paths: Sequence[str]) -> list[set[int]]:
    """Collects the numbers that paths have in each place.

    Haiku gives the first module of a name none: that tells it from the others, and counts as 0.
    """
    found = [list(map(int, _NUMBER.findall(path))) for path in paths]
    most = max(map(len, found))
    is_alike = all(len(numbers) == most for numbers in found)
    columns = zip(*(numbers for numbers in found if len(numbers) == most), strict=True)
    return [set(column) if is_alike else {0, *column} for column in columns]


def _named(path: str, numbers: Sequence[set[int]], common: Sequence[set[int]] | None) -> str:
    """Writes a path with `*` or, where not all rows have them in `common`, a list for numbers."""
    columns = iter(range(len(numbers)))

    def replaced(number: re.Match[str]) -> str:
        column = next(columns)
        if len(numbers[column]) == 1:
            return number[0]
        before, text = path[: number.start()], spans(numbers[column])
        if before.endswith(":"):
            return text
        if common is None or numbers[column] == common[column]:
            return "*"
        return text if before.endswith("[") else f"{{{text}}}"

    return _NUMBER.sub(replaced, path)


def spans(layers: Iterable[Any]) -> str:
    """Writes numbers of layers in short: `0-3, 6`, and `0[0-3]` for scanned leaves with a number.

    A text that would be too long gives the ends and the count: `0, 2 .. 10 (6)`.
    """
    layers = set(layers)
    plain = sorted(layer for layer in layers if not isinstance(layer, tuple))
    pairs = sorted(layer for layer in layers if isinstance(layer, tuple))
    scanned: dict[int, list[int]] = {}
    for number, index in pairs:
        scanned.setdefault(number, []).append(index)
    by_indices: dict[str, list[int]] = {}
    for number, indices in scanned.items():
        by_indices.setdefault(", ".join(_runs(indices)), []).append(number)
    texts = _runs(plain)
    texts += [f"{', '.join(_runs(numbers))}[{inside}]" for inside, numbers in by_indices.items()]
    text = ", ".join(texts)
    if len(text) <= _LEAST or (len(texts) < 4 and len(text) <= _MOST):
        return text
    if len(texts) > 3:
        text = f"{texts[0]}, {texts[1]} .. {texts[-1]} ({len(layers)})"
    if len(text) > _MOST:
        ends = [*map(str, plain), *(f"{number}[{index}]" for number, index in pairs)]
        text = f"{ends[0]} .. {ends[-1]} ({len(layers)})"
    return text


def _runs(numbers: Sequence[int]) -> list[str]:
    """Writes sorted numbers as runs of consecutive ones: `0-3`, `6`, `-2..1`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [
        str(first) if first == last else f"{first}{'-' if first >= 0 else '..'}{last}"
        for first, last in runs
    ]


def columns(rows: Sequence[tuple[str, ...]], notes: Iterable[str] = ()) -> list[str]:
    """Aligns columns, a line for each row; one whose path is too wide for its column is longer.

    Args:
      rows: The header comes first.
      notes: What stands under each row, if anything.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    first = min(widths[0], max(_LEAST, _WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for (path, *cells), note in itertools.zip_longest(rows, notes, fillvalue=""):
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines += ["  ".join([path.ljust(first), *cells]), *(["  " + note] if note else [])]
    return [*lines, ""]


def _wrapped(text: str, width: int) -> list[str]:
    head, *rest = textwrap.wrap(text, width, break_on_hyphens=False) or [""]
    return [head, *("  " + line for line in rest)]


def _parameters(groups: Sequence[Any], untouched: Sequence[Any]) -> dict[str, int]:
    """Counts the parameters that TEON, Muon and the fallback get."""
    sizes = {"TEON": 0, "Muon": 0, "fallback": sum(math.prod(leaf.shape) for leaf in untouched)}
    for group in groups:
        name = "TEON" if len(group.members) > 1 or group.rule.mode == 3 else "Muon"
        sizes[name] += _size(group)
    return sizes


def _size(group: Any) -> int:
    return len(group.members) * group.fan_in * group.fan_out * group.batch


def _flops(groups: Sequence[Any], method: MethodLike) -> tuple[int | None, int]:
    """Counts the FLOPs of an update's products, and of Muon's, which takes each matrix alone.

    Those of an SVD or a function are not known: None.
    """
    ours = muon = 0.0
    numerics, of_muon = _numerics(method), _numerics(_MUON)
    restarts = (1,) * len(of_muon.steps(()))
    for group in groups:
        alone = group.fan_in, group.fan_out
        if numerics.polynomial is not None:
            ours += group.batch * _polar_factor_flops(group.joint, numerics)
        each = _polar_factor_flops(alone, of_muon, restarts)
        muon += group.batch * len(group.members) * each
    return None if numerics.polynomial is None else round(ours), round(muon)


def _numerics(method: MethodLike) -> Numerics:
    """Finds how a method computes matrices of float32 on this backend."""
    return Numerics(resolve(method)).of(np.dtype("float32"))


def _polar_factor_flops(
    shape: tuple[int, int], numerics: Numerics, restarts: tuple[int, ...] | None = None
) -> float:
    """Counts the FLOPs of a polar factor, with the method's restarts unless some are given."""
    d, ratio = min(shape), max(shape) / min(shape)
    restarts = restarts or numerics.restarts(*shape)
    return 2 * d**3 * numerics.product_count(restarts, ratio)


def _dearer_than_alone(group: Any, method: MethodLike) -> str:
    """Says of a joint matrix that costs more than its layers alone by how much, and what would not.

    Mode 1 of kernels that are wider than high has a larger Gram matrix than these, and so has mode
    2 of those that are higher than wide.
    """
    K, alone, mode = len(group.members), (group.fan_in, group.fan_out), group.rule.mode
    numerics = _numerics(method)
    if K == 1 or numerics.polynomial is None:
        return ""
    each = _polar_factor_flops(alone, numerics)
    ratios = {
        other: _polar_factor_flops(joint_shape(K, *alone, other), numerics) / each / K
        for other in (1, 2, 3)
    }
    if ratios[mode] < 1.005:
        return ""
    cheaper = min((1, 2), key=ratios.__getitem__)
    return (
        f"{ratios[mode]:.2f} times the products of its layers alone (stack=1); "
        f"with mode={cheaper} {ratios[cheaper]:.2f} times"
    )


def _totals(groups: Sequence[Any], untouched: Sequence[Any], method: MethodLike) -> list[str]:
    """Writes the lines below the table: who gets the parameters, and what an update costs."""
    sizes, (flops, muon) = _parameters(groups, untouched), _flops(groups, method)
    total = max(1, sum(sizes.values()))
    shares = ", ".join(f"{name} {size:,} ({size / total:.0%})" for name, size in sizes.items())
    cost = f"not counted for method={method!r}; Muon's are {_short(muon)}"
    if flops is not None:
        ours, of_muon = (len(_numerics(each).steps(())) for each in (method, _MUON))
        steps = f"{ours} polynomial steps" + (" each" if ours == of_muon else f", Muon's {of_muon}")
        backend = jax.default_backend()
        cost = (
            f"{_short(flops)}, {flops / max(1, muon):.0%} of Muon's {_short(muon)} "
            f"({steps}, on {backend})"
        )
    return [f"{shares} of the parameters", f"matrix products per step: {cost}"]


def _short(flops: int) -> str:
    unit, name = next(unit for unit in _UNITS if flops >= unit[0] or unit == _UNITS[-1])
    return f"{flops / unit:.3g} {name}FLOP"
