"""Ratios of the figures in two files of `update_cost`.

    python -m benchmarks.compare before.json after.json
    python -m benchmarks.compare committed.json measured.json --gate 0.02

With `--gate`, the exit code says whether TEON's figures that do not depend on the machine grew.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.update_cost import FIGURES

# What depends on the program alone, given a version of jax.
GATED = ("flops", "tpu_passes", "hlo_lines")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, the second file's figures over the first's; returns the exit code."""
    parser = argparse.ArgumentParser("benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--gate", type=float, help="fail if FLOPs, TPU passes or HLO lines of TEON grew by more"
    )
    options = parser.parse_args(argv)
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    for setting in ("model", "dtype"):
        if before[setting] != after[setting]:
            parser.error(f"the files differ in {setting}: {before[setting]}, {after[setting]}")
    print(ratios(before, after))
    for name, record in (("before", before), ("after", after)):
        print(f"\n{name}: {results.caption(record)}")
    growth = [] if options.gate is None else grown(before, after, options.gate)
    for line in growth:
        print(line, file=sys.stderr)
    return 1 if growth else 0


def grown(before: dict[str, Any], after: dict[str, Any], share: float) -> list[str]:
    """Writes a line for each gated figure of TEON that grew by more than this share, or is gone."""
    lines = []
    for name, old in before["optimizers"].items():
        new = after["optimizers"].get(name, {})
        for figure in GATED if name.startswith("teon ") else ():
            if new.get(figure, float("inf")) > (1 + share) * old[figure]:
                found = f"{FIGURES[figure][0]} {new.get(figure)}"
                lines.append(f"{name}: {found}, more than {1 + share:g} times {old[figure]}.")
    return lines


def ratios(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Shows a row for each optimizer that both files have."""
    olds, news = before["optimizers"], after["optimizers"]
    both = [name for name in olds if name in news]
    shown = [f for f in FIGURES if any(f in olds[name] and f in news[name] for name in both)]
    rows = [[name, *(_ratio(olds[name], news[name], figure) for figure in shown)] for name in both]
    return results.markdown(["after / before", *(FIGURES[figure][0] for figure in shown)], rows)


def _ratio(old: dict[str, float], new: dict[str, float], figure: str) -> str:
    if figure not in new or not old.get(figure):
        return "-"
    return f"{new[figure] / old[figure]:.3f}"


if __name__ == "__main__":
    sys.exit(main())
