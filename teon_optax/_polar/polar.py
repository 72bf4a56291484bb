"""Polar factors of plain arrays: of matrices, and of the unfoldings of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from teon_optax._memory import as_given, on_device
from teon_optax._polar.coefficients import MethodLike, resolve
from teon_optax._polar.newton_schulz import orthogonalize_batches
from teon_optax._polar.numerics import Numerics


def _everywhere(array: jax.Array) -> jax.Array:
    """Gathers an array that a mesh of type Explicit cuts: its axes are about to be joined."""
    sharding = jax.typeof(array).sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.sharding.reshard(array, whole) if _is_cut(sharding) else array


def _placed_as(array: jax.Array, result: jax.Array) -> jax.Array:
    """Returns a result in the dtype, the memory and the sharding of an array."""
    result, sharding = as_given(result, array), jax.typeof(array).sharding
    return jax.sharding.reshard(result, sharding) if _is_cut(sharding) else result


def _is_cut(sharding: NamedSharding) -> bool:
    """Tells whether a mesh of type Explicit cuts an array with this sharding in its type."""
    return any(axis is not None for axis in sharding.spec)


def _checked(call: str, array: jax.typing.ArrayLike, ndim: int) -> jax.Array:
    array = jnp.asarray(array)
    if array.ndim < ndim or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"`{call}` takes a real floating array of at least {ndim} axes, none of them empty; "
            f"got {array.dtype} of shape {array.shape}."
        )
    return array


def polar(matrix: jax.typing.ArrayLike, method: MethodLike = "polar_express") -> jax.Array:
    """Computes the polar factor U V^T of a matrix M = U S V^T, or an approximation of it.

    Args:
      matrix: (..., m, n), real floating; leading axes are a batch. One that a mesh of type Explicit
        cuts is gathered, and its factor lies as it did.
      method: "polar_express" (5 steps for singular values down to 1e-3 of the Frobenius norm),
        "schatten" (4 steps down to 5e-3 of the Schatten-4 norm), "fast" (2 quintics and 2 cubics
        down to 1.15e-2 of the Schatten-4 norm), "jordan", "dion", "you", "svd" (exact), or a tuple
        of coefficients, a triple (a, b, c) for each quintic a x + b x^3 + c x^5 and a pair (a, b)
        for each cubic. Or a function from matrices [B, d, N], d <= N, in float32 at least, to as
        many of the same shape and dtype, which is used in place of the polar factor; higher
        matrices reach it transposed.

    Returns:
      (..., m, n) in the matrix's dtype; computed in float32 at least. Zero gives zero.

    Raises:
      ValueError: If the matrix is not real floating, has an empty axis, or the method is unknown or
        a function that returns another shape or dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> polar(jnp.array([[3.0, 0.0], [0.0, -2.0]]), method="svd").tolist()
      [[1.0, 0.0], [0.0, -1.0]]
    """
    matrix, resolved = _checked("polar(matrix)", matrix, 2), resolve(method)
    batch = _everywhere(on_device(matrix)).reshape(-1, *matrix.shape[-2:])
    (result,) = orthogonalize_batches([batch], [1], Numerics(resolved))
    return _placed_as(matrix, result.reshape(matrix.shape))


def mode_orthogonalize(
    tensor: jax.typing.ArrayLike, mode: int = 1, method: MethodLike = "polar_express"
) -> jax.Array:
    """Orthogonalizes the mode-i unfolding of a stack of K layers, and folds it back.

    In the paper's layout W is (m, n) = (fan_out, fan_in), and the unfoldings are
    mode 1: m x nK, mode 2: n x mK, mode 3: K x mn.

    Args:
      tensor: (..., m, n, K), real floating; leading axes are a batch.
      mode: 1, 2 or 3.
      method: A name, coefficients or a function, in the forms that `polar` takes.

    Returns:
      (..., m, n, K) in the tensor's dtype.

    Raises:
      ValueError: If the tensor is not real floating, has an empty axis, or mode or method are
        unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> stack = jnp.stack([jnp.eye(2), jnp.eye(2)], axis=-1)
      >>> mode_orthogonalize(stack, mode=1, method="svd")[0, 0].round(3).tolist()
      [0.7070000171661377, 0.7070000171661377]

    References:
      TEON, arXiv 2601.23261, algorithm 1.
    """
    tensor = _checked("mode_orthogonalize(tensor)", tensor, 3)
    is_integer = isinstance(mode, (int, np.integer)) and not isinstance(mode, bool)
    if not is_integer or mode not in (1, 2, 3):
        raise ValueError(f"`mode_orthogonalize(mode={mode!r})`: mode should be 1, 2 or 3.")
    first = jnp.moveaxis(_everywhere(tensor), mode - 4, -3)
    unfolded = first.reshape(*first.shape[:-2], -1)
    folded = polar(unfolded, method).reshape(first.shape)
    return _placed_as(tensor, jnp.moveaxis(folded, -3, mode - 4))
