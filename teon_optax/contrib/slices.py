"""`orthogonalize_slices`: transforms along the stacks of coupled matrices."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from teon_optax._groups.plan import Series, plan, plan_of_updates
from teon_optax._orthogonalize import orthogonalize_updates
from teon_optax._polar.coefficients import Method, MethodLike, resolve
from teon_optax._polar.newton_schulz import check_precision, weighted_sums
from teon_optax._polar.precision import Numerics
from teon_optax._rules.rule import Rule, checked_rules
from teon_optax._scaling import ScaleFunction, ScaleLike, scaling
from teon_optax._sharding.placement import Located, as_shardings, splittable
from teon_optax.contrib.matrices import from_parts, placed_like, to_parts
from teon_optax.contrib.transforms import TRANSFORMS, real_weights


def orthogonalize_slices(
    rules: Iterable[Rule] | None,
    transform: str,
    *,
    method: MethodLike = "polar_express",
    scale: ScaleLike = "spectral",
    shardings: Any = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformation:
    """T-MUON (arXiv 2610.24938): polar factors of sums and differences of layers. Stateless.

    Per group of K matrices M_1 .. M_K that the rules couple, with an orthonormal K x K matrix F:

        update_k = scale * sum_f conj(F_fk) polar(sum_j F_fj M_j)

    It takes the place of `orthogonalize`. A group of one matrix is Muon's; leaves that no rule
    takes pass through.

    Args:
      rules: As for `orthogonalize`. A transform unfolds nothing, so rules that couple matrices have
        mode 1, and the products that `plan` counts for them are those of `orthogonalize`.
      transform: "dct", "dft" or "haar": F along the group in its order, which is that of
        `Group.members`. A shorter last group has the transform of its own K.
      method: As for `orthogonalize`.
      scale: As for `orthogonalize`; with K = 1.
      shardings: As for `orthogonalize`. Layers, heads and fused parts that a mesh cuts are made
        whole where they are mixed.
      precision: As for `orthogonalize`, of the polar factors; mixing is exact everywhere.

    Returns:
      An `optax.GradientTransformation`. Updates keep their dtypes; matrices that are mixed are in
      float32 at least until then.

    Raises:
      ValueError: If an argument is unknown, a rule that couples has another mode than 1 or, in
        `init`, rules do not fit the tree.

    Examples:
      >>> import optax
      >>> from teon_optax import Rule, contrib
      >>> rules = [Rule(r"block_(?P<layer>\\d+)/(query|key|value)/kernel", stack=2)]
      >>> optimizer = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     contrib.orthogonalize_slices(rules, "dct"),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(0.02),
      ... )
    """
    rules = checked_rules(rules)
    if transform not in TRANSFORMS:
        raise ValueError(f"`transform={transform!r}` should be one of {TRANSFORMS}.")
    _check_modes(rules or ())
    placement = as_shardings(shardings)
    numerics, scale_function = Numerics(resolve(method), precision), scaling(scale)
    check_precision(precision)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        placement.check(params, plan(params, rules).taken)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        planned = plan_of_updates(updates, params, rules)
        located = placement.locate(updates, planned.taken)
        leaves, structure = jax.tree.flatten(updates)
        stacks = [stack for series in planned.series for stack in _stacks(leaves, series)]
        results = _orthogonalized(stacks, transform, numerics, scale_function, located)
        for leaf, update in _to_leaves(results, planned.series).items():
            update = update.astype(leaves[leaf].dtype)
            leaves[leaf] = update if located is None else located.returned(leaf, update)
        return structure.unflatten(leaves), state

    return optax.GradientTransformation(init_fn, update_fn)


def _check_modes(rules: Iterable[Rule]) -> None:
    def couples(rule: Rule) -> bool:
        return rule.stack > 1 or bool(rule.join) or "slice" in rule.compiled.groupindex

    if wrong := [str(rule) for rule in rules if rule.stack and rule.mode != 1 and couples(rule)]:
        raise ValueError(
            "`orthogonalize_slices` transforms the matrices of a group and unfolds nothing, so "
            f"leave out the mode of {', '.join(wrong)}."
        )


class _Stack(NamedTuple):
    """Groups of one series that have one K.

    Attributes:
      series: Whose groups they are.
      array: [groups, K, *member]. A member is a matrix, or a batch of them, that keeps the axes of
        its leaf, so that what a mesh cuts in the leaf is cut here.
    """

    series: Series
    array: jax.Array


def _member_axes(series: Series) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of an array of `to_parts` that count coupled matrices, and those that members keep."""
    coupled, *others = series.layout.roles
    return coupled, tuple(sorted(sum(others, ())))


def _stacks(leaves: Sequence[jax.Array], series: Series) -> Iterator[_Stack]:
    """All groups of a series; the last, if it is shorter, is a stack of its own."""
    layout = series.layout
    coupled, kept = _member_axes(series)

    def members(leaf: jax.Array) -> jax.Array:
        for axis in layout.layer + layout.heads:
            leaf = splittable(leaf, axis, (1,))
        return to_parts(leaf, layout)[series.part].transpose(coupled + kept)

    own = [members(leaves[leaf]) for leaf in series.leaves]
    dtype = functools.reduce(np.promote_types, (array.dtype for array in own))
    own = [placed_like(array.astype(dtype), own[0]) for array in own]
    # Siblings come after the axis of layers, if there is one, and before parts and heads.
    layers = [
        jnp.stack(own[start : start + series.siblings], axis=len(layout.layer))
        for start in range(0, len(own), series.siblings)
    ]
    joined = jnp.concatenate(layers) if layout.layer else jnp.stack(layers)
    member = own[0].shape[len(coupled) :]
    matrices = joined.reshape(-1, *member)
    K = series.rule.stack * series.coupled
    end = len(matrices) - len(matrices) % K
    if end:
        yield _Stack(series, matrices[:end].reshape(-1, K, *member))
    if end < len(matrices):
        yield _Stack(series, matrices[None, end:])


def _to_leaves(stacks: Iterable[_Stack], all_series: Iterable[Series]) -> dict[int, jax.Array]:
    """Inverse of `_stacks` of all series, by the leaf's position in the tree."""
    found: dict[Series, list[jax.Array]] = {}
    for series, array in stacks:
        found.setdefault(series, []).append(array.reshape(-1, *array.shape[2:]))
    parts: dict[int, list[jax.Array]] = {}
    for series in all_series:
        layout, matrices = series.layout, jnp.concatenate(found[series])
        axes = _member_axes(series)
        back = np.argsort(sum(axes, ()))
        parts_and_heads = [layout.equal_parts] if layout.joins_parts else []
        parts_and_heads += [layout.shape[axis] for axis in layout.heads]
        layer = [layout.shape[axis] for axis in layout.layer]
        shape = *layer, series.siblings, *parts_and_heads, *matrices.shape[1:]
        count = series.layers_per_leaf * series.coupled
        for position in range(len(series.leaves) // series.siblings):
            layers = matrices[position * count : (position + 1) * count].reshape(shape)
            for sibling in range(series.siblings):
                leaf = series.leaves[position * series.siblings + sibling]
                own = jax.lax.index_in_dim(layers, sibling, len(layer), keepdims=False)
                parts.setdefault(leaf, []).append(own.transpose(back))
    layouts = {leaf: series.layout for series in all_series for leaf in series.leaves}
    return {leaf: from_parts(arrays, layouts[leaf]) for leaf, arrays in parts.items()}


def _orthogonalized(
    stacks: Sequence[_Stack],
    transform: str,
    numerics: Numerics,
    scale: ScaleFunction,
    located: Located | None,
) -> list[_Stack]:
    """The stacks' updates: transformed, orthogonalized slice by slice, and transformed back."""
    results: list[Any] = [0] * len(stacks)
    for blocks in (1, 2):
        weights = {
            index: found[blocks]
            for index, stack in enumerate(stacks)
            if blocks in (found := real_weights(transform, stack.array.shape[1]))
        }
        mixed = [_mixed(weights[index], stacks[index].array) for index in weights]
        all_series = [stacks[index].series for index in weights]
        factors = _polar_factors(mixed, all_series, blocks, numerics, scale, located)
        for index, factor in zip(weights, factors, strict=True):
            results[index] += _unmixed(weights[index], factor)
    return [
        stack._replace(array=result.astype(stack.array.dtype))
        for stack, result in zip(stacks, results, strict=True)
    ]


def _mixed(weights: np.ndarray, stack: jax.Array) -> jax.Array:
    """Slices of the stack of each group: [groups, K, *member] to [groups, *weights[:-1], *member].

    One matrix alone is not mixed and stays in its dtype.
    """
    groups, K, *member = stack.shape
    if K > 1:
        stack = stack.astype(np.promote_types(stack.dtype, np.float32))
    sums = weighted_sums(weights.reshape(-1, K), stack)
    return sums.reshape(groups, *weights.shape[:-1], *member)


def _unmixed(weights: np.ndarray, slices: jax.Array) -> jax.Array:
    """What these slices add to the stack of each group: the transposed weights undo the others."""
    groups, member = slices.shape[0], slices.shape[weights.ndim :]
    weights = weights.reshape(-1, weights.shape[-1])
    return weighted_sums(weights.T, slices.reshape(groups, -1, *member))


def _polar_factors(
    slices: Sequence[jax.Array],
    all_series: Sequence[Series],
    blocks: int,
    numerics: Numerics,
    scale: ScaleFunction,
    located: Located | None,
) -> list[jax.Array]:
    """Scaled polar factors of slices, an array [groups, slices, blocks, blocks, *member] a stack.

    They are leaves of `orthogonalize` whose fans begin with the axes of blocks.
    """
    if numerics.method and blocks == 2:
        numerics = numerics._replace(method=_of_doubled(numerics.method))
    rules, sources = [], []
    for index, series in enumerate(all_series):
        _, kept = _member_axes(series)
        _, _, *fans = series.layout.roles
        dims = [
            (first, *(4 + kept.index(axis) for axis in fan))
            for first, fan in zip((2, 3), fans, strict=True)
        ]
        rules.append(Rule(f"^{index}$", mode=series.rule.mode, dims=MuonDimensionNumbers(*dims)))
        of_leaf = [None] * 4 + [_leaf_axis(series, axis) for axis in kept]
        sources.append((series.leaves[0], of_leaf))
    tree = list(slices)
    located = located and located.derived(tree, sources)

    def of_one_block(fan_in: int, fan_out: int, K: int, rank: int) -> jax.typing.ArrayLike:
        return scale(fan_in // blocks, fan_out // blocks, K, rank // blocks)

    return orthogonalize_updates(tree, plan(tree, rules), numerics, of_one_block, located)


def _leaf_axis(series: Series, axis: int) -> int | None:
    """Which axis of the leaf one of `to_parts` is; None for that of equal parts."""
    parts = series.layout.fan_out[0]
    return None if axis == parts else axis - (axis > parts)


def _of_doubled(method: Method) -> Method:
    """The method that does to a matrix with each singular value twice what this one does with one.

    That matrix's norm is greater, which the first quintic makes up for.
    """
    greater = 2 ** (1 / 4 if method.norm == "schatten4" else 1 / 2)
    (a, b, c), *others = method.coefficients
    first = a * greater, b * greater**3, c * greater**5
    return method._replace(coefficients=(first, *others))
