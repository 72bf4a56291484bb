"""Whole groups to the devices that own them and back, by one all-to-all each way.

For use inside `jax.shard_map`. Every device holds a piece of every group, and is assigned some
groups whole. A group's joint matrix is d x N here, d <= N. Its rows and columns arrive in any
order, since the polar factor of a permuted matrix is the permuted polar factor. Where groups of
unequal N meet in a round, columns of zeros fill up the narrow ones: they add nothing to a Gram
matrix, and stay zero.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from teon_optax._mesh.assignment import ExchangePlan, Round, devices_along
from teon_optax._plan.batches import MeshAxes


def to_owners(plan: ExchangePlan, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Sends every device's pieces of the groups to the devices that own them.

    Args:
      plan: Which device is assigned which groups.
      arrays: For each slab of the plan, what this device holds: [count, d / .., N / ..], all of
        one dtype.

    Returns:
      For each round of the plan, what this device owns:
      [matrices_per_device, d, width / devices_per_group].
    """
    stops: dict[int, list[int]] = {}
    for index, _, stop in itertools.chain(*(each.members for each in plan.rounds)):
        stops.setdefault(index, []).append(stop)
    pieces = {i: iter(jnp.split(arrays[i], stops[i][:-1])) for i in stops}
    packed = [
        _pack(plan, each, [next(pieces[index]) for index, _, _ in each.members])
        for each in plan.rounds
    ]
    arrived = _all_to_all(plan, packed)
    return [
        _unpack(plan, each, received) for each, received in zip(plan.rounds, arrived, strict=True)
    ]


def from_owners(plan: ExchangePlan, matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Sends what devices own back to where it came from: the inverse of `to_owners`.

    It is the transpose too, since `to_owners` only moves numbers and adds zeros.
    """
    dtype = matrices[0].dtype
    shapes = [(slab.count, *plan.held(index)) for index, slab in enumerate(plan.slabs)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    (returned,) = jax.linear_transpose(functools.partial(to_owners, plan), arrays)(list(matrices))
    return returned


def _all_to_all(plan: ExchangePlan, packed: Sequence[jax.Array]) -> list[jax.Array]:
    """Sends row i of each array [devices, ...] to device i; all arrays travel in one message."""
    if not plan.axes:
        return list(packed)
    ends = np.cumsum([array.shape[1] for array in packed])[:-1]
    message = jnp.concatenate(packed, axis=1)
    return jnp.split(jax.lax.all_to_all(message, plan.axes, 0, 0, tiled=True), ends, axis=1)


def _pack(plan: ExchangePlan, assigned: Round, pieces: Sequence[jax.Array]) -> jax.Array:
    """Sorts this device's pieces of a round by the device that they go to: [devices, ...].

    Args:
      plan: Which device is assigned which groups.
      assigned: The round.
      pieces: For each member of the round, what this device holds: [groups, d / .., N / ..].
    """
    by_receiver = []
    for (index, _, _), groups in zip(assigned.members, pieces, strict=True):
        width = assigned.width // devices_along(plan.slabs[index].axes[1], dict(plan.sizes))
        padded = jnp.pad(groups, ((0, 0), (0, 0), (0, width - groups.shape[2])))
        columns = padded.reshape(*groups.shape[:2], assigned.devices_per_group, -1)
        receivers = len(groups) * assigned.devices_per_group
        by_receiver.append(columns.transpose(0, 2, 1, 3).reshape(receivers, -1))
    sent = jnp.concatenate(by_receiver)
    # Devices without a group in the last round get zeros.
    idle = assigned.matrices_per_device * plan.devices - len(sent)
    filled = jnp.pad(sent, ((0, idle), (0, 0)))
    by_matrix = filled.reshape(assigned.matrices_per_device, plan.devices, -1)
    return by_matrix.transpose(1, 0, 2).reshape(plan.devices, -1)


def _unpack(plan: ExchangePlan, assigned: Round, received: jax.Array) -> jax.Array:
    """Assembles this device's matrices from the pieces that all devices sent: [devices, ...].

    How pieces lie in a matrix depends on the axes of the mesh that cut its slab. Where a round has
    slabs that are cut differently, each device takes the branch of its own.
    """
    axes = [plan.slabs[index].axes for index, _, _ in assigned.members]
    distinct = sorted(set(axes))
    branches = [functools.partial(_assembled, plan, assigned, cut) for cut in distinct]
    if len(branches) == 1:
        return branches[0](received)
    mine = of_this_device(plan, assigned, [distinct.index(cut) for cut in axes])
    return jax.lax.switch(mine, branches, received)


def _assembled(
    plan: ExchangePlan, assigned: Round, axes: MeshAxes, received: jax.Array
) -> jax.Array:
    """Assembles matrices [matrices_per_device, d, columns] from pieces cut along these axes."""
    sizes = dict(plan.sizes)
    matrices, pieces = assigned.matrices_per_device, devices_along(axes[1], sizes)
    d = assigned.d // devices_along(axes[0], sizes)
    N = assigned.width // pieces // assigned.devices_per_group
    by_sender = received.reshape(*sizes.values(), matrices, d, N)
    along_d, along_N = ([plan.axes.index(name) for name in along] for along in axes)
    mesh = len(plan.axes)
    order = mesh, *along_d, mesh + 1, *along_N, mesh + 2
    return by_sender.transpose(order).reshape(matrices, assigned.d, pieces * N)


def of_this_device(
    plan: ExchangePlan, assigned: Round, values: Sequence[jax.typing.ArrayLike]
) -> jax.Array:
    """Chooses, of the values given for each member of a round, that of this device's group.

    A device without a group gets the first.
    """
    if len(values) == 1:
        return jnp.asarray(values[0])
    owners = [
        member
        for member, (_, start, stop) in enumerate(assigned.members)
        for _ in range((stop - start) * assigned.devices_per_group)
    ]
    member_of = np.zeros(plan.devices, np.int32)
    member_of[: len(owners)] = owners
    mine = jnp.asarray(member_of)[jax.lax.axis_index(plan.axes)]
    return jnp.stack([jnp.asarray(value) for value in values])[mine]


def total_of_group(plan: ExchangePlan, assigned: Round, G: jax.Array) -> jax.Array:
    """Adds up symmetric matrices over the devices that share a group; half of each is sent."""
    teams = _teams(plan, assigned)
    return _square(jax.lax.psum(_triangle(G), plan.axes, axis_index_groups=teams), G)


def largest_of_group(plan: ExchangePlan, assigned: Round, value: jax.Array) -> jax.Array:
    """Finds the largest that a number is on any of the devices that share a group."""
    return jax.lax.pmax(value, plan.axes, axis_index_groups=_teams(plan, assigned))


def _teams(plan: ExchangePlan, assigned: Round) -> list[list[int]]:
    """Lists the devices that share each group of a round."""
    return np.arange(plan.devices).reshape(-1, assigned.devices_per_group).tolist()


def _triangle(G: jax.Array) -> jax.Array:
    """Writes the upper triangle of G = [[A, B], [B^T, D]] as a rectangle: A over D, B, diag D.

    A table of indices would do the same, but would be as large as G.
    """
    half = -(-len(G) // 2)
    G = jnp.pad(G, (0, 2 * half - len(G)))
    A, B, D = G[:half, :half], G[:half, half:], G[half:, half:]
    return jnp.concatenate([jnp.triu(A) + jnp.tril(D, -1), B, jnp.diagonal(D)[None]])


def _square(triangle: jax.Array, like: jax.Array) -> jax.Array:
    """Restores the symmetric matrix, of the size of `like`, whose `_triangle` this is."""
    half = triangle.shape[1]
    both, B, diagonal = triangle[:half], triangle[half:-1], triangle[-1]
    A = jnp.triu(both) + jnp.triu(both, 1).T
    D = jnp.tril(both, -1) + jnp.tril(both, -1).T + jnp.diag(diagonal)
    return jnp.block([[A, B], [B.T, D]])[: len(like), : len(like)]
