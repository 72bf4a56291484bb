"""The optax transformations: `orthogonalize`, and momentum before it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from teon_optax._engine import orthogonalize_updates
from teon_optax._groups.plan import plan
from teon_optax._polar.coefficients import MethodLike, resolve
from teon_optax._polar.newton_schulz import check_precision
from teon_optax._polar.precision import Numerics
from teon_optax._rules.rule import Rule, checked_rules
from teon_optax._scaling import ScaleLike, check_number, scaling
from teon_optax._sharding.placement import as_shardings

INJECTED = "under `optax.inject_hyperparams`, which calls every callable, name it in `static_args`"


class TeonState(NamedTuple):
    """State of `scale_by_teon`.

    Attributes:
      count: Number of updates so far, int32.
      mu: The momentum, in the tree and shapes of params.
    """

    count: jax.typing.ArrayLike
    mu: optax.Updates


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
        number the root mean square of the update, whatever its shape and K. fan_in and fan_out are
        one layer's.
      shardings: How leaves lie on the mesh: a tree, or its prefix, of `PartitionSpec` or
        `NamedSharding`, such as `jax.tree.map(lambda leaf: leaf.sharding, params)`. Groups then go
        whole to the devices that orthogonalize them and come back, as fast as two all-to-alls go.
        Not needed on meshes of type Explicit, where types say how leaves lie, nor on one device. A
        wrong sharding costs time only.
      precision: Of every product (`jax.lax.PrecisionLike`). None computes in float32 on CPU, and
        with one-pass products, made accurate by the way they are used, on TPU and GPU.

    Returns:
      An `optax.GradientTransformation`. Updates keep their dtypes.

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
    rules = None if rules is None else checked_rules(rules)
    placement = as_shardings(shardings)
    numerics, scale_function = Numerics(resolve(method), precision), scaling(scale)
    check_precision(precision)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        placement.check(params, plan(params, rules).taken)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        planned = plan(updates, rules)
        return orthogonalize_updates(updates, planned, numerics, scale_function, placement), state

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_teon(
    rules: Iterable[Rule] | None = None,
    *,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    mu_dtype: jax.typing.DTypeLike | None = None,
    method: MethodLike = "polar_express",
    scale: ScaleLike = "spectral",
    shardings: Any = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformation:
    """Momentum, then `orthogonalize`.

    The momentum is that of `optax.contrib.scale_by_muon`: an exponential average with bias
    correction. With rules of stack 1, `method="jordan"` and `scale="muon"` updates are those of
    `optax.contrib.scale_by_muon` and its `scale_by_shape`. Leaves that no rule takes get the
    momentum alone.

    Args:
      rules: As for `orthogonalize`.
      beta: Decay of the momentum.
      nesterov: Whether to use Nesterov's momentum.
      mu_dtype: Dtype in which the momentum is kept (also by name); None keeps that of params.
      method, scale, precision: As for `orthogonalize`.
      shardings: As for `orthogonalize`. A compiled `init` on a mesh of type Auto does not know
        where the momentum should lie: give it `out_shardings`, or do not compile it.

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
    transform = orthogonalize(
        rules, method=method, scale=scale, shardings=shardings, precision=precision
    )
    check_number("beta", beta, end=1)
    mu_dtype = checked_mu_dtype(mu_dtype)

    def init_fn(params: optax.Params) -> TeonState:
        transform.init(params)  # for its checks
        return TeonState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, TeonState]:
        del params
        count = optax.safe_increment(state.count)
        wide, mu = (jax.tree.map(_upcast, tree) for tree in (updates, state.mu))
        # As `optax.tree.update_moment`, in fewer operations per leaf.
        mu = optax.tree.add_scale(mu, 1 - beta, optax.tree.sub(wide, mu))
        with jax.numpy_dtype_promotion("standard"):  # a float to the power of a count
            if nesterov:
                # As `bias_correction` of both, as two scalars that all leaves share.
                of_mu = beta / (1 - beta ** optax.safe_increment(count))
                of_updates = (1 - beta) / (1 - beta**count)
                momentum = optax.tree.add_scale(optax.tree.scale(of_mu, mu), of_updates, wide)
            else:
                momentum = optax.tree.bias_correction(mu, beta, count)
        orthogonalized, _ = transform.update(momentum, optax.EmptyState())
        mu = optax.tree.cast_like(mu, state.mu)
        return optax.tree.cast_like(orthogonalized, updates), TeonState(count, mu)

    return optax.GradientTransformation(init_fn, update_fn)


def _upcast(leaf: jax.Array) -> jax.Array:
    """In float32 at least: bias correction takes the first float16 gradients out of range."""
    wide = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(np.promote_types(leaf.dtype, np.float32)) if wide else leaf


def checked_mu_dtype(mu_dtype: Any) -> jnp.dtype | None:
    """`mu_dtype` as a dtype.

    Raises:
      ValueError: If it is no real floating dtype.
    """
    if mu_dtype is None:
        return None
    if isinstance(mu_dtype, (jax.Array, np.ndarray)):
        raise ValueError(
            f"`mu_dtype={mu_dtype!r}` is an array: {INJECTED}, or write its name, 'bfloat16'."
        )
    try:
        dtype = jnp.dtype(mu_dtype)
    except TypeError as error:
        raise ValueError(
            f"`mu_dtype={mu_dtype!r}` is no dtype: write 'bfloat16' or 'float32'."
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`mu_dtype={mu_dtype!r}` should be a real floating dtype, such as 'bfloat16'."
        )
    return dtype
