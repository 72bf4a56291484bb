"""What becomes of a tree: the rules that it gets where none are given, its plan and its labels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from teon_optax._paths import LeafType, leaf_types, paths_of, tree_types
from teon_optax._plan.plan import Plan, is_taken, plan_of, rules_by_leaf
from teon_optax._polar.coefficients import MethodLike, resolve
from teon_optax._reading.default import default_rules
from teon_optax._rule import Rule, Rules, checked_rules

_FALLBACK = "fallback"


def rules_of(tree: Any, rules: Iterable[Rule] | None) -> tuple[Rule, ...]:
    """Checks rules, and reads those of `default_rules` off the tree where they are None."""
    return checked_rules(default_rules(tree) if rules is None else rules)


def plan(
    params: Any, rules: Iterable[Rule] | None = None, method: MethodLike = "polar_express"
) -> Plan:
    r"""Assigns every leaf of `params` to a group or to the fallback.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype` (`jax.eval_shape`).
      rules: The first rule whose pattern is found in a leaf's path takes it. None means
        `default_rules(params)`.
      method: As `teon` takes it. Its matrix products are counted in the plan's last line and in
        `as_dict`; which leaves go together does not depend on it.

    Returns:
      A `Plan`; every leaf is in exactly one place, members of its groups or `fallback`.

    Raises:
      ValueError: If rules do not fit the leaves that they take; the message lists all of them. Or
        if the method is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from teon_optax import Rule, plan
      >>> kernel = jax.ShapeDtypeStruct((64, 64), jnp.float32)
      >>> params = {f"block_{i}": {"query": {"kernel": kernel}} for i in range(3)}
      >>> rules = [Rule(r"block_(?P<layer>\d+)/query/kernel", stack=2)]
      >>> [group.layers for group in plan(params, rules).groups]
      [(0, 1), (2,)]
    """
    resolve(method)  # for its checks
    tree_rules = default_rules(params) if rules is None else rules
    made = plan_of(*tree_types(params), checked_rules(tree_rules))
    reasons = tree_rules.reasons if isinstance(tree_rules, Rules) else {}
    told = (leaf._replace(reason=reasons.get(leaf.path, leaf.reason)) for leaf in made.untouched)
    return made._replace(untouched=tuple(told), method=method)


def plan_of_updates(
    structure: Any, leaves: Sequence[Any], params: Any, rules: Iterable[Rule] | None = None
) -> Plan:
    """Plans updates by the dtypes of `params`, as `plan(params, rules)` shows it.

    Args:
      structure: The structure of the updates, gradients or momenta.
      leaves: Their leaves, which may have other dtypes.
      params: The tree that the user sees the plan of; None where `update` was not given it.
      rules: Those of the plan; None means `default_rules` of the tree.
    """
    types = leaf_types(leaves)
    tree_rules = rules_of(structure.unflatten(leaves), rules) if rules is None else tuple(rules)
    if params is not None:
        types = _typed_as(params, structure, types)
    return plan_of(structure, types, tree_rules)


def _typed_as(params: Any, structure: Any, types: tuple[LeafType, ...]) -> tuple[LeafType, ...]:
    """Gives updates the dtypes of their parameters; one without a parameter keeps its own."""
    own_structure, of_params = tree_types(params)
    if of_params == types and own_structure == structure:
        return types
    paths, names = paths_of(structure), paths_of(own_structure)
    if names == paths:  # Two leaves of one path may have different dtypes.
        pairs = zip(types, of_params, strict=True)
        return tuple([LeafType(shape, dtype) for (shape, _), (_, dtype) in pairs])
    # Models of Equinox hold functions too.
    dtypes = {path: dtype for path, (_, dtype) in zip(names, of_params, strict=True)}
    pairs = zip(paths, types, strict=True)
    return tuple([LeafType(shape, dtypes.get(path, dtype)) for path, (shape, dtype) in pairs])


def taken_as(tree: Any, rules: tuple[Rule, ...]) -> Any:
    """Labels leaves with "teon" where rules take them, else with "fallback", in their tree.

    Unlike `labels` it does not check that rules fit the leaves.
    """
    leaves, structure = jax.tree.flatten(tree)
    taking = zip(rules_by_leaf(structure, rules), leaves, strict=True)
    return structure.unflatten(
        ["teon" if is_taken(rule, np.shape(leaf)) else _FALLBACK for rule, leaf in taking]
    )


def labels(
    params: Any, rules: Iterable[Rule] | Mapping[str, Iterable[Rule] | None] | None = None
) -> Any:
    r"""Labels every leaf with what updates it, for `optax.partition`.

    Any chain can so take the place of `scale_by_teon`, and matrices of several kinds can have rates
    of their own:

        optax.partition({"teon": chain, "fallback": optax.adamw(3e-4)}, labels(params, rules))

    Where the tree that Optax gets is no such tree, give it a function of that tree,
    `lambda params: labels(params, rules)`: models of Equinox are callable, and would be called as
    labels; `nnx.Optimizer` keeps the values of `nnx.state`, without its variables.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      rules: The first rule whose pattern is found in a leaf's path takes it; None means
        `default_rules(params)`. Or several such sets of rules, by the label of the leaves that they
        take; a leaf that several take has the label of the first. What a set leaves out with
        `stack=0`, another may take.

    Returns:
      The tree of params with a label for each leaf: "teon", or that of the rules that take it;
      "fallback" where none do.

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
