"""What `rules=None` means: concrete rules for one tree, as few as it has kinds of leaves."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from teon_optax._paths import LeafType, cached, tree_types
from teon_optax._reading.leaves import Leaf, grouped
from teon_optax._reading.reading import Case, read
from teon_optax._reading.readings import Reading
from teon_optax._reading.writing import Choice, Draft, drafts_of, rule_of
from teon_optax._rule import Rule, Rules, checked_rules, fan_axes

PAPER = {"qkv": 2, "latent": 1, "out": 1, "hidden": 1}  # K by kind; all else is the fallback's
Change = Callable[[Leaf, Sequence[Reading]], Sequence[Reading]]
WORDS = {
    "qkv": "Q, K or V",
    "latent": "latent attention",
    "out": "output projection",
    "hidden": "hidden matrix",
    "lora_a": "low-rank factor",
    "lora_b": "low-rank factor",
}


def default_rules(params: Any, first: Iterable[Rule] = ()) -> Rules:
    r"""Reads the rules that `rules=None` means for a tree off its structure, sizes and names.

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
        message has their share, and the rules to choose from. Also if nothing at all is
        orthogonalized, or no Q, K or V is stacked.

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
    return _told(*_kept(*tree_types(params), checked_rules(first, "first")))


@cached
def _kept(
    structure: Any, types: Sequence[LeafType], first: tuple[Rule, ...]
) -> tuple[Rules, str, str]:
    """Reads a tree of this structure, whose leaves have these types; errors are kept as well."""
    leaves = (
        object() if dtype is None else jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types
    )
    return _read(structure.unflatten(leaves), first, PAPER)


def rules_by_role(
    params: Any,
    first: Iterable[Rule],
    stacks: Mapping[str, int],
    change: Change = lambda leaf, left: left,
) -> Rules:
    """Makes `first`, then rules for all other leaves by kind, each kind with its stack.

    `change` may give a leaf that `first` does not take other readings before the rules are made.
    """
    return _told(*_read(params, checked_rules(first, "first"), stacks, change))


def _told(rules: Rules, warning: str, error: str) -> Rules:
    """Raises the error if there is one, or warns, and gives the rules."""
    if error:
        raise ValueError(error)
    if warning:
        warnings.warn(warning, UserWarning, stacklevel=3)
    return rules


def _read(
    params: Any,
    first: Sequence[Rule],
    stacks: Mapping[str, int],
    change: Change = lambda leaf, left: left,
) -> tuple[Rules, str, str]:
    """Makes the rules by kind, what to warn of, and the error of what cannot be read, if any."""
    cases = read(params)
    told = [
        dataclasses.replace(case, left=[*change(case.leaf, case.left)])
        for case in cases
        if case.left and not any(rule.search(case.leaf.path) for rule in first)
    ]
    drafts = drafts_of(told, [case.leaf for case in cases if not case.left], stacks)
    error = _error([draft for draft in drafts if draft.question == "ask"])
    warning = _warning(drafts, [case.leaf for case in cases], first, stacks)
    drafts.sort(key=lambda draft: -draft.choice.stack)
    rules = Rules((*first, *(rule_of(draft, draft.choice) for draft in drafts)))
    rules.reasons = {
        case.leaf.path: ("asked: " if draft.question else "") + _reason(case)
        for draft in drafts
        for case in draft.cases
        if not draft.choice.stack
    }
    return rules, warning, error


def explain(params: Any) -> str:
    """Says what the default rules take every leaf for, and by what.

    A leaf is one of several things: query, key or value (or several in one), the output projection
    of attention, a hidden matrix; or of the fallback's a table, an input, a head, a vector, a
    convolution, a router, a low-rank factor. Where more than one is left, it is asked.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.

    Returns:
      A text with a line for every kind of leaf of two axes or more: its path with `*` for numbers,
      its shape, what it is, and what told so.

    Examples:
      >>> import jax.numpy as jnp
      >>> from teon_optax import explain
      >>> block = {name: {"kernel": jnp.zeros((64, 64))} for name in "qkvo"}
      >>> params = {"block_0": block, "embed": {"embedding": jnp.zeros((256, 64))}}
      >>> print(explain(params))
      block_*/k/kernel  64 x 64   key                by name; kernels are (in, out)
      block_*/o/kernel  64 x 64   output projection  by name; kernels are (in, out)
      block_*/q/kernel  64 x 64   query              by name; kernels are (in, out)
      block_*/v/kernel  64 x 64   value              by name; kernels are (in, out)
      embed/embedding   256 x 64  table              table, by name
    """
    rows: dict[tuple[str, ...], None] = {}
    for case in read(params):
        if case.left:
            shape = " x ".join(map(str, case.leaf.array_shape))
            path, reasons = re.sub(r"\d+", "*", case.leaf.path), "; ".join(case.reasons)
            rows[path, shape, _role(case), reasons] = None
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _role(case: Case) -> str:
    """Says what a leaf is, or what it may be."""
    letters = {"q": "query", "k": "key", "v": "value"}
    kinds = dict.fromkeys(reading.kind for reading in case.left)
    words = dict.fromkeys(WORDS.get(kind, kind) for kind in kinds)
    if [*kinds] == ["qkv"] and case.leaf.letter:
        words = [letters[case.leaf.letter]]
    is_open = len({reading[1:] for reading in case.left}) > 1
    return ("asked: " if is_open else "") + " or ".join(words)


def _reason(case: Case) -> str:
    """Says in a few words why a leaf is the fallback's."""
    return case.reasons[-1] if case.reasons else _role(case)


def _listing(draft: Draft) -> str:
    """Names the leaves of a draft, of many layers the first alone, and their shapes."""
    paths = []
    for alike in grouped(draft.leaves, lambda leaf: [(leaf.names, leaf.shape)]).values():
        some = alike if len(alike) < 5 else alike[:1]
        more = len(alike) - len(some)
        paths += [f'"{leaf.path}"' for leaf in some]
        paths[-1] += f" (and {more} more with other numbers)" if more else ""
    shapes = dict.fromkeys(str(leaf.array_shape) for leaf in draft.leaves)
    return f"{', '.join(paths)}, shape {' or '.join(shapes)}"


def _axes(rule: Rule, rank: int) -> str:
    """Says what a rule takes each axis for, as in (layer, in, out), or those of its view."""
    if rule.stack == 0:
        return "fallback"
    layer, seen = (None, f" of {rule.view}") if rule.view else (rule.layer_axis, "")
    axes = range(len(rule.view or range(rank)))
    rest = [axis for axis in axes if axis != layer]
    fans = fan_axes(rule.dims) if rule.dims else (rest[:1], rest[1:])
    words: dict[int | None, str] = {layer: "layer"}
    words |= dict.fromkeys(fans[0], "in") | dict.fromkeys(fans[1], "out")
    return f"({', '.join(words.get(axis, 'batch') for axis in axes)}){seen}"


def _offers(draft: Draft) -> list[str]:
    """Lists the rules to choose from, what each takes the axes for in a line above it."""
    rank = len(draft.leaves[0].array_shape)
    rules = dict.fromkeys(rule_of(draft, choice) for choice in draft.choices)
    if not any(rule.stack == 0 for rule in rules):
        rules |= {rule_of(draft, Choice(None, 0, Reading("table"))): None}
    return [line for rule in rules for line in (f"    # {_axes(rule, rank)}", f"    {rule}")]


def _question(draft: Draft) -> str:
    """Says what a leaf was taken for and by what, and what is open."""
    left, columns, known = draft.cases[0].left, draft.cases[0].columns, draft.cases[0].reasons
    kinds = dict.fromkeys(reading.kind for reading in left if reading.is_matrix)
    splits = {reading.split for reading in left}
    if len({(reading.axes, reading.split) for reading in left}) == 1 and len(columns) > 1:
        question = "which number counts the layers?"
    elif any(isinstance(split, tuple) for split in splits) or len(splits) > 1:
        question = (
            "where do its parts lie? `split` is for parts one after another; in turns, by heads or "
            "groups, they need a `view`."
        )
    elif [*kinds] == ["qkv"]:
        question = "which axes are heads, layers, fan_in?"
    elif "qkv" in kinds:
        question = f"{' or '.join(dict.fromkeys(WORDS[kind] for kind in kinds))}?"
    else:
        question = "what is each axis?"
    return "; ".join([*known, question])


def _error(drafts: list[Draft]) -> str:
    """Writes one error for all leaves that cannot be read, if there are any."""
    if not drafts:
        return ""
    lines = [
        "`default_rules(params)` cannot tell how to read some leaves. Choose a rule for each, and "
        "pass `rules=default_rules(params, first=[...])`, or write all rules."
    ]
    for draft in drafts:
        lines.append(f"{_listing(draft)}: {_question(draft)} Write one of")
        lines += _offers(draft)
    return "\n".join(lines)


def _warning(
    drafts: list[Draft], leaves: list[Leaf], first: Sequence[Rule], stacks: Mapping[str, int]
) -> str:
    """Writes a warning of what nothing tells of, and of a tree with nothing to orthogonalize.

    Also where projections are known, and none of them is stacked.
    """

    def size(leaves: Iterable[Leaf]) -> int:
        return sum(math.prod(leaf.array_shape) for leaf in leaves)

    unknown = [draft for draft in drafts if draft.question == "warn"]
    known = [case for draft in drafts if not draft.question for case in draft.cases]
    letters = {case.leaf.letter for case in known if case.left[0].kind == "qkv"}
    is_known = len(letters) > 1 or letters == {""}  # by names, or by what they fit
    is_stacked = any(draft.choice.stack > 1 for draft in drafts) or any(r.stack > 1 for r in first)
    is_unstacked = is_known and not is_stacked and stacks.get("qkv", 0) > 1
    lines = []
    taken = (rule.search(leaf.path) for rule in first if rule.stack for leaf in leaves)
    left = [leaf for draft in drafts for leaf in draft.leaves if leaf.is_matrix]
    if left and not any(draft.choice.stack for draft in drafts) and not any(taken):
        if not all("convolution" in leaf.called for leaf in left):
            lines.append("No leaf is orthogonalized: the fallback optimizer gets them all.")
    if is_unstacked:
        lines.append(
            "Q, K and V are recognized, but none of them is stacked: nothing counts their layers."
        )
    if unknown:
        lines.append(
            "No name and no size tells what these leaves are, so the fallback optimizer gets them. "
            "Pass one of the rules below a leaf in `default_rules(params, first=[...])` to "
            "orthogonalize it. Their share of the parameters:"
        )
    for draft in unknown:
        share = f"{size(draft.leaves) / size(leaves):.1%}"
        lines += [f"{_listing(draft)}: {share}. {_question(draft)}", *_offers(draft)]
    return "\n".join(lines)
