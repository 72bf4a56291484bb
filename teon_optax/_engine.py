"""Plan and updates become orthogonalized updates: matrices to batches, and back."""

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax import _policy
from teon_optax._coefficients import Method
from teon_optax._matrices import to_leaf, to_matrices
from teon_optax._plan import Plan, Type, joint_shape
from teon_optax._polar import method_cut, orthogonalize_batches

# (fan_in, fan_out, K, rank) of a group -> factor of its orthogonalized update.
ScaleFunction = Callable[[int, int, int, int], jax.typing.ArrayLike]


class _Piece(NamedTuple):
    """Layers `start` to `stop` of one part of a leaf."""

    leaf: int
    part: int
    start: int
    stop: int


class _Batch(NamedTuple):
    """What groups agree in that are orthogonalized as one array."""

    K: int
    batch: int
    fan_in: int
    fan_out: int
    mode: int
    dtype: Any

    @property
    def joint(self) -> tuple[int, int]:
        """Shape of a group's joint matrix."""
        return joint_shape(self.K, self.fan_in, self.fan_out, self.mode)

    @property
    def order(self) -> tuple[int, ...]:
        """Transposition of [groups, K, batch, fan_in, fan_out] that flattens to joint matrices."""
        return (0, 2, 3, 1, 4) if self.mode == 2 else (0, 2, 1, 3, 4)

    @property
    def stacked(self) -> tuple[int, ...]:
        """Shape before that transposition."""
        return (-1, self.K, self.batch, self.fan_in, self.fan_out)


class _Bucket(NamedTuple):
    """What batches agree in that share one polynomial."""

    d: int
    dtype: Any
    cut: tuple[int, ...]
    precision: jax.lax.PrecisionLike


def orthogonalize_updates(
    updates: Any,
    plan: Plan,
    method: Method | None,
    scale: ScaleFunction,
    precision: jax.lax.PrecisionLike = None,
) -> Any:
    """Replaces every leaf in the plan's groups by its orthogonalized and scaled update.

    Args:
      updates: The tree that the plan was made for.
      plan: Which matrices are orthogonalized together.
      method: As `resolve` gives it.
      scale: Factor for a group, from its (fan_in, fan_out, K, rank of a full-rank joint matrix).
      precision: Of every product; None follows the policy.
    """
    leaves, structure = jax.tree.flatten(updates)
    layouts = {leaf: kind.layout for kind in plan.types for leaf in kind.leaves}
    matrices = {leaf: to_matrices(leaves[leaf], layouts[leaf]) for leaf in layouts}
    batches = _batches(plan.types, leaves)
    parts: dict[int, dict[_Piece, jax.Array]] = {leaf: {} for leaf in layouts}
    for bucket, keys in _buckets(batches, method, precision).items():
        joint = [_gather(matrices, key, batches[key]) for key in keys]
        scales = [scale(key.fan_in, key.fan_out, key.K, min(key.joint)) for key in keys]
        results = orthogonalize_batches(
            joint,
            scales,
            method=method,
            cut=bucket.cut,
            precision=bucket.precision,
            budget=_policy.budget(jax.default_backend()),
        )
        for key, result in zip(keys, results, strict=True):
            for piece, layers in _scatter(result, key, batches[key]).items():
                parts[piece.leaf][piece] = layers.astype(key.dtype)
    for leaf, pieces in parts.items():
        by_part = itertools.groupby(sorted(pieces), key=operator.attrgetter("part"))
        whole = [_concatenate([pieces[piece] for piece in part]) for _, part in by_part]
        leaves[leaf] = to_leaf(whole, layouts[leaf])
    return structure.unflatten(leaves)


def _batches(types: Sequence[Type], leaves: Sequence[jax.Array]) -> dict[_Batch, list[_Piece]]:
    """All groups by what they agree in, as the pieces of leaves that make them up, in order."""
    batches: dict[_Batch, list[_Piece]] = {}
    for kind in types:
        total = len(kind.members)
        whole = total - total % kind.rule.stack
        for start, stop, K in ((0, whole, kind.rule.stack), (whole, total, total - whole)):
            if start < stop:
                # A single matrix has no other layer to share an axis with: modes 1 and 2 agree.
                mode = 1 if K == 1 and kind.rule.mode == 2 else kind.rule.mode
                dtype = leaves[kind.leaves[0]].dtype
                key = _Batch(K, kind.batch, *kind.matrix, mode, dtype)
                batches.setdefault(key, []).extend(_pieces(kind, start, stop))
    return batches


def _pieces(kind: Type, start: int, stop: int) -> Iterator[_Piece]:
    """Layers `start` to `stop` of a type, leaf by leaf; a scanned leaf holds many."""
    each = len(kind.members) // len(kind.leaves)
    for position in range(start // each, -(-stop // each)):
        first = position * each
        yield _Piece(
            kind.leaves[position], kind.part, max(start - first, 0), min(stop - first, each)
        )


def _buckets(
    batches: Mapping[_Batch, Any], method: Method | None, precision: jax.lax.PrecisionLike
) -> dict[_Bucket, list[_Batch]]:
    """Batches by the size of their Gram matrices and the way that policy takes with them."""
    buckets: dict[_Bucket, list[_Batch]] = {}
    for key in batches:
        dtype = np.promote_types(key.dtype, np.float32)
        used = _policy.products(jax.default_backend(), dtype) if precision is None else precision
        bucket = _Bucket(min(key.joint), dtype, method_cut(method, *key.joint, used), used)
        buckets.setdefault(bucket, []).append(key)
    return buckets


def _gather(
    matrices: Mapping[int, Sequence[jax.Array]], key: _Batch, pieces: Sequence[_Piece]
) -> jax.Array:
    """Joint matrices of all groups of a batch: [B, m, n]."""
    layers = [matrices[piece.leaf][piece.part][piece.start : piece.stop] for piece in pieces]
    rows = _concatenate([array.reshape(-1, key.fan_out) for array in layers])
    return rows.reshape(key.stacked).transpose(key.order).reshape(-1, *key.joint)


def _scatter(joint: jax.Array, key: _Batch, pieces: Sequence[_Piece]) -> dict[_Piece, jax.Array]:
    """Inverse of `_gather`."""
    order = key.order
    transposed = joint.reshape([-1, *(key.stacked[axis] for axis in order[1:])])
    rows = transposed.transpose(np.argsort(order)).reshape(-1, key.fan_out)
    zero = _unfoldable_zero(joint)
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
