"""Takes leaves apart into matrices (fan_in, fan_out), and puts them together: a bijection."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._rule import Rule, fan_axes


class Stored(NamedTuple):
    """Says how a leaf lies that its rule sees in another shape.

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


@dataclasses.dataclass(frozen=True)
class Layout:
    """Says what each axis of a leaf is for, and which sizes its fused parts have.

    Attributes:
      shape: Shape of the leaf, or the one that it is seen in.
      layer: The axis that counts layers, if there is one.
      batch: Axes along which matrices are orthogonalized each on its own.
      fan_in: Axes that are summed over.
      fan_out: Axes of the result.
      sizes: Sizes of the fused parts along the first fan_out axis.
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

    def size(self, axes: tuple[int, ...]) -> int:
        """Multiplies the sizes of some axes."""
        return math.prod(self.shape[axis] for axis in axes)

    @functools.cached_property
    def bounds(self) -> list[int]:
        """Lists where one fused part ends and the next begins, along the first fan_out axis."""
        return np.cumsum(self.sizes)[:-1].tolist()

    @functools.cached_property
    def arrays(self) -> tuple[int, ...]:
        """Lists the sizes of parts that are arrays of their own: unequal ones, or one of all."""
        return self.sizes if len(set(self.sizes)) > 1 else self.sizes[:1]

    @functools.cached_property
    def equal_parts(self) -> int:
        """Counts the parts that one array holds."""
        return len(self.sizes) // len(self.arrays)

    @functools.cached_property
    def coupled(self) -> int:
        """Counts the matrices of each layer in this leaf that the rule couples."""
        return (self.equal_parts if self.joins_parts else 1) * self.size(self.heads)

    @functools.cached_property
    def alone(self) -> int:
        """Counts the matrices of each layer beside those that are coupled: experts and parts."""
        return (1 if self.joins_parts else self.equal_parts) * self.size(self.batch)

    @functools.cached_property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """Sorts axes: those that count coupled matrices, and others, those of fan_in, of fan_out.

        They are the axes of an array with one more for its equal parts, right before fan_out's
        first.
        """
        parts = self.fan_out[0]
        layer, heads, batch, fan_in, fan_out = (
            tuple(axis + (axis >= parts) for axis in axes)
            for axes in (self.layer, self.heads, self.batch, self.fan_in, self.fan_out)
        )
        coupled, alone = ((parts,), ()) if self.joins_parts else ((), (parts,))
        return (*layer, *coupled, *heads), (*alone, *batch), fan_in, fan_out

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """Orders axes so that those of a kind follow each other, as `axes` sorts them."""
        return tuple(axis for axes in self.axes for axis in axes)

    @functools.cached_property
    def order_back(self) -> tuple[int, ...]:
        """Inverts `order`."""
        return tuple(np.argsort(self.order).tolist())

    @functools.cached_property
    def apart(self) -> tuple[int, ...]:
        """Gives the shape of an array of parts with an axis that counts equal ones; -1 is a part.

        That axis is right before fan_out's first.
        """
        first = self.fan_out[0]
        return (*self.shape[:first], self.equal_parts, -1, *self.shape[first + 1 :])

    @functools.cached_property
    def turned(self) -> tuple[int, ...]:
        """Gives that shape with its axes in `order`."""
        return tuple(self.apart[axis] for axis in self.order)

    @functools.cached_property
    def flat(self) -> tuple[int, ...]:
        """Gives the shape of its matrices: [layers x coupled, alone, fan_in, -1]."""
        layers = self.size(self.layer)
        return layers * self.coupled, self.alone, self.size(self.fan_in), -1

    @functools.cached_property
    def joined(self) -> tuple[int, ...]:
        """Gives the shape of an array of parts as it lies in the leaf; -1 is all its parts."""
        first = self.fan_out[0]
        return (*self.shape[:first], -1, *self.shape[first + 1 :])


def layout_of(shape: tuple[int, ...], rule: Rule) -> Layout:
    """Reads a leaf of this shape as `rule` says.

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
        return dataclasses.replace(own, stored=stored)
    batch, fan_in, fan_out, heads = (
        tuple(axis + 1 for axis in axes) for axes in (own.batch, own.fan_in, own.fan_out, own.heads)
    )
    return dataclasses.replace(
        own,
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
    """Lists the sizes of fused parts along an axis, or raises if they do not fit its length."""
    # Tested first: as many sizes as a mistyped number says may not fit into the memory.
    fits = length % split == 0 if isinstance(split, int) else sum(split) == length
    if not fits:
        raise ValueError(
            f"split={split} does not fit its first fan_out axis of length {length}: write a "
            "divisor, or sizes that add up to it"
        )
    return (length // split,) * split if isinstance(split, int) else split


def to_matrices(leaf: jax.Array, layout: Layout) -> list[jax.Array]:
    """Takes a leaf apart into its matrices, an array [layers x coupled, alone, fan_in, fan_out].

    Parts of unequal sizes are an array each. Equal parts are one, so that a program does not grow
    with their number. Several axes of a kind are flattened in the order that the rule writes.
    """
    parts = [seen(leaf, layout)]
    if len(layout.arrays) > 1:
        parts = jnp.split(parts[0], layout.bounds, axis=layout.fan_out[0])
    return [
        part.reshape(layout.apart).transpose(layout.order).reshape(layout.flat) for part in parts
    ]


def to_leaf(matrices: list[jax.Array], layout: Layout) -> jax.Array:
    """Puts the matrices of `to_matrices` together to the leaf again."""
    parts = [
        part.reshape(layout.turned).transpose(layout.order_back).reshape(layout.joined)
        for part in matrices
    ]
    whole_leaf = parts[0] if len(parts) == 1 else jnp.concatenate(parts, layout.fan_out[0])
    return unseen(whole_leaf, layout)


def joint_shape(K: int, fan_in: int, fan_out: int, mode: int) -> tuple[int, int]:
    """Gives the shape of the mode's unfolding of K matrices, up to a transposition.

    The paper's W is (fan_out, fan_in), so its mode 1, which shares fan_out, joins kernels along
    fan_in.
    """
    unfoldings = {1: (K * fan_in, fan_out), 2: (fan_in, K * fan_out), 3: (K, fan_in * fan_out)}
    return unfoldings[mode]
