"""Plan and updates become orthogonalized updates, here or on the devices that own the groups."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from teon_optax import _policy
from teon_optax._batches import Batch, in_batches
from teon_optax._coefficients import Method
from teon_optax._owners import entries_of, orthogonalize_owned
from teon_optax._plan import Plan
from teon_optax._polar import orthogonalize_batches
from teon_optax._scaling import ScaleFunction
from teon_optax._sharding import Shardings


def orthogonalize_updates(
    updates: Any,
    plan: Plan,
    method: Method | None,
    scale: ScaleFunction,
    precision: jax.lax.PrecisionLike = None,
    shardings: Shardings | None = None,
) -> Any:
    """Replaces every leaf in the plan's groups by its orthogonalized and scaled update.

    Args:
      updates: The tree that the plan was made for.
      plan: Which matrices are orthogonalized together.
      method: As `resolve` gives it.
      scale: Factor for a group, from its (fan_in, fan_out, K, rank of a full-rank joint matrix).
      precision: Of every product; None follows the policy.
      shardings: Where leaves lie; None is on one device.
    """
    leaves, structure = jax.tree.flatten(updates)
    taken = {leaf: leaves[leaf] for kind in plan.types for leaf in kind.leaves}
    here = functools.partial(_here, method=method, scale=scale, precision=precision)
    located = shardings.locate(updates, taken) if shardings else None
    if located is None:
        done = in_batches(taken, plan.types, here)
    else:
        entries = entries_of(plan.types, located)
        left = [kind for kind in plan.types if kind.leaves[0] not in entries]
        whole = {leaf: located.gathered(leaf, taken[leaf]) for kind in left for leaf in kind.leaves}
        done = in_batches(whole, left, here)
        done |= orthogonalize_owned(taken, plan.types, entries, located, method, scale, precision)
        done = {leaf: located.returned(leaf, update) for leaf, update in done.items()}
    for leaf, update in done.items():
        leaves[leaf] = update
    return structure.unflatten(leaves)


def _here(
    joint: Mapping[Batch, jax.Array],
    method: Method | None,
    scale: ScaleFunction,
    precision: jax.lax.PrecisionLike,
) -> dict[Batch, jax.Array]:
    """Scaled polar factors of batches that are whole on every device."""
    done = {}
    for (_, _, cut, used), keys in _buckets(joint, method, precision).items():
        results = orthogonalize_batches(
            [joint[key] for key in keys],
            [scale(key.fan_in, key.fan_out, key.K, min(key.joint)) for key in keys],
            method=method,
            cut=cut,
            precision=used,
            budget=_policy.budget(jax.default_backend()),
        )
        done |= zip(keys, results, strict=True)
    return done


def _buckets(
    batches: Iterable[Batch], method: Method | None, precision: jax.lax.PrecisionLike
) -> dict[tuple, list[Batch]]:
    """Batches that share a polynomial, by d, dtype, cut and precision."""
    buckets: dict[tuple, list[Batch]] = {}
    for key in batches:
        dtype = np.promote_types(key.dtype, np.float32)
        used = _policy.products(jax.default_backend(), dtype) if precision is None else precision
        bucket = min(key.joint), dtype, _policy.method_cut(method, *key.joint, used), used
        buckets.setdefault(bucket, []).append(key)
    return buckets
