"""`teon`, the optimizer that users switch to."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from teon_optax._arguments import check_mask, check_rate, checked_mu_dtype
from teon_optax._memory import check_typed, with_stable_state
from teon_optax._mesh.placement import as_shardings
from teon_optax._momentum import scale_by_teon
from teon_optax._paths import leaf_paths
from teon_optax._planning import rules_of, taken_as
from teon_optax._polar.coefficients import MethodLike
from teon_optax._rule import Rule, checked_rules, takes_rules
from teon_optax._scaling import ScaleLike

_CACHE_SIZE = 8


@takes_rules
def teon(
    learning_rate: optax.ScalarOrSchedule,
    rules: Iterable[Rule] | None = None,
    *,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    method: MethodLike = "polar_express",
    scale: ScaleLike = "spectral",
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    fallback: optax.GradientTransformation | None = None,
    shardings: Any = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer TEON: Muon whose orthogonalization spans a stack of layers.

    Leaves that `rules` take get momentum, `orthogonalize` (together these are `scale_by_teon`),
    decoupled weight decay and the learning rate; all others get `fallback`. `print(plan(params,
    rules))` shows which are which.

    Args:
      learning_rate: A number or a schedule. With `scale="spectral"` or "muon" an update has a
        spectral norm of about 1, so that rates are those of Muon, .005 to .05, some ten times
        Adam's; with `scale=0.2` an update is as long as one of Adam, and rates are Adam's.
      rules: Which leaves are orthogonalized, and which of them together; None means
        `default_rules(params)`: query, key and value projections of two consecutive layers jointly,
        other hidden matrices alone.
      beta: Decay of the momentum.
      nesterov: Whether to use Nesterov's momentum.
      method: "polar_express", "schatten", "fast", "jordan", "dion", "you", "svd", a tuple of
        coefficients, or a function; see `polar`.
      scale: "spectral" is sqrt(fan_out / fan_in), "muon" sqrt(max(1, fan_out / fan_in)), and a
        number the root mean square of a group's update.
      eps: What bounds tiny updates: that of a group is multiplied by n / (n + eps), n being the
        norm that its joint matrix is divided by first. 0 takes every magnitude alike.
      weight_decay: Strength of the weight decay, multiplied by the learning rate; the default
        fallback's too.
      weight_decay_mask: Tree of booleans (or its prefix, or a function of params that gives it):
        where to decay.
      mu_dtype: Dtype in which the momentum is kept (also by name), the default fallback's too; None
        keeps that of params, and float32 for float16.
      adam_learning_rate: A number or a schedule, that of the default fallback; None is
        `learning_rate`, so that a schedule reaches every leaf.
      fallback: A whole optimizer for the other leaves, learning rate included. None is
        `optax.adamw(adam_learning_rate, b1=0.9, b2=0.95, weight_decay=weight_decay, ...)`, whose
        state keeps the dtypes that `init` gave it.
      shardings: How leaves lie on a mesh of type Auto: a tree, or its prefix, of `PartitionSpec` or
        `NamedSharding`, such as `jax.tree.map(lambda leaf: leaf.sharding, params)`. Not needed on
        meshes of type Explicit, nor on one device; see `orthogonalize`.
      precision: Precision of every product (`jax.lax.PrecisionLike`). None is exact on CPU, and one
        pass, made accurate by the way it is used, on TPU and GPU, whatever
        `jax.default_matmul_precision` says.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose `update` needs `params` if there is weight
      decay or `fallback` needs them.

    Raises:
      ValueError: If an argument is unknown or, in `init`, rules do not fit the tree.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from teon_optax import teon
      >>> params = {f"block_{i}": {"query": {"kernel": jnp.eye(4)}} for i in range(2)}
      >>> optimizer = teon(0.02, weight_decay=0.1)
      >>> state = optimizer.init(params)
      >>> gradients = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = optimizer.update(gradients, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      TEON, arXiv 2601.23261.
    """
    rules = checked_rules(rules)
    mu_dtype = checked_mu_dtype(mu_dtype)
    if adam_learning_rate is None:
        adam_learning_rate = learning_rate
    elif fallback is not None:
        raise ValueError(
            f"`adam_learning_rate={adam_learning_rate!r}` is the rate of the default fallback, and "
            "`fallback=` replaces that: give your optimizer its rate, as in `fallback=optax.adamw"
            "(3e-4)`, or leave out one of the two."
        )
    check_rate("learning_rate", learning_rate)
    check_rate("adam_learning_rate", adam_learning_rate)
    check_rate("weight_decay", weight_decay)
    check_mask("weight_decay_mask", weight_decay_mask)
    # Decay needs params, which some trainers do not pass.
    decays = weight_decay_mask is not None or not _is_zero(weight_decay)
    decay = (
        optax.add_decayed_weights(weight_decay, weight_decay_mask) if decays else optax.identity()
    )
    if fallback is None:
        adam = optax.scale_by_adam(0.9, 0.95, mu_dtype=mu_dtype)
        descent = optax.scale_by_learning_rate(adam_learning_rate)
        fallback = with_stable_state(optax.chain(adam, decay, descent))
    elif not isinstance(fallback, optax.GradientTransformation):
        raise ValueError(
            f"`fallback={fallback!r}` should be an optimizer, such as `optax.adamw(3e-4)`."
        )

    placement = as_shardings(shardings)

    # Kept: default rules are as few as there are trees, and given ones are one set.
    @functools.lru_cache(_CACHE_SIZE)
    def partitioned(tree_rules: tuple[Rule, ...]) -> optax.GradientTransformationExtraArgs:
        matrices = optax.chain(
            scale_by_teon(
                tree_rules,
                beta=beta,
                nesterov=nesterov,
                mu_dtype=mu_dtype,
                method=method,
                scale=scale,
                eps=eps,
                shardings=placement,
                precision=precision,
            ),
            decay,
            optax.scale_by_learning_rate(learning_rate),
        )
        # A function: Optax would call labels that are callable, as Equinox's models are.
        return optax.partition(
            {"teon": matrices, "fallback": fallback}, lambda tree: taken_as(tree, tree_rules)
        )

    partitioned(rules or ())  # for its checks of the arguments, before any tree is seen

    # Default rules need the whole tree: what is an embedding tells what is a head.
    def init_fn(params: optax.Params) -> optax.OptState:
        _refuse_functions(params)
        return partitioned(rules_of(params, rules)).init(params)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        check_typed(state, ("inner_states",))
        partition = partitioned(rules_of(updates, rules))
        return partition.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _refuse_functions(params: optax.Params) -> None:
    """Raises where a model of Equinox still holds its activations."""
    leaves = leaf_paths(params)
    functions = [path for path, leaf in leaves if callable(leaf) and not hasattr(leaf, "dtype")]
    if functions:
        raise ValueError(
            f"`teon(...).init(params)`: {', '.join(map(repr, functions))} are functions, no "
            "arrays: pass `eqx.filter(params, eqx.is_inexact_array)`."
        )


def _is_zero(weight_decay: Any) -> bool:
    """Tells whether it is the number 0, and no array or schedule that may become another."""
    return isinstance(weight_decay, (int, float)) and weight_decay == 0
