"""Updates of leaves on a mesh: each group is orthogonalized once, on the devices that own it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from teon_optax._mesh.assignment import Block, Entry, ExchangePlan, entry, plan_exchange
from teon_optax._mesh.exchange import (
    from_owners,
    largest_of_group,
    of_this_device,
    to_owners,
    total_of_group,
)
from teon_optax._mesh.placement import Located
from teon_optax._mesh.views import cuts_of_view, enter_view, leave_view
from teon_optax._plan.batches import BatchKey, in_batches, pieces_by_batch, scaled_polar_factors
from teon_optax._plan.plan import Series
from teon_optax._polar.newton_schulz import orthogonalize_batches, orthogonalize_columns
from teon_optax._polar.numerics import Numerics
from teon_optax._scaling import ScaleFunction


def orthogonalize_sharded(
    leaves: Mapping[int, jax.Array],
    all_series: Sequence[Series],
    located: Located,
    numerics: Numerics,
    scale: ScaleFunction,
) -> dict[int, jax.Array]:
    """Orthogonalized updates of leaves on a mesh, which lie where the leaves did.

    Leaves that cannot enter the exchange, since the mesh does not cut them evenly or where they lie
    is not known, are orthogonalized on every device.

    Args:
      leaves: By position in the tree.
      all_series: Which matrices the leaves hold.
      located: Where the leaves lie.
      numerics: By which polynomial and in which precision.
      scale: Factor for a group, as for `scaled_polar_factors`.
    """
    entries = _entries(all_series, located)
    entering = [series for series in all_series if series.leaves[0] in entries]
    staying = [series for series in all_series if series.leaves[0] not in entries]
    local = functools.partial(scaled_polar_factors, numerics=numerics, scale=scale)
    whole = {i: located.gathered(i, leaves[i]) for series in staying for i in series.leaves}
    done = in_batches(whole, staying, local) if staying else {}
    if entering:
        done |= _exchanged_updates(leaves, entering, entries, located, numerics, scale)
    return {leaf: located.returned(leaf, update) for leaf, update in done.items()}


def _entries(all_series: Sequence[Series], located: Located) -> dict[int, Entry]:
    """How each leaf that can enters the exchange; all leaves of a series enter alike."""
    entries: dict[int, Entry] = {}
    for series in all_series:
        layout, stored = series.layout, series.layout.stored
        cuts = located.cuts(series.leaves[0], len(stored.shape if stored else layout.shape))
        if cuts is not None and located.sizes:
            if stored:
                _, cuts = cuts_of_view(layout, stored, cuts, located.sizes)
            found = entry(layout, series.rule.stack, cuts, located.sizes)
            entries |= dict.fromkeys(series.leaves, found) if found else {}
    return entries


def _exchanged_updates(
    leaves: Mapping[int, jax.Array],
    all_series: Sequence[Series],
    entries: Mapping[int, Entry],
    located: Located,
    numerics: Numerics,
    scale: ScaleFunction,
) -> dict[int, jax.Array]:
    """Orthogonalized updates of the leaves that enter the exchange."""
    of_shards = tuple(
        series._replace(layout=entries[series.leaves[0]].layout) for series in all_series
    )
    layouts = {leaf: series.layout for series in all_series for leaf in series.leaves}
    entered = {
        leaf: located.entered(enter_view(leaves[leaf], layouts[leaf]), own.spec)
        for leaf, own in entries.items()
    }
    axes = {leaf: own.axes for leaf, own in entries.items()}
    groups = [key.whole(located.sizes) for key in pieces_by_batch(of_shards, entered, axes)]
    # Operands, since a scale may be traced; in the order in which the shards form their batches.
    scales = [key.scaled(scale) for key in groups]
    done = _exchanged(
        entered,
        [jnp.asarray(value) for value in scales],
        all_series=of_shards,
        entries=tuple(entries.items()),
        mesh=located.mesh,
        sizes=tuple(located.sizes.items()),
        numerics=numerics,
    )
    return {leaf: leave_view(update, layouts[leaf], leaves[leaf]) for leaf, update in done.items()}


# Compiled as one, also where `update` is not: an exchange of single operations would be slow.
@functools.partial(jax.jit, static_argnames=("all_series", "entries", "mesh", "sizes", "numerics"))
def _exchanged(
    leaves: dict[int, jax.Array],
    scales: list[jax.Array],
    *,
    all_series: tuple[Series, ...],
    entries: tuple[tuple[int, Entry], ...],
    mesh: Mesh | AbstractMesh,
    sizes: tuple[tuple[str, int], ...],
    numerics: Numerics,
) -> dict[int, jax.Array]:
    """Scaled polar factors of leaves that are cut as their entries say, and stay so."""
    specs = {leaf: own.spec for leaf, own in entries}
    axes = {leaf: own.axes for leaf, own in entries}

    def on_each_device(
        shards: dict[int, jax.Array], scales: list[jax.Array]
    ) -> dict[int, jax.Array]:
        owners = functools.partial(_by_owners, scales=scales, sizes=dict(sizes), numerics=numerics)
        return in_batches(shards, all_series, owners, axes)

    # Without the check, which does not know sums over a part of an axis.
    mapped = jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=specs,
        check_vma=False,
    )
    return mapped(leaves, scales)


def _by_owners(
    joint: Mapping[BatchKey, jax.Array],
    scales: Sequence[jax.Array],
    sizes: Mapping[str, int],
    numerics: Numerics,
) -> dict[BatchKey, jax.Array]:
    """Scaled polar factors of joint matrices, of which this device holds the pieces [B, m, n].

    There is one exchange for each set of axes of the mesh that cut matrices, and each dtype.
    """
    scale_of = dict(zip(joint, scales, strict=True))
    exchanges: dict[tuple[frozenset[str], Any], list[BatchKey]] = {}
    for key in joint:
        exchanges.setdefault((frozenset(sum(key.axes, ())), key.dtype), []).append(key)
    done: dict[BatchKey, jax.Array] = {}
    for (names, dtype), keys in exchanges.items():
        blocks = [_block(key, len(joint[key]), sizes) for key in keys]
        pieces = [joint[key].mT if _is_tall(key, sizes) else joint[key] for key in keys]
        cutting = {name: size for name, size in sizes.items() if name in names}
        used = numerics.of(dtype)
        plan = plan_exchange(blocks, cutting, functools.partial(_cost, used))
        owned = _of_owner(plan, to_owners(plan, pieces), [scale_of[key] for key in keys], used)
        back = from_owners(plan, [array.astype(dtype) for array in owned])
        for key, array in zip(keys, back, strict=True):
            done[key] = array.mT if _is_tall(key, sizes) else array
    return done


def _is_tall(key: BatchKey, sizes: Mapping[str, int]) -> bool:
    """Whether joint matrices have more rows than columns: the exchange sees these transposed."""
    m, n = key.whole(sizes).joint
    return m > n


def _block(key: BatchKey, count: int, sizes: Mapping[str, int]) -> Block:
    """A batch as the exchange sees it."""
    m, n = key.whole(sizes).joint
    rows, columns = key.axes
    if key.mode == 3:
        rows, columns = (), tuple(name for name in sizes if name in rows + columns)
    is_tall = _is_tall(key, sizes)
    return Block(count, n, m, (columns, rows)) if is_tall else Block(count, m, n, (rows, columns))


def _cost(numerics: Numerics, d: int, N: int, devices_per_group: int) -> float:
    """What a d x N group costs each of its devices, in products of d x d matrices.

    Devices cannot share an SVD.
    """
    if numerics.method is None:
        return N / d if devices_per_group == 1 else float("inf")
    columns = -(-N // devices_per_group)
    return numerics.product_count(numerics.restarts(d, max(d, columns)), columns / d)


def _of_owner(
    plan: ExchangePlan,
    owned: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    numerics: Numerics,
) -> list[jax.Array]:
    """Scaled polar factors of what this device owns in each round.

    Devices run one program, so a round has the restarts of its widest group. Where those run on
    Gram matrices alone, square groups in the round lose up to 1e-4 of accuracy in float32.

    Args:
      plan: Which device is assigned which groups.
      owned: For each round, [matrices_per_device, d, width / devices_per_group].
      scales: For each block, the factor of its groups.
      numerics: By which polynomial and in which precision.
    """
    factors = [
        of_this_device(plan, each, [scales[block] for block, _, _ in each.members])
        for each in plan.rounds
    ]
    done: dict[int, jax.Array] = {}
    whole: list[int] = []
    for index, assigned in enumerate(plan.rounds):
        if assigned.devices_per_group == 1:
            whole.append(index)
        else:
            total, largest = (
                functools.partial(reduction, plan, assigned)
                for reduction in (total_of_group, largest_of_group)
            )
            (matrix,) = owned[index]
            columns = orthogonalize_columns(matrix, factors[index], total, largest, numerics)
            done[index] = columns[None]
    results = orthogonalize_batches(
        [owned[index] for index in whole], [factors[index] for index in whole], numerics
    )
    done |= zip(whole, results, strict=True)
    return [done[index] for index in range(len(owned))]
