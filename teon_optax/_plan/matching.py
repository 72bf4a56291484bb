"""Which layer and which sibling of a series a leaf is."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from teon_optax._plan.layout import Layout
from teon_optax._rule import Rule


class SeriesKey(NamedTuple):
    """What the leaves of a series agree in.

    Attributes:
      path: Path of the leaves, without the layer's number and the sibling's name.
      rule: The rule that took them.
      layout: How each leaf holds its matrices.
      dtype: Dtype of the leaves.
    """

    path: str
    rule: Rule
    layout: Layout
    dtype: Any


class LeafMatch(NamedTuple):
    """What a rule's pattern says of one leaf. Sorted, leaves of a layer come sibling by sibling.

    Attributes:
      number: Number of the layer.
      sibling: Position of the sibling among the alternatives of the group `slice`, and its name.
      leaf: Position of the leaf in the tree.
      path: Path of the leaf.
    """

    number: int
    sibling: tuple[int, str]
    leaf: int
    path: str


def match_leaf(path: str, leaf: int, rule: Rule) -> tuple[str, LeafMatch]:
    """The path of the leaf's series, and which layer and sibling of it the leaf is.

    The path of the series is that of the leaf without the number of the layer (and without a `_`
    right before it), and without the name of the sibling.

    Raises:
      ValueError: If the pattern's group `layer` matched something else than an integer.
    """
    match = rule.search(path)
    assert match is not None
    number, name = (match.groupdict().get(group) for group in ("layer", "slice"))
    if number is not None and not re.fullmatch(r"[+-]?\d+", number):
        raise ValueError(
            f"its layer is {number!r}, not a number: let `(?P<layer>...)` match digits alone, as "
            "`(?P<layer>\\d+)` does"
        )
    named = [group for group, text in (("layer", number), ("slice", name)) if text is not None]
    series_path = path
    for group in sorted(named, key=match.span, reverse=True):
        start, end = match.span(group)
        above = path[:start].removesuffix("_") if group == "layer" else path[:start]
        series_path = above + series_path[end:]
    sibling = (0, "") if name is None else (_position(name, rule), name)
    return series_path, LeafMatch(int(number or 0), sibling, leaf, path)


def _position(name: str, rule: Rule) -> int:
    """Which alternative of the group `slice` a name is.

    Where the alternatives are no words of their own, all names get 0, and are sorted as text.
    """
    group = re.search(r"\(\?P<slice>([^][()]*)\)", rule.pattern)
    words = re.split(r"(?<!\\)\|", group[1]) if group else []
    try:
        fits = [re.fullmatch(word, name, rule.compiled.flags) for word in words]
    except re.error:  # It refers to another group.
        return 0
    return next((index for index, fit in enumerate(fits) if fit), 0)


def problems(found: Mapping[SeriesKey, Sequence[LeafMatch]]) -> Iterator[str]:
    """What is wrong with series: two leaves for one sibling of a layer, or a sibling missing.

    Args:
      found: Sorted matches of each series.
    """
    siblings: dict[tuple[str, Rule], set[tuple[int, str]]] = {}
    for key, matches in found.items():
        siblings.setdefault(key[:2], set()).update(match.sibling for match in matches)
    for key, matches in found.items():
        taken = f"shape {key.layout.shape}, taken by `{key.rule}`"
        for number, of_layer in itertools.groupby(matches, key=lambda match: match.number):
            layer = list(of_layer)
            for one, other in itertools.pairwise(layer):
                if one.sibling == other.sibling:
                    yield _one_too_many(one, other, taken)
            missing = siblings[key[:2]] - {match.sibling for match in layer}
            if missing:
                names = ", ".join(repr(name) for _, name in sorted(missing))
                yield (
                    f"{layer[0].path!r}, {taken}: its layer {number} has no {names} of its shape "
                    f"and dtype ({key.dtype}) to couple it with: write a rule for each shape, "
                    "such as one with `(?P<slice>key|value)` and one for queries, or one without "
                    "`slice`."
                )


def _one_too_many(one: LeafMatch, other: LeafMatch, taken: str) -> str:
    """What is wrong with two leaves that are the same sibling of the same layer."""
    if one.path == other.path:
        return (
            f"{one.path!r}, {taken}: two leaves of the tree have this path, so that no pattern can "
            "tell them apart: rename a key that holds `/`."
        )
    return (
        f"{one.path!r} and {other.path!r}, {taken}: both are layer {one.number} of one series: "
        "let `(?P<layer>\\d+)` match the number that tells them apart."
    )
