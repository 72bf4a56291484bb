"""Which matrices are orthogonalized together: params and rules become a Plan."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from teon_optax._default_rules import default_rules
from teon_optax._matrices import Layout, layout
from teon_optax._rules import Rule, checked_rules, leaf_paths
from teon_optax._table import as_dict, table


class Type(NamedTuple):
    """Matrices that differ only in their layer, in the order of layers.

    Attributes:
      rule: The rule that took the leaves.
      layout: How each leaf holds its matrices.
      part: Index of the fused part, 0 where nothing is fused.
      leaves: Positions of the leaves in the tree, by layer number.
      members: Path of each layer's matrix.
      layers: Number of each layer: from the path, along `layer_axis`, or a pair of both.
    """

    rule: Rule
    layout: Layout
    part: int
    leaves: tuple[int, ...]
    members: tuple[str, ...]
    layers: tuple[Any, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """(fan_in, fan_out) of one layer."""
        rest = self.layout.length(self.layout.fan_out[1:])
        return self.layout.length(self.layout.fan_in), self.layout.sizes[self.part] * rest

    @property
    def batch(self) -> int:
        """How many matrices of its own each layer holds (experts)."""
        return self.layout.length(self.layout.batch)


class Group(NamedTuple):
    """A run of layers of one type that are orthogonalized jointly.

    Attributes:
      members: Path of each layer's matrix; `path:0` is a fused part, `path[3]` a slice of a scanned
        leaf.
      rule: The rule that took them.
      layers: Their numbers.
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
        """Shape of the joint matrix; its Gram matrix is square in the smaller number."""
        return joint_shape(len(self.members), self.fan_in, self.fan_out, self.rule.mode)


def joint_shape(K: int, fan_in: int, fan_out: int, mode: int) -> tuple[int, int]:
    """Shape of the mode's unfolding of K matrices (fan_in, fan_out), up to a transposition.

    The paper's W is (fan_out, fan_in), so its mode 1, which shares fan_out, joins kernels along
    fan_in.
    """
    unfoldings = {1: (K * fan_in, fan_out), 2: (fan_in, K * fan_out), 3: (K, fan_in * fan_out)}
    return unfoldings[mode]


class Untouched(NamedTuple):
    """A leaf that goes to the fallback optimizer, and why."""

    path: str
    shape: tuple[int, ...]
    reason: str


class Plan(NamedTuple):
    """What happens to every leaf. `print` shows it as a table, `as_dict` is for logs.

    Attributes:
      groups: Groups of matrices that are orthogonalized jointly (alone, where a group has one
        member).
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


class _Found(NamedTuple):
    number: int
    leaf: int
    path: str


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
    found: dict[tuple, list[_Found]] = {}
    untouched, problems = [], []
    used = set()
    for index, (path, leaf) in enumerate(leaf_paths(params)):
        shape = np.shape(leaf)
        rule = next((rule for rule in rules if rule.search(path)), None)
        used.add(rule)
        if rule is None or rule.stack == 0 or len(shape) < 2:
            untouched.append(Untouched(path, shape, _reason(rule, shape)))
            continue
        try:
            place, number = _place_and_layer(path, rule)
            key = rule, _checked_layout(shape, leaf.dtype, rule), leaf.dtype, place
            found.setdefault(key, []).append(_Found(number, index, path))
        except ValueError as error:
            problems.append(f"{path!r}, shape {shape}, taken by `{rule}`: {error}.")
    types = []
    for (rule, read_as, _, _), leaves in found.items():
        leaves.sort()
        problems += _same_layer_twice(rule, read_as, leaves)
        types += [_type(rule, read_as, part, leaves) for part in range(len(read_as.sizes))]
    if problems:
        raise ValueError("Rules do not fit the leaves that they take:\n  " + "\n  ".join(problems))
    groups = tuple(group for kind in types for group in _runs(kind))
    unused = tuple(rule for rule in rules if rule not in used)
    return Plan(groups, tuple(types), tuple(untouched), unused)


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


def _place_and_layer(path: str, rule: Rule) -> tuple[str, int]:
    """The path without its layer number (nor a `_` right before it), and the number."""
    match = rule.search(path)
    assert match is not None
    number = match.groupdict().get("layer")
    if number is None:
        return path, 0
    if not number.isdecimal():
        raise ValueError(f"its layer is {number!r}, not a number: write `(?P<layer>\\d+)`")
    start, end = match.span("layer")
    return path[:start].removesuffix("_") + path[end:], int(number)


def _same_layer_twice(rule: Rule, layout: Layout, leaves: Sequence[_Found]) -> list[str]:
    return [
        f"{a.path!r} and {b.path!r}, shape {layout.shape}, taken by `{rule}`: both are layer "
        f"{a.number} of one type: let `(?P<layer>\\d+)` match the number that tells them apart."
        for a, b in itertools.pairwise(leaves)
        if a.number == b.number
    ]


def _type(rule: Rule, layout: Layout, part: int, leaves: Sequence[_Found]) -> Type:
    suffix = f":{part}" if len(layout.sizes) > 1 else ""
    slices = range(layout.length(layout.layer)) if layout.layer else [None]
    members, layers = [], []
    for leaf, index in itertools.product(leaves, slices):
        members.append(f"{leaf.path}{suffix}" + ("" if index is None else f"[{index}]"))
        numbers = leaf.number, index
        named = "layer" in rule.compiled().groupindex
        layers.append(leaf.number if index is None else numbers if named else index)
    return Type(
        rule, layout, part, tuple(leaf.leaf for leaf in leaves), tuple(members), tuple(layers)
    )


def _runs(kind: Type) -> Iterable[Group]:
    """A type cut into runs of K layers; the last may be shorter."""
    fan_in, fan_out = kind.matrix
    for start in range(0, len(kind.members), kind.rule.stack):
        run = slice(start, start + kind.rule.stack)
        yield Group(kind.members[run], kind.rule, kind.layers[run], fan_in, fan_out, kind.batch)
