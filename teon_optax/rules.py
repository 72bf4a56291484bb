"""Ready sets of rules, as functions of a tree: a stack for each role that a matrix can have.

Each works on every tree that `default_rules` reads, and can be printed, pasted back and edited:

    optimizer = teon(0.02, rules.attention_out(params))
"""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from teon_optax._paths import leaf_paths
from teon_optax._plan.layout import layout_of
from teon_optax._planning import plan
from teon_optax._reading.default import PAPER, default_rules, rules_by_role
from teon_optax._reading.leaves import Leaf
from teon_optax._reading.names import spoken
from teon_optax._reading.readings import Reading
from teon_optax._rule import Rule, Rules, checked_rules

__all__ = ["all_hidden", "attention_out", "by_role", "lora", "muon", "paper", "per_head"]

# Stacks by the roles of `default_rules`, for each name of `by_role`.
_ROLES = {
    "qkv": {"qkv": PAPER["qkv"], "latent": PAPER["latent"]},
    "out": {"out": PAPER["out"]},
    "hidden": {"hidden": PAPER["hidden"]},
    "experts": {"experts": PAPER["hidden"]},
}


def paper(params: Any, stack: int = 2, mode: int = 1, first: Iterable[Rule] = ()) -> Rules:
    r"""Stacks Q, K and V in pairs of layers, in mode 1, as the paper does; the rest is Muon's.

    These are the `default_rules`, unless `stack` or `mode` is another.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      stack: K, how many consecutive layers of a projection are coupled.
      mode: Mode of the unfolding. 1 shares the Gram matrix over fan_out, 2 over fan_in, which is
        cheaper where projections are wider than the stream, 3 over the layers.
      first: Rules for what `default_rules` cannot read, which stay as they are.

    Returns:
      A tuple of rules; `print` shows it as code.

    Raises:
      ValueError: If `stack` is not a positive integer or `mode` is not 1, 2 or 3.

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
    _check_stack("paper", stack)
    if isinstance(mode, bool) or mode not in (1, 2, 3):
        raise ValueError(f"`rules.paper(params, mode={mode!r})`: mode should be 1, 2 or 3.")
    first = checked_rules(first, "first")
    found = rules_by_role(params, first, PAPER | {"qkv": stack})
    given, ours = found[: len(first)], found[len(first) :]
    in_mode = (dataclasses.replace(rule, mode=mode) if rule.stack > 1 else rule for rule in ours)
    return Rules((*given, *in_mode))


def muon(params: Any, first: Iterable[Rule] = ()) -> Rules:
    """Gives the matrices of `paper` to Muon, each alone (and each part of a fused projection).

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      first: Rules for what `default_rules` cannot read, which stay as they are.

    Returns:
      A tuple of rules; `print` shows it as code.
    """
    return rules_by_role(params, first, dict.fromkeys(PAPER, 1))


def all_hidden(params: Any, stack: int = 2, first: Iterable[Rule] = ()) -> Rules:
    """Stacks every hidden matrix, K layers of a series; what has no layer number stays alone.

    The paper found this worse than stacking Q, K and V alone.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      first: Rules for what `default_rules` cannot read, which stay as they are.
      stack: K, how many consecutive layers are coupled.

    Returns:
      A tuple of rules; `print` shows it as code.

    Raises:
      ValueError: If `stack` is not a positive integer.
    """
    _check_stack("all_hidden", stack)
    return rules_by_role(params, first, dict.fromkeys(PAPER, stack))


def attention_out(params: Any, stack: int = 2, first: Iterable[Rule] = ()) -> Rules:
    """Stacks Q, K, V and attention's output projection over K layers; the rest is Muon's.

    An output projection is a matrix so called (`out`, `o_proj`, `c_proj` ..) beside Q, K or V, and
    the one other matrix of an attention module. The paper found stacking it worse than stacking
    Q, K and V alone.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      first: Rules for what `default_rules` cannot read, which stay as they are.
      stack: K, how many consecutive layers are coupled.

    Returns:
      A tuple of rules; `print` shows it as code.

    Raises:
      ValueError: If `stack` is not a positive integer.
    """
    _check_stack("attention_out", stack)
    return rules_by_role(params, first, PAPER | {"qkv": stack, "out": stack})


def by_role(params: Any, first: Iterable[Rule] = ()) -> dict[str, Rules]:
    r"""Sorts the rules of `default_rules` by what matrices do, so that each kind has a rate.

    The names are "qkv", the projections of Q, K and V (and what makes heads of a latent vector);
    "out", the output projections of attention; "experts", matrices that are one of several, along
    an axis or by the name of their module; and "hidden", all other matrices. `labels(params, ...)`
    takes the mapping as it is.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      first: Rules for what `default_rules` cannot read. They get a name of their own, "first",
        which then needs a rate too; the other kinds leave out what these rules fit.

    Returns:
      A dict from names to rules; a kind that a tree lacks has no rules.

    Raises:
      ValueError: Where `default_rules` raises it.

    Warns:
      UserWarning: Where `default_rules` warns.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from teon_optax import labels, rules, teon
      >>> names = ("query", "key", "value", "out")
      >>> block = {"attn": {name: {"kernel": jnp.zeros((64, 64))} for name in names}}
      >>> params = {f"block_{i}": block for i in range(4)}
      >>> kinds = rules.by_role(params)
      >>> rates = {"qkv": 0.02, "out": 0.01, "hidden": 0.01, "experts": 0.005}
      >>> parts = {name: teon(rate, kinds[name]) for name, rate in rates.items()}
      >>> optimizer = optax.partition(
      ...     parts | {"fallback": optax.adamw(3e-4)}, labels(params, kinds)
      ... )
      >>> labels(params, kinds)["block_3"]["attn"]["out"]
      {'kernel': 'out'}
    """
    first = checked_rules(first, "first")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        default_rules(params, first)  # for its errors and its warning
        warnings.simplefilter("ignore", UserWarning)
        hidden = rules_by_role(params, first, {"qkv": 0, "hidden": 1})
        experts = _experts(params, hidden[len(first) :])

        def apart(leaf: Leaf, left: Sequence[Reading]) -> Sequence[Reading]:
            is_expert = leaf.path in experts and {reading.kind for reading in left} == {"hidden"}
            return [each._replace(kind="experts") for each in left] if is_expert else left

        found = {"first": Rules(first)} if first else {}
        left_out = [Rule(rule.pattern, stack=0) for rule in first]
        for name, of_role in _ROLES.items():
            rules = rules_by_role(params, first, {"qkv": 0} | of_role, apart)
            taking = [rule for rule in rules[len(first) :] if rule.stack]
            found[name] = Rules([*left_out, *taking] if taking else ())
    for each in caught:
        warnings.warn(each.message, each.category, stacklevel=2)
    return found


def _experts(params: Any, rules: Sequence[Rule]) -> set[str]:
    """Finds the paths of leaves, of those that rules take, whose matrices are experts.

    They lie along an axis, or their module is called so: `expert_3`, `local_experts/3`, `Expert_3`,
    and not `shared_expert`.
    """
    series = plan(params, rules).series
    stacked = {leaf for each in series if each.experts > 1 for leaf in each.leaves}
    return {
        path
        for index, (path, _) in enumerate(leaf_paths(params))
        if index in stacked or any(map(_is_expert, path.split("/")[:-1]))
    }


def _is_expert(module: str) -> bool:
    """Tells whether the last word of a module's name is expert, of one that is not shared."""
    words = spoken(module).split("_")
    return words[-1:] in (["expert"], ["experts"]) and "shared" not in words


def _check_stack(name: str, stack: Any) -> None:
    if isinstance(stack, bool) or not isinstance(stack, int) or stack < 1:
        raise ValueError(
            f"`rules.{name}(params, {stack!r})`: stack should be a positive integer, K. Rules that "
            "come before the others are `first=`."
        )


def lora(params: Any, first: Iterable[Rule] = ()) -> Rules:
    r"""Gives low-rank factors B (rank, fan_out) to Muon, A (fan_in, rank) to the fallback.

    B starts at zero, so that its updates alone decide where the adapted matrix goes; it is small
    enough for Muon to cost nothing. All other matrices are as in `paper`: freeze them, or mask them
    out, to train the factors alone.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      first: Rules for what `default_rules` cannot read, which stay as they are.

    Returns:
      A tuple of rules; `print` shows it as code.

    Raises:
      ValueError: If there is no low-rank factor in the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from teon_optax import rules
      >>> factors = {"lora_a": jnp.zeros((64, 4)), "lora_b": jnp.zeros((4, 64))}
      >>> print(rules.lora({"block_0": {"query": factors}}))
      (  # from teon_optax import Rule
          Rule(r"^block_(?P<layer>\d+)/query/lora_b$"),
          Rule(r"^block_\d+/query/lora_a$", stack=0),
      )
    """
    found = []

    def note(leaf: Leaf, left: Sequence[Reading]) -> Sequence[Reading]:
        found.extend(reading.kind for reading in left if len(left) == 1)
        return left

    rules = rules_by_role(params, first, PAPER | {"lora_b": 1}, note)
    if "lora_b" not in found:
        raise ValueError(
            "`rules.lora(params)`: no leaf is a low-rank factor by name (`lora_a`, `lora_b`) or by "
            "shape, (fan_in, rank) and (rank, fan_out) beside a matrix. Write a `Rule` for B."
        )
    return rules


def per_head(params: Any, head_dim: int | None = None, first: Iterable[Rule] = ()) -> Rules:
    """Gives each head of Q, K and V, and of what makes heads of a latent vector, to Muon alone.

    A fused projection needs no answer here: its heads are `head_dim` long wherever they lie.

    Args:
      params: Tree of arrays, or of anything with `shape` and `dtype`.
      first: Rules for what `default_rules` cannot read, which stay as they are.
      head_dim: Length of a head, where shapes do not show it: of projections with one fan_out axis.

    Returns:
      A tuple of rules of stack 1; `print` shows it as code.

    Raises:
      ValueError: If `head_dim` is needed, or does not divide a projection's fan_out, or if there
        is no projection.
    """
    first = checked_rules(first, "first")
    heads = []

    def by_heads(leaf: Leaf, left: Sequence[Reading]) -> Sequence[Reading]:
        fused = [r for r in left if r.kind == "qkv" and r.split != 1 and r.view is None]
        if len({reading.axes for reading in fused}) == 1:
            left = fused[:1]
        if len(left) == 1 and left[0].kind in ("qkv", "latent"):
            heads.append(leaf)
            return [_by_heads(leaf, left[0], head_dim)]
        return left

    rules = rules_by_role(params, first, dict.fromkeys(PAPER, 1), by_heads)
    if not heads and not first:
        raise ValueError(
            f"`rules.per_head(params, head_dim={head_dim!r})` finds no Q, K or V projection, so "
            "there are no heads: write rules whose `dims` leave out an axis of heads, or `split`."
        )
    return rules


def _by_heads(leaf: Leaf, reading: Reading, head_dim: int | None) -> Reading:
    """Reads the heads of a projection as a batch, or as parts of `head_dim`.

    Of several fan_out axes the last two are heads and their size; one before them counts the parts
    of a fused projection.
    """
    *heads, _ = (axis for axis, letter in enumerate(reading.axes) if letter == "o")
    if heads:
        axes = "".join("b" if axis in heads else each for axis, each in enumerate(reading.axes))
        return reading._replace(axes=axes, split=reading.split if "p" in axes else 1)
    rule = Rule("", 1, 1, reading.dims, reading.layer_axis, reading.split)
    sizes = layout_of(leaf.array_shape, rule).sizes
    if type(head_dim) is not int or head_dim < 1 or any(size % head_dim for size in sizes):
        raise ValueError(
            f"`rules.per_head(params, head_dim={head_dim!r})`: {leaf.path!r}, shape "
            f"{leaf.array_shape}, does not show its heads: pass a head_dim that divides it."
        )
    return reading._replace(split=sum(sizes) // head_dim)
