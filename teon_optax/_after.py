"""What may follow `orthogonalize` in a chain, on each matrix of its own."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from teon_optax._arguments import check_number
from teon_optax._groups.layout import Layout
from teon_optax._groups.plan import plan
from teon_optax._rules.rule import Rule, checked_rules
from teon_optax._scaling import ScaleLike, scaling
from teon_optax._sharding.placement import splittable

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
      >>> from teon_optax import normalize_matrices, orthogonalize
      >>> optimizer = optax.chain(orthogonalize(), normalize_matrices(), optax.scale(-0.02))
    """
    if normalize not in _NORMALIZATIONS:
        raise ValueError(f"`normalize={normalize!r}` should be one of {_NORMALIZATIONS}.")
    check_number("eps", eps)
    rules = None if rules is None else checked_rules(rules)
    factor = scaling(scale)

    def normalized(matrix: jax.Array, layout: Layout) -> tuple[jax.Array]:
        fan_in, fan_out = (_count(matrix, axes) for axes in (layout.fan_in, layout.fan_out))
        for series in normalize.split("_"):
            summed = layout.fan_in if series == "row" else layout.fan_out
            matrix = matrix / jnp.sqrt(_square(matrix, summed) + eps)
        square = fan_in if normalize.endswith("col") else fan_out
        return (matrix * jnp.asarray(factor(fan_in, fan_out, 1, square), matrix.dtype),)

    def update_fn(updates: optax.Updates, _: Any = None) -> optax.Updates:
        return updates if normalize == "none" else _each(normalized, rules, updates)[0]

    return optax.stateless(update_fn)


def scale_by_normuon(
    rules: Iterable[Rule] | None = None,
    *,
    beta2: jax.typing.ArrayLike = 0.95,
    rms: jax.typing.ArrayLike | None = None,
    eps: float = 1e-10,
) -> optax.GradientTransformation:
    """NorMuon (arXiv 2510.05491): a second moment for each output neuron of each layer.

        v <- beta2 v + (1 - beta2) mean_fan_in O^2      N = O / (sqrt(v) + eps)

    The update is N |O|_F / |N|_F, or rms sqrt(fan_in fan_out) N / |N|_F: the paper's with 0.2.

    Args:
      rules: As for `orthogonalize`; leaves that they do not take pass.
      beta2: Decay of the second moment.
      rms: Root mean square of every matrix's update; None keeps its norm.
      eps: Added to what is divided by.

    Returns:
      An `optax.GradientTransformation` with state `optax.ScaleByRmsState(nu)`; in `nu`, fan_in has
      length 1, and `optax.MaskedNode()` stands where rules take no leaf.

    Raises:
      ValueError: If an argument is out of range or, in `init`, rules do not fit the tree.

    Examples:
      >>> import optax
      >>> from teon_optax import orthogonalize, scale_by_normuon
      >>> optimizer = optax.chain(orthogonalize(), scale_by_normuon(), optax.scale(-0.02))
    """
    rules = None if rules is None else checked_rules(rules)
    check_number("beta2", beta2, end=1)
    check_number("rms", 1 if rms is None else rms)
    check_number("eps", eps)

    def zero(matrix: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
        return matrix, jnp.zeros_like(_square(matrix, layout.fan_in))

    def scaled(matrix: jax.Array, nu: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
        fans = layout.fan_in + layout.fan_out
        mean = _square(matrix, layout.fan_in) / _count(matrix, layout.fan_in)
        nu = nu + (1 - jnp.asarray(beta2, nu.dtype)) * (mean - nu)
        new = matrix / (jnp.sqrt(nu) + eps)
        own = jnp.sqrt(_square(matrix, fans))
        norm = own if rms is None else rms * math.sqrt(_count(matrix, fans))
        return new * (norm / (jnp.sqrt(_square(new, fans)) + eps)), nu

    def init_fn(params: optax.Params) -> optax.ScaleByRmsState:
        return optax.ScaleByRmsState(_each(zero, rules, params)[1])

    def update_fn(updates: optax.Updates, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        updates, nu = _each(scaled, rules, updates, state.nu)
        return updates, optax.ScaleByRmsState(nu)

    return optax.GradientTransformation(init_fn, update_fn)


def add_cautious_weight_decay(
    weight_decay: optax.ScalarOrSchedule, mask: Any | Callable[[optax.Params], Any] | None = None
) -> optax.GradientTransformation:
    """Cautious weight decay (arXiv 2510.12402): u <- u + weight_decay I(u x >= 0) x.

    Args:
      weight_decay, mask: As for `optax.add_decayed_weights`.

    Returns:
      An `optax.GradientTransformation`, to stand before `optax.scale_by_learning_rate`.

    Examples:
      >>> import optax
      >>> from teon_optax import add_cautious_weight_decay, orthogonalize
      >>> optimizer = optax.chain(orthogonalize(), add_cautious_weight_decay(0.1), optax.scale(-1))
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


def _each(function: Callable[..., tuple], rules: Any, tree: Any, *more: Any) -> tuple[Any, Any]:
    """`function` of leaves that rules take, by fused parts: its updates, and its other results."""
    leaves, structure = jax.tree.flatten(tree)
    layouts = {leaf: series.layout for series in plan(tree, rules).series for leaf in series.leaves}
    others = [structure.flatten_up_to(each) for each in more]
    last: list[Any] = [optax.MaskedNode()] * len(leaves)
    for index, layout in layouts.items():
        leaf, (axis, *_), cuts = leaves[index], layout.fan_out, np.cumsum(layout.sizes)[:-1]
        wide = leaf.astype(np.promote_types(leaf.dtype, np.float32))
        parts = [(wide, *(other[index] for other in others))]
        if cuts.size:
            uncut = [splittable(each, axis, layout.sizes) for each in parts[0]]
            parts = zip(*(jnp.split(each, cuts, axis) for each in uncut), strict=True)
        done = zip(*(function(*part, layout) for part in parts), strict=True)
        new, *other = (jnp.concatenate(each, axis) for each in done)
        new, own = new.astype(leaf.dtype), jax.typeof(leaf).sharding
        is_there = jax.typeof(new).sharding.spec == own.spec
        leaves[index] = new if is_there else jax.sharding.reshard(new, own)
        (last[index],) = other or [optax.MaskedNode()]
    return structure.unflatten(leaves), structure.unflatten(last)


def _square(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(jnp.square(leaf), axes, keepdims=True)


def _count(leaf: jax.Array, axes: tuple[int, ...]) -> int:
    return math.prod(leaf.shape[axis] for axis in axes)
