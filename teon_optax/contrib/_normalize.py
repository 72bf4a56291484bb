"""`normalize_matrices`: Muon+ and MuonEq."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from teon_optax._arguments import check_eps
from teon_optax._rule import Rule, checked_rules
from teon_optax._scaling import ScaleLike, scaling
from teon_optax.contrib._matrices import Axes, each_matrix, length, magnitude, sum_of_squares

_NORMALIZATIONS = ("none", "col", "row", "col_row", "row_col")


def normalize_matrices(
    rules: Iterable[Rule] | None = None,
    *,
    normalize: str = "col_row",
    scale: ScaleLike = "spectral",
    eps: float = 1e-7,
) -> optax.GradientTransformation:
    """Divides the columns or rows of each matrix by their norms, or both in turn. Stateless.

    Behind `orthogonalize` it is Muon+. Before it, behind the momentum, it is MuonEq, whose default
    is "row" and which needs no `scale`, as `orthogonalize` has its own. In the papers' layout
    (fan_out, fan_in) a column is an input, a row an output neuron:

        col: O <- O / sqrt(s + eps mean(s)),  s = sum_fan_out O^2, one for each column
        row: O <- O / sqrt(s + eps mean(s)),  s = sum_fan_in O^2, one for each row

    Then the whole matrix is multiplied so that it is as long as `scale` says if no row or column
    is zero; where a part of the vectors that were divided last is, it is shorter, by the root of
    the share that is left. In two pairs of our runs "row" before `orthogonalize` ended .017 below
    Muon without it, within ± .018 (docs/what_to_set.md).

    Args:
      rules: Which leaves hold matrices, and how, in the form that `orthogonalize` takes; the
        updates of other leaves pass. Each layer, head, expert and fused part is a matrix of its
        own.
      normalize: "none" (all pass), "col", "row", "col_row" (columns first) or "row_col".
      scale: Length of the result: "spectral", "muon" or a root mean square, as `orthogonalize`
        has it for one matrix, and in place of what it did.
      eps: Added to squares of norms, relative to their mean over the matrix, so that the size of
        what comes in does not matter.

    Returns:
      A stateless `optax.GradientTransformation`. A matrix of zeros stays zero.

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

    References:
      Muon+, 2026, arXiv 2602.21545. MuonEq, 2026, arXiv 2603.28254.
    """
    if normalize not in _NORMALIZATIONS:
        raise ValueError(f"`normalize={normalize!r}` should be one of {_NORMALIZATIONS}.")
    check_eps(eps, "normalize_matrices")
    rules, factor = checked_rules(rules), scaling(scale)

    def normalized(matrix: jax.Array, fan_in: Axes, fan_out: Axes) -> tuple[jax.Array]:
        lengths = length(matrix, fan_in), length(matrix, fan_out)
        matrix = matrix / magnitude(matrix, fan_in + fan_out)
        for direction in normalize.split("_"):
            squares = sum_of_squares(matrix, fan_in if direction == "row" else fan_out)
            squares += eps * jnp.mean(squares, fan_in + fan_out, keepdims=True)
            matrix = matrix / jnp.sqrt(jnp.where(squares == 0, jnp.ones_like(squares), squares))
        # The squares of all entries add up to the number of vectors that were divided last.
        square = lengths[0] if normalize.endswith("col") else lengths[1]
        return (matrix * jnp.asarray(factor(*lengths, 1, square), matrix.dtype),)

    def update_fn(updates: optax.Updates, _: Any = None) -> optax.Updates:
        return updates if normalize == "none" else each_matrix(normalized, rules, updates)[0]

    return optax.stateless(update_fn)
