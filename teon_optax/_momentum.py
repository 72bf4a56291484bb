"""`scale_by_teon`: momentum, then `orthogonalize`."""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from teon_optax._arguments import check_flag, check_number, checked_mu_dtype
from teon_optax._memory import as_given, check_restored, kept_beside, on_device, widened
from teon_optax._mesh.placement import as_shardings
from teon_optax._orthogonalize import orthogonalizer
from teon_optax._polar.coefficients import MethodLike
from teon_optax._rule import Rule, takes_rules
from teon_optax._scaling import ScaleLike


class TeonState(NamedTuple):
    """Keeps what `scale_by_teon` needs from one update to the next.

    The state of `teon` has it beside that of the fallback, which may have a `mu` as well, so that
    `optax.tree.get(state, "mu")` finds two and raises: write
    `optax.tree.get(state.inner_states["teon"], "mu")`.

    Attributes:
      count: Number of updates so far, int32.
      mu: The momentum, in the tree and shapes of params.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from teon_optax import teon
      >>> params = {"query": {"kernel": jnp.ones((4, 4))}, "bias": jnp.ones(4)}
      >>> state = teon(0.02).init(params)
      >>> momentum = optax.tree.get(state.inner_states["teon"], "mu")
      >>> momentum["query"]["kernel"].shape
      (4, 4)
    """

    count: jax.typing.ArrayLike
    mu: optax.Updates


@takes_rules
def scale_by_teon(
    rules: Iterable[Rule] | None = None,
    *,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    method: MethodLike = "polar_express",
    scale: ScaleLike = "spectral",
    eps: jax.typing.ArrayLike = 1e-8,
    shardings: Any = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformation:
    """Averages gradients to a momentum, and orthogonalizes that jointly over groups of layers.

    The momentum is that of `optax.contrib.scale_by_muon`: an exponential average with bias
    correction. With rules of stack 1, `method="jordan"` and `scale="muon"` updates are those of
    `optax.contrib.scale_by_muon` and its `scale_by_shape`. Leaves that no rule takes get the
    momentum alone.

    Args:
      rules: Which leaves, and which of them together; None means `default_rules` of the tree.
      beta: Decay of the momentum.
      nesterov: Whether to use Nesterov's momentum.
      mu_dtype: Dtype in which the momentum is kept (also by name); None keeps that of params, and
        float32 for float16, which cannot hold averages beyond 65504. Where layers differ in
        dtype, give `update` the params: layers are coupled by that.
      method: "polar_express", "schatten", "fast", "jordan", "dion", "you", "svd", a tuple of
        coefficients, or a function; see `polar`.
      scale: "spectral" is sqrt(fan_out / fan_in), "muon" sqrt(max(1, fan_out / fan_in)), and a
        number the root mean square of a group's update.
      eps: What bounds tiny updates: that of a group is multiplied by n / (n + eps), n being the
        norm that its joint matrix is divided by first. 0 takes every magnitude alike.
        Where gradients have stopped, as those of an expert without tokens, the update so fades with
        the momentum. A group has one norm: where one of its layers alone is without gradients, that
        layer's part fades as its share of the joint matrix does, and the others keep their size.
      shardings: How leaves lie on a mesh of type Auto: a tree, or its prefix, of `PartitionSpec` or
        `NamedSharding`; see `orthogonalize`. A compiled `init` on such a mesh does not know where
        the momentum should lie: give it `out_shardings`, or do not compile it.
      precision: Precision of every product (`jax.lax.PrecisionLike`). None is exact on CPU, and one
        pass, made accurate by the way it is used, on TPU and GPU, whatever
        `jax.default_matmul_precision` says.

    Returns:
      An `optax.GradientTransformation` with state `TeonState(count, mu)`.

    Raises:
      ValueError: If an argument is unknown or, in `init`, rules do not fit the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from teon_optax import Rule, scale_by_teon
      >>> params = {f"block_{i}": {"query": {"kernel": jnp.eye(2)}} for i in range(2)}
      >>> transform = scale_by_teon([Rule(r"block_(?P<layer>\\d+)/query", stack=2)], method="svd")
      >>> updates, _ = transform.update(params, transform.init(params))
      >>> updates["block_0"]["query"]["kernel"].round(2).tolist()[0]
      [0.7099999785423279, 0.0]
    """
    placement = as_shardings(shardings)
    check, orthogonalized = orthogonalizer(rules, method, scale, eps, placement, precision)
    check_number("beta", beta, end=1)
    check_flag("nesterov", nesterov)
    mu_dtype = checked_mu_dtype(mu_dtype)

    def init_fn(params: optax.Params) -> TeonState:
        check(params)
        zeros = jax.tree.map(functools.partial(_zero_momentum, mu_dtype=mu_dtype), params)
        mu = jax.tree.map(kept_beside, zeros, params)
        return TeonState(jnp.zeros([], jnp.int32), mu)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, TeonState]:
        check_restored(state, updates)
        given, structure = jax.tree.flatten(updates)
        kept = structure.flatten_up_to(state.mu)
        count = optax.safe_increment(on_device(state.count))
        decay = _decay(beta)
        wide: list[Any] = [_computable(leaf) for leaf in given]
        mu: list[Any] = [_computable(leaf) for leaf in kept]
        # As `optax.tree.update_moment`, in fewer operations per leaf.
        mu = optax.tree.add_scale(mu, 1 - decay, optax.tree.sub(wide, mu))
        if nesterov:
            # As `optax.tree.bias_correction` of both, as two scalars that all leaves share.
            of_mu = decay / _correction(decay, optax.safe_increment(count))
            of_updates = (1 - decay) / _correction(decay, count)
            momentum: list[Any] = optax.tree.add_scale(
                optax.tree.scale(of_mu, mu), of_updates, wide
            )
        else:
            momentum = optax.tree.scale(1 / _correction(decay, count), mu)
        # Layers are coupled by the dtypes of params, which the plan shows. The momentum has them
        # unless `mu_dtype` is another.
        if params is None:
            params = updates if mu_dtype else state.mu
        done, located = orthogonalized(structure, momentum, params)
        new: list[Any] = [done.get(index, leaf) for index, leaf in enumerate(momentum)]
        mu = [_saturated(leaf, old) for leaf, old in zip(mu, kept, strict=True)]
        if located is not None:
            new, mu = (
                [located.settled(*each) for each in enumerate(leaves)] for leaves in (new, mu)
            )
        new, mu = (list(map(as_given, *pair)) for pair in ((new, given), (mu, kept)))
        state = TeonState(as_given(jnp.asarray(count), state.count), structure.unflatten(mu))
        return structure.unflatten(new), state

    return optax.GradientTransformation(init_fn, update_fn)


def _zero_momentum(leaf: jax.Array, mu_dtype: Any) -> jax.Array:
    """Makes the momentum of a leaf before the first update, in float32 for one of float16.

    An average of finite gradients may be beyond the largest number of float16, 65504.
    """
    zero = jnp.zeros_like(on_device(leaf), dtype=mu_dtype)
    is_half = mu_dtype is None and zero.dtype == jnp.float16
    return zero.astype(jnp.float32) if is_half else zero


def _saturated(mu: jax.Array, kept: jax.typing.ArrayLike) -> jax.Array:
    """Limits a momentum that is kept in float16 to its largest number: inf would stay for ever."""
    if jnp.result_type(kept) != jnp.float16:
        return mu
    largest = jnp.asarray(jnp.finfo(jnp.float16).max, mu.dtype)
    return jnp.where(jnp.isfinite(mu), jnp.clip(mu, -largest, largest), mu)


def _decay(beta: jax.typing.ArrayLike) -> float | jax.Array:
    """Makes the decay of the momentum from `beta`, in float32 at least and below 1.

    `optax.inject_hyperparams` rounds .999 to 1 where params are in bfloat16.
    """
    if not isinstance(beta, jax.Array):
        return np.asarray(beta).item()
    is_float = jnp.issubdtype(beta.dtype, jnp.floating)
    decay = beta.astype(np.promote_types(beta.dtype, np.float32) if is_float else np.float32)
    return jnp.minimum(decay, 1 - jnp.finfo(decay.dtype).epsneg)


def _correction(decay: float | jax.Array, count: jax.typing.ArrayLike) -> jax.Array:
    """Computes 1 - decay^count, which an exponential average is divided by, also where tiny."""
    if isinstance(decay, jax.Array):
        logarithm = jnp.log(decay)
    else:
        logarithm = math.log(decay) if decay else -math.inf
    with jax.numpy_dtype_promotion("standard"):  # A float times a count.
        return -jnp.expm1(logarithm * jnp.asarray(count))


def _computable(leaf: jax.typing.ArrayLike) -> jax.Array:
    """Moves a leaf to the device, in float32 at least: corrected float16 gradients may overflow."""
    leaf = jnp.asarray(on_device(leaf))
    wide = jnp.issubdtype(leaf.dtype, jnp.floating)
    return widened(leaf) if wide else leaf
