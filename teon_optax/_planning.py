"""What becomes of a tree: the rules that it gets where none are given, its plan and its labels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from teon_optax._paths import LeafType, paths_of, tree_types
from teon_optax._plan.plan import Plan, plan_of
from teon_optax._reading.default import default_rules
from teon_optax._rule import Rule, checked_rules

_FALLBACK = "fallback"


def rules_of(tree: Any, rules: Iterable[Rule] | None) -> tuple[Rule, ...]:
    """Checks rules, and reads those of `default_rules` off the tree where they are None."""
    return checked_rules(default_rules(tree) if rules is None else rules)


def plan(params: Any, rules: Iterable[Rule] | None = None) -> Plan:
    r"""Assigns every leaf of `params` to a group or to the fallback.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype` (`jax.eval_shape`).
      rules: The first rule whose pattern is found in a leaf's path takes it. None means
        `default_rules(params)`.

    Returns:
      A `Plan`; every leaf is in exactly one place, members of its groups or `fallback`.

    Raises:
      ValueError: If rules do not fit the leaves that they take; the message lists all of them.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from teon_optax import Rule, plan
      >>> kernel = jax.ShapeDtypeStruct((64, 64), jnp.float32)
      >>> params = {f"block_{i}": {"query": {"kernel": kernel}} for i in range(3)}
      >>> rules = [Rule(r"block_(?P<layer>\d+)/query/kernel", stack=2)]
      >>> [group.layers for group in plan(params, rules).groups]
      [(0, 1), (2,)]
    """
    return plan_of(*tree_types(params), rules_of(params, rules))


def plan_of_updates(updates: Any, params: Any, rules: Iterable[Rule] | None = None) -> Plan:
    """Plans updates by the dtypes of `params`, as `plan(params, rules)` shows it.

    Args:
      updates: Gradients or momenta, which may have other dtypes.
      params: The tree that the user sees the plan of; None where `update` was not given it.
      rules: As for `plan`.
    """
    structure, types = tree_types(updates)
    tree_rules = rules_of(updates, rules)
    if params is not None:
        dtypes = _dtypes_of_params(paths_of(structure), types, params)
        pairs = zip(types, dtypes, strict=True)
        types = tuple(LeafType(of_update.shape, dtype) for of_update, dtype in pairs)
    return plan_of(structure, types, tree_rules)


def _dtypes_of_params(paths: Sequence[str], types: Sequence[LeafType], params: Any) -> list[Any]:
    """Looks up the dtype of each update's parameter; an update without one keeps its own."""
    structure, of_params = tree_types(params)
    names = paths_of(structure)
    if names == paths:  # Two leaves of one path may have different dtypes.
        return [dtype for _, dtype in of_params]
    # Models of Equinox hold functions too.
    dtypes = {path: dtype for path, (_, dtype) in zip(names, of_params, strict=True)}
    return [dtypes.get(path, own.dtype) for path, own in zip(paths, types, strict=True)]


def labels(
    params: Any, rules: Iterable[Rule] | Mapping[str, Iterable[Rule] | None] | None = None
) -> Any:
    r"""Labels every leaf with what updates it, for `optax.partition`.

    Any chain can so take the place of `scale_by_teon`, and matrices of several kinds can have rates
    of their own:

        optax.partition({"teon": chain, "fallback": optax.adamw(3e-4)}, labels(params, rules))

    Optax calls labels that are callable, as models of Equinox are: give it
    `lambda params: labels(params, rules)` for these.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      rules: As for `plan`; or several such sets of rules, by the label of the leaves that they
        take. A leaf that several take has the label of the first.

    Returns:
      The tree of params with a label for each leaf: "teon", or that of the rules that take it;
      "fallback" where none do, or a rule with `stack=0`.

    Raises:
      ValueError: If rules do not fit the leaves that they take, or a label is "fallback".

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from teon_optax import Rule, labels, orthogonalize
      >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> rules = [Rule("kernel")]
      >>> labels(params, rules)
      {'up': {'bias': 'fallback', 'kernel': 'teon'}}
      >>> lion_like = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     orthogonalize(rules),
      ...     optax.scale_by_learning_rate(0.02),
      ... )
      >>> optimizer = optax.partition(
      ...     {"teon": lion_like, "fallback": optax.adamw(3e-4)}, labels(params, rules)
      ... )
    """
    named: Any = rules if isinstance(rules, Mapping) else {"teon": rules}
    if _FALLBACK in named:
        raise ValueError(
            "`labels(params, rules)`: 'fallback' is the label of leaves that no rules take, so "
            "rules need another."
        )
    structure = jax.tree.structure(params)
    label_of: dict[int, Any] = {}
    for label, some in named.items():
        label_of = dict.fromkeys(plan(params, some).taken, label) | label_of
    return structure.unflatten(
        label_of.get(index, _FALLBACK) for index in range(structure.num_leaves)
    )
