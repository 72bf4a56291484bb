"""Leaves on a mesh that their rule sees in another shape (`Rule(view=...)`)."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from teon_optax._mesh.placement import cutting_axes, mesh_axes
from teon_optax._plan.layout import Layout, Stored, seen, unseen

# The axes of the mesh that cut each axis of an array.
Cuts = Sequence[tuple[str, ...]]


def cuts_of_view(
    layout: Layout, stored: Stored, cuts: Cuts, sizes: Mapping[str, int]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Finds how a mesh cuts the view of a leaf, and the leaf itself, so that both are the same cut.

    An axis of the mesh cuts both where the first axis of the view that an axis of the leaf becomes
    is a multiple of the pieces; along the others the leaf is gathered.

    Args:
      layout: Layout of the leaf, in its view.
      stored: How the leaf lies.
      cuts: The axes of the mesh that cut each axis of the leaf.
      sizes: Sizes of the axes of the mesh.

    Returns:
      What cuts each axis of the leaf, and what cuts each axis of its view.
    """
    order = stored.order
    kept: list[tuple[str, ...]] = [()] * len(order)
    of_view: list[tuple[str, ...]] = [()] * len(layout.shape)
    lengths = [stored.shape[axis] for axis in order]
    for own, viewed in _equal_runs(lengths, layout.shape):
        names = cuts[order[own]]
        pieces = math.prod(sizes[name] for name in names)
        if names and layout.shape[viewed] % pieces == 0:
            kept[order[own]] = of_view[viewed] = names
    return kept, of_view


def _equal_runs(lengths: Sequence[int], others: Sequence[int]) -> list[tuple[int, int]]:
    """Finds where two shapes of one size begin a run of axes that hold the same numbers.

    Returns:
      Positions in both shapes: (4, 6) and (4, 2, 3) have two such runs, (0, 0) and (1, 1).
    """
    starts = [np.cumprod([1, *shape])[:-1].tolist() for shape in (lengths, others)]
    # Of axes of length 1 the last is the one that a cut could be along.
    first, second = ({start: axis for axis, start in enumerate(each)} for each in starts)
    return [(first[start], second[start]) for start in first if start in second]


def enter_view(leaf: jax.Array, layout: Layout) -> jax.Array:
    """Reshapes a leaf to its view; on an explicit mesh it is cut as `cuts_of_view` says.

    Args:
      leaf: The leaf, in the shape of params.
      layout: Its layout, with or without a view.
    """
    stored, own = layout.stored, jax.typeof(leaf).sharding
    if stored is None or not cutting_axes(own.spec):
        return seen(leaf, layout)
    kept, of_view = cuts_of_view(layout, stored, _cuts(own), own.mesh.shape)
    leaf = jax.sharding.reshard(leaf, _sharding(own, kept)).transpose(stored.order)
    return jnp.reshape(leaf, layout.shape, out_sharding=_sharding(own, of_view))


def leave_view(update: jax.Array, layout: Layout, leaf: jax.Array) -> jax.Array:
    """Reshapes an update from its leaf's view to the leaf's shape: the inverse of `enter_view`.

    Args:
      update: The update, in the shape of the view.
      layout: The leaf's layout, with or without a view.
      leaf: The leaf that entered, whose type says how the mesh cut it.
    """
    stored, own = layout.stored, jax.typeof(leaf).sharding
    if stored is None or not cutting_axes(own.spec):
        return unseen(update, layout)
    kept, of_view = cuts_of_view(layout, stored, _cuts(own), own.mesh.shape)
    turned = jnp.reshape(
        jax.sharding.reshard(update, _sharding(own, of_view)),
        [stored.shape[axis] for axis in stored.order],
        out_sharding=_sharding(own, [kept[axis] for axis in stored.order]),
    )
    return turned.transpose(np.argsort(stored.order))


def _cuts(own: NamedSharding) -> list[tuple[str, ...]]:
    """Lists the axes of an explicit mesh that cut each axis of an array, from its type."""
    return [mesh_axes(names) for names in own.spec]


def _sharding(own: NamedSharding, cuts: Cuts) -> NamedSharding:
    """Writes cuts as a sharding on the mesh of another one."""
    return NamedSharding(own.mesh, PartitionSpec(*(names or None for names in cuts)))
