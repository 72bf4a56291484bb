"""Leaves on a mesh that their rule sees in another shape (`Rule(view=...)`)."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from teon_optax._mesh.placement import Located
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


def enter_view(located: Located, index: int, leaf: jax.Array, layout: Layout) -> jax.Array:
    """Reshapes a leaf on a mesh to its view, which is cut as `cuts_of_view` says.

    Args:
      located: Where leaves lie.
      index: Position of the leaf in the tree.
      leaf: The leaf.
      layout: Its layout.
    """
    stored = layout.stored
    if stored is None or not located.typed:
        return seen(leaf, layout)
    kept, of_view = _known_cuts(located, index, layout, stored)
    leaf = _placed(located, leaf, kept).transpose(stored.order)
    return jnp.reshape(leaf, layout.shape, out_sharding=_sharding(located, of_view))


def leave_view(located: Located, index: int, update: jax.Array, layout: Layout) -> jax.Array:
    """Reshapes an update from its leaf's view to the leaf's shape: the inverse of `enter_view`."""
    stored = layout.stored
    if stored is None or not located.typed:
        return unseen(update, layout)
    kept, of_view = _known_cuts(located, index, layout, stored)
    turned = jnp.reshape(
        _placed(located, update, of_view),
        [stored.shape[axis] for axis in stored.order],
        out_sharding=_sharding(located, [kept[axis] for axis in stored.order]),
    )
    return turned.transpose(np.argsort(stored.order))


def _known_cuts(
    located: Located, index: int, layout: Layout, stored: Stored
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Finds `cuts_of_view` of a leaf whose type says how it lies."""
    cuts = located.cuts(index, len(stored.shape)) or [()] * len(stored.shape)
    return cuts_of_view(layout, stored, cuts, located.sizes)


def _placed(located: Located, array: jax.Array, cuts: Cuts) -> jax.Array:
    """Moves an array so that it is cut in this way."""
    return jax.sharding.reshard(array, _sharding(located, cuts))


def _sharding(located: Located, cuts: Cuts) -> NamedSharding:
    """Writes cuts as a sharding on the leaves' mesh."""
    return NamedSharding(located.mesh, PartitionSpec(*(names or None for names in cuts)))
