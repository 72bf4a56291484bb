"""`normalize_matrices`: Muon+."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from teon_optax._arguments import check_eps
from teon_optax._rule import Rule, checked_rules
from teon_optax._scaling import ScaleLike, scaling
from teon_optax.contrib._matrices import Axes, each_matrix, length, sum_of_squares

_NORMALIZATIONS = ("none", "col", "row", "col_row", "row_col")


def normalize_matrices(
    rules: Iterable[Rule] | None = None,
    *,
    normalize: str = "col_row",
    scale: ScaleLike = "spectral",
    eps: float = 1e-7,
) -> optax.GradientTransformation:
    """Muon+ (arXiv 2602.21545): divides columns, rows or both by their norms, then scales.

    In the paper's layout (fan_out, fan_in) a column is an input, a row an output neuron:

        col: O <- O / sqrt(sum_fan_out O^2 + eps)      row: O <- O / sqrt(sum_fan_in O^2 + eps)

    Args:
      rules: As for `orthogonalize`; leaves that they do not take pass.
      normalize: "none" (all pass), "col", "row", "col_row" (columns first) or "row_col".
      scale: As for `orthogonalize`, and in place of that one's.
      eps: Added to squares of norms.

    Returns:
      A stateless `optax.GradientTransformation`.

    Raises:
      ValueError: If an argument is unknown or, in `update`, rules do not fit the tree.

    Examples:
      >>> import optax
      >>> from teon_optax import contrib, orthogonalize
      >>> optimizer = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     orthogonalize(),
      ...     contrib.normalize_matrices(),
      ...     optax.scale_by_learning_rate(0.02),
      ... )
    """
    if normalize not in _NORMALIZATIONS:
        raise ValueError(f"`normalize={normalize!r}` should be one of {_NORMALIZATIONS}.")
    check_eps(eps, "normalize_matrices")
    rules, factor = checked_rules(rules), scaling(scale)

    def normalized(matrix: jax.Array, fan_in: Axes, fan_out: Axes) -> tuple[jax.Array]:
        lengths = length(matrix, fan_in), length(matrix, fan_out)
        for direction in normalize.split("_"):
            summed = fan_in if direction == "row" else fan_out
            matrix = matrix / jnp.sqrt(sum_of_squares(matrix, summed) + eps)
        # The squares of all entries add up to the number of vectors that were divided last.
        square = lengths[0] if normalize.endswith("col") else lengths[1]
        return (matrix * jnp.asarray(factor(*lengths, 1, square), matrix.dtype),)

    def update_fn(updates: optax.Updates, _: Any = None) -> optax.Updates:
        return updates if normalize == "none" else each_matrix(normalized, rules, updates)[0]

    return optax.stateless(update_fn)
