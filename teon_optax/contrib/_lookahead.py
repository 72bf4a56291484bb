"""`add_lookahead`: EMA-Nesterov."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from teon_optax._arguments import check_number, check_rate
from teon_optax._memory import kept_beside, on_device
from teon_optax.contrib._kept import check_kept


class LookaheadState(NamedTuple):
    """Keeps what `add_lookahead` needs from one update to the next.

    Attributes:
      count: Number of updates so far, int32.
      mean: Average of the steps so far, in the tree and shapes of params, in float32 at least.
    """

    count: jax.typing.ArrayLike
    mean: optax.Updates


def add_lookahead(
    step_size: optax.ScalarOrSchedule, decay: jax.typing.ArrayLike = 0.99
) -> optax.GradientTransformation:
    """Moves params ahead along the average of all steps, where gradients are then taken.

    This is EMA-Nesterov. The optimizer before it steps from y_t = x_t + b_t m_t by u_t to x_(t+1);
    m is the decaying average of the steps x_(t+1) - x_t. Params are y, so that the update of a leaf
    is elementwise, for leaves of any shape:

        m_(t+1) = decay m_t + (1 - decay) (u_t + b_t m_t)      update = u_t + b_(t+1) m_(t+1)

    Where the schedule b ends at 0, params end at x itself. In one pair of our runs it did not pay:
    it ended .012 above Muon without it, within ± .026 (docs/what_to_set.md).

    Args:
      step_size: b, a number or a schedule. The best known run has .6 times the rate over its
        maximum, and 0 in the first and the last fifth. Under `optax.inject_hyperparams` the
        schedule of the next step is not known: give the schedule to this function.
      decay: Decay of the average.

    Returns:
      An `optax.GradientTransformation` with state `LookaheadState(count, mean)`, to stand last in a
      chain, behind the learning rate and the weight decay.

    Raises:
      ValueError: If an argument is no number in range or, in `update`, the state is another tree's.

    Examples:
      >>> import optax
      >>> from teon_optax import contrib, teon
      >>> ahead = optax.join_schedules(
      ...     [optax.constant_schedule(0.0), optax.constant_schedule(0.6)], boundaries=[500]
      ... )
      >>> optimizer = optax.chain(teon(0.02), contrib.add_lookahead(ahead))

    References:
      C.-Y. Yau et al., EMA-Nesterov, 2026, arXiv 2605.25395. The schedule is that of a record of
      modded-nanogpt (May 2026).
    """
    check_rate("step_size", step_size)
    check_number("decay", decay, end=1, of="add_lookahead")

    def ahead(count: Any) -> Any:
        return step_size(count) if callable(step_size) else step_size

    def init_fn(params: optax.Params) -> LookaheadState:
        return LookaheadState(jnp.zeros([], jnp.int32), jax.tree.map(_wide_zeros, params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LookaheadState]:
        del params
        check_kept("mean", state.mean, updates)
        count = on_device(state.count)
        after = optax.safe_increment(count)
        now, then = ahead(count), ahead(after)

        def averaged(update: jax.Array | None, mean: jax.Array) -> jax.Array:
            if update is None:
                return mean
            old = on_device(mean)
            step = _ahead_of(update, now, old)
            new = old + (1 - jnp.asarray(decay, old.dtype)) * (step - old)
            return kept_beside(new, mean)

        def moved(update: jax.Array | None, mean: jax.Array) -> jax.Array | None:
            if update is None:
                return None
            new = _ahead_of(update, then, on_device(mean))
            return kept_beside(new.astype(update.dtype), update)

        mean = jax.tree.map(averaged, updates, state.mean, is_leaf=_is_none)
        updates = jax.tree.map(moved, updates, mean, is_leaf=_is_none)
        return updates, LookaheadState(kept_beside(jnp.asarray(after), state.count), mean)

    return optax.GradientTransformation(init_fn, update_fn)


def _is_none(leaf: Any) -> bool:
    """Tells whether a leaf has no gradient."""
    return leaf is None


def _ahead_of(update: jax.Array, step_size: Any, mean: jax.Array) -> jax.Array:
    """Adds `step_size` times the average to an update, in the dtype of the average."""
    wide = jnp.asarray(on_device(update)).astype(mean.dtype)
    return wide + jnp.asarray(step_size, mean.dtype) * mean


def _wide_zeros(param: jax.typing.ArrayLike) -> jax.Array:
    """Makes zeros like a parameter, in float32 at least: bfloat16 stops averages of 100 steps."""
    dtype = jnp.result_type(param)
    if jnp.issubdtype(dtype, jnp.floating):
        dtype = np.promote_types(dtype, np.float32)
    return kept_beside(jnp.zeros_like(on_device(param), dtype=dtype), param)
