"""A plan as text that a person can check in a minute, and as a dict for logs."""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from teon_optax._polar.coefficients import resolve
from teon_optax._polar.precision import Numerics, product_count

_WIDTH = 100
_LEAST = 12  # columns for a path, and at most for layers
_UNITS = (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")
_STEPS = 5  # of the paper's method, and of Muon


def table(groups: Sequence[Any], untouched: Sequence[Any], unused: Sequence[Any]) -> str:
    """A plan's table; rows that differ in the numbers of their paths alone are one row."""
    taken: Counter[tuple[str, ...]] = Counter()
    layers: dict[tuple[str, ...], list] = {}
    for group in groups:
        rule, K, shape = group.rule, len(group.members), f"{group.fan_in} x {group.fan_out}"
        coupled = str(rule.transform or rule.mode)
        row = anonymous(group.members[0]), shape, str(K), coupled, str(min(group.joint))
        taken[row] += group.batch
        layers.setdefault(row, []).extend(group.layers if rule.counts_layers else ())
    left = Counter(
        (anonymous(leaf.path), " x ".join(map(str, leaf.shape)), leaf.reason) for leaf in untouched
    )
    lines = columns(
        [("orthogonalized", "layers", "fan_in x fan_out", "K", "mode", "Gram", "groups")]
        + [(row[0], spans(layers[row]), *row[1:], str(count)) for row, count in taken.items()]
    )
    lines += columns(
        [("fallback", "shape", "why", "leaves")]
        + [(*row, str(count)) for row, count in left.items()]
    )
    lines += [line for rule in unused for line in _wrapped(f"takes no leaf: {rule}", _WIDTH - 2)]
    return "\n".join([*lines, *_totals(groups, untouched)])


def as_dict(
    groups: Sequence[Any], untouched: Sequence[Any], unused: Sequence[Any]
) -> dict[str, Any]:
    """A plan in lists, dicts, strings and integers."""
    flops, muon = _flops(groups)
    return {
        "groups": [
            group._asdict()
            | {
                "members": list(group.members),
                "layers": [list(n) if isinstance(n, tuple) else n for n in group.layers],
                "rule": str(group.rule),
                "mode": group.rule.transform or group.rule.mode,
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
    """A path with `*` for its numbers, but for that of a fused part."""
    return re.sub(r"(?<![:\d])\d+", "*", path)


def spans(layers: Iterable[Any]) -> str:
    """Numbers of layers in short, as in `0-3, 6`; pairs of numbers as in `1.0`."""
    runs: list[list[int]] = []
    found = sorted(set(layers))
    names = [".".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in found]
    for i, number in enumerate(found):
        if runs and not isinstance(number, tuple) and number == found[i - 1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    text = ", ".join(names[a] if a == b else f"{names[a]}-{names[b]}" for a, b in runs)
    return text if len(text) <= _LEAST else f"{len(found)} of {names[0]}-{names[-1]}"


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned columns; a path that is too wide for its column goes on in the next line."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    first = min(widths[0], max(_LEAST, _WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for path, *cells in rows:
        head, *rest = _wrapped(path, first)
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines += ["  ".join([head.ljust(first), *cells]), *rest]
    return [*lines, ""]


def _wrapped(text: str, width: int) -> list[str]:
    head, *rest = textwrap.wrap(text, width, break_on_hyphens=False) or [""]
    return [head, *("  " + line for line in rest)]


def _parameters(groups: Sequence[Any], untouched: Sequence[Any]) -> dict[str, int]:
    sizes = {"TEON": 0, "Muon": 0, "fallback": sum(math.prod(leaf.shape) for leaf in untouched)}
    for group in groups:
        name = "TEON" if len(group.members) > 1 or group.rule.mode == 3 else "Muon"
        sizes[name] += _size(group)
    return sizes


def _size(group: Any) -> int:
    return len(group.members) * group.fan_in * group.fan_out * group.batch


def _flops(groups: Sequence[Any]) -> tuple[int, int]:
    """Of the matrix products of an update, and of those of Muon, which takes each matrix alone."""

    def products(shape: tuple[int, int], restarts: tuple[int, ...]) -> float:
        d, ratio = min(shape), max(shape) / min(shape)
        return 2 * d**3 * product_count(restarts, ratio)

    numerics = Numerics(resolve("polar_express")).of(np.dtype("float32"))
    ours = sum(
        group.batch * group.factors * products(group.joint, numerics.restarts(*group.joint))
        for group in groups
    )
    # There and back, of K matrices along their stack.
    ours += sum(4 * len(g.members) * _size(g) for g in groups if g.factors > 1)
    alone = [(len(group.members) * group.batch, (group.fan_in, group.fan_out)) for group in groups]
    return round(ours), round(sum(n * products(shape, (1,) * _STEPS) for n, shape in alone))


def _totals(groups: Sequence[Any], untouched: Sequence[Any]) -> list[str]:
    sizes, (flops, muon) = _parameters(groups, untouched), _flops(groups)
    total = max(1, sum(sizes.values()))
    shares = ", ".join(f"{name} {size:,} ({size / total:.0%})" for name, size in sizes.items())
    return [
        f"{shares} of the parameters",
        f"matrix products per step: {_short(flops)}, {flops / max(1, muon):.0%} of Muon's "
        f"{_short(muon)} ({_STEPS} polynomial steps each, on {jax.default_backend()})",
    ]


def _short(flops: int) -> str:
    unit, name = next(unit for unit in _UNITS if flops >= unit[0] or unit == _UNITS[-1])
    return f"{flops / unit:.3g} {name}FLOP"
