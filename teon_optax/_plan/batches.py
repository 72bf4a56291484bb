"""Gathers the matrices of leaves into batches of joint matrices, and scatters these again."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._plan.layout import Layout, joint_shape, to_leaf, to_matrices
from teon_optax._plan.plan import Series
from teon_optax._polar.newton_schulz import orthogonalize_batches
from teon_optax._polar.numerics import Numerics
from teon_optax._scaling import ScaleFunction

# Axes of the mesh that cut fan_in, and that cut fan_out; or d and N of joint matrices.
MeshAxes = tuple[tuple[str, ...], tuple[str, ...]]
_UNCUT: MeshAxes = (), ()
# How [groups, K, batch, fan_in, fan_out] is transposed, so that flattening gives joint matrices.
_ORDERS = {1: (0, 2, 1, 3, 4), 2: (0, 2, 3, 1, 4), 3: (0, 2, 1, 3, 4)}
_CACHE_SIZE = 64


class Piece(NamedTuple):
    """Matrices `start` to `stop`, along the first axis, of an array of `to_matrices`.

    Attributes:
      leaf: Position of the leaf in the tree.
      part: Which of the leaf's arrays it is of.
      start: The first matrix.
      stop: The one after the last.
    """

    leaf: int
    part: int
    start: int
    stop: int


class Batch(NamedTuple):
    """Groups that are one array, since they agree in all but their members.

    Attributes:
      K: How many matrices a group couples.
      batch: How many groups the batch axes and uncoupled parts of the leaves hold.
      fan_in: Size of one matrix's fan_in, as far as one device has it.
      fan_out: Size of its fan_out, as far as one device has it.
      mode: Mode of the unfolding.
      dtype: Dtype of the leaves in the tree that the plan is of; updates may have another.
      axes: Axes of the mesh that cut fan_in, and that cut fan_out; none where every device has
        these entire.
      pieces: The pieces of leaves that make up the groups, in order.
    """

    K: int
    batch: int
    fan_in: int
    fan_out: int
    mode: int
    dtype: Any
    axes: MeshAxes = _UNCUT
    pieces: tuple[Piece, ...] = ()

    @property
    def joint(self) -> tuple[int, int]:
        """Gives the shape of a group's joint matrix."""
        return joint_shape(self.K, self.fan_in, self.fan_out, self.mode)

    @property
    def stacks(self) -> tuple[int, ...]:
        """Gives the shape of the groups before they are unfolded; -1 stands for their number."""
        return -1, self.K, self.batch, self.fan_in, self.fan_out

    def scaled(self, scale: ScaleFunction) -> jax.typing.ArrayLike:
        """Asks `scale` for the factor of the update of one of the groups."""
        return scale(self.fan_in, self.fan_out, self.K, min(self.joint))

    def uncut(self, sizes: Mapping[str, int]) -> "Batch":
        """Gives the batch the sizes of entire groups, where one device has a piece of each.

        Args:
          sizes: Sizes of the axes of the mesh.
        """
        fan_in, fan_out = (
            fan * math.prod(sizes[name] for name in axes)
            for fan, axes in zip((self.fan_in, self.fan_out), self.axes, strict=True)
        )
        return self._replace(fan_in=fan_in, fan_out=fan_out)


# What is done to joint matrices [groups, m, n], an array for each batch; as many come back, of the
# same shapes.
JointFunction = Callable[[Sequence[Batch], list[jax.Array]], Sequence[jax.Array]]


def map_joint_matrices(
    leaves: Mapping[int, jax.Array],
    layouts: Mapping[int, Layout],
    batches: Sequence[Batch],
    function: JointFunction,
) -> dict[int, jax.Array]:
    """Gathers leaves into joint matrices, applies a function to these, and scatters the result.

    Args:
      leaves: Leaves by position in the tree, at least those that have a layout.
      layouts: How leaves hold their matrices.
      batches: Which matrices are joint.
      function: What is done to the joint matrices.

    Returns:
      The leaves that have a layout, in the dtype that the function gave.
    """
    matrices = {leaf: to_matrices(leaves[leaf], layout) for leaf, layout in layouts.items()}
    joint = [_gather(matrices, batch) for batch in batches]
    pieces: dict[Piece, jax.Array] = {}
    for batch, result in zip(batches, function(batches, joint), strict=True):
        pieces |= _scatter(result, batch)
    parts: dict[int, list[list[jax.Array]]] = {
        leaf: [[] for _ in layout.arrays] for leaf, layout in layouts.items()
    }
    for piece in sorted(pieces):
        parts[piece.leaf][piece.part].append(pieces[piece])
    return {
        leaf: to_leaf([_concatenate(part) for part in parts[leaf]], layout)
        for leaf, layout in layouts.items()
    }


def scaled_polar_factors(
    batches: Sequence[Batch],
    joint: Sequence[jax.Array],
    numerics: Numerics,
    scale: ScaleFunction,
    eps: jax.typing.ArrayLike,
) -> list[jax.Array]:
    """Makes polar factors of joint matrices, and multiplies each by the factor of its group.

    Args:
      batches: What the matrices are.
      joint: Joint matrices [groups, m, n] of each batch, all of them entire on this device.
      numerics: The method, and the precision of its products.
      scale: Factor of a group, from its (fan_in, fan_out, K, rank of a full-rank joint matrix).
      eps: What bounds tiny matrices, as in `orthogonalize_batches`.
    """
    scales = [batch.scaled(scale) for batch in batches]
    dtypes = [batch.dtype for batch in batches]
    return orthogonalize_batches(joint, scales, numerics, eps, dtypes)


@functools.lru_cache(_CACHE_SIZE)
def batches_of(
    all_series: tuple[Series, ...], axes: tuple[MeshAxes, ...] = ()
) -> tuple[Batch, ...]:
    """Divides series into groups, and these into batches that are one array each.

    Args:
      all_series: Which matrices the leaves hold.
      axes: Along which axes of the mesh each series is cut, if its leaves are those of shards.
    """
    found: dict[Batch, list[Piece]] = {}
    for series, cutting in zip(all_series, axes or (_UNCUT,) * len(all_series), strict=True):
        stack, depth = series.rule.stack, series.depth
        full = depth - depth % stack
        for start, stop, layers in ((0, full, stack), (full, depth, depth - full)):
            if start < stop:
                K = layers * series.coupled
                # A single matrix has no other layer to share an axis with: modes 1 and 2 agree.
                mode = 1 if K == 1 and series.rule.mode == 2 else series.rule.mode
                batch = Batch(K, series.alone, *series.matrix, mode, series.dtype, cutting)
                found.setdefault(batch, []).extend(pieces_of(series, start, stop))
    return tuple(batch._replace(pieces=tuple(pieces)) for batch, pieces in found.items())


def pieces_of(series: Series, start: int, stop: int) -> Iterator[Piece]:
    """Lists the pieces with layers `start` to `stop` of a series, those of one layer together."""
    each, coupled = series.layers_per_leaf, series.layout.coupled
    for position in range(start // each, -(-stop // each)):
        first, last = max(start - position * each, 0), min(stop - position * each, each)
        # Siblings of one layer come one after the other, so scanned ones come layer by layer.
        step = last - first if series.siblings == 1 else 1
        leaves = series.leaves[position * series.siblings : (position + 1) * series.siblings]
        for layer, leaf in itertools.product(range(first, last, step), leaves):
            yield Piece(leaf, series.part, layer * coupled, (layer + step) * coupled)


def _gather(matrices: Mapping[int, Sequence[jax.Array]], batch: Batch) -> jax.Array:
    """Stacks the matrices of each group of a batch and unfolds them: [groups, m, n].

    Updates of one batch may differ in dtype although params do not: then the joint matrices have a
    common one, of float32 at least.
    """
    arrays = [matrices[piece.leaf][piece.part][piece.start : piece.stop] for piece in batch.pieces]
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) > 1:
        dtype = functools.reduce(np.promote_types, dtypes, np.dtype("float32"))
        arrays = [array.astype(dtype) for array in arrays]
    rows = _concatenate([array.reshape(-1, batch.fan_out) for array in arrays])
    return _unfold(rows.reshape(batch.stacks), batch.mode)


def _scatter(joint: jax.Array, batch: Batch) -> dict[Piece, jax.Array]:
    """Folds joint matrices and slices them into the pieces that `_gather` stacked."""
    rows = _fold(joint, batch.stacks, batch.mode).reshape(-1, batch.fan_out)
    zero = _unfoldable_zero(joint)
    arrays, start = {}, 0
    for piece in batch.pieces:
        shape = piece.stop - piece.start, batch.batch, batch.fan_in, batch.fan_out
        stop = start + math.prod(shape[:-1])
        arrays[piece] = _row_slice(rows, zero, start, stop).reshape(shape)
        start = stop
    return arrays


def _unfold(stacks: jax.Array, mode: int) -> jax.Array:
    """Unfolds [groups, K, batch, fan_in, fan_out] to joint matrices [groups x batch, m, n]."""
    _, K, _, fan_in, fan_out = stacks.shape
    return stacks.transpose(_ORDERS[mode]).reshape(-1, *joint_shape(K, fan_in, fan_out, mode))


def _fold(joint: jax.Array, shape: tuple[int, ...], mode: int) -> jax.Array:
    """Folds joint matrices to stacks of this shape, in which -1 may stand for the groups."""
    order = _ORDERS[mode]
    return joint.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _unfoldable_zero(array: jax.Array) -> jax.Array:
    """Makes a zero that the compiler cannot know to be one."""
    row = array[0, 0]
    return jnp.max(((row < 0) & (row > 0)).astype(jnp.uint32))


def _row_slice(rows: jax.Array, zero: jax.Array, start: int, stop: int) -> jax.Array:
    """Slices `rows[start:stop]`, with `start` an operand.

    XLA:CPU compiles equal kernels once, but one for each constant `start`: 25 ms a leaf, half of
    the compile time of a deep network.
    """
    if (start, stop) == (0, len(rows)):
        return rows
    # There an operand may be cut, by `jax.vmap` over what lies along the mesh.
    if jax.sharding.AxisType.Explicit in jax.typeof(rows).sharding.mesh.axis_types:
        return rows[start:stop]
    (origin,) = jax.lax.dynamic_slice(np.array([start, 0], np.uint32), (zero,), (1,))
    return jax.lax.dynamic_slice(rows, (origin, np.uint32(0)), (stop - start, rows.shape[1]))


def _concatenate(arrays: Sequence[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
