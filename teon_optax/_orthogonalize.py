"""`orthogonalize`: a plan and updates become updates."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import optax

from teon_optax._memory import kept_beside, on_device
from teon_optax._mesh.placement import Located, as_shardings
from teon_optax._mesh.sharded import orthogonalize_sharded
from teon_optax._plan.batches import in_batches, scaled_polar_factors
from teon_optax._plan.plan import Plan
from teon_optax._planning import plan, plan_of_updates
from teon_optax._polar.coefficients import MethodLike, resolve
from teon_optax._polar.numerics import Numerics, check_precision
from teon_optax._rule import Rule, checked_rules, takes_rules
from teon_optax._scaling import ScaleFunction, ScaleLike, scaling


@takes_rules
def orthogonalize(
    rules: Iterable[Rule] | None = None,
    *,
    method: MethodLike = "polar_express",
    scale: ScaleLike = "spectral",
    shardings: Any = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformation:
    """Orthogonalizes what it is given, jointly over groups of layers. Stateless.

    Per group of K layers M_1 .. M_K, kernels (fan_in, fan_out), and the mode's joint matrix M = U S
    V^T:

        update = scale * unfolded(U V^T)

    Leaves that no rule takes pass through.

    Args:
      rules: Which leaves, and which of them together; None means `default_rules` of the tree.
      method: "polar_express", "schatten", "jordan", "you", "svd", or a tuple of coefficients; see
        `polar`.
      scale: "spectral" is sqrt(fan_out / fan_in), "muon" sqrt(max(1, fan_out / fan_in)), and a
        number the root mean square of a group's update, whatever its shape and K; within a group
        that of one layer may differ. fan_in and fan_out are one layer's.
      shardings: How leaves lie on the mesh: a tree, or its prefix, of `PartitionSpec` or
        `NamedSharding`, such as `jax.tree.map(lambda leaf: leaf.sharding, params)`. Groups then go
        whole to the devices that orthogonalize them and come back, as fast as two all-to-alls go.
        Not needed on meshes of type Explicit, where types say how leaves lie, nor on one device. A
        wrong sharding costs time only.
      precision: Precision of every product (`jax.lax.PrecisionLike`). None computes in float32 on
        CPU, and with one-pass products, made accurate by the way they are used, on TPU (bf16) and
        GPU (TF32). "BF16_BF16_F32" is faster for large matrices on a GPU that has bf16 products,
        as NVIDIA's have from Ampere on: .83 of the time for those of a LLaMA-1B.

    Returns:
      An `optax.GradientTransformation`. Updates keep their dtypes. Layers are coupled by the dtypes
      of params where `update` gets these, as `plan(params, rules)` shows.

    Raises:
      ValueError: If an argument is unknown or, in `init`, rules do not fit the tree.

    Examples:
      The paper's recipe, from parts of optax:

      >>> import optax
      >>> from teon_optax import orthogonalize
      >>> optimizer = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     orthogonalize(),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(0.01),
      ... )

    References:
      TEON, arXiv 2601.23261, algorithm 1.
    """
    rules = checked_rules(rules)
    placement = as_shardings(shardings)
    numerics, scale_function = Numerics(resolve(method), precision), scaling(scale)
    check_precision(precision)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        placement.check(params, plan(params, rules).taken)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        planned = plan_of_updates(updates, params, rules)
        located = placement.locate(updates, planned.taken)
        return orthogonalize_updates(updates, planned, numerics, scale_function, located), state

    return optax.GradientTransformation(init_fn, update_fn)


def orthogonalize_updates(
    updates: Any, plan: Plan, numerics: Numerics, scale: ScaleFunction, located: Located | None
) -> Any:
    """Replaces every leaf in the plan's groups by its orthogonalized and scaled update.

    Args:
      updates: The tree that the plan was made for.
      plan: Which matrices are orthogonalized together.
      numerics: By which polynomial and in which precision.
      scale: Factor for a group, from its (fan_in, fan_out, K, rank of a full-rank joint matrix).
      located: Where the plan's leaves lie on a mesh, if that is known.
    """
    leaves, structure = jax.tree.flatten(updates)
    taken = {leaf: on_device(leaves[leaf]) for leaf in plan.taken}
    if located is None:
        factors = functools.partial(scaled_polar_factors, numerics=numerics, scale=scale)
        orthogonalized = in_batches(taken, plan.series, factors)
    else:
        orthogonalized = orthogonalize_sharded(taken, plan.series, located, numerics, scale)
    for leaf, update in orthogonalized.items():
        leaves[leaf] = kept_beside(update, leaves[leaf])
    return structure.unflatten(leaves)
