"""Leaves become batches of joint matrices, and batches become leaves."""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._groups.coupling import joint_shape
from teon_optax._groups.layout import to_leaf, to_matrices
from teon_optax._groups.plan import Type
from teon_optax._mixing import Mix, mixed, slices, unmixed

# Axes of the mesh along fan_in and along fan_out.
Axes = tuple[tuple[str, ...], tuple[str, ...]]


class _Piece(NamedTuple):
    """Matrices `start` to `stop` of one part of a leaf."""

    leaf: int
    part: int
    start: int
    stop: int


class Batch(NamedTuple):
    """What groups agree in that are orthogonalized as one array."""

    K: int  # of a joint matrix; 1 for slices of a transform
    batch: int
    fan_in: int
    fan_out: int
    mode: int
    dtype: Any
    axes: Axes
    mix: Mix | None = None

    @property
    def joint(self) -> tuple[int, int]:
        """Shape of a group's joint matrix."""
        return joint_shape(self.K, self.fan_in, self.fan_out, self.mode)

    def whole(self, sizes: Mapping[str, int]) -> "Batch":
        """The batch of which this is one device's block, on a mesh of these sizes."""
        fans = zip((self.fan_in, self.fan_out), self.axes, strict=True)
        fan_in, fan_out = (fan * math.prod(sizes[name] for name in axes) for fan, axes in fans)
        return self._replace(fan_in=fan_in, fan_out=fan_out)

    @property
    def order(self) -> tuple[int, ...]:
        """Transposition of [groups, K, batch, fan_in, fan_out] that flattens to joint matrices."""
        return (0, 2, 3, 1, 4) if self.mode == 2 else (0, 2, 1, 3, 4)


def in_batches(
    leaves: Mapping[int, jax.Array],
    types: Sequence[Type],
    function: Callable[[dict[Batch, jax.Array]], Mapping[Batch, jax.Array]],
    axes: Mapping[int, Axes] | None = None,
) -> dict[int, jax.Array]:
    """Leaves of which `function` has replaced all joint matrices.

    Args:
      leaves: By position in the tree, at least those of the types.
      types: Which matrices the leaves hold.
      function: From joint matrices [B, m, n] to as many of the same shapes.
      axes: As for `batches`.
    """
    layouts = {leaf: kind.layout for kind in types for leaf in kind.leaves}
    matrices = {leaf: to_matrices(leaves[leaf], layouts[leaf]) for leaf in layouts}
    pieces = batches(types, leaves, axes)
    joint = {key: _gather(matrices, key, pieces[key]) for key in pieces}
    parts: dict[int, dict[_Piece, jax.Array]] = {leaf: {} for leaf in layouts}
    for key, result in function(joint).items():
        for piece, layers in _scatter(result, key, pieces[key]).items():
            held = parts[piece.leaf]
            # A piece may be in two batches, the real and the complex slices of a transform.
            held[piece] = held[piece] + layers if piece in held else layers
    done = {}
    for leaf, of_leaf in parts.items():
        by_part = itertools.groupby(sorted(of_leaf), key=operator.attrgetter("part"))
        dtype = leaves[leaf].dtype
        whole = [_concatenate([of_leaf[p].astype(dtype) for p in part]) for _, part in by_part]
        done[leaf] = to_leaf(whole, layouts[leaf])
    return done


def batches(
    types: Sequence[Type], leaves: Mapping[int, Any], axes: Mapping[int, Axes] | None = None
) -> dict[Batch, list[_Piece]]:
    """All groups by what they agree in, as the pieces of leaves that make them up, in order.

    Args:
      types: Which matrices the leaves hold.
      leaves: By position in the tree; their dtypes count.
      axes: Along which axes of the mesh leaves are cut, if types are those of shards.
    """
    found: dict[Batch, list[_Piece]] = {}
    for kind in types:
        stack, total = kind.rule.stack, kind.depth
        whole = total - total % stack
        for start, stop, layers in ((0, whole, stack), (whole, total, total - whole)):
            if start < stop:
                K, first = layers * kind.coupled, kind.leaves[0]
                # A single matrix has no other layer to share an axis with: modes 1 and 2 agree.
                mode = 1 if K == 1 and kind.rule.mode == 2 else kind.rule.mode
                dtype, cut = leaves[first].dtype, axes[first] if axes else ((), ())
                key = Batch(K, kind.batch, *kind.matrix, mode, dtype, cut)
                for own in _by_slices(key, kind.rule.transform):
                    found.setdefault(own, []).extend(pieces_of(kind, start, stop))
    return found


def _by_slices(key: Batch, transform: str | None) -> list[Batch]:
    """A batch's real and its complex slices, or the batch itself where nothing is mixed."""
    found, wide = [], np.promote_types(key.dtype, np.float32)
    for index, weights in enumerate(slices(transform, key.K)):
        dtype = np.promote_types(wide, np.complex64) if np.iscomplexobj(weights) else wide
        found.append(key._replace(K=1, dtype=dtype, mix=Mix(transform, key.K, index)))
    return found or [key]


def pieces_of(kind: Type, start: int, stop: int) -> Iterator[_Piece]:
    """Layers `start` to `stop` of a type, of each the siblings, and of these the joined parts."""
    each, heads = (kind.layout.length(axes) for axes in (kind.layout.layer, kind.layout.heads))
    for position in range(start // each, -(-stop // each)):
        first, last = max(start - position * each, 0), min(stop - position * each, each)
        step = last - first if kind.siblings == len(kind.parts) == 1 else 1
        leaves = kind.leaves[position * kind.siblings : (position + 1) * kind.siblings]
        for layer, leaf, part in itertools.product(range(first, last, step), leaves, kind.parts):
            yield _Piece(leaf, part, layer * heads, (layer + step) * heads)


def _gather(
    matrices: Mapping[int, Sequence[jax.Array]], key: Batch, pieces: Sequence[_Piece]
) -> jax.Array:
    """Joint matrices of all groups of a batch: [B, m, n]."""
    layers = [matrices[piece.leaf][piece.part][piece.start : piece.stop] for piece in pieces]
    rows = _concatenate([array.reshape(-1, key.fan_out) for array in layers])
    if key.mix is not None:
        rows = mixed(key.mix, rows.reshape(-1, key.batch * key.fan_in, key.fan_out))
    stacked = rows.reshape(-1, key.K, key.batch, key.fan_in, key.fan_out)
    return stacked.transpose(key.order).reshape(-1, *key.joint)


def _scatter(joint: jax.Array, key: Batch, pieces: Sequence[_Piece]) -> dict[_Piece, jax.Array]:
    """Inverse of `_gather`."""
    stacked = -1, key.K, key.batch, key.fan_in, key.fan_out
    transposed = joint.reshape([stacked[axis] for axis in key.order])
    rows = transposed.transpose(np.argsort(key.order)).reshape(-1, key.fan_out)
    if key.mix is not None:
        matrices = rows.reshape(-1, key.batch * key.fan_in, key.fan_out)
        rows = unmixed(key.mix, matrices).reshape(-1, key.fan_out)
    zero = _unfoldable_zero(joint.real)
    layers, start = {}, 0
    for piece in pieces:
        stop = start + (piece.stop - piece.start) * key.batch * key.fan_in
        shape = piece.stop - piece.start, key.batch, key.fan_in, key.fan_out
        layers[piece] = _row_slice(rows, zero, start, stop).reshape(shape)
        start = stop
    return layers


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
