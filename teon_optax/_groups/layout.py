"""A leaf and its matrices (fan_in, fan_out): a bijection."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._rules.rule import Rule, fan_axes


class Layout(NamedTuple):
    """Where a leaf's matrices are: axes by their role, and the sizes of its fused parts."""

    shape: tuple[int, ...]
    layer: tuple[int, ...]  # at most one axis
    batch: tuple[int, ...]
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    sizes: tuple[int, ...]  # of the parts, along the first fan_out axis
    heads: tuple[int, ...] = ()  # axes along which matrices are coupled

    def length(self, axes: tuple[int, ...]) -> int:
        """Product of the lengths of some axes."""
        return math.prod(self.shape[axis] for axis in axes)


def layout(shape: tuple[int, ...], rule: Rule) -> Layout:
    """How `rule` reads a leaf of this shape.

    Raises:
      ValueError: With the reason and the remedy, if the rule does not fit the shape.
    """
    layer = () if rule.layer_axis is None else _normalized((rule.layer_axis,), shape)
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
    return Layout(shape, layer, batch, fan_in, fan_out, sizes, heads)


def _normalized(axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    ndim = len(shape)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"axes {axes} are not all among its {ndim} axes: correct dims or layer_axis"
        )
    return tuple(axis % ndim for axis in axes)


def _part_sizes(split: int | tuple[int, ...], length: int) -> tuple[int, ...]:
    sizes = (length // split,) * split if isinstance(split, int) else split
    if sum(sizes) != length or 0 in sizes:
        raise ValueError(
            f"split={split} does not fit its first fan_out axis of length {length}: write a "
            "divisor, or sizes that add up to it"
        )
    return sizes


def to_matrices(leaf: jax.Array, layout: Layout) -> list[jax.Array]:
    """The matrices of every part of the leaf: [layers, batch, fan_in, fan_out].

    Several axes of one role are flattened in the order written; joined heads count as layers.
    """
    layers, fan_out = layout.layer + layout.heads, layout.fan_out
    roles = layers, layout.batch, layout.fan_in, fan_out[:1], fan_out[1:]
    flat = leaf.transpose(sum(roles, ())).reshape([layout.length(axes) for axes in roles])
    cuts = np.cumsum(layout.sizes)[:-1]
    parts = jnp.split(flat, cuts, axis=3) if cuts.size else [flat]
    return [part.reshape(*part.shape[:3], -1) for part in parts]


def to_leaf(parts: list[jax.Array], layout: Layout) -> jax.Array:
    """Inverse of `to_matrices`."""
    rest = layout.length(layout.fan_out[1:])
    unflat = [part.reshape(*part.shape[:3], -1, rest) for part in parts]
    flat = jnp.concatenate(unflat, axis=3) if len(parts) > 1 else unflat[0]
    order = layout.layer + layout.heads + layout.batch + layout.fan_in + layout.fan_out
    return flat.reshape([layout.shape[axis] for axis in order]).transpose(np.argsort(order))
