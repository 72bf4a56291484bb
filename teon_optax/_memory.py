"""Device and host memory, and states that keep their shapes, their dtypes and their memory."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from teon_optax._paths import leaf_paths

_REMEDY = (
    ": this is the state of another model. Make a new one by `init(params)`, or restore that of "
    "this model."
)


def on_device(leaf: jax.typing.ArrayLike) -> Any:
    """Moves a leaf to the memory of its device: accelerators compute with nothing else."""
    device = jax.memory.Space.Device
    return leaf if jax.typeof(leaf).memory_space == device else jax.device_put(leaf, device)


def widened(array: Any) -> Any:
    """Casts a real array, of NumPy or JAX, to float32, or leaves it in what is wider."""
    return array.astype(np.promote_types(array.dtype, np.float32))


def kept_beside(leaf: jax.Array, other: jax.typing.ArrayLike) -> jax.Array:
    """Moves a leaf to the memory that another one is kept in."""
    space = jax.typeof(other).memory_space
    return leaf if jax.typeof(leaf).memory_space == space else jax.device_put(leaf, space)


def as_given(leaf: jax.Array, given: Any) -> jax.Array:
    """Casts a leaf to the dtype of the one that it is in place of, and moves it to its memory.

    `jax.lax.scan` wants states to be so.
    """
    return kept_beside(leaf.astype(given.dtype) if hasattr(given, "dtype") else leaf, given)


def with_stable_state(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps an optimizer so that its state keeps its dtypes and may be in the memory of the host.

    Optax's first moment takes the dtype of the gradients at the first update, where params have
    another; `jax.lax.scan` and `optax.apply_if_finite` then raise. Leaves of float16 are computed
    and their state is kept in float32: squares of gradients below 2e-4 and Adam's eps of 1e-8 are
    zero in float16, and zero divided by them is NaN.
    """

    def init_fn(params: optax.Params) -> optax.OptState:
        state = optimizer.init(jax.tree.map(_out_of_half, jax.tree.map(on_device, params)))
        return optax.tree.map_params(optimizer, kept_beside, state, params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        given, old_state, old_params = jax.tree.map(on_device, (updates, state, params))
        wide, wide_params = jax.tree.map(_out_of_half, (given, old_params))
        new_updates, new_state = optimizer.update(wide, old_state, wide_params)
        _check_shapes((updates, state), (new_updates, new_state))
        new_updates = jax.tree.map(_back_to_half, new_updates, given)
        new_updates = jax.tree.map(kept_beside, new_updates, updates)
        return new_updates, jax.tree.map(as_given, new_state, state)

    return optax.GradientTransformation(init_fn, update_fn)


def _out_of_half(leaf: jax.Array) -> jax.Array:
    """Casts a leaf of float16 to float32, which has the exponents of squares."""
    return leaf.astype(jnp.float32) if jnp.result_type(leaf) == jnp.float16 else leaf


def _back_to_half(leaf: jax.Array, given: jax.Array) -> jax.Array:
    """Casts a leaf back to float16 where it was given in float16."""
    return leaf.astype(jnp.float16) if jnp.result_type(given) == jnp.float16 else leaf


def check_restored(state: Any, updates: Any) -> None:
    """Raises if a state with `count` and `mu`, perhaps restored, is not of such updates."""
    check_typed(state, ("count", "mu"))
    if problem := _problem(state, updates):
        raise ValueError(f"{problem}{_REMEDY}")


def check_typed(state: Any, fields: Sequence[str]) -> None:
    """Raises if a state has lost its types, as a checkpoint that is restored without a target."""
    if not all(hasattr(state, field) for field in fields):
        raise ValueError(
            f"The state is a {type(state).__name__}, without {' and '.join(map(repr, fields))}: "
            "perhaps a checkpoint that was restored without its types. Restore it into the tree of "
            "`optimizer.init(params)`, as with Orbax's `StandardRestore(optimizer.init(params))` "
            "or `flax.serialization.from_bytes(optimizer.init(params), ...)`."
        )


def _problem(state: Any, updates: Any) -> str | None:
    """Says what tells that a state is not of these updates, if anything does."""
    if jnp.ndim(state.count):
        return f"The state's `count` has shape {jnp.shape(state.count)}, and should be one number"
    kept, new = jax.tree.leaves(state.mu), jax.tree.leaves(updates)
    if len(kept) != len(new):
        odd = sorted({path for path, _ in leaf_paths(state.mu)} ^ {*dict(leaf_paths(updates))})
        return f"The momentum `mu` has {len(kept)} leaves, and updates {len(new)}; see {odd[:4]}"
    for index, (mu, update) in enumerate(zip(kept, new, strict=True)):
        if jnp.shape(mu) != jnp.shape(update):
            return (
                f"The momentum `mu` of {leaf_paths(updates)[index][0]!r} has shape {jnp.shape(mu)},"
                f" and its update {jnp.shape(update)}"
            )
        dtype, of_update = jnp.result_type(mu), jnp.result_type(update)
        if jnp.issubdtype(of_update, jnp.floating) and not jnp.issubdtype(dtype, jnp.floating):
            return (
                f"The momentum `mu` of {leaf_paths(updates)[index][0]!r} has dtype {dtype}, which "
                "is not real floating"
            )
    return None


def _check_shapes(old: Any, new: Any) -> None:
    """Raises if an update of the fallback changed a shape: NumPy's rules broadcast in silence."""
    for (path, before), after in zip(leaf_paths(old), jax.tree.leaves(new), strict=True):
        if jnp.shape(before) != jnp.shape(after):
            raise ValueError(
                f"The fallback's {path!r} has shape {jnp.shape(before)} before and "
                f"{jnp.shape(after)} after an update{_REMEDY}"
            )
