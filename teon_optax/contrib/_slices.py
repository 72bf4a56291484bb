"""`orthogonalize_slices`: transforms along the stacks of coupled matrices."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from teon_optax._memory import as_given, on_device, widened
from teon_optax._mesh.placement import Located, as_shardings
from teon_optax._orthogonalize import orthogonalize_leaves
from teon_optax._plan.batches import Batch, batches_of, map_joint_matrices
from teon_optax._planning import plan, plan_of_updates
from teon_optax._polar.coefficients import Method, MethodLike, of_quotient, resolve
from teon_optax._polar.newton_schulz import weighted_sums
from teon_optax._polar.numerics import Numerics, check_precision
from teon_optax._rule import Rule, checked_rules, takes_rules
from teon_optax._scaling import ScaleFunction, ScaleLike, scaling
from teon_optax.contrib._transforms import TRANSFORMS, real_weights


@takes_rules
def orthogonalize_slices(
    rules: Iterable[Rule] | None,
    transform: str,
    *,
    method: MethodLike = "polar_express",
    scale: ScaleLike = "spectral",
    shardings: Any = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformation:
    """Orthogonalizes sums and differences of layers instead of the layers: T-MUON. Stateless.

    Per group of K matrices M_1 .. M_K that the rules couple, with an orthonormal K x K matrix F:

        update_k = scale * sum_f conj(F_fk) polar(sum_j F_fj M_j)

    It takes the place of `orthogonalize`. A group of one matrix is Muon's; leaves that no rule
    takes pass through.

    Args:
      rules: Which leaves, and which of them together, in the form that `orthogonalize` takes. A
        transform unfolds nothing, so rules that couple matrices have mode 1, and the products that
        `plan` counts for them are those of `orthogonalize`.
      transform: "dct", "dft" or "haar": F along the group in its order, which is that of
        `Group.members`. A shorter last group has the transform of its own K.
      method: Polynomial of the polar factors, by name or as coefficients; see `polar`.
      scale: Size of the update, "spectral", "muon" or a root mean square, that `orthogonalize`
        gives to a matrix alone.
      shardings: How leaves lie on a mesh of type Auto, as `orthogonalize` takes it. Leaves are
        gathered to be mixed, and the slices shared out among the devices.
      precision: Precision of the products of the polar factors, as `orthogonalize` takes it; mixing
        is exact everywhere.

    Returns:
      An `optax.GradientTransformation`. Updates keep their dtypes; until then matrices are in
      float32 at least.

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
        leaves, structure = jax.tree.flatten(updates)
        planned = plan_of_updates(structure, leaves, params, rules)
        taken = {index: on_device(leaves[index]) for index in planned.taken}
        located = placement.locate(structure, leaves, planned.taken)
        if located is not None:
            settled = {index: located.settled(index, leaf) for index, leaf in taken.items()}
            taken = {index: located.gathered(index, leaf) for index, leaf in settled.items()}
        function = functools.partial(
            _transformed,
            transform=transform,
            numerics=numerics,
            scale=scale_function,
            located=located,
        )
        batches = batches_of(planned.series)
        done = map_joint_matrices(taken, planned.layouts, batches, function)
        for index, update in done.items():
            placed = update if located is None else located.returned(index, update)
            leaves[index] = as_given(placed, leaves[index])
        return structure.unflatten(leaves), state

    return optax.GradientTransformation(init_fn, update_fn)


def _check_modes(rules: Iterable[Rule]) -> None:
    """Raises if a rule that couples matrices unfolds them in another mode than 1."""

    def couples(rule: Rule) -> bool:
        return rule.stack > 1 or bool(rule.join) or "slice" in rule.compiled.groupindex

    if wrong := [str(rule) for rule in rules if rule.stack and rule.mode != 1 and couples(rule)]:
        raise ValueError(
            "`orthogonalize_slices` transforms the matrices of a group and unfolds nothing, so "
            f"leave out the mode of {', '.join(wrong)}."
        )


def _transformed(
    batches: Sequence[Batch],
    joint: Sequence[jax.Array],
    transform: str,
    numerics: Numerics,
    scale: ScaleFunction,
    located: Located | None,
) -> list[jax.Array]:
    """Mixes the groups of joint matrices, orthogonalizes them slice by slice, and mixes back."""
    done: list[Any] = [0] * len(joint)
    for tiles in (1, 2):
        weights = {
            index: found[tiles]
            for index, batch in enumerate(batches)
            if tiles in (found := real_weights(transform, batch.K))
        }
        mixed = [_mixed(weights[index], batches[index], joint[index]) for index in weights]
        dtypes = [batches[index].dtype for index in weights]
        all_factors = _polar_factors(mixed, dtypes, tiles, numerics, located)
        for index, factors in zip(weights, all_factors, strict=True):
            batch = batches[index]
            size = scale(batch.fan_in, batch.fan_out, 1, min(_matrix(batch)))
            done[index] += jnp.asarray(size, factors.dtype) * _unmixed(weights[index], factors)
    return [sums.reshape(array.shape) for sums, array in zip(done, joint, strict=True)]


def _matrix(batch: Batch) -> tuple[int, int]:
    """Gives the shape of one matrix of a group; mode 3 flattens a matrix that is alone."""
    return (batch.fan_in, batch.fan_out) if batch.K > 1 else batch.joint


def _mixed(weights: np.ndarray, batch: Batch, joint: jax.Array) -> jax.Array:
    """Mixes joint matrices [groups, K x m, n] to slices [groups, slices, tiles x m, tiles x n].

    They are in float32 at least. One matrix alone is not mixed.
    """
    m, n = _matrix(batch)
    stacks = widened(joint.reshape(-1, batch.K, m, n))
    if batch.K == 1:
        return stacks
    slices, tiles, _, K = weights.shape
    sums = weighted_sums(weights.reshape(-1, K), stacks)
    grid = sums.reshape(-1, slices, tiles, tiles, m, n).transpose(0, 1, 2, 4, 3, 5)
    return grid.reshape(-1, slices, tiles * m, tiles * n)


def _unmixed(weights: np.ndarray, slices: jax.Array) -> jax.Array:
    """Adds up what slices give to the matrices of each group, by the transposed weights."""
    count, tiles, _, K = weights.shape
    if K == 1:
        return slices
    m, n = (size // tiles for size in slices.shape[2:])
    grid = slices.reshape(-1, count, tiles, m, tiles, n).transpose(0, 1, 2, 4, 3, 5)
    return weighted_sums(weights.reshape(-1, K).T, grid.reshape(-1, count * tiles**2, m, n))


def _polar_factors(
    slices: Sequence[jax.Array],
    dtypes: Sequence[Any],
    tiles: int,
    numerics: Numerics,
    located: Located | None,
) -> list[jax.Array]:
    """Takes polar factors of slices, of which a mesh gives each device some.

    Args:
      slices: Arrays [groups, slices, tiles x m, tiles x n].
      dtypes: The dtypes of the leaves that each array is made of.
      tiles: 1, or 2 of complex slices.
      numerics: The method, and the precision of its products.
      located: Where the leaves lie on a mesh, if that is known.
    """
    if numerics.polynomial and tiles == 2:
        numerics = numerics._replace(method=_of_doubled(numerics.polynomial))
    pairs = zip(slices, dtypes, strict=True)
    types = [jax.ShapeDtypeStruct(array.shape, dtype) for array, dtype in pairs]
    planned = plan(types, [Rule("", dims=MuonDimensionNumbers(-2, -1))])
    everywhere = located and located.everywhere(len(slices))
    given = dict(enumerate(slices))
    done = orthogonalize_leaves(given, planned, numerics, lambda *_: 1.0, 0.0, everywhere)
    return [done[index] for index in range(len(slices))]


def _of_doubled(method: Method) -> Method:
    """Adapts a method to matrices that have each singular value twice.

    It does to them what the method itself does to one of each. Their norm is greater, which the
    first quintic makes up for.
    """
    greater = 2 ** (1 / 4 if method.norm == "schatten4" else 1 / 2)
    first, *others = method.coefficients
    return method._replace(coefficients=(of_quotient(first, 1 / greater), *others))
