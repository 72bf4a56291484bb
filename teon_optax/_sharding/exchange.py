"""Whole groups to their owners and back, by one all_to_all each way.

For use inside `jax.shard_map`. Every device holds a block of every group, and gets some groups
whole. A group's joint matrix is d x N here, d <= N. Its rows and columns arrive in any order, since
the polar factor of a permuted matrix is the permuted polar factor; zeros are added as columns where
groups of unequal N meet, and stay zero.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._sharding.assignment import Block, Exchange, Hand, count


def to_owners(plan: Exchange, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Blocks [count, d / .., N / ..] of one dtype to owned matrices [rows, d, width / share].

    One array for each hand of the plan.
    """
    stops: dict[int, list[int]] = {}
    for index, _, stop in itertools.chain(*(hand.members for hand in plan.hands)):
        stops.setdefault(index, []).append(stop)
    pieces = {i: iter(jnp.split(arrays[i], stops[i][:-1])) for i in stops}
    packed = [
        _pack(plan, hand, [next(pieces[index]) for index, _, _ in hand.members])
        for hand in plan.hands
    ]
    owned = []
    for hand, sent in zip(plan.hands, _swap(plan, packed), strict=True):
        kinds = [plan.blocks[index]._replace(count=0) for index, _, _ in hand.members]
        owned.append(own_branch(plan, hand, kinds, functools.partial(_assemble, plan, hand), sent))
    return owned


def from_owners(plan: Exchange, matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Inverse of `to_owners`, and its transpose: it moves numbers, and adds zeros."""
    dtype = matrices[0].dtype
    shapes = [(block.count, *plan.held(index)) for index, block in enumerate(plan.blocks)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    (done,) = jax.linear_transpose(functools.partial(to_owners, plan), arrays)(list(matrices))
    return done


def _swap(plan: Exchange, packed: Sequence[jax.Array]) -> list[jax.Array]:
    """What device i holds for device j, [devices, ...] per hand, goes there, all in one message."""
    if not plan.axes:
        return list(packed)
    ends = np.cumsum([array.shape[1] for array in packed])[:-1]
    message = jnp.concatenate(packed, axis=1)
    return jnp.split(jax.lax.all_to_all(message, plan.axes, 0, 0, tiled=True), ends, axis=1)


def _pack(plan: Exchange, hand: Hand, pieces: Sequence[jax.Array]) -> jax.Array:
    """This device's blocks of a hand's groups, by the slot they go to: [devices, ...]."""
    slots = []
    for (index, _, _), groups in zip(hand.members, pieces, strict=True):
        width = hand.width // count(plan.blocks[index].axes[1], dict(plan.sizes))
        padded = jnp.pad(groups, ((0, 0), (0, 0), (0, width - groups.shape[2])))
        columns = padded.reshape(*groups.shape[:2], hand.share, -1)
        slots.append(columns.transpose(0, 2, 1, 3).reshape(len(groups) * hand.share, -1))
    dealt = jnp.concatenate(slots)
    empty = hand.rows * plan.devices - len(dealt)
    rows = jnp.pad(dealt, ((0, empty), (0, 0))).reshape(hand.rows, plan.devices, -1)
    return rows.transpose(1, 0, 2).reshape(plan.devices, -1)


def _assemble(plan: Exchange, hand: Hand, block: Block, arrived: jax.Array) -> jax.Array:
    """Matrices [rows, d, width / share] from what devices sent, if it is of this block.

    Columns of zeros come last; but those of shared groups are where devices put them.
    """
    sizes = dict(plan.sizes)
    pieces = count(block.axes[1], sizes)
    d, N = block.d // count(block.axes[0], sizes), hand.width // pieces // hand.share
    grid = arrived.reshape(*sizes.values(), hand.rows, d, N)
    along_d, along_N = ([plan.axes.index(name) for name in along] for along in block.axes)
    mesh = len(plan.axes)
    order = mesh, *along_d, mesh + 1, *along_N, mesh + 2
    columns = grid.transpose(order).reshape(hand.rows, hand.d, pieces, N)
    if hand.share > 1:
        return columns.reshape(hand.rows, hand.d, -1)
    filled = columns[..., : block.N // pieces].reshape(hand.rows, hand.d, -1)
    return jnp.pad(filled, ((0, 0), (0, 0), (0, hand.width - block.N)))


def own_branch(
    plan: Exchange,
    hand: Hand,
    kinds: Sequence[Any],
    function: Callable[[Any, jax.Array], jax.Array],
    array: jax.Array,
) -> jax.Array:
    """`function` of the kind of this device's matrices, of those given by member, and an array."""
    distinct = sorted(set(kinds))
    if len(distinct) == 1:
        return function(distinct[0], array)
    mine = _mine(plan, hand, [distinct.index(kind) for kind in kinds])
    return jax.lax.switch(mine, [functools.partial(function, kind) for kind in distinct], array)


def own_value(plan: Exchange, hand: Hand, values: Sequence[jax.Array]) -> jax.Array:
    """Of values given by member, that of this device's matrices."""
    if len(values) == 1:
        return values[0]
    return jnp.stack(values)[_mine(plan, hand, range(len(values)))]


def _mine(plan: Exchange, hand: Hand, values: Sequence[int]) -> jax.Array:
    """Of numbers given by member, that of this device's matrices; the first's if it has none."""
    slots = [
        value
        for value, (_, start, stop) in zip(values, hand.members, strict=True)
        for _ in range((stop - start) * hand.share)
    ]
    by_device = (slots + slots[:1] * plan.devices)[: plan.devices]
    return jnp.asarray(by_device, jnp.int32)[jax.lax.axis_index(plan.axes)]


def shared_total(plan: Exchange, hand: Hand, G: jax.Array) -> jax.Array:
    """Sum of Hermitian matrices over the devices that share a group; half of each is sent."""
    return _square(jax.lax.psum(_triangle(G), plan.axes, axis_index_groups=_teams(plan, hand)), G)


def shared_peak(plan: Exchange, hand: Hand, peak: jax.Array) -> jax.Array:
    """Largest of a number over the devices that share a group."""
    return jax.lax.pmax(peak, plan.axes, axis_index_groups=_teams(plan, hand))


def _teams(plan: Exchange, hand: Hand) -> list[list[int]]:
    return np.arange(plan.devices).reshape(-1, hand.share).tolist()


def _triangle(G: jax.Array) -> jax.Array:
    """The upper triangle of G = [[A, B], [B^H, D]] as a rectangle: A over D, then B, then diag D.

    Without a table of indices, which would be as large as G.
    """
    half = -(-len(G) // 2)
    G = jnp.pad(G, (0, 2 * half - len(G)))
    A, B, D = G[:half, :half], G[:half, half:], G[half:, half:]
    return jnp.concatenate([jnp.triu(A) + jnp.tril(D, -1), B, jnp.diagonal(D)[None]])


def _square(triangle: jax.Array, like: jax.Array) -> jax.Array:
    """Inverse of `_triangle`."""
    half = triangle.shape[1]
    both, B, diagonal = triangle[:half], triangle[half:-1], triangle[-1]
    A = jnp.triu(both) + jnp.triu(both, 1).conj().T
    D = jnp.tril(both, -1) + jnp.tril(both, -1).conj().T + jnp.diag(diagonal)
    return jnp.block([[A, B], [B.conj().T, D]])[: len(like), : len(like)]
