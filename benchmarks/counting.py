"""Matrix products of a traced function, by FLOPs and by passes, loops multiplied by their length.

XLA's own cost analysis counts the body of a loop once, so it cannot compare an optimizer that loops
with one that does not.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.extend.core import primitives

# How often a TPU multiplies two float32 operands as bfloat16 parts: one part each, or the products
# of two or three parts that matter.
_PASSES = {
    jax.lax.Precision.DEFAULT: 1,
    jax.lax.Precision.HIGH: 3,
    jax.lax.Precision.HIGHEST: 6,
}
CALLED_ONCE = (
    primitives.jit_p,
    primitives.closed_call_p,
    primitives.custom_jvp_call_p,
    primitives.custom_vjp_call_p,
    primitives.remat_p,
)


class ProductCount(NamedTuple):
    """What the matrix products of a function cost.

    Attributes:
      flops: Multiplications and additions.
      passes: The same, each product multiplied by the passes that its precision takes on a TPU.
    """

    flops: int = 0
    passes: int = 0


def count_products(function: Callable[..., Any], *args: Any) -> ProductCount:
    """Counts every `dot_general` that a call of `function` executes.

    Of the branches of a `cond`, the most expensive one counts.

    Args:
      function: Anything that JAX can trace.
      *args: Its arguments, as arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The costs of one call.

    Raises:
      ValueError: If products stand in a loop of unknown length, or in an operation that is none of
        jit, scan, while, cond, checkpoint, custom derivatives.
    """
    closed = jax.make_jaxpr(function)(*args)
    return _count(closed.jaxpr, dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)))


def passes(eqn: Any) -> int:
    """How many passes a TPU takes for one `dot_general`: 1, 3 or 6.

    Raises:
      ValueError: If its precision is a `jax.lax.DotAlgorithmPreset`.
    """
    if all(var.aval.dtype.name == "bfloat16" for var in eqn.invars):
        return 1
    precisions = eqn.params["precision"] or (jax.lax.Precision.DEFAULT,)
    if not isinstance(precisions, tuple) or not all(p in _PASSES for p in precisions):
        raise ValueError(f"The passes of a product with precision {precisions} are not known.")
    return max(_PASSES[precision] for precision in precisions)


def trip_count(eqn: core.JaxprEqn, known: Mapping[core.Var, Any]) -> int:
    """How often a `while` runs that counts in constant steps, as that of a `fori_loop`.

    Args:
      eqn: The `while`.
      known: Constants among the variables around it.

    Raises:
      ValueError: If it is any other loop.
    """
    error = ValueError(
        "A loop contains products, and how often it runs is not known when it is traced: give "
        "`fori_loop` "
        "constant bounds."
    )
    condition, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    if [test.primitive.name for test in condition.eqns] != ["lt"]:
        raise error
    (test,) = condition.eqns
    # What each variable of the condition is before the loop, and what becomes of it in one round.
    outer = eqn.invars[:n_cond] + eqn.invars[n_cond + n_body :]
    before = dict(zip(condition.invars, outer, strict=True))
    rounds = zip(body.invars[n_body:], body.outvars, strict=True)
    inside = dict(zip(condition.invars[n_cond:], rounds, strict=True))

    def value(atom: core.Var | core.Literal, variables: Mapping) -> int:
        if isinstance(atom, core.Literal):
            return int(atom.val)
        if atom not in variables:
            raise error
        return int(variables[atom])

    def start(atom: core.Var | core.Literal) -> int:
        return value(atom if isinstance(atom, core.Literal) else before[atom], known)

    counter, bound = test.invars
    if bound in inside and inside[bound][0] is not inside[bound][1]:
        raise error
    if counter not in inside:
        raise error
    old, new = inside[counter]
    additions = [e for e in body.eqns if new in e.outvars and e.primitive is primitives.add_p]
    if not additions or additions[0].invars[0] is not old:
        raise error
    step = value(additions[0].invars[1], {})
    if step <= 0:
        raise error
    return max(0, -(-(start(bound) - start(counter)) // step))


def _count(jaxpr: core.Jaxpr, known: Mapping[core.Var, Any]) -> ProductCount:
    total = ProductCount()
    for eqn in jaxpr.eqns:
        flops, weighted = _count_one(eqn, known)
        total = ProductCount(total.flops + flops, total.passes + weighted)
    return total


def _count_one(eqn: core.JaxprEqn, known: Mapping[core.Var, Any]) -> ProductCount:
    if eqn.primitive is primitives.dot_general_p:
        flops = _flops(eqn)
        return ProductCount(flops, passes(eqn) * flops)
    inner = list(core.jaxprs_in_params(eqn.params))
    counts = [_count(jaxpr, _known_inside(jaxpr, eqn, known)) for jaxpr in inner]
    if not any(count.flops for count in counts):
        return ProductCount()
    if eqn.primitive is primitives.cond_p:
        return max(counts, key=lambda count: count.passes)
    if eqn.primitive is primitives.scan_p:
        times = eqn.params["length"]
    elif eqn.primitive is primitives.while_p:
        times = trip_count(eqn, known)
    elif eqn.primitive in CALLED_ONCE:
        times = 1
    else:
        raise ValueError(f"How often `{eqn.primitive}` runs the products in it is not known.")
    return ProductCount(
        times * sum(count.flops for count in counts), times * sum(count.passes for count in counts)
    )


def _known_inside(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, known: Mapping) -> Mapping:
    """Constants that a call hands to its jaxpr; loops and branches start with none."""
    if eqn.primitive not in CALLED_ONCE:
        return {}
    constants = {}
    for inner, outer in zip(jaxpr.invars, eqn.invars, strict=True):
        if isinstance(outer, core.Literal):
            constants[inner] = outer.val
        elif outer in known:
            constants[inner] = known[outer]
    return constants


def _flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lengths = [eqn.invars[0].aval.shape[axis] for axis in contracted]
    return 2 * eqn.outvars[0].aval.size * math.prod(lengths)
