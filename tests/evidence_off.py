"""Switches off each piece of the default rules' evidence in turn, and says which trees change.

    python -m tests.evidence_off                  # all pieces, all trees of tests/trees
    python -m tests.evidence_off bare place       # some pieces

Printed are a piece, how many trees of libraries change (tests/trees/models, libraries, and
kinds/architectures), how many of those that were made for a test, and some names. A piece that
changes none of a library wants a sentence in its docstring that says why it stands.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from teon_optax import rules
from teon_optax._reading import evidence, reading
from tests import listings

PIECES = (*evidence.EVIDENCE, *reading.AXES)


def main(names: Sequence[str]) -> None:
    """Prints for every piece how many trees change, of libraries and of those made for a test."""
    trees = listings.trees()
    by_hand = set(listings.trees("kinds/*")) - set(listings.trees("kinds/architectures"))
    before = {name: _read(tree) for name, tree in trees.items()}
    for piece in PIECES:
        if names and piece.__name__ not in names:
            continue
        changed = list(_changed(piece, trees, before))
        made = [name for name in changed if name in by_hand]
        others = [name for name in changed if name not in made]
        shown = ", ".join([*others, *made][:4])
        print(f"{piece.__name__:14} {len(others):4} {len(made):4}  {shown}", flush=True)


def _changed(
    piece: Callable[..., Any], trees: dict[str, listings.Tree], before: dict[str, Any]
) -> Iterator[str]:
    """Names the trees that are read otherwise without a piece of evidence."""
    kept = {
        (module, name): tuple(each for each in getattr(module, name) if each is not piece)
        for module, name in ((evidence, "EVIDENCE"), (reading, "AXES"))
    }
    with mock.patch.object(evidence, "EVIDENCE", kept[evidence, "EVIDENCE"]):
        with mock.patch.object(reading, "AXES", kept[reading, "AXES"]):
            yield from (name for name, tree in trees.items() if _read(tree) != before[name])


def _read(tree: listings.Tree) -> Any:
    """Reads a tree anew: `rules.paper` keeps nothing, as `default_rules` does."""

    def read_rules(params: Any, first: Any) -> Any:
        return rules.paper(params, first=first)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return listings.read(tree.params, tree.lines_by_path, read_rules)
        except Exception as error:  # Without its evidence, a tree may not be read at all.
            return repr(error)


if __name__ == "__main__":
    main(sys.argv[1:])
