"""`orthogonalize`: gathers leaves by a plan, takes polar factors, scatters these."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from teon_optax._arguments import check_number
from teon_optax._memory import as_given, on_device
from teon_optax._mesh.placement import Located, Shardings, as_shardings
from teon_optax._mesh.sharded import orthogonalize_sharded
from teon_optax._plan.batches import batches_of, map_joint_matrices, scaled_polar_factors
from teon_optax._plan.plan import Plan
from teon_optax._planning import plan, plan_of_updates
from teon_optax._polar.coefficients import MethodLike, resolve
from teon_optax._polar.numerics import Numerics, check_precision
from teon_optax._rule import Rule, checked_rules, takes_rules
from teon_optax._scaling import ScaleFunction, ScaleLike, scaling

# Orthogonalizes some of the leaves of a tree: from its structure, its leaves, and params if they
# are known, to the leaves that are other ones now, by position, and where leaves lie on a mesh.
_Update = Callable[[Any, list[Any], Any], tuple[dict[int, jax.Array], Located | None]]


@takes_rules
def orthogonalize(
    rules: Iterable[Rule] | None = None,
    *,
    method: MethodLike = "polar_express",
    scale: ScaleLike = "spectral",
    eps: jax.typing.ArrayLike = 0.0,
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
      method: "polar_express", "schatten", "fast", "jordan", "dion", "you", "svd", a tuple of
        coefficients, or a function; see `polar`.
      scale: "spectral" is sqrt(fan_out / fan_in), "muon" sqrt(max(1, fan_out / fan_in)), and a
        number the root mean square of a group's update, whatever its shape and K; within a group
        that of one layer may differ. fan_in and fan_out are one layer's.
      eps: What bounds tiny updates: that of a group is multiplied by n / (n + eps), n being the
        norm that its joint matrix is divided by first (Frobenius or, of methods that say so,
        Schatten-4). 0 takes every magnitude alike.
      shardings: How leaves lie on the mesh: a tree, or its prefix, of `PartitionSpec` or
        `NamedSharding`, such as `jax.tree.map(lambda leaf: leaf.sharding, params)`. Groups then go
        whole to the devices that orthogonalize them and come back, as fast as two all-to-alls go.
        Not needed on meshes of type Explicit, where types say how leaves lie, nor on one device. A
        wrong sharding costs time only.
      precision: Precision of every product (`jax.lax.PrecisionLike`). None computes in float32 on
        CPU, and with one-pass products, made accurate by the way they are used, on TPU (bf16) and
        GPU (TF32, or bf16 for leaves of bf16). "BF16_BF16_F32" is faster for large matrices on a
        GPU that has bf16 products, as NVIDIA's have from Ampere on: .83 of the time for those of a
        LLaMA-1B. `jax.default_matmul_precision`, which is for the model, changes nothing here.

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
    check, update = orthogonalizer(rules, method, scale, eps, as_shardings(shardings), precision)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        check(params)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        leaves, structure = jax.tree.flatten(updates)
        done, _ = update(structure, leaves, params)
        for index, leaf in done.items():
            leaves[index] = as_given(leaf, leaves[index])
        return structure.unflatten(leaves), state

    return optax.GradientTransformation(init_fn, update_fn)


def orthogonalizer(
    rules: Iterable[Rule] | None,
    method: MethodLike,
    scale: ScaleLike,
    eps: jax.typing.ArrayLike,
    placement: Shardings,
    precision: jax.lax.PrecisionLike,
) -> tuple[Callable[[Any], None], _Update]:
    """Checks the arguments of `orthogonalize`, and makes of them what it does to leaves.

    Returns:
      A check of params, which raises if rules or shardings do not fit them; and a function from the
      structure of updates, their leaves and params (or None) to the leaves that rules take, by
      position, orthogonalized, in float32 at least; and to where leaves lie, if that is known.
    """
    rules = checked_rules(rules)
    numerics, factor = Numerics(resolve(method), precision), scaling(scale)
    check_precision(precision)
    check_number("eps", eps)

    def check(params: Any) -> None:
        placement.check(params, plan(params, rules).taken)

    def update(
        structure: Any, leaves: list[Any], params: Any
    ) -> tuple[dict[int, jax.Array], Located | None]:
        planned = plan_of_updates(structure, leaves, params, rules)
        located = placement.locate(structure, leaves, planned.taken)
        given = {index: on_device(leaves[index]) for index in planned.taken}
        if located is not None:
            given = {index: located.settled(index, leaf) for index, leaf in given.items()}
        return orthogonalize_leaves(given, planned, numerics, factor, eps, located), located

    return check, update


def orthogonalize_leaves(
    leaves: Mapping[int, jax.Array],
    plan: Plan,
    numerics: Numerics,
    scale: ScaleFunction,
    eps: jax.typing.ArrayLike,
    located: Located | None,
) -> dict[int, jax.Array]:
    """Gathers leaves into joint matrices, takes polar factors of these, and scatters them.

    Args:
      leaves: Leaves by position in the tree, at least those that the plan takes, on their devices.
      plan: Which matrices are orthogonalized together.
      numerics: The method, and the precision of its products.
      scale: Factor for a group, from its (fan_in, fan_out, K, rank of a full-rank joint matrix).
      eps: What bounds tiny updates, as in `orthogonalize`.
      located: Where leaves lie on a mesh, if that is known.
    """
    if located is not None:
        return orthogonalize_sharded(leaves, plan, located, numerics, scale, eps)
    factors = functools.partial(scaled_polar_factors, numerics=numerics, scale=scale, eps=eps)
    return map_joint_matrices(leaves, plan.layouts, batches_of(plan.series), factors)
