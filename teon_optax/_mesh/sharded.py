"""Orthogonalizes leaves on a mesh: each group once, on the devices that own it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from teon_optax._mesh.assignment import Cut, ExchangePlan, Slab, cut_along_mesh, plan_exchange
from teon_optax._mesh.exchange import (
    from_owners,
    largest_of_group,
    of_this_device,
    to_owners,
    total_of_group,
)
from teon_optax._mesh.placement import Located
from teon_optax._mesh.views import cuts_of_view, enter_view, leave_view
from teon_optax._plan.batches import Batch, batches_of, map_joint_matrices, scaled_polar_factors
from teon_optax._plan.plan import Plan, Series
from teon_optax._polar.newton_schulz import nonzero, orthogonalize_batches, orthogonalize_columns
from teon_optax._polar.numerics import Numerics
from teon_optax._scaling import ScaleFunction

# The axes of the mesh that cut each axis of the leaves of a series; None where that is not known.
_Given = tuple[tuple[str, ...], ...] | None
# How each leaf that enters the exchange is cut, the batches of its shards, and of what stays.
_Divided = tuple[dict[int, Cut], tuple[Batch, ...], tuple[Batch, ...]]
_CACHE_SIZE = 64


def orthogonalize_sharded(
    leaves: Mapping[int, jax.Array],
    plan: Plan,
    located: Located,
    numerics: Numerics,
    scale: ScaleFunction,
    eps: jax.typing.ArrayLike,
) -> dict[int, jax.Array]:
    """Orthogonalizes leaves on a mesh, and puts the updates where the leaves lay.

    Leaves that cannot enter the exchange, since the mesh does not cut them evenly or where they lie
    is not known, are orthogonalized on every device.

    Args:
      leaves: Leaves by position in the tree.
      plan: Which matrices the leaves hold.
      located: Where the leaves lie.
      numerics: The method, and the precision of its products.
      scale: Factor of a group, from its (fan_in, fan_out, K, rank of a full-rank joint matrix).
      eps: What bounds tiny matrices, as in `orthogonalize_batches`.
    """
    arguments = located, numerics, scale, eps
    given = tuple(_given(series, located) for series in plan.series)
    sizes = tuple(located.sizes.items())
    try:
        done = _orthogonalized(leaves, plan, _divided(plan.series, given, sizes), *arguments)
    except Exception:
        if not located.is_mapped(next(iter(leaves.values()))):
            raise
        # Under `jax.vmap` over what a mesh cuts, devices have something else to share out.
        staying = _divided(plan.series, given, ())
        done = _orthogonalized(leaves, plan, staying, *arguments)
    return {leaf: located.returned(leaf, update) for leaf, update in done.items()}


def _orthogonalized(
    leaves: Mapping[int, jax.Array],
    plan: Plan,
    divided: _Divided,
    located: Located,
    numerics: Numerics,
    scale: ScaleFunction,
    eps: jax.typing.ArrayLike,
) -> dict[int, jax.Array]:
    """Orthogonalizes the leaves that enter the exchange, and those that stay."""
    cuts, batches, staying = divided
    layouts, done = plan.layouts, {}
    if staying:
        local = functools.partial(scaled_polar_factors, numerics=numerics, scale=scale, eps=eps)
        left = {leaf: layout for leaf, layout in layouts.items() if leaf not in cuts}
        gathered = {leaf: located.gathered(leaf, leaves[leaf]) for leaf in left}
        done = map_joint_matrices(gathered, left, staying, local)
    if cuts:
        entered = {
            leaf: located.entered(enter_view(leaves[leaf], layouts[leaf]), cut.spec)
            for leaf, cut in cuts.items()
        }
        scales = [batch.uncut(located.sizes).scaled(scale) for batch in batches]
        exchanged = _exchanged(
            entered,
            # Operands, since a scale may be traced.
            [jnp.asarray(value) for value in scales],
            nonzero(eps),
            batches=batches,
            cuts=tuple(cuts.items()),
            mesh=located.mesh,
            sizes=tuple(located.sizes.items()),
            numerics=numerics,
        )
        for leaf, update in exchanged.items():
            done[leaf] = leave_view(update, layouts[leaf], leaves[leaf])
    return done


def _given(series: Series, located: Located) -> _Given:
    """Finds along which axes of the mesh the leaves of a series are cut, in their rule's view."""
    layout, stored = series.layout, series.layout.stored
    cuts = located.cuts(series.leaves[0], len(stored.shape if stored else layout.shape))
    if cuts is not None and stored:
        _, cuts = cuts_of_view(layout, stored, cuts, located.sizes)
    return None if cuts is None else tuple(cuts)


@functools.lru_cache(_CACHE_SIZE)
def _divided(
    all_series: tuple[Series, ...], given: tuple[_Given, ...], sizes: tuple[tuple[str, int], ...]
) -> _Divided:
    """Decides which leaves enter the exchange; all leaves of a series enter alike.

    Args:
      all_series: Which matrices the leaves hold.
      given: How the leaves of each series are cut.
      sizes: Names and sizes of the axes of the mesh.

    Returns:
      How each leaf that enters is cut, the batches of its shards, and those of leaves that stay.
    """
    cuts: dict[int, Cut] = {}
    entering: list[Series] = []
    staying: list[Series] = []
    for series, known in zip(all_series, given, strict=True):
        cut = None
        if known is not None and sizes:
            cut = cut_along_mesh(series.layout, series.rule.stack, known, dict(sizes))
        if cut is None:
            staying.append(series)
        else:
            entering.append(series._replace(layout=cut.layout))
            cuts |= dict.fromkeys(series.leaves, cut)
    axes = tuple(cuts[series.leaves[0]].axes for series in entering)
    return cuts, batches_of(tuple(entering), axes), batches_of(tuple(staying))


# Compiled as one, also where `update` is not: an exchange of single operations would be slow.
@functools.partial(jax.jit, static_argnames=("batches", "cuts", "mesh", "sizes", "numerics"))
def _exchanged(
    leaves: dict[int, jax.Array],
    scales: list[jax.Array],
    eps: jax.typing.ArrayLike | None,
    *,
    batches: tuple[Batch, ...],
    cuts: tuple[tuple[int, Cut], ...],
    mesh: Mesh | AbstractMesh,
    sizes: tuple[tuple[str, int], ...],
    numerics: Numerics,
) -> dict[int, jax.Array]:
    """Makes scaled polar factors of leaves that are cut as `cuts` says, and stay so."""
    specs = {leaf: cut.spec for leaf, cut in cuts}
    layouts = {leaf: cut.layout for leaf, cut in cuts}

    def on_each_device(
        shards: dict[int, jax.Array],
        scales: list[jax.Array],
        eps: jax.typing.ArrayLike | None,
    ) -> dict[int, jax.Array]:
        owners = functools.partial(
            _by_owners, scales=scales, eps=eps, sizes=dict(sizes), numerics=numerics
        )
        return map_joint_matrices(shards, layouts, batches, owners)

    # Without the check, which does not know sums over a part of an axis.
    mapped = jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(specs, PartitionSpec(), PartitionSpec()),
        out_specs=specs,
        check_vma=False,
    )
    return mapped(leaves, scales, eps)


def _by_owners(
    batches: Sequence[Batch],
    joint: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    eps: jax.typing.ArrayLike | None,
    sizes: Mapping[str, int],
    numerics: Numerics,
) -> list[jax.Array]:
    """Makes scaled polar factors of joint matrices, of which this device has pieces [B, m, n].

    There is one exchange for each set of axes of the mesh that cut matrices, dtype, and precision.
    """
    exchanges: dict[tuple[Any, ...], list[int]] = {}
    for index, (batch, array) in enumerate(zip(batches, joint, strict=True)):
        kind = frozenset(sum(batch.axes, ())), array.dtype, numerics.of(array.dtype, batch.dtype)
        exchanges.setdefault(kind, []).append(index)
    done: dict[int, jax.Array] = {}
    for (names, dtype, used), indices in exchanges.items():
        tall = [_is_tall(batches[index], sizes) for index in indices]
        slabs = [_slab(batches[index], len(joint[index]), sizes) for index in indices]
        pieces = [
            joint[index].mT if turn else joint[index]
            for index, turn in zip(indices, tall, strict=True)
        ]
        cutting = {name: size for name, size in sizes.items() if name in names}
        plan = plan_exchange(slabs, cutting, functools.partial(_cost, used))
        factors = [scales[index] for index in indices]
        owned = _of_owner(plan, to_owners(plan, pieces), factors, eps, used)
        back = from_owners(plan, [array.astype(dtype) for array in owned])
        for index, turn, array in zip(indices, tall, back, strict=True):
            done[index] = array.mT if turn else array
    return [done[index] for index in range(len(joint))]


def _is_tall(batch: Batch, sizes: Mapping[str, int]) -> bool:
    """Tells whether joint matrices are higher than wide: the exchange sees these transposed."""
    m, n = batch.uncut(sizes).joint
    return m > n


def _slab(batch: Batch, count: int, sizes: Mapping[str, int]) -> Slab:
    """Describes a batch to the exchange."""
    m, n = batch.uncut(sizes).joint
    rows, columns = batch.axes
    if batch.mode == 3:
        rows, columns = (), tuple(name for name in sizes if name in rows + columns)
    is_tall = _is_tall(batch, sizes)
    return Slab(count, n, m, (columns, rows)) if is_tall else Slab(count, m, n, (rows, columns))


def _cost(numerics: Numerics, d: int, N: int, devices_per_group: int) -> float:
    """Prices a d x N group for each of its devices, in products of d x d matrices.

    Devices cannot share an SVD, nor what a function does.
    """
    if numerics.polynomial is None:
        return N / d if devices_per_group == 1 else float("inf")
    columns = -(-N // devices_per_group)
    return numerics.product_count(numerics.restarts(d, max(d, columns)), columns / d)


def _of_owner(
    plan: ExchangePlan,
    owned: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    eps: jax.typing.ArrayLike | None,
    numerics: Numerics,
) -> list[jax.Array]:
    """Makes scaled polar factors of what this device owns in each round.

    Devices run one program, so a round has the restarts of its widest group. Where those run on
    Gram matrices alone, square groups in the round lose up to 1e-4 of accuracy in float32.

    Args:
      plan: Which device is assigned which groups.
      owned: For each round, [matrices_per_device, d, width / devices_per_group].
      scales: For each slab, the factor of its groups.
      eps: What bounds tiny matrices, as in `orthogonalize_batches`.
      numerics: The method, and the precision of its products.
    """
    factors = [
        of_this_device(plan, each, [scales[slab] for slab, _, _ in each.members])
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
            columns = orthogonalize_columns(matrix, factors[index], total, largest, numerics, eps)
            done[index] = columns[None]
    results = orthogonalize_batches(
        [owned[index] for index in whole], [factors[index] for index in whole], numerics, eps
    )
    done |= zip(whole, results, strict=True)
    return [done[index] for index in range(len(owned))]
