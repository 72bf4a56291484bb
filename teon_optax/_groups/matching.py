"""Where a rule puts a leaf: which layer's it is, and which sibling of which type."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from teon_optax._rules.rule import Rule


class Place(NamedTuple):
    """Of one leaf; leaves of one layer come in the order of `sibling`."""

    number: int
    sibling: tuple[int, str]  # position among the alternatives of `slice`, and the name
    leaf: int
    path: str


def place_of(path: str, leaf: int, rule: Rule) -> tuple[str, Place]:
    """The path without layer number (nor a `_` right before it) and sibling, and the rest.

    Raises:
      ValueError: If the layer is no number.
    """
    match = rule.search(path)
    assert match is not None
    number, name = (match.groupdict().get(group) for group in ("layer", "slice"))
    if not (number is None or number.isdecimal()):
        raise ValueError(f"its layer is {number!r}, not a number: write `(?P<layer>\\d+)`")
    named = [group for group, text in (("layer", number), ("slice", name)) if text is not None]
    type_path = path
    for group in sorted(named, key=match.span, reverse=True):
        start, end = match.span(group)
        above = path[:start].removesuffix("_") if group == "layer" else path[:start]
        type_path = above + type_path[end:]
    sibling = (0, "") if name is None else (_position(name, rule), name)
    return type_path, Place(int(number or 0), sibling, leaf, path)


def _position(name: str, rule: Rule) -> int:
    """Which alternative of `slice` it is; where these are no words, the first, for all names."""
    group = re.search(r"\(\?P<slice>([^][()]*)\)", rule.pattern)
    words = re.split(r"(?<!\\)\|", group[1]) if group else []
    fits = (re.fullmatch(word, name, rule.compiled().flags) for word in words)
    return next((index for index, fit in enumerate(fits) if fit), 0)


def problems(found: Mapping[tuple, Sequence[Place]]) -> Iterator[str]:
    """What is wrong with types: places in order, by (type's path, rule, layout, dtype)."""
    siblings: dict[tuple, set] = {}
    for key, places in found.items():
        siblings.setdefault(key[:2], set()).update(place.sibling for place in places)
    for (type_path, rule, layout, dtype), places in found.items():
        shape = f"shape {layout.shape}, taken by `{rule}`"
        for number, layer in itertools.groupby(places, key=lambda place: place.number):
            first, *others = layer
            missing = siblings[type_path, rule] - {place.sibling for place in (first, *others)}
            for a, b in itertools.pairwise([first, *others]):
                if a.sibling == b.sibling:
                    yield (
                        f"{a.path!r} and {b.path!r}, {shape}: both are layer {number} of one type: "
                        "let `(?P<layer>\\d+)` match the number that tells them apart."
                    )
            if missing:
                names = ", ".join(repr(name) for _, name in sorted(missing))
                yield (
                    f"{first.path!r}, {shape}: its layer has no {names} of its shape and dtype "
                    f"({dtype}) to couple it with: write a rule for each shape, such as one with "
                    "`(?P<slice>key|value)` and one for queries, or one without `slice`."
                )
