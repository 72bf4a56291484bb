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
    jax.lax.DotAlgorithmPreset.BF16_BF16_F32: 1,
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
    """Tells how many passes a TPU takes for one `dot_general`: 1, 3 or 6.

    Raises:
      ValueError: If its precision is another `jax.lax.DotAlgorithmPreset` than BF16_BF16_F32.
    """
    if all(var.aval.dtype.name == "bfloat16" for var in eqn.invars):
        return 1
    precisions = eqn.params["precision"] or jax.lax.Precision.DEFAULT
    precisions = precisions if isinstance(precisions, tuple) else (precisions,)
    if not all(p in _PASSES for p in precisions):
        raise ValueError(f"The passes of a product with precision {precisions} are not known.")
    return max(_PASSES[precision] for precision in precisions)


def _trip_count(eqn: core.JaxprEqn, known: Mapping[core.Var, Any]) -> int:
    """Tells how often a `while` runs that counts to a constant bound, as in a `fori_loop`."""
    start, bound, step = (
        known.get(atom) if isinstance(atom, core.Var) else getattr(atom, "val", None)
        for atom in _counter(eqn) or (None, None, None)
    )
    if start is None or bound is None or step is None or step <= 0:
        raise ValueError(
            "A loop contains products, and how often it runs is not known when it is traced: give "
            "`fori_loop` constant bounds."
        )
    return max(0, -(-int(bound - start) // int(step)))


def _counter(eqn: core.JaxprEqn) -> tuple[Any, Any, Any] | None:
    """Finds start, bound and step of a `while` that adds steps while below a bound, or None."""
    condition, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    before = [*eqn.invars[:n_cond], *eqn.invars[n_cond + n_body :]]
    before = dict(zip(condition.invars, before, strict=True))
    rounds = zip(body.invars[n_body:], body.outvars, strict=True)
    rounds = dict(zip(condition.invars[n_cond:], rounds, strict=True))
    if [test.primitive for test in condition.eqns] != [primitives.lt_p]:
        return None
    counter, bound = condition.eqns[0].invars
    if isinstance(counter, core.Literal) or counter not in rounds:
        return None
    old, new = rounds[counter]
    additions = [
        e.invars for e in body.eqns if e.primitive is primitives.add_p and new in e.outvars
    ]
    if not additions or additions[0][0] is not old:
        return None
    step = additions[0][1]
    if isinstance(bound, core.Literal):
        return before[counter], bound, step
    old, new = rounds.get(bound, (bound, bound))
    return (before[counter], before[bound], step) if old is new else None


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
        times = _trip_count(eqn, known)
    elif eqn.primitive in CALLED_ONCE:
        times = 1
    else:
        raise ValueError(f"How often `{eqn.primitive}` runs the products in it is not known.")
    return ProductCount(
        times * sum(count.flops for count in counts), times * sum(count.passes for count in counts)
    )


def _known_inside(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, known: Mapping) -> Mapping:
    """Finds constants that a call hands to its jaxpr; loops and branches start with none."""
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
