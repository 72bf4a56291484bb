"""A leaf and its matrices (fan_in, fan_out): a bijection."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._rule import Rule, fan_axes


class Stored(NamedTuple):
    """How a leaf lies that its rule sees in another shape.

    Attributes:
      shape: Shape of the leaf.
      layer_axis: The axis that counts layers, if there is one; the view has it first.
    """

    shape: tuple[int, ...]
    layer_axis: int | None

    @property
    def order(self) -> tuple[int, ...]:
        """Lists the axes of the leaf as they lie in the view: the one of layers first."""
        first = () if self.layer_axis is None else (self.layer_axis,)
        return (*first, *(axis for axis in range(len(self.shape)) if axis not in first))


class Layout(NamedTuple):
    """Where a leaf's matrices are: what each of its axes is for, and the sizes of its fused parts.

    Attributes:
      shape: Shape of the leaf, or the one that it is seen in.
      layer: The axis that counts layers, if there is one.
      batch: Axes along which matrices are orthogonalized each on its own.
      fan_in: Axes that are summed over.
      fan_out: Axes of the result.
      sizes: Lengths of the fused parts along the first fan_out axis.
      heads: Axes along which a rule couples matrices.
      joins_parts: Whether the rule couples the parts, which then have one size.
      stored: How the leaf itself lies, if its rule has a view.
    """

    shape: tuple[int, ...]
    layer: tuple[int, ...]
    batch: tuple[int, ...]
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    sizes: tuple[int, ...]
    heads: tuple[int, ...] = ()
    joins_parts: bool = False
    stored: Stored | None = None

    def length(self, axes: tuple[int, ...]) -> int:
        """Product of the lengths of some axes."""
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def bounds(self) -> list[int]:
        """Where one fused part ends and the next begins, along the first fan_out axis."""
        return np.cumsum(self.sizes)[:-1].tolist()

    @property
    def arrays(self) -> tuple[int, ...]:
        """Lengths of the parts that are arrays of their own: unequal ones, or one of all."""
        return self.sizes if len(set(self.sizes)) > 1 else self.sizes[:1]

    @property
    def equal_parts(self) -> int:
        """How many parts one array holds."""
        return len(self.sizes) // len(self.arrays)

    @property
    def coupled(self) -> int:
        """How many matrices of each layer in this leaf the rule couples."""
        return (self.equal_parts if self.joins_parts else 1) * self.length(self.heads)

    @property
    def alone(self) -> int:
        """How many matrices each layer holds beside those that are coupled: experts and parts."""
        return (1 if self.joins_parts else self.equal_parts) * self.length(self.batch)

    @property
    def roles(self) -> tuple[tuple[int, ...], ...]:
        """Axes that count coupled matrices, and others, and those of fan_in and of fan_out.

        They are those of an array that has an axis for its equal parts, right before fan_out's
        first.
        """
        parts = self.fan_out[0]
        layer, heads, batch, fan_in, fan_out = (
            tuple(axis + (axis >= parts) for axis in axes)
            for axes in (self.layer, self.heads, self.batch, self.fan_in, self.fan_out)
        )
        coupled, alone = ((parts,), ()) if self.joins_parts else ((), (parts,))
        return (*layer, *coupled, *heads), (*alone, *batch), fan_in, fan_out


def layout_of(shape: tuple[int, ...], rule: Rule) -> Layout:
    """How `rule` reads a leaf of this shape.

    Raises:
      ValueError: With the reason and the remedy, if the rule does not fit the shape.
    """
    layer = () if rule.layer_axis is None else _normalized((rule.layer_axis,), shape)
    if rule.view is not None:
        return _viewed(shape, layer, rule, rule.view)
    if rule.dims is None:
        rest = tuple(axis for axis in range(len(shape)) if axis not in layer)
        if len(rest) != 2:
            raise ValueError(
                f"{len(rest)} axes are left for fan_in and fan_out, not 2: pass "
                "`dims=optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis)`, or narrow "
                "the pattern"
            )
        fan_in, fan_out = rest[:1], rest[1:]
    else:
        fan_in, fan_out = (_normalized(axes, shape) for axes in fan_axes(rule.dims))
    named = layer + fan_in + fan_out
    if len(set(named)) != len(named):
        raise ValueError("dims and layer_axis overlap: name each axis once")
    if 0 in shape:
        raise ValueError("it has an empty axis: leave it out with `stack=0`")
    batch, heads = tuple(axis for axis in range(len(shape)) if axis not in named), ()
    if "heads" in rule.join:
        batch, heads = (), batch
        if not heads:
            raise ValueError("no axis is left for the heads to join: pass dims without theirs")
    sizes = _part_sizes(rule.split, shape[fan_out[0]])
    return Layout(shape, layer, batch, fan_in, fan_out, sizes, heads, "parts" in rule.join)


def _viewed(
    shape: tuple[int, ...], layer: tuple[int, ...], rule: Rule, view: tuple[int, ...]
) -> Layout:
    """Reads a leaf in its rule's view, in which the axis of layers comes first."""
    of_layer = math.prod(length for axis, length in enumerate(shape) if axis not in layer)
    if math.prod(view) != of_layer:
        one = "one layer of it" if layer else "the leaf"
        raise ValueError(
            f"view={view} has {math.prod(view)} entries and {one} {of_layer}: write lengths whose "
            "product that is"
        )
    own = layout_of(view, dataclasses.replace(rule, stack=1, layer_axis=None, view=None))
    stored = Stored(shape, layer[0] if layer else None)
    if not layer:
        return own._replace(stored=stored)
    batch, fan_in, fan_out, heads = (
        tuple(axis + 1 for axis in axes) for axes in (own.batch, own.fan_in, own.fan_out, own.heads)
    )
    return own._replace(
        shape=(shape[layer[0]], *view),
        layer=(0,),
        batch=batch,
        fan_in=fan_in,
        fan_out=fan_out,
        heads=heads,
        stored=stored,
    )


def seen(leaf: jax.Array, layout: Layout) -> jax.Array:
    """Reshapes a leaf to the shape of its layout, which differs where its rule has a view."""
    stored = layout.stored
    return leaf if stored is None else leaf.transpose(stored.order).reshape(layout.shape)


def unseen(leaf: jax.Array, layout: Layout) -> jax.Array:
    """Reshapes a leaf back from the shape of its layout: the inverse of `seen`."""
    stored = layout.stored
    if stored is None:
        return leaf
    turned = leaf.reshape([stored.shape[axis] for axis in stored.order])
    return turned.transpose(np.argsort(stored.order))


def _normalized(axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Counts axes from the front, or raises if the shape does not have them."""
    ndim = len(shape)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"axes {axes} are not all among its {ndim} axes: correct dims or layer_axis"
        )
    return tuple(axis % ndim for axis in axes)


def _part_sizes(split: int | tuple[int, ...], length: int) -> tuple[int, ...]:
    """The sizes of fused parts along an axis of this length, or an error if they do not fit."""
    # Tested first: as many sizes as a mistyped number says may not fit into the memory.
    fits = length % split == 0 if isinstance(split, int) else sum(split) == length
    if not fits:
        raise ValueError(
            f"split={split} does not fit its first fan_out axis of length {length}: write a "
            "divisor, or sizes that add up to it"
        )
    return (length // split,) * split if isinstance(split, int) else split


def to_matrices(leaf: jax.Array, layout: Layout) -> list[jax.Array]:
    """The matrices of a leaf, an array [layers x coupled, alone, fan_in, fan_out] for each part.

    Equal parts are one array, so that a program does not grow with their number. Several axes of
    one role are flattened in the order that the rule writes.
    """
    roles = layout.roles
    unfused = [seen(leaf, layout)]
    if len(layout.arrays) > 1:
        unfused = jnp.split(unfused[0], layout.bounds, axis=layout.fan_out[0])
    matrices = []
    for part, size in zip(unfused, layout.arrays, strict=True):
        axes = part.reshape(_shape_with_parts(layout, size)).transpose(sum(roles, ()))
        lengths = layout.length(layout.layer) * layout.coupled, layout.alone
        matrices.append(axes.reshape(*lengths, layout.length(layout.fan_in), -1))
    return matrices


def to_leaf(matrices: list[jax.Array], layout: Layout) -> jax.Array:
    """Inverse of `to_matrices`."""
    order = sum(layout.roles, ())
    parts = []
    for part, size in zip(matrices, layout.arrays, strict=True):
        shape = _shape_with_parts(layout, size)
        axes = part.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
        whole = list(layout.shape)
        whole[layout.fan_out[0]] = size * layout.equal_parts
        parts.append(axes.reshape(whole))
    whole_leaf = parts[0] if len(parts) == 1 else jnp.concatenate(parts, layout.fan_out[0])
    return unseen(whole_leaf, layout)


def _shape_with_parts(layout: Layout, size: int) -> tuple[int, ...]:
    """The shape of an array of equal parts of this size, with an axis before fan_out for them."""
    first = layout.fan_out[0]
    return (*layout.shape[:first], layout.equal_parts, size, *layout.shape[first + 1 :])


def joint_shape(K: int, fan_in: int, fan_out: int, mode: int) -> tuple[int, int]:
    """Shape of the mode's unfolding of K matrices (fan_in, fan_out), up to a transposition.

    The paper's W is (fan_out, fan_in), so its mode 1, which shares fan_out, joins kernels along
    fan_in.
    """
    unfoldings = {1: (K * fan_in, fan_out), 2: (fan_in, K * fan_out), 3: (K, fan_in * fan_out)}
    return unfoldings[mode]
