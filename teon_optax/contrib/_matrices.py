"""Leaves as arrays of matrices that keep the leaf's axes, and so its sharding."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from teon_optax._memory import kept_beside, on_device
from teon_optax._mesh.placement import merge_axes, split_axis, splittable
from teon_optax._plan.layout import Layout
from teon_optax._plan.plan import plan
from teon_optax._rule import Rule

Axes = tuple[int, ...]


def to_parts(leaf: jax.Array, layout: Layout) -> list[jax.Array]:
    """An array for each of the layout's arrays, with an axis for equal parts before fan_out."""
    axis, arrays = layout.fan_out[0], [leaf]
    if len(layout.arrays) > 1:
        arrays = jnp.split(splittable(leaf, axis, layout.sizes), layout.bounds, axis)
    return [split_axis(array, axis, layout.equal_parts) for array in arrays]


def from_parts(arrays: Sequence[jax.Array], layout: Layout) -> jax.Array:
    """Inverse of `to_parts`."""
    axis = layout.fan_out[0]
    merged = [merge_axes(array, axis) for array in arrays]
    return merged[0] if len(merged) == 1 else jnp.concatenate(merged, axis)


def placed_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """Puts an array where another of its rank lies, by the type of that one (explicit meshes)."""
    wanted = jax.typeof(other).sharding
    is_there = jax.typeof(array).sharding.spec == wanted.spec
    return array if is_there else jax.sharding.reshard(array, wanted)


def each_matrix(
    function: Callable[..., tuple[jax.Array, ...]],
    rules: tuple[Rule, ...] | None,
    tree: Any,
    *others: Any,
) -> tuple[Any, Any]:
    """What a function makes of the matrices of all leaves that rules take.

    Args:
      function: From an array of `to_parts` of a leaf, in float32 at least, those of the same leaf
        in the other trees, and the axes of fan_in and fan_out, to the array's new value and at most
        one array more.
      rules: Which leaves, and how they hold matrices.
      tree: Other leaves of it pass.
      *others: Trees with leaves of the same parts along fan_out.

    Returns:
      The tree of new values, and that of what more there is, with `optax.MaskedNode()` where there
      is nothing.
    """
    leaves, structure = jax.tree.flatten(tree)
    layouts = {leaf: series.layout for series in plan(tree, rules).series for leaf in series.leaves}
    inputs = [leaves, *(structure.flatten_up_to(other) for other in others)]
    more: list[Any] = [optax.MaskedNode()] * len(leaves)
    for index, layout in layouts.items():
        leaf, last = leaves[index], inputs[-1][index]
        wide = on_device(leaf).astype(np.promote_types(leaf.dtype, np.float32))
        given = [wide, *(on_device(other[index]) for other in inputs[1:])]
        _, _, fan_in, fan_out = layout.roles
        parts = zip(*(to_parts(each, layout) for each in given), strict=True)
        results = zip(*(function(*part, fan_in, fan_out) for part in parts), strict=True)
        new, *rest = (from_parts(result, layout) for result in results)
        leaves[index] = kept_beside(placed_like(new.astype(leaf.dtype), leaf), leaf)
        (more[index],) = [kept_beside(each, last) for each in rest] or [optax.MaskedNode()]
    return structure.unflatten(leaves), structure.unflatten(more)


def sum_of_squares(array: jax.Array, axes: Axes) -> jax.Array:
    """Adds up the squares of an array along some axes, which stay with length 1."""
    return jnp.sum(jnp.square(array), axes, keepdims=True)


def length(array: jax.Array, axes: Axes) -> int:
    """Product of the lengths of some axes."""
    return math.prod(array.shape[axis] for axis in axes)
