"""Plan and updates become orthogonalized updates, here or on the devices that own the groups."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from teon_optax._groups.batching import Batch, in_batches
from teon_optax._groups.plan import Plan
from teon_optax._polar import precision as _policy
from teon_optax._polar.newton_schulz import orthogonalize_batches
from teon_optax._polar.precision import Numerics
from teon_optax._scaling import ScaleFunction
from teon_optax._sharding.placement import Shardings
from teon_optax._sharding.sharded import entries_of, orthogonalize_owned


def orthogonalize_updates(
    updates: Any, plan: Plan, numerics: Numerics, scale: ScaleFunction, shardings: Shardings
) -> Any:
    """Replaces every leaf in the plan's groups by its orthogonalized and scaled update.

    Args:
      updates: The tree that the plan was made for.
      plan: Which matrices are orthogonalized together.
      numerics: Of every product.
      scale: Factor for a group, from its (fan_in, fan_out, K, rank of a full-rank joint matrix).
      shardings: Where leaves lie.
    """
    leaves, structure = jax.tree.flatten(updates)
    taken = {leaf: leaves[leaf] for kind in plan.types for leaf in kind.leaves}
    here = functools.partial(_here, numerics=numerics, scale=scale)
    located = shardings.locate(updates, taken)
    if located is None:
        done = in_batches(taken, plan.types, here)
    else:
        entries = entries_of(plan.types, located)
        left = [kind for kind in plan.types if kind.leaves[0] not in entries]
        whole = {leaf: located.gathered(leaf, taken[leaf]) for kind in left for leaf in kind.leaves}
        done = in_batches(whole, left, here)
        done |= orthogonalize_owned(taken, plan.types, entries, located, numerics, scale)
        done = {leaf: located.returned(leaf, update) for leaf, update in done.items()}
    for leaf, update in done.items():
        leaves[leaf] = update
    return structure.unflatten(leaves)


def _here(
    joint: Mapping[Batch, jax.Array], numerics: Numerics, scale: ScaleFunction
) -> dict[Batch, jax.Array]:
    """Scaled polar factors of batches that are whole on every device.

    Those that agree in d, dtype and cut share a polynomial.
    """
    buckets: dict[tuple, list[Batch]] = {}
    for key in joint:
        used, dtype = numerics.of(key.dtype), np.promote_types(key.dtype, np.float32)
        buckets.setdefault((min(key.joint), dtype, used, used.cut(*key.joint)), []).append(key)
    done, budget = {}, _policy.budget(jax.default_backend())
    for (_, _, used, cut), keys in buckets.items():
        scales = [scale(key.fan_in, key.fan_out, key.K, min(key.joint)) for key in keys]
        results = orthogonalize_batches([joint[key] for key in keys], scales, used, cut, budget)
        done |= zip(keys, results, strict=True)
    return done
