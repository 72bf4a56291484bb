"""Rules before they are written: one for all leaves that differ in names or numbers alone."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from teon_optax._reading.leaves import HOLE, Leaf, grouped
from teon_optax._reading.reading import Case
from teon_optax._reading.readings import Reading
from teon_optax._rule import Rule

FALLBACK = Reading("table")
_ANY = r"\d+"


class _Segment(NamedTuple):
    """A pattern between two slashes: one of the names, with one of the numbers in its hole.

    A number may be any, or nothing, as of Haiku's first block; no numbers are None.
    """

    names: tuple[str, ...]
    numbers: tuple[str, ...] | None

    def regex(self, is_layer: bool) -> str:
        """Writes the pattern as a regular expression, whose number is the layer's if `is_layer`."""
        names = [re.sub(r"([][\\.^$*+?{}|()])", r"\\\1", name) for name in self.names]
        if self.numbers is None:
            return _one_of(names)
        numbers = [number for number in self.numbers if number]
        number = f"(?P<layer>{'|'.join(numbers)})" if is_layer else _one_of(numbers)
        before = [name.partition(HOLE)[0] for name in names]
        if "" in self.numbers:
            name = _one_of([each.removesuffix("_") for each in before])
            return f"{name}(?:_{number})?" if numbers else name
        return _one_of(before) + number + names[0].partition(HOLE)[2]


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
      cases: The leaves that it takes, and what is known of them.
    """

    segments: tuple[_Segment, ...]
    choices: tuple[Choice, ...]
    question: str
    cases: tuple[Case, ...]

    @property
    def choice(self) -> Choice:
        """Gives the choice that is made, the fallback where none can be."""
        return Choice(None, 0, FALLBACK) if self.question else self.choices[0]

    @property
    def leaves(self) -> list[Leaf]:
        """Lists the leaves that it takes."""
        return [case.leaf for case in self.cases]


def _one_of(words: Sequence[str]) -> str:
    """Writes alternatives, in parentheses if there are several."""
    words = [*dict.fromkeys(words)]
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def drafts_of(
    cases: Sequence[Case], vectors: Sequence[Leaf], stacks: Mapping[str, int]
) -> list[Draft]:
    """Makes drafts, each for all leaves that one rule may do for; `vectors` are of no rule."""
    beside = grouped(vectors, lambda leaf: [leaf.names])
    kinds = grouped(
        cases, lambda case: [(case.leaf.names, *(n is None for n in case.leaf.numbers))]
    )
    return _joined(
        [
            draft
            for (names, *_), alike in kinds.items()
            for draft in _drafts(alike, stacks, beside.get(names, []))
        ]
    )


def _drafts(
    alike: Sequence[Case], stacks: Mapping[str, int], vectors: Sequence[Leaf]
) -> Iterator[Draft]:
    """Yields one draft for leaves that are alike, or where they differ, one for each of them.

    Each has its own, too, where only its number tells a leaf from a vector, as in a list of arrays.
    """
    columns = [*zip(*(case.leaf.numbers for case in alike), strict=True)]
    numbers = {c: (("", _ANY) if "" in n else (_ANY,)) for c, n in enumerate(columns)}
    varying = {place for place, column in enumerate(columns) if len({*column}) > 1}
    drafts = [_draft([case], {*case.columns} - varying, numbers, stacks) for case in alike]
    is_mixed = any(
        all(c in varying or leaf.numbers[c] == columns[c][0] for c in range(len(columns)))
        for leaf in vectors
    )
    if len({(*draft[1:3], draft.cases[0].columns) for draft in drafts}) == 1 and not is_mixed:
        yield _draft(alike, {*alike[0].columns} | varying, numbers, stacks)
        return
    found: dict[str, Draft] = {}
    for draft in drafts:
        leaf = draft.cases[0].leaf
        if found.setdefault(leaf.path, draft).choices != draft.choices:
            raise ValueError(
                f'"{leaf.path}", shape {leaf.array_shape}, is the path of another leaf too, and '
                "each needs a rule of its own: rename one."
            )
        yield draft


def _draft(
    cases: Sequence[Case],
    generic: set[int | None],
    numbers: Mapping[int, tuple[str, ...]],
    stacks: Mapping[str, int],
) -> Draft:
    """Makes the rule for leaves that are alike, with the choices where there are more than one.

    The `generic` segments have any of the `numbers` there, the others keep theirs.
    """
    leaf, left, columns = cases[0].leaf, cases[0].left, cases[0].columns
    segments = tuple(
        _Segment((name,), None if number is None else numbers[c] if c in generic else (number,))
        for c, (name, number) in enumerate(zip(leaf.names, leaf.numbers, strict=True))
    )
    is_stacked = stacks.get("qkv", 0) > 1 and any(each.kind == "qkv" for each in left)
    layers = columns if is_stacked and columns else (columns[0] if columns else None,)
    choices = tuple(dict.fromkeys(_choice(each, at, stacks) for each in left for at in layers))
    is_unproven = leaf.layer_axis is None and choices[0].reading.layer_axis is not None
    is_open = len(choices) > 1 or is_unproven
    question = ("ask" if _is_asked(leaf, left) else "warn") if is_open else ""
    return Draft(segments, choices, question, tuple(cases))


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
    return Choice(layer, stack, reading._replace(kind="")) if stack else Choice(None, 0, FALLBACK)


def _joined(drafts: list[Draft]) -> list[Draft]:
    """Joins drafts that differ in the names or the numbers of one segment, until none do."""
    count = 0
    while count != len(drafts):
        count = len(drafts)
        for place in reversed(range(max((len(draft.segments) for draft in drafts), default=0))):
            for field in ("names", "numbers"):
                found: dict[Any, list[Draft]] = {}
                for draft in drafts:
                    found.setdefault(_but_for(draft, place, field), []).append(draft)
                drafts = [_in_one(some, place, field) for some in found.values()]
    return drafts


def _but_for(draft: Draft, place: int, field: str) -> Any:
    """Gives what drafts must agree in so that one rule may do for both.

    That is all but the names or the numbers of one segment; where only shapes tell leaves apart,
    the shapes too.
    """
    leaf = draft.cases[0].leaf
    if place >= len(draft.segments):
        return id(draft)
    segment, ends = draft.segments[place], ""
    if field == "names":
        (ends,) = {name.partition(HOLE)[2] for name in segment.names}
    elif segment.numbers is None or _ANY in segment.numbers:
        return id(draft)
    rest = (
        *draft.segments[:place],
        segment._replace(**{field: (ends,)}),
        *draft.segments[place + 1 :],
    )
    shape = leaf.array_shape if leaf.box == "penzai" else ()
    return rest, draft.choices, draft.question, shape


def _in_one(drafts: Sequence[Draft], place: int, field: str) -> Draft:
    """Joins drafts that differ in the names or the numbers of one segment alone."""
    if len(drafts) == 1:
        return drafts[0]
    values = tuple(each for draft in drafts for each in getattr(draft.segments[place], field))
    segments = [*drafts[0].segments]
    segments[place] = segments[place]._replace(**{field: values})
    cases = tuple(case for draft in drafts for case in draft.cases)
    return drafts[0]._replace(segments=tuple(segments), cases=cases)


def rule_of(draft: Draft, choice: Choice) -> Rule:
    """Writes the rule of a draft, with one of its choices."""
    leaf, reading = draft.cases[0].leaf, choice.reading
    parts = [segment.regex(place == choice.layer) for place, segment in enumerate(draft.segments)]
    before, *between, after = (re.escape(text) if text != "/" else text for text in leaf.separators)
    body = "".join(part + separator for part, separator in zip(parts, [*between, ""], strict=True))
    pattern = f"^{before}{body}{after}$"
    if not choice.stack:
        return Rule(pattern, 0)
    # Haiku's and Keras' first module has no number, which would count it.
    is_first = choice.layer is not None and not any(draft.segments[choice.layer].numbers or ())
    stack, axis = 1 if is_first else choice.stack, reading.layer_axis
    return Rule(pattern, stack, 1, reading.dims, axis, reading.split, view=reading.view)
