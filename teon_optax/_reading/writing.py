"""Rules before they are written: one for all leaves that differ in names or numbers alone."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from teon_optax._reading.leaves import HOLE, Leaf
from teon_optax._reading.readings import Reading
from teon_optax._rule import Rule

FALLBACK = Reading("table")


class Member(NamedTuple):
    """A leaf above 1-D, and what is known of it.

    Attributes:
      leaf: The leaf.
      left: What it may be, the likely first.
      columns: The segments of its path whose number may count layers.
      reasons: Why nothing else is left.
    """

    leaf: Leaf
    left: tuple[Reading, ...]
    columns: tuple[int | None, ...]
    reasons: tuple[str, ...]


class _Segment(NamedTuple):
    """A pattern between two slashes: one of the names, with one of the numbers in its hole."""

    names: tuple[str, ...]
    numbers: tuple[str, ...] | None  # None: it has none; (): any
    is_optional: bool  # Haiku: block, block_1, block_2

    def regex(self, is_layer: bool) -> str:
        """Writes the pattern as a regular expression, whose number is the layer's if `is_layer`."""
        names = [re.sub(r"([][\\.^$*+?{}|()])", r"\\\1", name) for name in self.names]
        if self.numbers is None:
            return _one_of(names)
        numbers = [number for number in self.numbers if number] or [r"\d+"]
        number = f"(?P<layer>{'|'.join(numbers)})" if is_layer else _one_of(numbers)
        parts = [name.partition(HOLE)[::2] for name in names]
        before, after = _one_of([part[0] for part in parts]), parts[0][1]
        if self.is_optional and (not self.numbers or "" in self.numbers):
            name = _one_of([part[0].removesuffix("_") for part in parts])
            return name if self.numbers == ("",) else f"{name}(?:_{number})?"
        return before + number + after


class Choice(NamedTuple):
    """A rule without its names: the segment whose number counts layers, K, and the axes."""

    layer: int | None
    stack: int
    reading: Reading


class Draft(NamedTuple):
    """A rule before it is written; more than one choice where people must choose.

    Attributes:
      segments: Of the pattern.
      choices: What the rule may be, the likely first.
      question: Whether leaves cannot be read ("ask"), or go to the fallback with a warning
        ("warn"); nothing where it is known what they are.
      members: The leaves that it takes.
    """

    segments: tuple[_Segment, ...]
    choices: tuple[Choice, ...]
    question: str
    members: tuple[Member, ...]

    @property
    def choice(self) -> Choice:
        """Gives the choice that is made, the fallback where none can be."""
        return Choice(None, 0, FALLBACK) if self.question else self.choices[0]

    @property
    def leaves(self) -> list[Leaf]:
        """Lists the leaves that it takes."""
        return [member.leaf for member in self.members]


def _one_of(words: Sequence[str]) -> str:
    words = [*dict.fromkeys(words)]
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def drafts_of(
    members: Iterable[Member],
    vectors: Iterable[Leaf],
    stacks: Mapping[str, int],
) -> list[Draft]:
    """Makes drafts, one for leaves that differ in numbers alone.

    Drafts that one rule may do for are joined.
    """
    all_alike: dict[tuple[Any, ...], list[Member]] = {}
    beside: dict[tuple[str, ...], list[tuple[str | None, ...]]] = {}
    for leaf in vectors:
        beside.setdefault(leaf.names, []).append(leaf.numbers)
    for member in members:
        numbers = tuple(number is None for number in member.leaf.numbers)
        all_alike.setdefault((member.leaf.names, numbers), []).append(member)
    return _joined(
        [
            draft
            for (names, _), alike in all_alike.items()
            for draft in _drafts(alike, stacks, beside.get(names, []))
        ]
    )


def _drafts(
    alike: list[Member], stacks: Mapping[str, int], vectors: Sequence[tuple[str | None, ...]]
) -> Iterator[Draft]:
    """Yields one draft for leaves that are alike, or where they differ, one for each of them.

    Each has its own, too, where only its number tells a leaf from a vector, as in a list of arrays.
    """
    first = alike[0].leaf.numbers
    fixed = [c for c in range(len(first)) if all(m.leaf.numbers[c] == first[c] for m in alike)]
    is_mixed = any(all(numbers[c] == first[c] for c in fixed) for numbers in vectors)
    varying = {c for c in range(len(first)) if c not in fixed}
    has_first = {c for c in range(len(first)) if any(m.leaf.numbers[c] == "" for m in alike)}
    drafts = [_draft([member], varying, has_first, stacks, False) for member in alike]
    kinds = {(draft.choices, draft.question, draft.members[0].columns) for draft in drafts}
    if len(kinds) == 1 and not is_mixed:
        yield _draft(alike, varying, has_first, stacks, True)
        return
    found: dict[str, Draft] = {}
    for draft in drafts:
        leaf = draft.members[0].leaf
        if found.setdefault(leaf.path, draft).choices != draft.choices:
            raise ValueError(
                f'"{leaf.path}", shape {leaf.array_shape}, is the path of another leaf too, and '
                "each needs a rule of its own: rename one."
            )
        yield draft


def _draft(
    members: list[Member],
    varying: set[int],
    has_first: set[int],
    stacks: Mapping[str, int],
    is_whole: bool,
) -> Draft:
    """Makes the rule for some of the leaves that are alike, with the choices where there are more.

    A segment has any number where the numbers of these leaves vary or count layers, unless the rule
    is for some of them only: it then keeps theirs.
    """
    leaf, left, columns, _ = members[0]
    generic = {*varying, *columns} if is_whole else {*columns} - varying
    segments = tuple(
        _Segment(
            (name,), None if number is None else () if c in generic else (number,), c in has_first
        )
        for c, (name, number) in enumerate(zip(leaf.names, leaf.numbers, strict=True))
    )
    choices = [_choice(each, columns[0] if columns else None, stacks) for each in left]
    is_projection = any(each.kind == "qkv" for each in left)
    if is_projection and len(columns) > 1 and any(choice.stack > 1 for choice in choices):
        choices = [_choice(each, column, stacks) for each in left for column in columns]
    choices = tuple(dict.fromkeys(choices))
    question = ""
    is_unproven = leaf.layer_axis is None and choices[0].reading.layer_axis is not None
    if len(choices) > 1 or is_unproven:
        question = "ask" if _is_asked(leaf, left) else "warn"
    return Draft(segments, choices, question, tuple(members))


def _is_asked(leaf: Leaf, left: Sequence[Reading]) -> bool:
    """Tells whether readings differ in more than in whether a leaf is orthogonalized.

    What is no projection, and has more axes than a matrix, is warned of instead.
    """
    if leaf.is_nameless or not all(reading.is_matrix for reading in left):
        return leaf.is_nameless
    is_output = {reading.kind for reading in left} == {"out"} and len(leaf.shape) > 2
    return leaf.hides_axes or not is_output


def _choice(reading: Reading, layer: int | None, stacks: Mapping[str, int]) -> Choice:
    """Makes the choice of a reading, equal for readings that do the same."""
    counts = layer is not None or reading.layer_axis is not None
    stack = stacks.get(reading.kind, 0)
    stack = stack if counts else min(stack, 1)
    if not stack:
        return Choice(None, 0, FALLBACK)
    return Choice(layer, stack, reading._replace(kind="hidden"))


def _joined(drafts: list[Draft]) -> list[Draft]:
    """Joins drafts that differ in the name or the number of one segment, until none do."""
    count = 0
    while count != len(drafts):
        count = len(drafts)
        for place in reversed(range(max((len(draft.segments) for draft in drafts), default=0))):
            for field in ("names", "numbers"):
                found: dict[Any, Draft] = {}
                for draft in drafts:
                    key = _but_for(draft, place, field)
                    found[key] = _both(found[key], draft, place, field) if key in found else draft
                drafts = [*found.values()]
    return drafts


def _but_for(draft: Draft, place: int, field: str) -> Any:
    """Gives what drafts must agree in so that one rule may do for both.

    That is all but the names or the numbers of one segment; where only shapes tell leaves apart,
    the shapes too.
    """
    leaf = draft.members[0].leaf
    if place >= len(draft.segments):
        return id(draft)
    segment, ends = draft.segments[place], ""
    if field == "names":
        (ends,) = {name.partition(HOLE)[2] for name in segment.names}
    elif not segment.numbers:
        return id(draft)
    rest = (
        *draft.segments[:place],
        segment._replace(**{field: (ends,)}),
        *draft.segments[place + 1 :],
    )
    shape = leaf.array_shape if leaf.box == "penzai" else ()
    return rest, draft.choices, draft.question, shape


def _both(one: Draft, other: Draft, place: int, field: str) -> Draft:
    """Joins two drafts that differ in the names or the numbers of one segment alone."""
    a, b = one.segments[place], other.segments[place]
    both = a._replace(**{field: (*getattr(a, field), *getattr(b, field))})
    segments = *one.segments[:place], both, *one.segments[place + 1 :]
    return one._replace(segments=segments, members=one.members + other.members)


def rule_of(draft: Draft, choice: Choice) -> Rule:
    """Writes the rule of a draft, with one of its choices."""
    leaf, reading = draft.members[0].leaf, choice.reading
    parts = [segment.regex(place == choice.layer) for place, segment in enumerate(draft.segments)]
    before, *between, after = (re.escape(text) if text != "/" else text for text in leaf.separators)
    body = "".join(part + separator for part, separator in zip(parts, [*between, ""], strict=True))
    pattern = f"^{before}{body}{after}$"
    if not choice.stack:
        return Rule(pattern, 0)
    axis = reading.layer_axis
    return Rule(pattern, choice.stack, 1, reading.dims, axis, reading.split, view=reading.view)
