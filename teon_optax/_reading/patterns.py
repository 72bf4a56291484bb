"""Rules before they are written: one for all leaves that differ in names or numbers alone."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from teon_optax._reading.roles import FALLBACK, Role
from teon_optax._reading.tree import HOLE, Leaf
from teon_optax._rule import Rule


class _Member(NamedTuple):
    """A leaf above 1-D, its role, and the segments of its path whose numbers may count layers."""

    leaf: Leaf
    role: Role
    columns: tuple[int | None, ...]


class _Segment(NamedTuple):
    """A pattern between two slashes: one of the names, with one of the numbers in its hole."""

    names: tuple[str, ...]
    numbers: tuple[str, ...] | None  # None: it has none; (): any
    is_optional: bool  # Haiku: block, block_1, block_2

    def regex(self, is_layer: bool) -> str:
        """The pattern as a regular expression, whose number is the layer's if `is_layer`."""
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
    role: Role


class Draft(NamedTuple):
    """A rule before it is written; `choices` where people must choose."""

    segments: tuple[_Segment, ...]
    choice: Choice
    choices: tuple[Choice, ...]
    leaves: tuple[Leaf, ...]


def _one_of(words: Sequence[str]) -> str:
    words = [*dict.fromkeys(words)]
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def drafts_of(
    found: Iterable[tuple[Leaf, Role | None, tuple[int | None, ...]]],
    first: Sequence[Rule],
    stacks: Mapping[str, int],
) -> list[Draft]:
    """Makes drafts of what `first` does not take, one for leaves that differ in numbers alone.

    Drafts that one rule may do for are joined.
    """
    all_alike: dict[tuple[Any, ...], list[_Member]] = {}
    vectors: dict[tuple[str, ...], list[tuple[str | None, ...]]] = {}
    for leaf, role, columns in found:
        if role is None:
            vectors.setdefault(leaf.names, []).append(leaf.numbers)
        if role is not None and not any(rule.search(leaf.path) for rule in first):
            key = leaf.names, tuple(number is None for number in leaf.numbers)
            all_alike.setdefault(key, []).append(_Member(leaf, role, columns))
    return _joined(
        [
            draft
            for (names, _), alike in all_alike.items()
            for draft in _drafts(alike, stacks, vectors.get(names, []))
        ]
    )


def _drafts(
    alike: list[_Member], stacks: Mapping[str, int], vectors: Sequence[tuple[str | None, ...]]
) -> Iterator[Draft]:
    """One draft for leaves that are alike, or where their roles differ, one for each of them.

    Each has its own, too, where only its number tells a leaf from a vector, as in a list of arrays.
    """
    first = alike[0].leaf.numbers
    fixed = [c for c in range(len(first)) if all(m.leaf.numbers[c] == first[c] for m in alike)]
    is_mixed = any(all(numbers[c] == first[c] for c in fixed) for numbers in vectors)
    if len({(member.role, member.columns) for member in alike}) == 1 and not is_mixed:
        yield _draft(alike, alike, stacks)
        return
    found: dict[str, Role] = {}
    for member in alike:
        if found.setdefault(member.leaf.path, member.role) != member.role:
            raise ValueError(
                f'"{member.leaf.path}", shape {member.leaf.array_shape}, is the path of another '
                "leaf too, and each needs a rule of its own: rename one."
            )
        yield _draft(alike, [member], stacks)


def _draft(alike: list[_Member], members: list[_Member], stacks: Mapping[str, int]) -> Draft:
    """The rule for some of the leaves that are alike, with the choices where it is not certain.

    A segment has any number where the numbers of these leaves vary or count layers, unless the rule
    is for some of them only: it then keeps theirs.
    """
    (leaf, role, columns), *_ = members
    is_whole = members is alike
    varying = {c for c in range(len(leaf.numbers)) if len({m.leaf.numbers[c] for m in alike}) > 1}
    generic = {*varying, *columns} if is_whole else {*columns} - varying
    segments = tuple(
        _Segment(
            (name,),
            None if number is None else () if c in generic else (number,),
            any(member.leaf.numbers[c] == "" for member in alike),
        )
        for c, (name, number) in enumerate(zip(leaf.names, leaf.numbers, strict=True))
    )

    def choice(role: Role, layer: int | None) -> Choice:
        counts = layer is not None or role.layer_axis is not None
        stack = stacks.get(role.name, 0)
        if stack:  # one rule for what differs in its role alone
            role = role._replace(name="hidden")
        elif role.name not in ("refused", "unknown"):
            role = FALLBACK
        return Choice(layer if stack else None, stack if counts else min(stack, 1), role)

    layer = columns[0] if columns else None
    choices = tuple(choice(each, layer) for each in role.choices)
    if role.name == "qkv" and stacks["qkv"] > 1 and len(columns) > 1:
        choices = (*(choice(role, column) for column in columns), Choice(None, 0, FALLBACK))
        role = Role("refused", question="which number counts the layers?")
    leaves = tuple(member.leaf for member in members)
    return Draft(segments, choice(role, layer), choices, leaves)


def _joined(drafts: list[Draft]) -> list[Draft]:
    """Fewer drafts: those that differ in the name or the number of one segment become one."""
    joined: list[Draft] = []
    for draft in drafts:
        for index, other in enumerate(joined):
            if _agree(other, draft) and (segments := _union(other.segments, draft.segments)):
                leaves = other.leaves + draft.leaves
                joined[index] = draft._replace(segments=segments, leaves=leaves)
                break
        else:
            joined.append(draft)
    return joined if len(joined) == len(drafts) else _joined(joined)


def _agree(one: Draft, other: Draft) -> bool:
    """Whether one rule may do for both; where only shapes tell leaves apart, for equal shapes."""
    (a, *_), (b, *_) = one.leaves, other.leaves
    return one[1:3] == other[1:3] and (a.box != "penzai" or a.shape == b.shape)


def _union(ours: tuple[_Segment, ...], theirs: tuple[_Segment, ...]) -> tuple[_Segment, ...] | None:
    """The segments of one rule for both, if they differ in one name or number alone."""
    pairs = zip(ours, theirs, strict=False)
    differ = [place for place, (one, other) in enumerate(pairs) if one != other]
    if len(ours) != len(theirs) or len(differ) != 1:
        return None
    a, b = ours[differ[0]], theirs[differ[0]]
    ends = {name.partition(HOLE)[2] for name in a.names + b.names}
    if a._replace(names=()) == b._replace(names=()) and len(ends) == 1:
        both = a._replace(names=a.names + b.names)
    elif a._replace(numbers=()) == b._replace(numbers=()) and a.numbers and b.numbers:
        both = a._replace(numbers=a.numbers + b.numbers)
    else:
        return None
    return (*ours[: differ[0]], both, *ours[differ[0] + 1 :])


def rule_of(draft: Draft, choice: Choice) -> Rule:
    """Writes the rule of a draft, with one of its choices."""
    parts = [segment.regex(place == choice.layer) for place, segment in enumerate(draft.segments)]
    role = choice.role if choice.stack else FALLBACK
    pattern = "^" + "/".join(parts) + "$"
    return Rule(pattern, choice.stack, 1, role.dims, role.layer_axis, role.split)
