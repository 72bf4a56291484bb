"""`scale_by_normuon`: NorMuon."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from teon_optax._arguments import check_eps, check_number
from teon_optax._rule import Rule, checked_rules
from teon_optax.contrib._kept import check_kept
from teon_optax.contrib._matrices import Axes, each_matrix, root_mean_square, sum_of_squares


def scale_by_normuon(
    rules: Iterable[Rule] | None = None,
    *,
    beta2: jax.typing.ArrayLike = 0.95,
    rms: jax.typing.ArrayLike | None = None,
    eps: float = 1e-10,
) -> optax.GradientTransformation:
    """Divides each output neuron of each matrix by the root of its second moment, as NorMuon does.

        v <- beta2 v + (1 - beta2) mean_fan_in O^2      N = O / (sqrt(v) + eps)

    The update is N |O|_F / |N|_F, or rms sqrt(fan_in fan_out) N / |N|_F: the paper's with 0.2.
    In two pairs of our runs it ended .018 below Muon, within ± .018 (docs/what_to_set.md).

    Args:
      rules: Which leaves hold matrices, and how, in the form that `orthogonalize` takes; the
        updates of other leaves pass. Each layer, head, expert and fused part is a matrix of its
        own.
      beta2: Decay of the second moment.
      rms: Root mean square of every matrix's update; None keeps its norm.
      eps: Added to what is divided by.

    Returns:
      An `optax.GradientTransformation` with state `optax.ScaleByRmsState(nu)`; in `nu`, fan_in has
      length 1, and `optax.MaskedNode()` stands where rules take no leaf. An update of zero stays
      zero; v stops at the largest number of its dtype.

    Raises:
      ValueError: If an argument is out of range; in `init`, if rules do not fit the tree; in
        `update`, if the state is that of another model or of other rules.

    Examples:
      >>> import optax
      >>> from teon_optax import contrib, orthogonalize
      >>> optimizer = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     orthogonalize(),
      ...     contrib.scale_by_normuon(),
      ...     optax.scale_by_learning_rate(0.02),
      ... )

    References:
      Z. Li et al., NorMuon, 2025, arXiv 2510.05491.
    """
    rules = checked_rules(rules)
    check_number("beta2", beta2, end=1, of="scale_by_normuon")
    check_number("rms", 1 if rms is None else rms, of="scale_by_normuon")
    check_eps(eps, "scale_by_normuon")

    def zero(matrix: jax.Array, fan_in: Axes, fan_out: Axes) -> tuple[jax.Array, jax.Array]:
        del fan_out
        return matrix, jnp.zeros_like(sum_of_squares(matrix, fan_in))

    def scaled(
        matrix: jax.Array, nu: jax.Array, fan_in: Axes, fan_out: Axes
    ) -> tuple[jax.Array, jax.Array]:
        square = jnp.square(root_mean_square(matrix, fan_in))
        mean = jnp.minimum(square, jnp.finfo(nu.dtype).max)
        nu = nu + (1 - jnp.asarray(beta2, nu.dtype)) * (mean - nu)
        new = matrix / (jnp.sqrt(nu) + eps)
        axes = fan_in + fan_out
        own_rms = root_mean_square(new, axes)
        wanted = root_mean_square(matrix, axes) if rms is None else jnp.asarray(rms, matrix.dtype)
        return new / jnp.where(own_rms == 0, jnp.ones_like(own_rms), own_rms) * wanted, nu

    def init_fn(params: optax.Params) -> optax.ScaleByRmsState:
        return optax.ScaleByRmsState(each_matrix(zero, rules, params)[1])

    def update_fn(updates: optax.Updates, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        # A leaf of another shape would be broadcast, and the state would grow.
        check_kept("nu", state.nu, jax.eval_shape(init_fn, updates).nu)
        updates, nu = each_matrix(scaled, rules, updates, state.nu)
        return updates, optax.ScaleByRmsState(nu)

    return optax.GradientTransformation(init_fn, update_fn)
