"""`add_cautious_weight_decay`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def add_cautious_weight_decay(
    weight_decay: optax.ScalarOrSchedule, mask: Any | Callable[[optax.Params], Any] | None = None
) -> optax.GradientTransformation:
    """Cautious weight decay (arXiv 2510.12402): u <- u + weight_decay I(u x >= 0) x.

    Args:
      weight_decay: As for `optax.add_decayed_weights`: a number or a schedule.
      mask: As for `optax.add_decayed_weights`: a tree of booleans, or a function of params.

    Returns:
      An `optax.GradientTransformation`, to stand before `optax.scale_by_learning_rate`.

    Examples:
      >>> import optax
      >>> from teon_optax import contrib, orthogonalize
      >>> optimizer = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     orthogonalize(),
      ...     contrib.add_cautious_weight_decay(0.1),
      ...     optax.scale_by_learning_rate(0.02),
      ... )
    """
    decay = optax.add_decayed_weights(weight_decay, mask)

    def agreeing(update: jax.Array | None, param: jax.Array) -> jax.Array | None:
        if update is None:
            return None
        # Of signs: the product of two small numbers may be zero.
        agrees = jnp.sign(update) * jnp.sign(param).astype(update.dtype) >= 0
        return jnp.where(agrees, param, jnp.zeros_like(param))

    def update_fn(updates: optax.Updates, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is not None:
            params = jax.tree.map(agreeing, updates, params, is_leaf=lambda leaf: leaf is None)
        return decay.update(updates, state, params)

    return optax.GradientTransformation(decay.init, update_fn)
