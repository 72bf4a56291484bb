"""Ready sets of rules, as functions of a tree: `default_rules` of it, edited.

Each works on every tree that `default_rules` reads, and can be printed, pasted back and edited:

    optimizer = teon(0.02, rules.attention_out(params))
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from optax.contrib import MuonDimensionNumbers

from teon_optax._groups.layout import layout_of
from teon_optax._rules import names
from teon_optax._rules.default import default_rules
from teon_optax._rules.names import anywhere, stem
from teon_optax._rules.rule import Rule, Rules
from teon_optax._rules.tree import Leaf, leaves_of


def paper(params: Any, first: Sequence[Rule] = ()) -> Rules:
    r"""The paper's choice, `default_rules`: Q, K and V in pairs of layers, mode 1; the rest Muon.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      first: As for `default_rules`: rules for what it cannot read, which stay as they are.

    Returns:
      A tuple of rules; `print` shows it as code.

    Examples:
      >>> import jax.numpy as jnp
      >>> from teon_optax import rules
      >>> attention = {name: {"kernel": jnp.zeros((64, 64))} for name in ("query", "key", "out")}
      >>> params = {f"block_{i}": {"attn": attention} for i in range(4)}
      >>> print(rules.paper(params))
      (  # from teon_optax import Rule
          Rule(r"^block_(?P<layer>\d+)/attn/(key|query)/kernel$", stack=2),
          Rule(r"^block_(?P<layer>\d+)/attn/out/kernel$"),
      )
    """
    return default_rules(params, first)


def muon(params: Any, first: Sequence[Rule] = ()) -> Rules:
    """Muon: the same matrices as `paper`, each alone (and each part of a fused projection).

    Args:
      params, first: As for `paper`.

    Returns:
      As of `paper`.
    """
    return _edited(params, first, lambda rule: [_restacked(rule, 1)])


def all_hidden(params: Any, stack: int = 2, first: Sequence[Rule] = ()) -> Rules:
    """Every hidden matrix, K layers of its type jointly; what has no layer number stays alone.

    The paper found this worse than stacking Q, K and V alone.

    Args:
      params, first: As for `paper`.
      stack: K.

    Returns:
      As of `paper`.
    """
    return _edited(params, first, lambda rule: [_restacked(rule, stack)])


def attention_out(params: Any, stack: int = 2, first: Sequence[Rule] = ()) -> Rules:
    """Q, K, V and the output projection of attention in runs of K layers; the rest Muon.

    An output projection is a matrix so called (`out`, `o_proj`, `c_proj` ..) beside Q, K or V, and
    the one other `linear` or `output/dense` of an attention module. The paper found stacking it
    worse than stacking Q, K and V alone.

    Args:
      params, first: As for `paper`.
      stack: K.

    Returns:
      As of `paper`.
    """
    leaves = leaves_of(params)
    outputs = set(_attention_outputs(leaves))

    def edit(rule: Rule) -> Iterable[Rule]:
        taken = [leaf.path for leaf in leaves if rule.search(leaf.path)]
        if rule.stack != 1 or outputs.issuperset(taken):
            return [_restacked(rule, stack)]
        some = [path for path in taken if path in outputs]
        return [*(_restacked(part, stack) for part in _narrowed(rule, taken, some)), rule]

    return _edited(params, first, edit)


def per_head(params: Any, head_dim: int | None = None, first: Sequence[Rule] = ()) -> Rules:
    """Muon on each head alone, of the projections that `paper` stacks; the rest as `muon`.

    Args:
      params, first: As for `paper`.
      head_dim: Length of a head, where shapes do not show it: of projections with one fan_out axis.

    Returns:
      As of `paper`.

    Raises:
      ValueError: If `head_dim` is needed, or does not divide a projection's fan_out.
    """
    leaves = leaves_of(params)

    def edit(rule: Rule) -> Iterable[Rule]:
        if rule.stack < 2:
            return [rule]
        taken = [leaf for leaf in leaves if rule.search(leaf.path)]
        paths: dict[Rule, list[str]] = {}
        for leaf in taken:
            new = _restacked(_by_heads(rule, leaf, head_dim), 1)
            paths.setdefault(new, []).append(leaf.path)
        if len(paths) == 1:
            return [*paths]
        every = [leaf.path for leaf in taken]
        return [part for new, some in paths.items() for part in _narrowed(new, every, some)]

    return _edited(params, first, edit)


def _by_heads(rule: Rule, leaf: Leaf, head_dim: int | None) -> Rule:
    """A rule of projections like this leaf, whose heads become a batch, or parts."""
    held = layout_of(leaf.array_shape, rule)
    fan_in, fan_out = held.fan_in, held.fan_out
    if len(fan_out) > 1 + (len(held.sizes) > 1):
        dims = MuonDimensionNumbers(fan_in, (*fan_out[:-2], fan_out[-1]))
        return dataclasses.replace(rule, dims=dims)
    if type(head_dim) is not int or head_dim < 1 or any(size % head_dim for size in held.sizes):
        raise ValueError(
            f"`rules.per_head(params, head_dim={head_dim!r})`: {leaf.path!r}, shape "
            f"{leaf.array_shape}, taken by `{rule}`, does not show its heads: pass a head_dim that "
            "divides it."
        )
    return dataclasses.replace(rule, split=sum(held.sizes) // head_dim)


def _edited(params: Any, first: Sequence[Rule], edit: Callable[[Rule], Iterable[Rule]]) -> Rules:
    rules = default_rules(params, first)[len(first) :]
    return Rules((*first, *(new for rule in rules for new in edit(rule))))


def _restacked(rule: Rule, stack: int) -> Rule:
    """With another K; 0 stays, and what counts no layers is alone."""
    stack = 0 if rule.stack == 0 else stack if rule.counts_layers else min(stack, 1)
    return dataclasses.replace(rule, stack=stack)


def _attention_outputs(leaves: Sequence[Leaf]) -> Iterator[str]:
    kinds = names.PROJECTION, names.FUSED
    homes = {leaf.place[0] for leaf in leaves if any(k.fullmatch(leaf.place[1]) for k in kinds)}
    for leaf in leaves:
        home, role = leaf.place
        around, module = ["", *home.split("/")][-2:]
        is_output = names.OUTPUT.fullmatch(role) is not None
        # Haiku calls it linear, BERT output/dense.
        inside = anywhere(names.ATTENTION, [module]) and (is_output or role == "linear")
        below = anywhere(names.ATTENTION, [around]) and names.OUTPUT.fullmatch(stem(module))
        if inside or below or (is_output and home in homes):
            yield leaf.path


def _narrowed(rule: Rule, taken: Sequence[str], some: Sequence[str]) -> list[Rule]:
    """A default rule of stack 1, whose pattern has a segment for each of the path, for some leaves.

    Where no choice of names and numbers in segments has them and no others: for their paths.
    """
    segments = rule.pattern.removeprefix("^").removesuffix("$").split("/")
    few, every = ([path.split("/") for path in paths] for paths in (some, taken))
    differ, narrow = [], []
    for place, segment in enumerate(segments):
        found = {keys[place] for keys in few}
        if found == {keys[place] for keys in every}:
            continue
        if "(?P<layer>" in segment:
            numbers = {number for key in found for number in re.findall(r"\d+$", key)}
            segments[place] = segment.replace(r"\d+", "|".join(sorted(numbers, key=int)))
        else:
            differ.append(place)
    for keys in sorted({tuple(keys[place] for place in differ) for keys in few}):
        for place, key in zip(differ, keys, strict=True):
            segments[place] = re.escape(key)
        narrow.append(dataclasses.replace(rule, pattern=f"^{'/'.join(segments)}$"))
    if any(part.search(path) for part in narrow for path in {*taken} - {*some}):
        pattern = f"^({'|'.join(map(re.escape, some))})$"
        narrow = [dataclasses.replace(rule, pattern=pattern)]
    return narrow
