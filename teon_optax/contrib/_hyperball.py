"""`project_to_sphere` and `scale_to_param_norm`: Hyperball."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from teon_optax._paths import leaf_paths
from teon_optax._plan.layout import Layout
from teon_optax._planning import plan
from teon_optax._rule import Rule, checked_rules
from teon_optax.contrib._matrices import (
    Axes,
    each_matrix,
    magnitude,
    root_mean_square,
    sum_of_squares,
    to_parts,
    wide_view,
)


def project_to_sphere(rules: Iterable[Rule] | None = None) -> optax.GradientTransformation:
    """Lets a step turn each matrix and not lengthen it: its Frobenius norm stays. Stateless.

    Of a matrix W of params and its step u, learning rate and all:

        update = (W + u) |W|_F / |W + u|_F - W

    With `scale_to_param_norm` before the learning rate it is Hyperball, which takes the place of
    weight decay:

        W <- R Norm(W - learning_rate R Norm(u)),  R = |W|_F,  Norm(x) = x / |x|_F

    What it brings is disputed: the paper reports rates that carry over from one width and depth to
    another; where rates were tuned for each run, others gained nothing from it. In our runs of
    160 steps it ended .14 above Muon or more (docs/what_to_set.md).

    Args:
      rules: Which leaves hold matrices, and how, in the form that `orthogonalize` takes; the steps
        of other leaves pass. Each layer, head, expert and fused part is a matrix of its own.

    Returns:
      An `optax.GradientTransformation` to stand last in a chain. Its `update` needs `params`. In
      float32 the norm stays up to rounding; params in bfloat16 are rounded after it, which adds
      some 3e-7 of it in a step.

    Raises:
      ValueError: In `init`, if rules do not fit the tree or a matrix is zero, which a sphere of
        radius 0 would keep so. Under `jax.jit`, where no value is known, zeros pass.

    Examples:
      >>> import optax
      >>> from teon_optax import contrib, orthogonalize
      >>> optimizer = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     orthogonalize(),
      ...     contrib.scale_to_param_norm(),
      ...     optax.scale_by_learning_rate(0.01),
      ...     contrib.project_to_sphere(),
      ... )

    References:
      K. Wen et al., Hyperball Optimization, 2026, arXiv 2606.16899. As in NVIDIA's
      `emerging_optimizers.MuonHyperball` the radius is the norm before the step.
    """
    return _of_params("project_to_sphere", _projected, rules)


def scale_to_param_norm(rules: Iterable[Rule] | None = None) -> optax.GradientTransformation:
    """Gives each matrix's update the Frobenius norm of the matrix itself. Stateless.

    Of a matrix W of params and its update u:

        update = u |W|_F / |u|_F

    The learning rate behind it is then the norm of a step relative to the matrix. It is
    `optax.scale_by_trust_ratio` for each layer, head, expert and fused part instead of each leaf,
    and takes the place of `scale` of `orthogonalize`.

    Args:
      rules: Which leaves hold matrices, and how, in the form that `orthogonalize` takes; the
        updates of other leaves pass.

    Returns:
      An `optax.GradientTransformation` to stand before the learning rate. Its `update` needs
      `params`. An update of zero stays zero.

    Raises:
      ValueError: In `init`, if rules do not fit the tree or a matrix is zero, whose updates would
        all be zero. Under `jax.jit`, where no value is known, zeros pass.

    Examples:
      >>> import optax
      >>> from teon_optax import contrib, orthogonalize
      >>> optimizer = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     orthogonalize(),
      ...     contrib.scale_to_param_norm(),
      ...     optax.scale_by_learning_rate(0.01),
      ... )

    References:
      K. Wen et al., Hyperball Optimization, 2026, arXiv 2606.16899.
    """
    return _of_params("scale_to_param_norm", _as_long, rules)


def _of_params(name: str, function: Any, rules: Any) -> optax.GradientTransformation:
    """Makes a stateless transformation of a function of an update's matrices and of params'."""
    rules = checked_rules(rules)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        _refuse_zeros(name, params, rules)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                f"`{name}` measures params: write `optimizer.update(updates, state, params)`."
            )
        return each_matrix(function, rules, updates, params)[0], state

    return optax.GradientTransformation(init_fn, update_fn)


def _refuse_zeros(name: str, params: Any, rules: tuple[Rule, ...] | None) -> None:
    """Raises if a matrix that rules take is zero, as far as values are known: not in `jax.jit`."""
    leaves = leaf_paths(params)
    zeros = []
    for index, layout in sorted(plan(params, rules).layouts.items()):
        path, leaf = leaves[index]
        if isinstance(leaf, (jax.Array, np.ndarray)) and not isinstance(leaf, Tracer):
            count = _count_zeros(leaf, layout)
            zeros += [f"{count} of the matrices of {path!r}"] if count else []
    if zeros:
        raise ValueError(
            f"`contrib.{name}` would keep what is zero at zero: {', '.join(zeros)}. Initialize it "
            "otherwise, or leave it to another optimizer with `Rule(..., stack=0)`."
        )


def _count_zeros(leaf: Any, layout: Layout) -> int:
    """Counts the matrices of a leaf that are zero."""
    _, _, fan_in, fan_out = layout.axes
    parts = to_parts(wide_view(jnp.asarray(leaf), layout), layout)
    return sum(int(jnp.sum(~jnp.any(part, fan_in + fan_out))) for part in parts)


def _projected(
    update: jax.Array, param: jax.Array, fan_in: Axes, fan_out: Axes
) -> tuple[jax.Array]:
    """Changes steps [.., fan_in, .., fan_out] so that params keep their norms."""
    axes = fan_in + fan_out
    unit = jnp.maximum(magnitude(update, axes), magnitude(param, axes))
    u, W = update / unit, param.astype(update.dtype) / unit
    new = W + u
    old_norm, new_norm = (jnp.sqrt(sum_of_squares(each, axes)) for each in (W, new))
    nonzero = jnp.where(new_norm == 0, jnp.ones_like(new_norm), new_norm)
    # |W| / |W + u| - 1, and with it the update, without a difference of nearly equal numbers. Of a
    # long step u itself nearly equals the rest, and W does not.
    grown = jnp.sum(u * (W + new), axes, keepdims=True)
    shrinks = -grown / (nonzero * (old_norm + nonzero))
    projected = jnp.where(shrinks < -0.5, old_norm / nonzero * new - W, u + shrinks * new)
    return (unit * jnp.where(new_norm == 0, jnp.zeros_like(u), projected),)


def _as_long(update: jax.Array, param: jax.Array, fan_in: Axes, fan_out: Axes) -> tuple[jax.Array]:
    """Gives updates [.., fan_in, .., fan_out] the norms of params."""
    axes = fan_in + fan_out
    own = root_mean_square(update, axes)
    wanted = root_mean_square(param.astype(update.dtype), axes)
    return (update / jnp.where(own == 0, jnp.ones_like(own), own) * wanted,)
