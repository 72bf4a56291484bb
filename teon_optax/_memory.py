"""Device and host memory, and states that keep their shapes, their dtypes and their memory."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from teon_optax._paths import leaf_paths

_REMEDY = (
    ": this is the state of another model. Make a new one by `init(params)`, or restore that of "
    "this model."
)


def on_device(leaf: jax.typing.ArrayLike) -> Any:
    """The leaf in the memory of its device: accelerators compute with nothing else."""
    return _in_memory(leaf, jax.memory.Space.Device)


def kept_beside(leaf: jax.Array, other: jax.typing.ArrayLike) -> jax.Array:
    """The leaf in the memory that another one is kept in."""
    return _in_memory(leaf, jax.typeof(other).memory_space)


def _in_memory(leaf: Any, space: Any) -> Any:
    return leaf if jax.typeof(leaf).memory_space == space else jax.device_put(leaf, space)


def with_stable_state(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, with a state that keeps its dtypes and may be kept in the memory of the host.

    Optax's first moment takes the dtype of the gradients at the first update, where params have
    another; `jax.lax.scan` and `optax.apply_if_finite` then raise. Leaves of float16 are computed
    and their state is kept in float32: squares of gradients below 2e-4 and Adam's eps of 1e-8 are
    zero in float16, and zero divided by them is NaN.
    """

    def init_fn(params: optax.Params) -> optax.OptState:
        state = optimizer.init(jax.tree.map(_widened, jax.tree.map(on_device, params)))
        return optax.tree.map_params(optimizer, kept_beside, state, params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        given, old_state, old_params = jax.tree.map(on_device, (updates, state, params))
        wide, wide_params = jax.tree.map(_widened, (given, old_params))
        new_updates, new_state = optimizer.update(wide, old_state, wide_params)
        _check_shapes((updates, state), (new_updates, new_state))
        new_updates = jax.tree.map(_narrowed, new_updates, given)
        return jax.tree.map(kept_beside, new_updates, updates), kept_as(state, new_state)

    return optax.GradientTransformation(init_fn, update_fn)


def _widened(leaf: jax.Array) -> jax.Array:
    """Casts a leaf of float16 to float32, which has the exponents of squares."""
    return leaf.astype(jnp.float32) if jnp.result_type(leaf) == jnp.float16 else leaf


def _narrowed(leaf: jax.Array, given: jax.Array) -> jax.Array:
    """Casts a leaf back to float16 where it was given in float16."""
    return leaf.astype(jnp.float16) if jnp.result_type(given) == jnp.float16 else leaf


def check_restored(state: Any, updates: Any) -> None:
    """Raises if a state with `count` and `mu`, perhaps restored, is not of such updates."""
    if problem := _problem(state, leaf_paths(state.mu), leaf_paths(updates)):
        raise ValueError(f"{problem}{_REMEDY}")


def _problem(
    state: Any, kept: Sequence[tuple[str, Any]], updates: Sequence[tuple[str, Any]]
) -> str | None:
    """What tells that a state is not of these updates, if anything does."""
    if jnp.ndim(state.count):
        return f"The state's `count` has shape {jnp.shape(state.count)}, and should be one number"
    if len(kept) != len(updates):
        odd = sorted({path for path, _ in kept} ^ {path for path, _ in updates})
        return (
            f"The momentum `mu` has {len(kept)} leaves, and updates {len(updates)}; see {odd[:4]}"
        )
    for (path, update), (_, mu) in zip(updates, kept, strict=True):
        if jnp.shape(mu) != jnp.shape(update):
            return (
                f"The momentum `mu` of {path!r} has shape {jnp.shape(mu)}, and its update "
                f"{jnp.shape(update)}"
            )
        dtype = jnp.result_type(mu)
        if _is_floating(jnp.result_type(update)) and not _is_floating(dtype):
            return f"The momentum `mu` of {path!r} has dtype {dtype}, which is not real floating"
    return None


def _is_floating(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def kept_as(old: Any, new: Any) -> Any:
    """A new tree in the dtypes and memory of the old one, as `jax.lax.scan` wants a state to be."""
    return jax.tree.map(kept_beside, optax.tree.cast_like(new, old), old)


def _check_shapes(old: Any, new: Any) -> None:
    """Raises if an update of the fallback changed a shape: NumPy's rules broadcast in silence."""
    for (path, before), after in zip(leaf_paths(old), jax.tree.leaves(new), strict=True):
        if jnp.shape(before) != jnp.shape(after):
            raise ValueError(
                f"The fallback's {path!r} has shape {jnp.shape(before)} before and "
                f"{jnp.shape(after)} after an update{_REMEDY}"
            )
