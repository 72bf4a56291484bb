"""Leaves become batches of joint matrices, and batches become leaves."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._plan.layout import joint_shape, to_leaf, to_matrices
from teon_optax._plan.plan import Series
from teon_optax._polar.newton_schulz import orthogonalize_batches
from teon_optax._polar.numerics import Numerics
from teon_optax._scaling import ScaleFunction

# Axes of the mesh that cut fan_in, and that cut fan_out; or d and N of joint matrices.
MeshAxes = tuple[tuple[str, ...], tuple[str, ...]]
# How [groups, K, batch, fan_in, fan_out] is transposed, so that flattening gives joint matrices.
_ORDERS = {1: (0, 2, 1, 3, 4), 2: (0, 2, 3, 1, 4), 3: (0, 2, 1, 3, 4)}


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


class BatchKey(NamedTuple):
    """What the groups of a batch agree in, which are one array.

    Attributes:
      K: How many matrices a group couples.
      batch: How many groups the batch axes and uncoupled parts of the leaves hold.
      fan_in: Length of one matrix's fan_in, as far as one device holds it.
      fan_out: Length of its fan_out, as far as one device holds it.
      mode: Mode of the unfolding.
      dtype: Dtype of the leaves.
      axes: Axes of the mesh that cut fan_in, and that cut fan_out; none where every device holds
        these whole.
    """

    K: int
    batch: int
    fan_in: int
    fan_out: int
    mode: int
    dtype: Any
    axes: MeshAxes = ((), ())

    @property
    def joint(self) -> tuple[int, int]:
        """Shape of a group's joint matrix."""
        return joint_shape(self.K, self.fan_in, self.fan_out, self.mode)

    @property
    def stacks(self) -> tuple[int, ...]:
        """Shape of the groups before they are unfolded; -1 stands for their number."""
        return -1, self.K, self.batch, self.fan_in, self.fan_out

    def scaled(self, scale: ScaleFunction) -> jax.typing.ArrayLike:
        """What `scale` gives to the update of one of the groups."""
        return scale(self.fan_in, self.fan_out, self.K, min(self.joint))

    def whole(self, sizes: Mapping[str, int]) -> "BatchKey":
        """The key of the whole groups of which one device holds a piece.

        Args:
          sizes: Sizes of the axes of the mesh.
        """
        fan_in, fan_out = (
            fan * math.prod(sizes[name] for name in axes)
            for fan, axes in zip((self.fan_in, self.fan_out), self.axes, strict=True)
        )
        return self._replace(fan_in=fan_in, fan_out=fan_out)


def in_batches(
    leaves: Mapping[int, jax.Array],
    all_series: Sequence[Series],
    function: Callable[[dict[BatchKey, jax.Array]], Mapping[BatchKey, jax.Array]],
    axes: Mapping[int, MeshAxes] | None = None,
) -> dict[int, jax.Array]:
    """Leaves in which `function` has replaced all joint matrices.

    Args:
      leaves: By position in the tree, at least those of the series.
      all_series: Which matrices the leaves hold.
      function: From joint matrices [groups, m, n] by key to as many of the same shapes.
      axes: As for `pieces_by_batch`.
    """
    layouts = {leaf: series.layout for series in all_series for leaf in series.leaves}
    matrices = {leaf: to_matrices(leaves[leaf], layouts[leaf]) for leaf in layouts}
    batches = pieces_by_batch(all_series, leaves, axes)
    joint = {key: _gather(matrices, key, pieces) for key, pieces in batches.items()}
    replaced: dict[Piece, jax.Array] = {}
    for key, result in function(joint).items():
        replaced |= _scatter(result, key, batches[key])
    by_leaf: dict[int, list[list[jax.Array]]] = {
        leaf: [[] for _ in layout.arrays] for leaf, layout in layouts.items()
    }
    for piece in sorted(replaced):
        by_leaf[piece.leaf][piece.part].append(replaced[piece].astype(leaves[piece.leaf].dtype))
    return {
        leaf: to_leaf([_concatenate(pieces) for pieces in parts], layouts[leaf])
        for leaf, parts in by_leaf.items()
    }


def scaled_polar_factors(
    joint: Mapping[BatchKey, jax.Array], numerics: Numerics, scale: ScaleFunction
) -> dict[BatchKey, jax.Array]:
    """Polar factors of joint matrices, each times the factor of its group.

    Args:
      joint: Joint matrices [groups, m, n] by key, whole on this device.
      numerics: By which polynomial and in which precision.
      scale: Factor of a group, from its (fan_in, fan_out, K, rank of a full-rank joint matrix).
    """
    scales = [key.scaled(scale) for key in joint]
    factors = orthogonalize_batches(list(joint.values()), scales, numerics)
    return dict(zip(joint, factors, strict=True))


def pieces_by_batch(
    all_series: Sequence[Series],
    leaves: Mapping[int, Any],
    axes: Mapping[int, MeshAxes] | None = None,
) -> dict[BatchKey, list[Piece]]:
    """Finds the pieces of leaves that make up all groups, in order, by the batch they belong to.

    Args:
      all_series: Which matrices the leaves hold.
      leaves: By position in the tree; their dtypes count.
      axes: Along which axes of the mesh leaves are cut, if the series are those of shards.
    """
    found: dict[BatchKey, list[Piece]] = {}
    for series in all_series:
        stack, depth = series.rule.stack, series.depth
        full = depth - depth % stack
        dtype = _common_dtype([leaves[leaf].dtype for leaf in series.leaves])
        for start, stop, layers in ((0, full, stack), (full, depth, depth - full)):
            if start < stop:
                K, first = layers * series.coupled, series.leaves[0]
                # A single matrix has no other layer to share an axis with: modes 1 and 2 agree.
                mode = 1 if K == 1 and series.rule.mode == 2 else series.rule.mode
                key = BatchKey(K, series.alone, *series.matrix, mode, dtype)
                key = key._replace(axes=axes[first]) if axes else key
                found.setdefault(key, []).extend(pieces_of(series, start, stop))
    return found


def _common_dtype(dtypes: Sequence[Any]) -> Any:
    """The dtype of all leaves, or a common one of float32 at least where they differ.

    Updates may, although the params of a series do not.
    """
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return functools.reduce(np.promote_types, dtypes, np.dtype("float32"))


def pieces_of(series: Series, start: int, stop: int) -> Iterator[Piece]:
    """The pieces that hold layers `start` to `stop` of a series, those of one layer together."""
    each, coupled = series.layers_per_leaf, series.layout.coupled
    for position in range(start // each, -(-stop // each)):
        first, last = max(start - position * each, 0), min(stop - position * each, each)
        # Siblings of one layer come one after the other, so scanned ones come layer by layer.
        step = last - first if series.siblings == 1 else 1
        leaves = series.leaves[position * series.siblings : (position + 1) * series.siblings]
        for layer, leaf in itertools.product(range(first, last, step), leaves):
            yield Piece(leaf, series.part, layer * coupled, (layer + step) * coupled)


def _gather(
    matrices: Mapping[int, Sequence[jax.Array]], key: BatchKey, pieces: Sequence[Piece]
) -> jax.Array:
    """Joint matrices of all groups of a batch: [groups, m, n]."""
    arrays = [matrices[piece.leaf][piece.part][piece.start : piece.stop] for piece in pieces]
    rows = _concatenate([array.reshape(-1, key.fan_out).astype(key.dtype) for array in arrays])
    return _unfold(rows.reshape(key.stacks), key.mode)


def _scatter(joint: jax.Array, key: BatchKey, pieces: Sequence[Piece]) -> dict[Piece, jax.Array]:
    """Inverse of `_gather`."""
    rows = _fold(joint, key.stacks, key.mode).reshape(-1, key.fan_out)
    zero = _unfoldable_zero(joint)
    arrays, start = {}, 0
    for piece in pieces:
        shape = piece.stop - piece.start, key.batch, key.fan_in, key.fan_out
        stop = start + math.prod(shape[:-1])
        arrays[piece] = _row_slice(rows, zero, start, stop).reshape(shape)
        start = stop
    return arrays


def _unfold(stacks: jax.Array, mode: int) -> jax.Array:
    """Stacks [groups, K, batch, fan_in, fan_out] to joint matrices [groups x batch, m, n]."""
    _, K, _, fan_in, fan_out = stacks.shape
    return stacks.transpose(_ORDERS[mode]).reshape(-1, *joint_shape(K, fan_in, fan_out, mode))


def _fold(joint: jax.Array, shape: tuple[int, ...], mode: int) -> jax.Array:
    """Joint matrices back to stacks of this shape, in which -1 may stand for the groups."""
    order = _ORDERS[mode]
    return joint.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _unfoldable_zero(array: jax.Array) -> jax.Array:
    """A zero that the compiler cannot know to be one."""
    row = array[0, 0]
    return jnp.max(((row < 0) & (row > 0)).astype(jnp.uint32))


def _row_slice(rows: jax.Array, zero: jax.Array, start: int, stop: int) -> jax.Array:
    """`rows[start:stop]`, with `start` an operand.

    XLA:CPU compiles equal kernels once, but one for each constant `start`: 25 ms a leaf, half of
    the compile time of a deep network.
    """
    if (start, stop) == (0, len(rows)):
        return rows
    (origin,) = jax.lax.dynamic_slice(np.array([start, 0], np.uint32), (zero,), (1,))
    return jax.lax.dynamic_slice(rows, (origin, np.uint32(0)), (stop - start, rows.shape[1]))


def _concatenate(arrays: Sequence[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
