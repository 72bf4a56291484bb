"""Which matrices are orthogonalized together: params and rules become a Plan."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from teon_optax._groups.coupling import joint_shape
from teon_optax._groups.layout import Layout, layout
from teon_optax._groups.matching import Place, place_of, problems
from teon_optax._groups.report import as_dict, table
from teon_optax._mixing import slices
from teon_optax._rules.default import default_rules
from teon_optax._rules.paths import leaf_paths
from teon_optax._rules.rule import Rule, checked_rules


class Type(NamedTuple):
    """Matrices that differ only in their layer, or in what a rule couples.

    Attributes:
      rule: The rule that took the leaves.
      layout: How each leaf holds its matrices.
      parts: Indices of the fused parts: all that are joined, or one.
      siblings: How many leaves hold a layer.
      leaves: Positions of the leaves in the tree, by layer number, then by sibling.
    """

    rule: Rule
    layout: Layout
    parts: tuple[int, ...]
    siblings: int
    leaves: tuple[int, ...]

    @property
    def depth(self) -> int:
        """How many layers."""
        return len(self.leaves) // self.siblings * self.layout.length(self.layout.layer)

    @property
    def coupled(self) -> int:
        """How many matrices of each layer are coupled."""
        return self.siblings * len(self.parts) * self.layout.length(self.layout.heads)

    @property
    def matrix(self) -> tuple[int, int]:
        """(fan_in, fan_out) of one layer."""
        rest = self.layout.length(self.layout.fan_out[1:])
        return self.layout.length(self.layout.fan_in), self.layout.sizes[self.parts[0]] * rest

    @property
    def batch(self) -> int:
        """How many matrices of its own each layer holds (experts)."""
        return self.layout.length(self.layout.batch)


class Group(NamedTuple):
    """Matrices of one type, from a run of layers, that are orthogonalized jointly.

    Attributes:
      members: Path of each of the K matrices; `path:0` is a fused part, `path[3]` a slice of a
        scanned leaf, `path#2` a joined head.
      rule: The rule that took them.
      layers: Numbers of their layers.
      fan_in: Of one layer.
      fan_out: Of one layer.
      batch: How many such groups the batch axes hold (experts).
    """

    members: tuple[str, ...]
    rule: Rule
    layers: tuple[Any, ...]
    fan_in: int
    fan_out: int
    batch: int

    @property
    def joint(self) -> tuple[int, int]:
        """Shape of the joint matrix (or of a transform's slices); Gram is its smaller side."""
        K = 1 if self.rule.transform else len(self.members)
        return joint_shape(K, self.fan_in, self.fan_out, self.rule.mode)

    @property
    def factors(self) -> int:
        """How many polar factors it takes: 1, or K of a transform; of complex ones each is four."""
        found = slices(self.rule.transform, len(self.members))
        return sum(len(rows) * (4 if np.iscomplexobj(rows) else 1) for rows in found) or 1


class Untouched(NamedTuple):
    """A leaf that goes to the fallback optimizer, and why."""

    path: str
    shape: tuple[int, ...]
    reason: str


class Plan(NamedTuple):
    """What happens to every leaf. `print` shows it as a table, `as_dict` is for logs.

    Attributes:
      groups: Groups of matrices that are orthogonalized jointly; one matrix alone is a group too.
      types: The same matrices before they are cut into groups.
      untouched: The leaves that go to the fallback optimizer.
      unused: Rules that took no leaf.
    """

    groups: tuple[Group, ...]
    types: tuple[Type, ...]
    untouched: tuple[Untouched, ...]
    unused: tuple[Rule, ...]

    @property
    def taken(self) -> set[int]:
        """Positions in the tree of the leaves that are not in the fallback."""
        return {leaf for kind in self.types for leaf in kind.leaves}

    @property
    def fallback(self) -> tuple[str, ...]:
        """Paths of the leaves that go to the fallback optimizer."""
        return tuple(leaf.path for leaf in self.untouched)

    def __str__(self) -> str:
        """A table of types and fallback leaves, equal rows collapsed."""
        return table(self.groups, self.untouched, self.unused)

    def as_dict(self) -> dict[str, Any]:
        """The same in full, in what JSON can hold.

        `groups`, `fallback`, `unused`; totals as `parameters` (by treatment) and `flops` (of an
        update's matrix products, `plan`'s and Muon's).
        """
        return as_dict(self.groups, self.untouched, self.unused)


def plan(params: Any, rules: Iterable[Rule] | None = None) -> Plan:
    r"""Assigns every leaf of `params` to a group or to the fallback.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype` (`jax.eval_shape`).
      rules: The first rule whose pattern is found in a leaf's path takes it. None means
        `default_rules(params)`.

    Returns:
      A `Plan`; every leaf is in exactly one place, members of its groups or `fallback`.

    Raises:
      ValueError: If rules do not fit the leaves that they take; the message lists all of them.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from teon_optax import Rule, plan
      >>> kernel = jax.ShapeDtypeStruct((64, 64), jnp.float32)
      >>> params = {f"block_{i}": {"query": {"kernel": kernel}} for i in range(3)}
      >>> rules = [Rule(r"block_(?P<layer>\d+)/query/kernel", stack=2)]
      >>> [group.layers for group in plan(params, rules).groups]
      [(0, 1), (2,)]
    """
    rules = checked_rules(default_rules(params) if rules is None else rules)
    found: dict[tuple, list[Place]] = {}
    untouched, wrong = [], []
    used = set()
    for index, (path, leaf) in enumerate(leaf_paths(params)):
        shape = np.shape(leaf)
        rule = next((rule for rule in rules if rule.search(path)), None)
        used.add(rule)
        if rule is None or rule.stack == 0 or len(shape) < 2:
            untouched.append(Untouched(path, shape, _reason(rule, shape)))
            continue
        try:
            type_path, place = place_of(path, index, rule)
            key = type_path, rule, _checked_layout(shape, leaf.dtype, rule), leaf.dtype
            found.setdefault(key, []).append(place)
        except ValueError as error:
            wrong.append(f"{path!r}, shape {shape}, taken by `{rule}`: {error}.")
    found = {key: sorted(places) for key, places in found.items()}
    if wrong := [*wrong, *problems(found)]:
        raise ValueError("Rules do not fit the leaves that they take:\n  " + "\n  ".join(wrong))
    types, groups = [], []
    for (_, rule, held, _), places in found.items():
        siblings, leaves = len({place.sibling for place in places}), [p.leaf for p in places]
        every = tuple(range(len(held.sizes)))
        for parts in [every] if "parts" in rule.join else zip(every, strict=True):
            types.append(Type(rule, held, parts, siblings, tuple(leaves)))
            groups += _groups(types[-1], places)
    unused = tuple(rule for rule in rules if rule not in used)
    return Plan(tuple(groups), tuple(types), tuple(untouched), unused)


def _reason(rule: Rule | None, shape: tuple[int, ...]) -> str:
    if rule is None:
        return "no rule"
    return "stack=0" if rule.stack == 0 else f"{len(shape)}-D: no matrix"


def _checked_layout(shape: tuple[int, ...], dtype: Any, rule: Rule) -> Layout:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"its dtype is {dtype}, and only real floating leaves have a polar factor here: put "
            "`Rule(..., stack=0)` for it before this rule"
        )
    return layout(shape, rule)


def _groups(kind: Type, places: Sequence[Place]) -> Iterator[Group]:
    """A type cut into runs of layers; the last may be shorter."""
    rule, held = kind.rule, kind.layout
    parts = [f":{i}" for i in kind.parts] if len(held.sizes) > 1 else [""]
    heads = [f"#{i}" for i in range(held.length(held.heads))] if held.heads else [""]
    indices = range(held.length(held.layer)) if held.layer else [None]
    named = "layer" in rule.compiled().groupindex
    members = []
    for start, index in itertools.product(range(0, len(places), kind.siblings), indices):
        number, at = places[start].number, "" if index is None else f"[{index}]"
        layer = number if index is None else (number, index) if named else index
        leaves = places[start : start + kind.siblings]
        for leaf, part, head in itertools.product(leaves, parts, heads):
            members.append((f"{leaf.path}{part}{at}{head}", layer))
    K = rule.stack * kind.coupled
    for start in range(0, len(members), K):
        paths, layers = zip(*members[start : start + K], strict=True)
        yield Group(paths, rule, layers, *kind.matrix, kind.batch)
