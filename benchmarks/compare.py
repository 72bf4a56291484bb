"""Ratios of the figures in two files of `update_cost`.

python -m benchmarks.compare before.json after.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.update_cost import FIGURES


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table: the second file's figures over the first's."""
    parser = argparse.ArgumentParser("benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(argv)
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    for setting in ("model", "dtype"):
        if before[setting] != after[setting]:
            parser.error(f"the files differ in {setting}: {before[setting]}, {after[setting]}")
    print(ratios(before, after))
    for name, record in (("before", before), ("after", after)):
        print(f"\n{name}: {results.caption(record)}")


def ratios(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A row for each optimizer that both files have."""
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
