"""What `rules=None` means: concrete rules for one tree, as few as it has kinds of leaves."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from teon_optax._paths import LeafType, cached, tree_types
from teon_optax._reading.names import says
from teon_optax._reading.patterns import Choice, Draft, drafts_of, rule_of
from teon_optax._reading.reading import roles
from teon_optax._reading.roles import Role
from teon_optax._reading.tree import Leaf
from teon_optax._rule import Rule, Rules, checked_rules, fan_axes

PAPER = {"qkv": 2, "latent": 1, "out": 1, "hidden": 1}  # K by role; all else is the fallback's


def default_rules(params: Any, first: Sequence[Rule] = ()) -> Rules:
    r"""The rules that `rules=None` means for a tree, read off its structure, sizes and names.

    Q, K and V projections get stack 2 and mode 1, other matrices stack 1. Embeddings, heads, norms,
    biases, routers, LoRA factors and convolutions go to the fallback: by a rule with stack 0 where
    they have two axes or more, by none below. A fused projection is taken for Q, K and V one after
    another where its sizes allow it. Print the rules, and edit them.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype` (`jax.eval_shape`).
      first: Rules to put before the others. What they take is not read, so they answer what this
        function cannot know.

    Returns:
      A tuple: `first`, then rules whose patterns are whole paths but for numbers, so that one at
      most fits a leaf. `print` shows it as code.

    Raises:
      ValueError: If a Q, K or V projection, or an orientation, can be read in two ways. The message
        names every such leaf and gives the rules to choose from.

    Warns:
      UserWarning: If other leaves go to the fallback because nothing tells what they are; the
        message has their share, and a rule to paste. Also if nothing at all is orthogonalized.

    Examples:
      >>> import jax.numpy as jnp
      >>> from teon_optax import default_rules
      >>> dense = {"kernel": jnp.zeros((64, 64))}
      >>> block = {"attn": {"query": dense, "key": dense, "out": dense}, "up": dense}
      >>> params = {"embed": {"embedding": jnp.zeros((256, 64))}, "block_0": block}
      >>> print(default_rules(params))
      (  # from teon_optax import Rule
          Rule(r"^block_(?P<layer>\d+)/attn/(key|query)/kernel$", stack=2),
          Rule(r"^block_(?P<layer>\d+)/attn/out/kernel$"),
          Rule(r"^block_(?P<layer>\d+)/up/kernel$"),
          Rule(r"^embed/embedding$", stack=0),
      )
    """
    rules, warning = _kept(*tree_types(params), checked_rules(first, "first"))
    _warn(warning)
    return rules


@cached
def _kept(structure: Any, types: Sequence[LeafType], first: tuple[Rule, ...]) -> tuple[Rules, str]:
    """The default rules of a tree of this structure, whose leaves have these types."""
    leaves = (
        object() if dtype is None else jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types
    )
    return _read(structure.unflatten(leaves), first, PAPER)


def rules_by_role(
    params: Any,
    first: Sequence[Rule],
    stacks: Mapping[str, int],
    change: Callable[[Leaf, Role], Role] = lambda leaf, role: role,
) -> Rules:
    """`first`, then rules for all other leaves by role, each role with its stack.

    `change` may give a leaf that `first` does not take another role before the rules are made.
    """
    rules, warning = _read(params, checked_rules(first, "first"), stacks, change)
    _warn(warning)
    return rules


def _warn(text: str) -> None:
    if text:
        warnings.warn(text, UserWarning, stacklevel=3)


def _read(
    params: Any,
    first: Sequence[Rule],
    stacks: Mapping[str, int],
    change: Callable[[Leaf, Role], Role] = lambda leaf, role: role,
) -> tuple[Rules, str]:
    """The rules by role, and what to warn of, if anything."""
    found = roles(params)
    changed = [
        (leaf, role and (role if _takes(first, leaf) else change(leaf, role)), columns)
        for leaf, role, columns in found
    ]
    drafts = drafts_of(changed, first, stacks)
    _refuse([draft for draft in drafts if draft.choice.role.name == "refused"])
    warning = _warning(drafts, [leaf for leaf, _, _ in found], first)
    drafts.sort(key=lambda draft: -draft.choice.stack)
    return Rules((*first, *(rule_of(draft, draft.choice) for draft in drafts))), warning


def _takes(first: Sequence[Rule], leaf: Leaf) -> bool:
    """Tells whether one of these rules is found in the path of a leaf."""
    return any(rule.search(leaf.path) for rule in first)


def _listing(draft: Draft) -> str:
    """The leaves of a draft, of many layers the first alone, and their shapes."""
    alike_leaves: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf in draft.leaves:
        alike_leaves.setdefault((leaf.names, leaf.shape), []).append(leaf)
    paths = []
    for alike in alike_leaves.values():
        some = alike if len(alike) < 5 else alike[:1]
        more = len(alike) - len(some)
        paths += [f'"{leaf.path}"' for leaf in some]
        paths[-1] += f" (and {more} more with other numbers)" if more else ""
    shapes = dict.fromkeys(str(leaf.array_shape) for leaf in draft.leaves)
    return f"{', '.join(paths)}, shape {' or '.join(shapes)}"


def _axes(rule: Rule, rank: int) -> str:
    """What a rule takes each axis for, as in (layer, in, out)."""
    if rule.stack == 0:
        return "fallback"
    rest = [axis for axis in range(rank) if axis != rule.layer_axis]
    fans = fan_axes(rule.dims) if rule.dims else (rest[:1], rest[1:])
    words: dict[int | None, str] = {rule.layer_axis: "layer"}
    words |= dict.fromkeys(fans[0], "in") | dict.fromkeys(fans[1], "out")
    return f"({', '.join(words.get(axis, 'batch') for axis in range(rank))})"


def _offer(draft: Draft, choice: Choice) -> str:
    """A rule to paste, and what it takes each axis for."""
    rule = rule_of(draft, choice)
    return f"{rule}  # {_axes(rule, len(draft.leaves[0].array_shape))}"


def _refuse(drafts: list[Draft]) -> None:
    """Raises one error for all leaves that may be projections, if there are any."""
    lines = [
        "`default_rules(params)` cannot tell how to read some leaves. Choose a rule for each, and "
        "pass `rules=default_rules(params, first=[...])`, or write all rules."
    ]
    for draft in drafts:
        lines.append(f"{_listing(draft)}: {draft.choice.role.question} Write one of")
        lines += dict.fromkeys(f"    {_offer(draft, choice)}" for choice in draft.choices)
    if drafts:
        raise ValueError("\n".join(lines))


def _warning(drafts: list[Draft], leaves: list[Leaf], first: Sequence[Rule]) -> str:
    """A warning of leaves that nothing tells of, and of a tree with nothing to orthogonalize."""

    def size(leaves: Iterable[Leaf]) -> int:
        return sum(math.prod(leaf.array_shape) for leaf in leaves)

    unknown = [draft for draft in drafts if draft.choice.role.name == "unknown"]
    lines = []
    taken = (rule.search(leaf.path) for rule in first if rule.stack for leaf in leaves)
    left = [leaf for draft in drafts for leaf in draft.leaves if leaf.is_matrix]
    if left and not any(draft.choice.stack for draft in drafts) and not any(taken):
        if not all(says("convolution", *leaf.keys) for leaf in left):
            lines.append("No leaf is orthogonalized: the fallback optimizer gets them all.")
    if unknown:
        lines.append(
            "No name and no size tells what these leaves are, so the fallback optimizer gets them. "
            "Pass the rule beside one in `default_rules(params, first=[...])` to orthogonalize it. "
            "Their share of the parameters:"
        )
    for draft in unknown:
        share = f"{size(draft.leaves) / size(leaves):.1%}"
        lines.append(f"{_listing(draft)}: {share}, {_offer(draft, draft.choices[0])}")
    return "\n".join(lines)
