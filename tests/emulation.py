"""Matrix products as accelerators compute them: a function is traced, its operands are rounded."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

from tests.counting import CALLED_ONCE, passes

# Bits of exponent and mantissa of what a one-pass product of float32 operands multiplies.
FORMATS = {"bf16": (8, 7), "tf32": (8, 10), "fp16": (5, 10)}


def with_products_in(one_pass: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Rounds the operands of every `dot_general` of a function as its precision says.

    | operands       | DEFAULT        | HIGH                       | HIGHEST  |
    |----------------|----------------|----------------------------|----------|
    | float32        | one pass       | three passes of two parts  | as is    |
    | 16-bit, float64| as they are    | as they are                | as is    |

    Products are summed in float32. bf16 is a TPU's format, tf32, bf16 or fp16 a GPU's.

    Args:
      one_pass: One of `FORMATS`.
      function: Anything that JAX can trace.

    Returns:
      A function of the same arguments and results, which can be traced itself.
    """
    round_product = functools.partial(_rounded_product, FORMATS[one_pass])

    def rounded(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), round_product)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return rounded


@functools.partial(jax.jit, static_argnames="bits")
def rounded_to(x: jax.Array, bits: tuple[int, int]) -> jax.Array:
    """Rounds float32 `x` to so many bits of exponent and mantissa, subnormals included.

    A pair of conversions would not do: XLA simplifies it away.
    """
    rounded = jax.lax.reduce_precision(x, *bits)
    smallest_exponent = 2 - 2 ** (bits[0] - 1)
    if smallest_exponent <= jnp.finfo(jnp.float32).minexp:
        return rounded
    grid = jnp.float32(2.0 ** (smallest_exponent - bits[1]))
    subnormal = jnp.abs(x) < 2.0**smallest_exponent
    return jnp.where(subnormal, jnp.round(x / grid) * grid, rounded)


def _rounded_product(bits: tuple[int, int], eqn: core.JaxprEqn, operands: Sequence) -> jax.Array:
    aval: Any = eqn.outvars[0].aval
    dtype = aval.dtype
    multiply = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=eqn.params["dimension_numbers"],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )
    count = passes(eqn)
    if count == 6 or all(operand.dtype != jnp.float32 for operand in operands):
        # A CPU may lack the product of 16-bit operands in float32, which holds them exactly.
        wider = [
            operand.astype(np.promote_types(operand.dtype, np.float32)) for operand in operands
        ]
        return multiply(*wider).astype(dtype)
    parts = [_parts(operand, bits, 1 if count == 1 else 2) for operand in operands]
    pairs = [(a, b) for i, a in enumerate(parts[0]) for b in parts[1][: len(parts[0]) - i]]
    return functools.reduce(jnp.add, [multiply(a, b) for a, b in pairs]).astype(dtype)


def _parts(operand: jax.Array, bits: tuple[int, int], count: int) -> list[jax.Array]:
    """Splits an operand into numbers of the format whose sum is nearly it."""
    if operand.dtype != jnp.float32:
        return [operand]
    parts = []
    for _ in range(count):
        parts.append(rounded_to(operand, bits))
        operand = operand - parts[-1]
    return parts


def _evaluate(
    jaxpr: core.Jaxpr, consts: Sequence, args: Sequence, round_product: Callable
) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: core.Var | core.Literal) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        results = _evaluate_one(eqn, [read(atom) for atom in eqn.invars], round_product)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_one(eqn: core.JaxprEqn, operands: Sequence, round_product: Callable) -> Sequence:
    if eqn.primitive is primitives.dot_general_p:
        return [round_product(eqn, operands)]
    params = eqn.params
    if eqn.primitive in CALLED_ONCE:
        (called,) = filter(_is_jaxpr, params.values())
        return _evaluate(*_opened(called), operands, round_product)
    if eqn.primitive in (primitives.scan_p, primitives.while_p, primitives.cond_p):
        params = {name: _rounded_param(value, round_product) for name, value in params.items()}
    elif any("dot_general" in str(jaxpr) for jaxpr in core.jaxprs_in_params(params)):
        raise ValueError(f"Products in `{eqn.primitive}` cannot be rounded.")
    results = eqn.primitive.bind(*operands, **params)
    return results if eqn.primitive.multiple_results else [results]


def _rounded_param(param: Any, round_product: Callable) -> Any:
    """Rounds the products in the jaxprs that a parameter of a loop or a branch holds."""
    if isinstance(param, tuple) and any(map(_is_jaxpr, param)):
        return tuple(_rounded_param(item, round_product) for item in param)
    if not _is_jaxpr(param):
        return param
    jaxpr, consts = _opened(param)
    avals: list[Any] = [var.aval for var in jaxpr.invars]
    avals = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
    return jax.make_jaxpr(lambda *args: _evaluate(jaxpr, consts, args, round_product))(*avals)


def _opened(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> tuple[core.Jaxpr, Sequence]:
    closed = isinstance(jaxpr, core.ClosedJaxpr)
    return (jaxpr.jaxpr, jaxpr.consts) if closed else (jaxpr, [])


def _is_jaxpr(value: Any) -> TypeGuard[core.Jaxpr | core.ClosedJaxpr]:
    return isinstance(value, (core.Jaxpr, core.ClosedJaxpr))
