"""Reads a tree: all readings of each leaf, less those that evidence removes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from teon_optax._reading import axes, evidence
from teon_optax._reading.layers import layer_columns
from teon_optax._reading.leaves import Leaf, leaves_of
from teon_optax._reading.names import says
from teon_optax._reading.network import Network, out_axis
from teon_optax._reading.readings import Reading, fan, readings_of

# Pieces of evidence of axes, in the order of their strength.
AXES = (
    axes.by_bias, axes.unscanned, axes.by_stream, axes.last_is_out, axes.einsum, axes.by_parts,
    axes.by_partner, axes.alike,
)  # fmt: skip


@dataclasses.dataclass
class Case:
    """A leaf, while it is read.

    Attributes:
      leaf: The leaf.
      left: The readings that are left, likely first; none below two axes.
      reasons: Why the others went.
      columns: The segments of the path whose number may count layers; None for an axis, or nothing.
    """

    leaf: Leaf
    left: list[Reading]
    reasons: list[str]
    columns: tuple[int | None, ...] = ()

    def hear(self, said: evidence.Said | None, is_of_axes: bool = False) -> bool:
        """Removes what a piece of evidence denies, unless nothing would be left.

        What tells of axes removes no kind but that of any matrix, and not all matrices.
        """
        kept = [reading for reading in self.left if said is None or said.keeps(reading)]
        if said is None or not kept or len(kept) == len(self.left):
            return False
        if is_of_axes and not any(reading.is_matrix for reading in kept):
            return False
        if is_of_axes and not _sure({r.kind for r in self.left}) <= {r.kind for r in kept}:
            return False
        self.left = kept
        if said.why and said.why not in self.reasons:
            self.reasons.append(said.why)
        return True


def read(params: Any) -> list[Case]:
    """Reads every leaf, in the tree's order."""
    leaves = leaves_of(params)
    net = Network(leaves)
    cases: dict[Any, Case] = {}
    keys = [_kind(leaf, net) for leaf in leaves]
    for leaf, key in zip(leaves, keys, strict=True):
        if key not in cases:
            cases[key] = _case(leaf, net)
    by_path = {leaf.path: cases[key] for leaf, key in zip(leaves, keys, strict=True)}
    _fit([*cases.values()], net, by_path)
    for case in cases.values():
        case.left = [each.along(case.leaf.layer_axis) for each in _in_order(case, net)]
    pairs = zip(leaves, keys, strict=True)
    return [dataclasses.replace(cases[key], leaf=leaf) for leaf, key in pairs]


def _kind(leaf: Leaf, net: Network) -> Any:
    """Gives what equal leaves of equal layers have in common, so that they are read once."""
    module = next((place for place in leaf.places if place in net.twins), "")
    return net.twins.get(module), leaf.place.removeprefix(module), leaf.array_shape


def _case(leaf: Leaf, net: Network) -> Case:
    """Removes from all readings of a leaf what its kind denies."""
    if len(leaf.array_shape) < 2:
        return Case(leaf, [], [])
    is_matrix = leaf.is_matrix and 0 not in leaf.shape
    parts = evidence.parts(leaf, net) if is_matrix else ()
    is_batch = says("members", *leaf.keys[: leaf.depth])
    shape = leaf.shape if len(leaf.shape) > 1 else leaf.array_shape
    readings = readings_of(shape, parts, leaf.layer_axis is not None, is_batch)
    readings = [*(evidence.views(leaf, net) if is_matrix else []), *readings]
    case = Case(leaf, readings, [])
    pieces = evidence.EVIDENCE if is_matrix else (evidence.no_matrix,)
    for piece in (evidence.nameless,) if is_matrix and leaf.is_nameless else pieces:
        said = piece(leaf, net)
        if case.hear(said) and said is not None and said.is_open:
            break
    case.columns = layer_columns(leaf, net)
    return case


def _fit(cases: Sequence[Case], net: Network, by_path: dict[str, Case]) -> None:
    """Removes axes that do not fit, until nothing changes; then those that are not usual."""

    def left(leaf: Leaf) -> Sequence[Reading]:
        return by_path[leaf.path].left

    open_cases = [case for case in cases if sum(r.is_matrix for r in case.left) > 1]
    open_cases = [case for case in open_cases if not case.leaf.is_nameless]
    is_changed = True
    while is_changed:
        is_changed = False
        for piece in AXES:
            for case in open_cases:
                is_changed |= case.hear(piece(case.leaf, net, left), True)
    for case in open_cases:
        said = axes.by_convention(case.leaf, net, left)
        kept = [reading for reading in case.left if said is not None and said.keeps(reading)]
        if len(case.leaf.shape) == 2 or len({outcome(case, r) for r in kept}) == 1:
            case.hear(said)


def _sure(kinds: set[str]) -> set[str]:
    return kinds & {"qkv", "latent", "out"}


def outcome(case: Case, reading: Reading) -> Any:
    """Gives what two readings agree in if they do the same."""
    if not reading.is_matrix or reading.kind.startswith("lora"):
        return None
    axes = reading.axes
    is_square = len({*case.leaf.shape}) == 1 and len(axes) == 2
    axes = "io" if is_square and reading.kind != "qkv" else axes
    return reading.kind == "qkv", axes, reading.split, reading.view


def _in_order(case: Case, net: Network) -> list[Reading]:
    """Puts the likely readings first.

    A module of layers without a number is scanned more often than not; where a number counts layers
    already, an axis seldom does. The fallback comes first for arrays that are the weights of no
    module, and for the ends of a list.
    """
    leaf = case.leaf
    if len(case.left) < 2:
        return case.left
    is_inside = (net.widths | net.linked - net.ends).issuperset(leaf.shape)
    is_end = leaf.is_bare or leaf.home not in net.blocks and not net.ends.isdisjoint(leaf.shape)
    fallback_first = not is_inside if leaf.is_nameless else is_end
    is_called = says("layers", *leaf.keys[: leaf.depth]) and {*leaf.numbers} == {None}
    hidden_first = evidence.is_pair(leaf, net) and not leaf.in_attention
    by_heads = leaf.says("by heads")
    has_module = leaf.weight != "" or len(leaf.shape) == 2 or leaf.says("mlp")
    axis = out_axis(leaf, net)
    out_first = leaf.is_out_first if axis is None else axis == 0
    is_packed = any(r.kind == "hidden" and r.split not in (1, 2) for r in case.left)

    def place(reading: Reading) -> tuple[Any, ...]:
        letters = [letter for letter in reading.axes if letter in "io"]
        is_turned = bool(letters) and letters[-1] == "i"
        return (
            reading.is_matrix == fallback_first,
            hidden_first and reading.kind != "hidden",
            ("l" in reading.axes) != is_called,
            reading.kind != "qkv" and 2 or (reading.view is None) == by_heads,
            has_module and not evidence.has_parts(reading),
            has_module and reading.kind == "hidden" and reading.view is not None,
            is_packed and (reading.split == 1 or not is_long(reading)),
            is_turned != out_first,
        )

    def is_long(reading: Reading) -> bool:
        return fan(reading.axes, leaf.shape, "o") > fan(reading.axes, leaf.shape, "i")

    ordered = sorted(case.left, key=place)
    is_square = len(leaf.shape) == 2 and leaf.shape[0] == leaf.shape[1]
    if is_square and all(r.kind != "qkv" and r.split == 1 for r in ordered):
        # Both fans are equal, so that both orientations do the same.
        usual = next((reading.axes for reading in ordered if reading.is_matrix), "")
        ordered = [reading for reading in ordered if reading.axes in ("", usual)]
    return ordered
