"""Leaves as arrays of matrices that keep the leaf's axes, and so its sharding."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from teon_optax._memory import kept_beside, on_device, widened
from teon_optax._mesh.placement import merge_axes, placed_along, split_axis, splittable
from teon_optax._mesh.views import enter_view, leave_view
from teon_optax._plan.layout import Layout
from teon_optax._planning import plan
from teon_optax._rule import Rule

Axes = tuple[int, ...]


def each_matrix(
    function: Callable[..., tuple[jax.Array, ...]],
    rules: tuple[Rule, ...] | None,
    tree: Any,
    *others: Any,
) -> tuple[Any, Any]:
    """Applies a function to every matrix of every leaf that rules take.

    This is what a new transformation is made of. The function sees matrices that lie in the leaf as
    they did: it is called with an array of several axes, of which some are fan_in, some fan_out,
    and all others count matrices (layers of a scanned leaf, experts, heads, fused parts). So it
    should reduce over `fan_in`, `fan_out` or both, with `keepdims=True`, and otherwise work
    elementwise; then meshes may cut the leaf in any way, and no axis is ever moved. A leaf with
    a view (`Rule(view=...)`) is given in that shape, and so is what is kept of it.

    A leaf is one call, unless its fused parts have unequal sizes: then each part is one. A leaf
    (12, 64, 3, 16) of 12 scanned layers and 3 heads, read by `layer_axis=0` and
    `dims=MuonDimensionNumbers(1, 3)`, is given as (12, 64, 3, 1, 16) with `fan_in` (1,) and
    `fan_out` (4,): the axis before fan_out's first counts equal parts, and there is one.

    Args:
      function: Called as `function(array, *arrays, fan_in, fan_out)`: the leaf's array, then that
        of the same leaf in each of `others`, all in float32 at least; and the positions of axes, as
        tuples. It returns the array's new value in a tuple, and at most one array more to keep,
        whose axes may have length 1 where the array's are fan_in.
      rules: Which leaves hold matrices, and how; None means `default_rules(tree)`.
      tree: Tree of leaves; those that no rule takes come back as they are.
      *others: Trees in which the leaves that rules take have the same axes, of the same lengths or,
        along fan_in, of length 1: params, or what was kept of an update before.

    Returns:
      The tree of new values, in the dtypes and places of `tree`; and the tree of what there is to
      keep, with `optax.MaskedNode()` for leaves that have nothing. Where `tree` has None, as where
      a leaf gets no gradient, there is what the last of `others` has.

    Examples:
      Gives each neuron's update its own mean as an offset, whatever the leaf looks like:

      >>> import jax.numpy as jnp
      >>> from teon_optax import Rule
      >>> from teon_optax.contrib._matrices import each_matrix
      >>> def centred(array, fan_in, fan_out):
      ...     return (array - jnp.mean(array, fan_in, keepdims=True),)
      >>> updates = {"up": jnp.array([[1.0, 5.0], [3.0, 9.0]])}
      >>> each_matrix(centred, (Rule("up"),), updates)[0]["up"].tolist()
      [[-1.0, -2.0], [1.0, 2.0]]
    """
    # None is where a leaf has no gradient; the trees beside may have something there.
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    positions = [index for index, leaf in enumerate(leaves) if leaf is not None]
    inputs = [leaves, *(structure.flatten_up_to(other) for other in others)]
    more: list[Any] = [
        optax.MaskedNode() if first is not None else last
        for first, last in zip(leaves, inputs[-1], strict=True)
    ]
    layouts = {leaf: series.layout for series in plan(tree, rules).series for leaf in series.leaves}
    for position, layout in layouts.items():
        index = positions[position]
        leaf, last = leaves[index], inputs[-1][index]
        given = [wide_view(each[index], layout) for each in inputs]
        _, _, fan_in, fan_out = layout.axes
        parts = zip(*(to_parts(each, layout) for each in given), strict=True)
        results = zip(*(function(*part, fan_in, fan_out) for part in parts), strict=True)
        new, *rest = (from_parts(result, layout) for result in results)
        new = leave_view(new, layout, leaf)
        leaves[index] = kept_beside(placed_like(new.astype(leaf.dtype), leaf), leaf)
        more[index] = optax.MaskedNode()
        if rest:
            more[index] = kept_beside(placed_along(rest[0], last), last)
    return structure.unflatten(leaves), structure.unflatten(more)


def wide_view(leaf: jax.Array, layout: Layout) -> jax.Array:
    """Moves a leaf to the memory of its device, in float32 at least, and to its rule's view.

    What was kept of an update before has the axes of the view already.
    """
    wide = widened(on_device(leaf))
    is_whole = layout.stored is not None and leaf.shape == layout.stored.shape
    return enter_view(wide, layout) if is_whole else wide


def to_parts(leaf: jax.Array, layout: Layout) -> list[jax.Array]:
    """Cuts a leaf into the layout's arrays, each with an axis for equal parts before fan_out."""
    axis, arrays = layout.fan_out[0], [leaf]
    if len(layout.arrays) > 1:
        arrays = jnp.split(splittable(leaf, axis, layout.sizes), layout.bounds, axis)
    return [split_axis(array, axis, layout.equal_parts) for array in arrays]


def from_parts(arrays: Sequence[jax.Array], layout: Layout) -> jax.Array:
    """Joins the arrays of `to_parts` to a leaf again."""
    axis = layout.fan_out[0]
    merged = [merge_axes(array, axis) for array in arrays]
    return merged[0] if len(merged) == 1 else jnp.concatenate(merged, axis)


def placed_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """Puts an array where another of its rank lies, by the type of that one (explicit meshes)."""
    wanted = jax.typeof(other).sharding
    is_there = jax.typeof(array).sharding.spec == wanted.spec
    return array if is_there else jax.sharding.reshard(array, wanted)


def length(array: jax.Array, axes: Axes) -> int:
    """Multiplies the lengths of some axes."""
    return math.prod(array.shape[axis] for axis in axes)


def sum_of_squares(array: jax.Array, axes: Axes) -> jax.Array:
    """Adds up the squares of an array along some axes, which stay with length 1."""
    return jnp.sum(jnp.square(array), axes, keepdims=True)


def magnitude(array: jax.Array, axes: Axes) -> jax.Array:
    """Finds the largest absolute value along some axes, which stay with length 1; 1 where it is 0.

    Divided by it, entries have squares that are neither infinite nor all zero.
    """
    largest = jnp.max(jnp.abs(array), axes, keepdims=True)
    return jnp.where(largest == 0, jnp.ones_like(largest), largest)


def root_mean_square(array: jax.Array, axes: Axes) -> jax.Array:
    """Takes the root mean square along some axes, which stay with length 1.

    Unlike a norm it is finite for every finite array, however large or small its entries are.
    """
    unit = magnitude(array, axes)
    return unit * jnp.sqrt(sum_of_squares(array / unit, axes) / length(array, axes))
