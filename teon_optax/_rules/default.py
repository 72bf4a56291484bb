"""What `rules=None` means: concrete rules for one tree, as few as it has kinds of leaves."""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from teon_optax._rules.names import LAYERS, anywhere
from teon_optax._rules.roles import FALLBACK, UNNAMED, Reading, readings
from teon_optax._rules.rule import Rule, Rules, fan_axes
from teon_optax._rules.tree import Leaf, without_numbers


def default_rules(params: Any, first: Sequence[Rule] = ()) -> Rules:
    r"""The rules that `rules=None` means for a tree, read off its names, shapes and siblings.

    Q, K and V projections get stack 2 and mode 1, other matrices stack 1. Embeddings, heads, norms,
    biases, routers, LoRA factors and convolutions go to the fallback: by a rule with stack 0 where
    they have two axes or more, by none below. A fused projection is taken for Q, K and V one after
    another where its sizes allow it. Print the rules, and edit them.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype` (`jax.eval_shape`).
      first: Rules to put before the others. What they take is not read, so they answer what this
        function cannot know.

    Returns:
      A tuple: `first`, then rules whose patterns are whole paths but for numbers, so that one at
      most fits a leaf. `print` shows it as code.

    Raises:
      ValueError: If a Q, K or V projection, or an orientation, can be read in two ways. The message
        names every such leaf and gives the rules to choose from.

    Warns:
      UserWarning: If other leaves above 2-D go to the fallback because no name tells what they are.

    Examples:
      >>> import jax.numpy as jnp
      >>> from teon_optax import default_rules
      >>> dense = {"kernel": jnp.zeros((64, 64))}
      >>> block = {"attn": {"query": dense, "key": dense, "out": dense}, "up": dense}
      >>> params = {"embed": {"embedding": jnp.zeros((256, 64))}, "block_0": block}
      >>> print(default_rules(params))
      (  # from teon_optax import Rule
          Rule(r"^block_(?P<layer>\d+)/attn/(key|query)/kernel$", stack=2),
          Rule(r"^block_(?P<layer>\d+)/attn/out/kernel$"),
          Rule(r"^block_(?P<layer>\d+)/up/kernel$"),
          Rule(r"^embed/embedding$", stack=0),
      )
    """
    read = readings(params)
    drafts = _joined([draft for kind in _kinds(read, first) for draft in _drafts(kind)])
    _refuse([draft for draft in drafts if draft.choices])
    _warn([draft for draft in drafts if draft.reading == UNNAMED], [leaf for leaf, _ in read])
    drafts.sort(key=lambda draft: -draft.reading.stack)
    return Rules((*first, *(_rule(draft, draft.layer, draft.reading) for draft in drafts)))


class _Member(NamedTuple):
    """A leaf, its path in names and numbers: `a/layer_3` is ("a", "layer_"), (None, "3")."""

    leaf: Leaf
    reading: Reading
    names: tuple[str, ...]
    numbers: tuple[str | None, ...]


class _Segment(NamedTuple):
    """A pattern between two slashes: one of the names, then one of the numbers."""

    names: tuple[str, ...]
    numbers: tuple[str, ...] | None  # None: it has none; (): any
    is_optional: bool  # Haiku: block, block_1, block_2

    def regex(self, is_layer: bool) -> str:
        names = [re.sub(r"([][\\.^$*+?{}|()])", r"\\\1", name) for name in self.names]
        if self.numbers is None:
            return _one_of(names)
        numbers = [number for number in self.numbers if number] or [r"\d+"]
        number = f"(?P<layer>{'|'.join(numbers)})" if is_layer else _one_of(numbers)
        if not self.is_optional or self.numbers and "" not in self.numbers:
            return _one_of(names) + number
        name = _one_of([name.removesuffix("_") for name in names])
        return name if self.numbers == ("",) else f"{name}(?:_{number})?"


class _Draft(NamedTuple):
    """A rule before it is written: `layer` is the segment whose number counts layers."""

    segments: tuple[_Segment, ...]
    layer: int | None
    reading: Reading
    choices: tuple[tuple[int | None, Reading], ...]  # where it is in doubt: (layer, reading)
    leaves: tuple[Leaf, ...]


def _one_of(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def _kinds(
    read: list[tuple[Leaf, Reading | None]], first: Sequence[Rule]
) -> Iterable[list[_Member]]:
    """Leaves whose paths agree but for their numbers."""
    kinds: dict[tuple, list[_Member]] = {}
    numbered = without_numbers([leaf for leaf, _ in read])
    for (leaf, reading), (names, numbers) in zip(read, numbered, strict=True):
        if reading is not None and not any(rule.search(leaf.path) for rule in first):
            kind = names, tuple(number is None for number in numbers)
            kinds.setdefault(kind, []).append(_Member(leaf, reading, names, numbers))
    return kinds.values()


def _drafts(kind: list[_Member]) -> Iterator[_Draft]:
    """One for all; one for each member, its numbers kept, where they are read differently."""
    if len({member.reading for member in kind}) == 1:
        yield _draft(kind, kind)
        return
    found: dict[str, Reading] = {}
    for member in kind:
        if found.setdefault(member.leaf.path, member.reading) != member.reading:
            raise ValueError(
                f'"{member.leaf.path}", shape {member.leaf.array_shape}, is the path of another '
                "leaf too, and each needs a rule of its own: rename one."
            )
        yield _draft(kind, [member])


def _draft(kind: list[_Member], members: list[_Member]) -> _Draft:
    names, numbers, reading = kind[0].names, members[0].numbers, members[0].reading
    numbered = [c for c, number in enumerate(numbers) if number is not None]
    called = [c for c in numbered if anywhere(LAYERS, [names[c] or names[max(c - 1, 0)]])]
    varying = [c for c in numbered if len({member.numbers[c] for member in kind}) > 1]
    columns = _layer_columns(reading, numbered, called, varying)
    generic = {*varying, *called, *(columns if reading.stack > 1 or reading.choices else ())}
    layer = columns[0] if columns[0] in generic and reading not in (FALLBACK, UNNAMED) else None
    kept = set() if members is kind else set(varying)
    segments = []
    for c, (name, number) in enumerate(zip(names, numbers, strict=True)):
        some = None if number is None else () if c in generic - kept else (number,)
        is_optional = any(member.numbers[c] == "" for member in kind)
        segments.append(_Segment((name,), some, is_optional))
    choices = tuple((layer, choice) for choice in reading.choices)
    if reading.stack > 1 and len(columns) > 1:
        choices = (*((column, reading) for column in columns), (layer, FALLBACK))
        reading = Reading(0, doubt="which number counts the layers?")
    leaves = tuple(member.leaf for member in members)
    return _Draft(tuple(segments), layer, reading, choices, leaves)


def _layer_columns(
    reading: Reading, numbered: list[int], called: list[int], varying: list[int]
) -> list[int | None]:
    """Segments whose number may count layers, the likely one first; one where that is certain."""
    if reading.layer_axis is not None:  # scanned; a number too where the scan is over a pattern
        return [None, *called]
    if called:
        return [*dict.fromkeys([called[0], *(c for c in called if c in varying)])]
    if numbered and numbered[0] not in varying:
        return [numbered[0], *varying]
    return [*numbered[:1]] or [None]


def _joined(drafts: list[_Draft]) -> list[_Draft]:
    """Fewer drafts: those that differ in the name or the number of one segment become one."""
    joined: list[_Draft] = []
    for draft in drafts:
        for index, other in enumerate(joined):
            if _agree(other, draft) and (segments := _union(other.segments, draft.segments)):
                leaves = other.leaves + draft.leaves
                joined[index] = draft._replace(segments=segments, leaves=leaves)
                break
        else:
            joined.append(draft)
    return joined if len(joined) == len(drafts) else _joined(joined)


def _agree(one: _Draft, other: _Draft) -> bool:
    """Whether one rule may do for both; where only shapes tell leaves apart, for equal shapes."""
    (a, *_), (b, *_) = one.leaves, other.leaves
    return one[1:4] == other[1:4] and (a.box != "penzai" or a.shape == b.shape)


def _union(ours: tuple[_Segment, ...], theirs: tuple[_Segment, ...]) -> tuple[_Segment, ...] | None:
    pairs = zip(ours, theirs, strict=False)
    differ = [place for place, (one, other) in enumerate(pairs) if one != other]
    if len(ours) != len(theirs) or len(differ) != 1:
        return None
    a, b = ours[differ[0]], theirs[differ[0]]
    if a._replace(names=()) == b._replace(names=()):
        both = a._replace(names=a.names + b.names)
    elif a._replace(numbers=()) == b._replace(numbers=()) and a.numbers and b.numbers:
        both = a._replace(numbers=a.numbers + b.numbers)
    else:
        return None
    return (*ours[: differ[0]], both, *ours[differ[0] + 1 :])


def _rule(draft: _Draft, layer: int | None, reading: Reading) -> Rule:
    parts = [segment.regex(place == layer) for place, segment in enumerate(draft.segments)]
    pattern = "^" + "/".join(parts) + "$"
    counts = "(?P<layer>" in pattern or reading.layer_axis is not None
    stack = reading.stack if counts else min(reading.stack, 1)
    return Rule(pattern, stack, 1, reading.dims, reading.layer_axis, reading.split)


def _listing(draft: _Draft) -> str:
    paths = ", ".join(f'"{leaf.path}"' for leaf in draft.leaves)
    shapes = dict.fromkeys(str(leaf.array_shape) for leaf in draft.leaves)
    return f"{paths}, shape {' or '.join(shapes)}"


def _axes(rule: Rule, rank: int) -> str:
    """What a rule takes each axis for, as in (layer, in, out)."""
    if rule.stack == 0:
        return "fallback"
    rest = [axis for axis in range(rank) if axis != rule.layer_axis]
    fans = fan_axes(rule.dims) if rule.dims else (rest[:1], rest[1:])
    words: dict[int | None, str] = {rule.layer_axis: "layer"}
    words |= dict.fromkeys(fans[0], "in") | dict.fromkeys(fans[1], "out")
    return f"({', '.join(words.get(axis, 'batch') for axis in range(rank))})"


def _refuse(drafts: list[_Draft]) -> None:
    lines = [
        "`default_rules(params)` cannot tell how to read some leaves. Choose a rule for each, and "
        "pass `rules=default_rules(params, first=[...])`, or write all rules."
    ]
    for draft in drafts:
        lines.append(f"{_listing(draft)}: {draft.reading.doubt} Write one of")
        for choice in draft.choices:
            rule = _rule(draft, *choice)
            lines.append(f"    {rule}  # {_axes(rule, len(draft.leaves[0].array_shape))}")
    if drafts:
        raise ValueError("\n".join(lines))


def _warn(drafts: list[_Draft], leaves: list[Leaf]) -> None:
    def size(leaves: Iterable[Leaf]) -> int:
        return sum(math.prod(leaf.array_shape) for leaf in leaves)

    lines = [f"{_listing(draft)}: {size(draft.leaves) / size(leaves):.1%}" for draft in drafts]
    if lines:
        message = (
            "No name tells what these leaves above 2-D are, so the fallback optimizer gets them. "
            "Write a `Rule` for those to orthogonalize. Their share of the parameters:\n"
        )
        warnings.warn(message + "\n".join(lines), UserWarning, stacklevel=3)
