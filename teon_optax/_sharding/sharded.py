"""Groups orthogonalized on the devices that own them, each with the ordinary numerics."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from teon_optax._groups.batching import Batch, batches, in_batches
from teon_optax._groups.plan import Type
from teon_optax._polar.newton_schulz import orthogonalize_batches, orthogonalize_columns
from teon_optax._polar.precision import Numerics, chunk_bytes, product_count
from teon_optax._scaling import ScaleFunction
from teon_optax._sharding.assignment import Block, Entry, Exchange, entry, plan_exchange
from teon_optax._sharding.exchange import (
    from_owners,
    own_branch,
    own_value,
    shared_peak,
    shared_total,
    to_owners,
)
from teon_optax._sharding.placement import Located


def entries_of(types: Iterable[Type], located: Located) -> dict[int, Entry]:
    """How leaves enter the exchange, those that can; the leaves of a type alike."""
    entries: dict[int, Entry] = {}
    for kind in types:
        cuts = located.cuts(kind.leaves[0], len(kind.layout.shape))
        if cuts is not None and located.sizes:
            found = entry(kind.layout, kind.rule.stack, cuts, located.sizes)
            entries |= dict.fromkeys(kind.leaves, found) if found else {}
    return entries


def orthogonalize_owned(
    leaves: Mapping[int, jax.Array],
    types: Iterable[Type],
    entries: Mapping[int, Entry],
    located: Located,
    numerics: Numerics,
    scale: ScaleFunction,
) -> dict[int, jax.Array]:
    """Orthogonalized updates of the leaves that enter, by position in the tree."""
    entering = [(kind, entries[kind.leaves[0]]) for kind in types if kind.leaves[0] in entries]
    local = [kind._replace(layout=own.layout) for kind, own in entering]
    if not local:
        return {}
    entered = {leaf: located.entered(leaves[leaf], entries[leaf].spec) for leaf in entries}
    axes = {leaf: own.axes for leaf, own in entries.items()}
    groups = [key.whole(located.sizes) for key in batches(local, entered, axes)]
    scales = [scale(key.fan_in, key.fan_out, key.K, min(key.joint)) for key in groups]
    return _exchanged(
        entered,
        [jnp.asarray(value) for value in scales],
        types=tuple(local),
        entries=tuple(entries.items()),
        mesh=located.mesh,
        sizes=tuple(located.sizes.items()),
        numerics=numerics,
    )


# Compiled as one, also where `update` is not: an exchange of single operations would be slow.
@functools.partial(jax.jit, static_argnames=("types", "entries", "mesh", "sizes", "numerics"))
def _exchanged(
    leaves: dict[int, jax.Array],
    scales: list[jax.Array],
    *,
    types: tuple[Type, ...],
    entries: tuple[tuple[int, Entry], ...],
    mesh: Mesh | AbstractMesh,
    sizes: tuple[tuple[str, int], ...],
    numerics: Numerics,
) -> dict[int, jax.Array]:
    specs = {leaf: own.spec for leaf, own in entries}
    axes = {leaf: own.axes for leaf, own in entries}

    def on_each_device(
        shards: dict[int, jax.Array], scales: list[jax.Array]
    ) -> dict[int, jax.Array]:
        owners = functools.partial(_by_owners, scales=scales, sizes=dict(sizes), numerics=numerics)
        return in_batches(shards, types, owners, axes)

    # Without the check, which does not know sums over a part of an axis.
    mapped = jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(specs, jax.sharding.PartitionSpec()),
        out_specs=specs,
        check_vma=False,
    )
    return mapped(leaves, scales)


def _by_owners(
    joint: Mapping[Batch, jax.Array],
    scales: Sequence[jax.Array],
    sizes: Mapping[str, int],
    numerics: Numerics,
) -> dict[Batch, jax.Array]:
    """Scaled polar factors of blocks: [B, m, n], what one device holds of joint matrices.

    One exchange for each set of axes of the mesh that blocks are cut along, and each dtype.
    """
    scale_of = dict(zip(joint, scales, strict=True))
    alike: dict[Any, dict[Batch, jax.Array]] = {}
    for key, array in joint.items():
        alike.setdefault((frozenset(sum(key.axes, ())), key.dtype), {})[key] = array
    done: dict[Batch, jax.Array] = {}
    for together in alike.values():
        done |= _one_exchange(together, scale_of, sizes, numerics)
    return done


def _one_exchange(
    joint: Mapping[Batch, jax.Array],
    scales: Mapping[Batch, jax.Array],
    sizes: Mapping[str, int],
    numerics: Numerics,
) -> dict[Batch, jax.Array]:
    first = next(iter(joint))
    used = numerics.of(first.dtype)
    cutting = {name: size for name, size in sizes.items() if name in sum(first.axes, ())}
    blocks = {key: _block(key, len(array), sizes) for key, array in joint.items()}
    cost = functools.partial(_cost, used)
    plan = plan_exchange([block for block, _ in blocks.values()], cutting, cost)
    turned = [array.mT if blocks[key][1] else array for key, array in joint.items()]
    done = _orthogonalized(plan, to_owners(plan, turned), [scales[key] for key in joint], used)
    back = from_owners(plan, [array.astype(first.dtype) for array in done])
    return {
        key: array.mT if blocks[key][1] else array for key, array in zip(joint, back, strict=True)
    }


def _block(key: Batch, B: int, sizes: Mapping[str, int]) -> tuple[Block, bool]:
    """A batch as the exchange sees it, and whether its matrices must be turned for that."""
    m, n = key.whole(sizes).joint
    rows, columns = key.axes
    if key.mode == 3:
        rows, columns = (), tuple(name for name in sizes if name in rows + columns)
    turned = m > n
    return Block(B, n, m, (columns, rows)) if turned else Block(B, m, n, (rows, columns)), turned


def _cost(numerics: Numerics, d: int, N: int, share: int) -> float:
    """Of a d x N group for each of the devices that share it; an SVD cannot be shared."""
    if numerics.method is None:
        return N / d if share == 1 else float("inf")
    columns = -(-N // share)
    return product_count(numerics.restarts(d, max(d, columns)), columns / d)


def _orthogonalized(
    plan: Exchange, owned: Sequence[jax.Array], scales: Sequence[jax.Array], numerics: Numerics
) -> list[jax.Array]:
    """Scaled polar factors of what this device owns, or shares."""
    orthogonalize = functools.partial(
        orthogonalize_batches, numerics=numerics, chunk_bytes=chunk_bytes(jax.default_backend())
    )
    done: dict[int, jax.Array] = {}
    buckets: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    factors = []
    for index, (hand, matrices) in enumerate(zip(plan.hands, owned, strict=True)):
        factors.append(own_value(plan, hand, [scales[block] for block, _, _ in hand.members]))
        widths = [plan.blocks[block].N for block, _, _ in hand.members]
        cuts = [numerics.restarts(hand.d, N) for N in widths]
        if hand.share > 1:
            total, peak = (functools.partial(f, plan, hand) for f in (shared_total, shared_peak))
            columns = orthogonalize_columns(matrices[0], factors[index], total, peak, numerics)
            done[index] = columns[None]
        elif len(set(cuts)) == 1:
            buckets.setdefault((hand.d, cuts[0]), []).append(index)
        else:
            # One cut for all would do: the best for wide matrices, at 1e-4 of error in square ones.
            widest = {cut: N for N, cut in sorted(zip(widths, cuts, strict=True))}
            one_cut = functools.partial(_narrow, orthogonalize, factors[index])
            kinds = [(cut, widest[cut]) for cut in cuts]
            done[index] = own_branch(plan, hand, kinds, one_cut, matrices)
    for (_, cut), indices in buckets.items():
        results = orthogonalize(
            [owned[index] for index in indices], [factors[index] for index in indices], restarts=cut
        )
        done |= zip(indices, results, strict=True)
    return [done[index] for index in range(len(owned))]


def _narrow(
    orthogonalize: Callable[..., list[jax.Array]],
    scale: jax.Array,
    kind: tuple[tuple[int, ...], int],
    matrices: jax.Array,
) -> jax.Array:
    """Scaled polar factors with the cut, and of the first columns, that are this kind's."""
    cut, N = kind
    (done,) = orthogonalize([matrices[..., :N]], [scale], restarts=cut)
    return jnp.pad(done, ((0, 0), (0, 0), (0, matrices.shape[2] - N)))
