"""Decides which matrices are orthogonalized together: types and rules become a Plan."""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from teon_optax._paths import LeafType, cached, paths_of
from teon_optax._plan.layout import Layout, joint_shape, layout_of
from teon_optax._plan.report import as_dict, table
from teon_optax._polar.coefficients import MethodLike
from teon_optax._rule import Rule

# What the leaves of a series agree in: their path without the layer's number and the sibling's
# name, the rule that took them, how each holds its matrices, and their dtype.
_Kind = tuple[str, Rule, Layout, Any]


class Match(NamedTuple):
    """Says what a rule's pattern tells of one leaf; sorted, a layer's come sibling by sibling.

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


class Series(NamedTuple):
    """Matrices that differ only in their layer, or in what a rule couples.

    Attributes:
      rule: The rule that took the leaves.
      layout: How each leaf holds its matrices.
      dtype: Dtype of the leaves, in the tree that the plan is of.
      part: Which of the arrays of `to_matrices`.
      siblings: How many leaves hold a layer.
      leaves: Positions of the leaves in the tree, by layer number, then by sibling.
    """

    rule: Rule
    layout: Layout
    dtype: Any
    part: int
    siblings: int
    leaves: tuple[int, ...]

    @property
    def layers_per_leaf(self) -> int:
        """Counts the layers that one leaf holds."""
        return self.layout.size(self.layout.layer)

    @property
    def depth(self) -> int:
        """Counts the layers."""
        return len(self.leaves) // self.siblings * self.layers_per_leaf

    @property
    def coupled(self) -> int:
        """Counts the matrices of each layer that are coupled."""
        return self.siblings * self.layout.coupled

    @property
    def alone(self) -> int:
        """Counts the matrices of each layer beside those that are coupled."""
        return self.layout.alone

    @property
    def experts(self) -> int:
        """Counts the matrices that the batch axes hold."""
        return self.layout.size(self.layout.batch)

    @property
    def matrix(self) -> tuple[int, int]:
        """Gives (fan_in, fan_out) of one matrix."""
        rest = self.layout.size(self.layout.fan_out[1:])
        return self.layout.size(self.layout.fan_in), self.layout.arrays[self.part] * rest


class Group(NamedTuple):
    """Matrices of one series, from a run of its layers, that are orthogonalized jointly.

    Attributes:
      members: Path of each of the K matrices; `path:0` is a fused part, `path[3]` a layer of a
        scanned leaf, `path#2` a joined head.
      rule: The rule that took them.
      layers: Numbers of their layers.
      fan_in: Size of one layer's fan_in.
      fan_out: Size of one layer's fan_out.
      batch: How many such groups the batch axes hold (experts).
      dtype: Dtype of the matrices.
    """

    members: tuple[str, ...]
    rule: Rule
    layers: tuple[Any, ...]
    fan_in: int
    fan_out: int
    batch: int
    dtype: Any

    @property
    def joint(self) -> tuple[int, int]:
        """Gives the shape of the joint matrix; the Gram matrix has its smaller side."""
        return joint_shape(len(self.members), self.fan_in, self.fan_out, self.rule.mode)


class Untouched(NamedTuple):
    """A leaf that goes to the fallback optimizer, and why, which makes no difference."""

    path: str
    shape: tuple[int, ...]
    reason: str

    def __eq__(self, other: object) -> bool:
        """Compares all but the reason: rules that were pasted back do not know it."""
        if isinstance(other, Untouched):
            return self[:2] == other[:2]
        return tuple(self) == other

    def __hash__(self) -> int:
        """Hashes what is compared."""
        return hash(self[:2])


class Plan(NamedTuple):
    """Says what happens to every leaf. `print` shows it as a table, `as_dict` is for logs.

    Attributes:
      groups: Groups of matrices that are orthogonalized jointly; one matrix alone is a group too.
      series: The same matrices before they are divided into groups.
      untouched: The leaves that go to the fallback optimizer.
      unused: Rules that took no leaf.
      method: The method whose products are counted.
    """

    groups: tuple[Group, ...]
    series: tuple[Series, ...]
    untouched: tuple[Untouched, ...]
    unused: tuple[Rule, ...]
    method: MethodLike = "polar_express"

    @property
    def taken(self) -> set[int]:
        """Lists the positions in the tree of the leaves that are not in the fallback."""
        return {leaf for series in self.series for leaf in series.leaves}

    @property
    def layouts(self) -> dict[int, Layout]:
        """Says how each of these leaves holds its matrices."""
        return {leaf: series.layout for series in self.series for leaf in series.leaves}

    @property
    def fallback(self) -> tuple[str, ...]:
        """Lists the paths of the leaves that go to the fallback optimizer."""
        return tuple(leaf.path for leaf in self.untouched)

    def __str__(self) -> str:
        """Writes a table of series and fallback leaves, equal rows collapsed."""
        return table(self.groups, self.untouched, self.unused, self.method)

    def as_dict(self) -> dict[str, Any]:
        """Writes the plan in full, as a dict of what JSON can hold.

        Its keys are `groups`, `fallback` and `unused`, and for totals `parameters` (by treatment)
        and `flops` (of an update's matrix products, the plan's and Muon's; None for the plan's
        where they are not known, as of an SVD).
        """
        return as_dict(self.groups, self.untouched, self.unused, self.method)


@cached
def plan_of(structure: Any, types: tuple[LeafType, ...], rules: tuple[Rule, ...]) -> Plan:
    """Plans a tree of this structure, whose leaves have these types, by these rules."""
    found: dict[_Kind, list[Match]] = {}
    untouched: list[Untouched] = []
    wrong: list[str] = []
    paths, taking = paths_of(structure), rules_by_leaf(structure, rules)
    for index, (path, rule, (shape, dtype)) in enumerate(zip(paths, taking, types, strict=True)):
        if not is_taken(rule, shape):
            reason = _reason(rule, shape, dtype)
            untouched.append(Untouched(path, shape, reason))
            continue
        assert rule is not None
        try:
            series_path, match = _match_leaf(path, index, rule)
            kind = series_path, rule, _checked_layout(shape, dtype, rule), dtype
            found.setdefault(kind, []).append(match)
        except ValueError as error:
            wrong.append(f"{path!r}, shape {shape}, taken by `{rule}`: {error}.")
    found = {kind: sorted(matches) for kind, matches in found.items()}
    if wrong := [*wrong, *_problems(found)]:
        raise ValueError("Rules do not fit the leaves that they take:\n  " + "\n  ".join(wrong))
    series: list[Series] = []
    groups: list[Group] = []
    for (_, rule, layout, dtype), matches in found.items():
        siblings, leaves = len({match.sibling for match in matches}), [m.leaf for m in matches]
        for part in range(len(layout.arrays)):
            series.append(Series(rule, layout, dtype, part, siblings, tuple(leaves)))
            groups += _groups(series[-1], matches)
    unused = tuple(rule for rule in rules if rule not in {*taking})
    return Plan(tuple(groups), tuple(series), tuple(untouched), unused)


@cached
def rules_by_leaf(structure: Any, rules: tuple[Rule, ...]) -> list[Rule | None]:
    """Finds the rule of each leaf of a tree: the first whose pattern is found in its path."""
    return [
        next((rule for rule in rules if rule.search(path)), None) for path in paths_of(structure)
    ]


def is_taken(rule: Rule | None, shape: Collection[int]) -> bool:
    """Tells whether a leaf of this shape, whose rule this is, is orthogonalized."""
    return rule is not None and rule.stack > 0 and len(shape) > 1


def _reason(rule: Rule | None, shape: tuple[int, ...], dtype: Any) -> str:
    """Says why a leaf goes to the fallback."""
    if dtype is None:
        return "no array: eqx.filter it out"
    if rule is None:
        return "no rule"
    return "stack=0" if rule.stack == 0 else f"{len(shape)}-D: no matrix"


def _checked_layout(shape: tuple[int, ...], dtype: Any, rule: Rule) -> Layout:
    """Reads a leaf as its rule says, or raises if its dtype or its shape does not fit."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"its dtype is {dtype}, and only real floating leaves have a polar factor here: put "
            "`Rule(..., stack=0)` for it before this rule"
        )
    return layout_of(shape, rule)


def _match_leaf(path: str, leaf: int, rule: Rule) -> tuple[str, Match]:
    """Finds the path of the leaf's series, and which layer and sibling of it the leaf is.

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
    return series_path, Match(int(number or 0), sibling, leaf, path)


def _position(name: str, rule: Rule) -> int:
    """Finds which alternative of the group `slice` a name is.

    Where the alternatives are no words of their own, all names get 0, and are sorted as text.
    """
    group = re.search(r"\(\?P<slice>([^][()]*)\)", rule.pattern)
    words = re.split(r"(?<!\\)\|", group[1]) if group else []
    try:
        fits = [re.fullmatch(word, name, rule.compiled.flags) for word in words]
    except re.error:  # It refers to another group.
        return 0
    return next((index for index, fit in enumerate(fits) if fit), 0)


def _problems(found: Mapping[_Kind, Sequence[Match]]) -> Iterator[str]:
    """Says what is wrong with series: two leaves for one sibling of a layer, or a sibling missing.

    Args:
      found: Sorted matches of each series.
    """
    siblings: dict[tuple[str, Rule], set[tuple[int, str]]] = {}
    for (path, rule, _, _), matches in found.items():
        siblings.setdefault((path, rule), set()).update(match.sibling for match in matches)
    for (path, rule, layout, dtype), matches in found.items():
        taken = f"shape {layout.shape}, taken by `{rule}`"
        for number, of_layer in itertools.groupby(matches, key=lambda match: match.number):
            layer = list(of_layer)
            for one, other in itertools.pairwise(layer):
                if one.sibling == other.sibling:
                    yield _one_too_many(one, other, taken)
            missing = siblings[path, rule] - {match.sibling for match in layer}
            if missing:
                names = ", ".join(repr(name) for _, name in sorted(missing))
                yield (
                    f"{layer[0].path!r}, {taken}: its layer {number} has no {names} of its shape "
                    f"and dtype ({dtype}) to couple it with: write a rule for each shape, "
                    "such as one with `(?P<slice>key|value)` and one for queries, or one without "
                    "`slice`."
                )


def _one_too_many(one: Match, other: Match, taken: str) -> str:
    """Says what is wrong with two leaves that are the same sibling of the same layer."""
    if one.path == other.path:
        return (
            f"{one.path!r}, {taken}: two leaves of the tree have this path, so that no pattern can "
            "tell them apart: rename a key that holds `/`."
        )
    return (
        f"{one.path!r} and {other.path!r}, {taken}: both are layer {one.number} of one series: "
        "let `(?P<layer>\\d+)` match the number that tells them apart."
    )


def _groups(series: Series, matches: Sequence[Match]) -> Iterator[Group]:
    """Forms the groups of a series: runs of `stack` layers, of which the last may be shorter.

    Each of the parts that are not coupled has groups of its own.
    """
    parts = _part_names(series)
    for names in [parts] if series.layout.joins_parts else [[name] for name in parts]:
        members = list(_members(series, matches, names))
        K = series.rule.stack * series.siblings * len(names) * len(_head_names(series))
        for start in range(0, len(members), K):
            paths, layers = zip(*members[start : start + K], strict=True)
            yield Group(paths, series.rule, layers, *series.matrix, series.experts, series.dtype)


def _members(
    series: Series, matches: Sequence[Match], parts: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Lists name and layer of every matrix in these parts, those of one layer together."""
    named = "layer" in series.rule.compiled.groupindex
    indices = range(series.layers_per_leaf) if series.layout.layer else [None]
    for start, index in itertools.product(range(0, len(matches), series.siblings), indices):
        number, at = matches[start].number, "" if index is None else f"[{index}]"
        layer = number if index is None else (number, index) if named else index
        leaves = matches[start : start + series.siblings]
        for leaf, part, head in itertools.product(leaves, parts, _head_names(series)):
            yield f"{leaf.path}{part}{at}{head}", layer


def _part_names(series: Series) -> list[str]:
    """Lists what is added to a path for each part that this series holds: `:0`, `:1`, .."""
    if len(series.layout.sizes) == 1:
        return [""]
    if len(series.layout.arrays) > 1:
        return [f":{series.part}"]
    return [f":{part}" for part in range(len(series.layout.sizes))]


def _head_names(series: Series) -> list[str]:
    """Lists what is added to a path for each head that the rule couples: `#0`, `#1`, .."""
    heads = series.layout.heads
    return [f"#{head}" for head in range(series.layout.size(heads))] if heads else [""]
