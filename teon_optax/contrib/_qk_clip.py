"""`clip_qk`: QK-clip of MuonClip."""

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from teon_optax._arguments import check_number
from teon_optax._memory import kept_beside, on_device, widened
from teon_optax._paths import LeafType, cached, paths_of, tree_types
from teon_optax._plan.layout import Layout, unseen
from teon_optax._plan.plan import plan_of
from teon_optax._reading.default import rules_by_role
from teon_optax._rule import Rule, checked_rules
from teon_optax.contrib._matrices import placed_like

# What a segment of a path holds, by its words: wq, q_proj, query, kv_einsum, query_key_value.
_WORD = re.compile(r"[bw]?(qkv|qk|kv|q|k|v|quer(?:y|ies)|keys?|values?)")
_BIAS = re.compile(r"(.*_)?bias|b|b[qkv]+")
_NORM = re.compile(
    r"(.*_)?(qk?|k|query|key)_?((layer|rms|l2)_?)?(norm|ln)(_.*)?"
    r"|(.*_)?(layer|rms|l2)?(norm|ln)_?(qk?|k|query|key)"
)


def clip_qk(
    threshold: jax.typing.ArrayLike = 100.0,
    rules: Iterable[Rule] | None = None,
    *,
    query: str | None = None,
    key: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks Q and K of attention heads whose logits grew past a threshold: QK-clip of MuonClip.

    S is the largest attention logit of a head in the batch, as the softmax gets it. After the
    step, the columns of that head in the kernel of Q (and its bias) are multiplied by

        sqrt(threshold / S)  where S > threshold,

    and so are those of K. Several heads of Q that share one of K shrink it by the largest of their
    logits. Logits come from the forward pass of the gradients; give them to `update`:

        optimizer.update(gradients, state, params, attention_logits=logits)

    `logits` is an array [layers, heads] in the order of the layers. A tree with several stacks of
    attention, as encoder and decoder, needs a dict of such arrays; the error says which.

    Args:
      threshold: The largest logit that is left as it is.
      rules: Which leaves are projections of Q and K, and how their axes lie, heads before what a
        head holds; stack and mode do not matter. None reads them off the tree as `default_rules`
        does. Parts of a fused projection are Q, K and V, in the order of its name. Heads that lie
        along several axes, as groups and the heads of a group, are counted in the order of the
        leaf's axes, or its view's.
      query: Regular expression that is found in the path of projections of Q; None goes by words
        such as `query`, `q_proj` and `wq`.
      key: The same for K.

    Returns:
      An `optax.GradientTransformationExtraArgs` without state, to stand last in a chain, behind the
      learning rate. Its `update` needs `params` and `attention_logits`. Logits that are not finite
      clip nothing.

    Raises:
      ValueError: In `init`, if Q and K are not found or cannot be told; if they are normalized
        after the projection, so that the kernel's size does not matter; or if attention is latent
        (MLA), where heads share the rotary part of K: the paper clips that of Q twice, and a kernel
        does not show which part that is. In `update`, if logits do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from teon_optax import contrib, teon
      >>> projections = {"query": jnp.ones((4, 8)), "key": jnp.ones((4, 8))}
      >>> params = {"block_0": {"attn": projections}}
      >>> optimizer = optax.chain(teon(0.02), contrib.clip_qk(100.0))
      >>> state = optimizer.init(params)
      >>> logits = jnp.array([[400.0, 50.0]])  # one layer of two heads
      >>> updates, state = optimizer.update(params, state, params, attention_logits=logits)

    References:
      Kimi Team, Kimi K2, 2025, arXiv 2507.20534, algorithm 1.
    """
    check_number("threshold", threshold, float(jnp.finfo(jnp.float32).tiny), of="clip_qk")
    rules = checked_rules(rules)

    def stacks_of(params: Any) -> dict[str, "_Stack"]:
        structure, types = tree_types(params)
        return _stacks(structure, types, rules, query, key)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        stacks_of(params)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        attention_logits: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None or attention_logits is None:
            raise ValueError(
                "`clip_qk` needs params and the largest logit of each layer and head: write "
                "`optimizer.update(gradients, state, params, attention_logits=logits)`."
            )
        stacks = stacks_of(params)
        leaves, structure = jax.tree.flatten(params)
        new = structure.flatten_up_to(updates)
        for name, logits in _logits_by_stack(attention_logits, stacks).items():
            roots = _roots(jnp.asarray(on_device(logits)), threshold)
            for index, factor in _factors(stacks[name], roots).items():
                if new[index] is not None:
                    new[index] = _shrunk(new[index], leaves[index], factor)
        return structure.unflatten(new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Projection(NamedTuple):
    """A leaf with kernels of Q, K or V.

    Attributes:
      leaf: Position in the tree.
      biases: Positions of its biases.
      shapes: Their shapes.
      layout: How it holds its kernels.
      holds: "q", "k" or "v" for all of it, or a letter for each of its parts.
      parts: The axis along which its parts lie, and how long each is there; None for one of all.
      rows: Rows of the logits that its layers have.
    """

    leaf: int
    biases: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    holds: str
    parts: tuple[int, tuple[int, ...]] | None
    rows: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Orders the axes of features: those of heads as they lie, then what a head holds."""
        layout = self.layout
        # A rule with `split` has to name its axis first, wherever that one lies.
        last = max(layout.fan_out) if len(layout.sizes) > 1 else layout.fan_out[-1]
        others = {*range(len(layout.shape))} - {*layout.layer, *layout.fan_in, last}
        return (*sorted(others), last)

    def lengths(self, letter: str) -> tuple[int, ...]:
        """Lists the lengths of these axes in the part that is Q, K or V."""
        axis, sizes = self.parts or (None, ())
        return tuple(
            sizes[self.holds.index(letter)] if each == axis else self.layout.shape[each]
            for each in self.order
        )

    def features(self, letter: str) -> int:
        """Counts the features of one layer of Q, of K or of V."""
        return math.prod(self.lengths(letter))


class _Stack(NamedTuple):
    """The layers of attention that differ in their number alone.

    Attributes:
      name: Path of their modules, with * for the number of the layer.
      layers: How many there are.
      projections: Their leaves of Q and K.
    """

    name: str
    layers: int
    projections: tuple[_Projection, ...]

    def features(self, letter: str) -> int:
        """Counts the features of Q or of K in each layer."""
        return next(p.features(letter) for p in self.projections if letter in p.holds)


@cached
def _stacks(
    structure: Any,
    types: Sequence[LeafType],
    rules: tuple[Rule, ...] | None,
    query: str | None,
    key: str | None,
) -> dict[str, _Stack]:
    """Finds the stacks of attention in a tree of this structure and these types, by their names."""
    paths = paths_of(structure)
    if rules is None:
        leaves = (jax.ShapeDtypeStruct(*each) if each.dtype else object() for each in types)
        rules = _rules_of_projections(structure.unflatten(leaves))
    layouts: dict[int, tuple[Layout, Rule]] = {
        leaf: (series.layout, series.rule)
        for series in plan_of(structure, tuple(types), rules).series
        for leaf in series.leaves
    }
    held: dict[int, tuple[str, str]] = {}
    for index, (layout, _) in layouts.items():
        held[index] = _held(paths[index], layout, query, key)
    names: dict[str, str] = {}
    found: dict[str, dict[tuple[int, int], list[tuple[int, int]]]] = {}
    for index, (layout, rule) in layouts.items():
        module, holds = held[index]
        if set(holds) <= {"v"}:
            continue
        number, stack, name = _numbered(paths[index], module, rule)
        names[stack] = max(names.get(stack, name), name, key=len)
        for layer in range(layout.size(layout.layer)):
            found.setdefault(stack, {}).setdefault((number, layer), []).append((index, layer))
    if not found:
        raise ValueError(
            "`clip_qk` finds no projections of Q and K: pass `rules=`, and `query=` and `key=`, "
            "regular expressions that are found in their paths."
        )
    return {
        names[stack]: _stack(
            names[stack], [layers[at] for at in sorted(layers)], layouts, held, paths, types
        )
        for stack, layers in found.items()
    }


def _rules_of_projections(params: Any) -> tuple[Rule, ...]:
    """Reads rules for Q, K and V off a tree, and refuses latent attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rules = rules_by_role(params, (), {"qkv": 1})
        latent = [rule for rule in rules_by_role(params, (), {"qkv": 0, "latent": 1}) if rule.stack]
    if latent:
        raise ValueError(
            "`clip_qk` does not clip latent attention, of which are the leaves of "
            f"{latent[0].pattern!r}: its heads share the rotary part of K, so that only Q's may be "
            "clipped there, and kernels do not show which part is rotary."
        )
    return tuple(rule for rule in rules if rule.stack)


def _held(path: str, layout: Layout, query: str | None, key: str | None) -> tuple[str, str]:
    """Tells the module of a projection, and which of Q, K and V it holds, as letters in order."""
    segments = path.split("/")
    patterns = {"q": query, "k": key}
    given = "".join(letter for letter, one in patterns.items() if one and re.search(one, path))
    at, letters = _named(segments)
    if given:
        letters = given
    if not letters and _parts(layout, 3) is not None:
        letters = "qkv"
    if not letters or (len(letters) > 1 and _parts(layout, len(letters)) is None):
        raise ValueError(
            f"`clip_qk` cannot tell which of Q, K and V {path!r}, shape {layout.shape}, holds"
            + (", or along which axis" if letters else "")
            + ": pass `rules=` whose `split` is the number of its parts, or their sizes, or "
            "`query=` and `key=`, regular expressions that are found in the paths of projections."
        )
    return "/".join(segments[:at]), letters


def _parts(layout: Layout, count: int) -> tuple[int, tuple[int, ...]] | None:
    """Finds the axis along which so many parts lie, and their lengths there; None if none does.

    They are those of the rule's `split`, or lie along an axis of their own.
    """
    if len(layout.sizes) == count:
        return layout.fan_out[0], layout.sizes
    own = [axis for axis in layout.batch + layout.heads if layout.shape[axis] == count]
    return (own[0], (1,) * count) if len(own) == 1 and len(layout.sizes) == 1 else None


def _named(segments: Sequence[str]) -> tuple[int, str]:
    """Finds the last segment that names Q, K or V, and what it names; else the module's end."""
    for at in range(len(segments) - 1, -1, -1):
        words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", segments[at]).lower())
        letters = "".join(
            match[1] if len(match[1]) < 4 and match[1] != "key" else match[1][0]
            for match in map(_WORD.fullmatch, words)
            if match
        )
        if letters:
            return at, letters
    return max(len(segments) - 2, 0), ""


def _numbered(path: str, module: str, rule: Rule) -> tuple[int, str, str]:
    """Tells the number of a projection's layer, and its module without it and with * instead.

    Haiku's first layer has no number: its module is that of the others without `_1`.
    """
    match = rule.search(path)
    number = match and match.groupdict().get("layer")
    if not match or number is None:
        return 0, module, module
    start, end = match.span("layer")
    if end > len(module):
        return int(number), module, module
    before, after = module[:start], module[end:]
    return int(number), before.removesuffix("_") + after, f"{before}*{after}"


def _stack(
    name: str,
    layers: Sequence[Sequence[tuple[int, int]]],
    layouts: Mapping[int, tuple[Layout, Rule]],
    held: Mapping[int, tuple[str, str]],
    paths: Sequence[str],
    types: Sequence[LeafType],
) -> _Stack:
    """Collects a stack, or raises if a layer has not one Q and one K, or these are normalized.

    Args:
      name: That of the stack.
      layers: For each layer the leaves of Q and K, and which of the leaf's layers it is.
      layouts: Layouts of leaves.
      held: Their modules, and what they hold.
      paths: Paths of all leaves.
      types: Their types.
    """
    rows: dict[int, list[int]] = {}
    for row, leaves in enumerate(layers):
        letters = "".join(held[index][1] for index, _ in leaves).replace("v", "")
        if sorted(letters) != ["k", "q"]:
            raise ValueError(
                f"`clip_qk` wants one projection of Q and one of K in each layer, and finds "
                f"{sorted(letters)} in {[paths[index] for index, _ in leaves]}: pass `rules=` for "
                "these two, or `query=` and `key=`."
            )
        for index, _ in leaves:
            rows.setdefault(index, []).append(row)
    projections: list[_Projection] = []
    for index, own in rows.items():
        module, holds = held[index]
        _refuse_what_changes_features(module, paths)
        biases = tuple(
            other
            for other, path in enumerate(paths)
            if other not in layouts and _is_bias(path, paths[index])
        )
        shapes = tuple(types[bias].shape for bias in biases)
        layout = layouts[index][0]
        parts = _parts(layout, len(holds)) if len(holds) > 1 else None
        projections.append(_Projection(index, biases, shapes, layout, holds, parts, tuple(own)))
    return _Stack(name, len(layers), tuple(projections))


def _refuse_what_changes_features(module: str, paths: Sequence[str]) -> None:
    """Raises if a module of attention normalizes Q or K, or adds low-rank factors to them."""
    for path in paths:
        inside = path.removeprefix(f"{module}/" if module else "")
        if module and inside == path:
            continue
        segments = inside.lower().split("/")
        if (module or len(segments) <= 2) and any(map(_NORM.fullmatch, segments)):
            raise ValueError(
                f"`clip_qk`: {path!r} normalizes Q or K after the projection, so that the size "
                "of its kernel changes no logit. Leave `clip_qk` out: the norm bounds logits."
            )
        if "lora" in inside.lower() and set(_named(inside.split("/"))[1]) & {"q", "k"}:
            raise ValueError(
                f"`clip_qk`: {path!r} is a low-rank factor of Q or K, which `clip_qk` does not "
                "clip with the kernel."
            )


def _is_bias(path: str, kernel: str) -> bool:
    """Tells whether a leaf is the bias of a kernel: `query/bias`, or `bq` beside `wq`."""
    (home, _, name), (its_home, _, its_name) = path.rpartition("/"), kernel.rpartition("/")
    if home != its_home or not _BIAS.fullmatch(name.lower()):
        return False
    letters = _named([name])[1]
    stems = (
        re.sub("_?(bias|weights?|kernel|[bw])$", "", each.lower()) for each in (name, its_name)
    )
    return letters == _named([its_name])[1] if letters else len({*stems}) == 1


def _logits_by_stack(given: Any, stacks: Mapping[str, _Stack]) -> dict[str, Any]:
    """Checks that there are logits for each layer and head, and that heads fit."""
    by_stack: dict[str, Any]
    if isinstance(given, Mapping):
        by_stack = dict(given)
    else:
        if len(stacks) > 1:
            raise ValueError(
                "`attention_logits` should be a dict, with an array [layers, heads] for each of "
                f"{[*stacks]}: the tree has several stacks of attention."
            )
        by_stack = dict.fromkeys(stacks, given)
    if by_stack.keys() != stacks.keys():
        raise ValueError(f"`attention_logits` has {[*by_stack]}, and should have {[*stacks]}.")
    for name, stack in stacks.items():
        shape = np.shape(by_stack[name])
        q, k = stack.features("q"), stack.features("k")
        if len(shape) != 2 or shape[0] != stack.layers:
            raise ValueError(
                f"`attention_logits` of {name!r} has shape {shape}, and should be [layers, heads], "
                f"of {stack.layers} layers."
            )
        heads = shape[1]
        if heads == 0 or q % heads or k % (q // heads) or heads % (k // (q // heads)):
            raise ValueError(
                f"`attention_logits` of {name!r} has {heads} heads, which do not fit the {q} "
                f"features of Q and {k} of K."
            )
    return by_stack


def _roots(logits: jax.Array, threshold: Any) -> jax.Array:
    """Computes what each layer and head is multiplied by, [layers, heads]."""
    logits = _whole(widened(logits))
    limit = jnp.asarray(threshold, logits.dtype)
    above = (logits > limit) & jnp.isfinite(logits)
    return jnp.sqrt(jnp.where(above, limit / jnp.where(above, logits, limit), 1))


def _whole(logits: jax.Array) -> jax.Array:
    """Gives each device of an explicit mesh all logits, which heads of K and biases need."""
    own = jax.typeof(logits).sharding
    if not any(own.spec):
        return logits
    return jax.sharding.reshard(logits, NamedSharding(own.mesh, PartitionSpec()))


def _factors(stack: _Stack, roots: jax.Array) -> dict[int, jax.Array]:
    """Computes what each leaf of Q and K and each of their biases is multiplied by, elementwise."""
    heads = roots.shape[1]
    groups = stack.features("k") // (stack.features("q") // heads)
    # The least of a group is that of the largest logit.
    of = {"q": roots, "k": jnp.min(roots.reshape(-1, groups, heads // groups), axis=2)}
    of["v"] = jnp.ones_like(of["k"])
    found: dict[int, jax.Array] = {}
    for projection in stack.projections:
        layout = projection.layout
        whole = _in_view({letter: of[letter] for letter in projection.holds}, projection)
        found[projection.leaf] = unseen(jnp.broadcast_to(whole, layout.shape), layout)
        along = jnp.squeeze(whole, layout.fan_in)
        for bias, shape in zip(projection.biases, projection.shapes, strict=True):
            if along.size != math.prod(shape) or (layout.layer and along.shape != shape):
                raise ValueError(
                    f"`clip_qk`: a bias of Q or K has shape {shape}, where its kernel has "
                    f"{along.shape} beside fan_in, so it cannot be clipped with it."
                )
            found[bias] = along.reshape(shape)
    return found


def _in_view(of: Mapping[str, jax.Array], projection: _Projection) -> jax.Array:
    """Lays out what belongs to heads as a leaf's axes lie, with length 1 along fan_in.

    Args:
      of: [layers of the stack, heads] for each letter of the projection.
      projection: Of which leaf.
    """
    layout, order = projection.layout, projection.order
    axis, _ = projection.parts or (order[-1], ())
    along = 1 + order.index(axis)
    arrays: dict[str, jax.Array] = {}
    for letter, all_layers in of.items():
        own, lengths = all_layers[np.array(projection.rows)], projection.lengths(letter)
        each = jnp.repeat(own, math.prod(lengths) // own.shape[1], axis=1)
        arrays[letter] = each.reshape(-1, *lengths)
    if {"q", "k"} <= arrays.keys() and axis != order[-1]:
        # The axis of the parts counts heads: those of Q that lie along it share K.
        q, count = arrays["q"], arrays["k"].shape[along]
        by_group = q.reshape(*q.shape[:along], count, -1, *q.shape[along + 1 :])
        arrays["k"] = jnp.min(by_group, axis=along + 1)
    joined = jnp.concatenate([*arrays.values()], axis=along)
    joined = joined if layout.layer else joined[0]
    axes = (*layout.layer, *order, *layout.fan_in)
    ones = (1,) * len(layout.fan_in)
    return joined.reshape(*joined.shape, *ones).transpose(np.argsort(axes))


def _shrunk(update: jax.Array, param: jax.Array, factor: jax.Array) -> jax.Array:
    """Changes an update so that it multiplies the stepped parameter: (W + u) f - W."""
    wide = widened(on_device(jnp.asarray(update)))
    factor = placed_like(factor.astype(wide.dtype), wide)
    # A factor of 1 leaves the update as it is, bit for bit.
    new = wide * factor + on_device(jnp.asarray(param)).astype(wide.dtype) * (factor - 1)
    return kept_beside(placed_like(new.astype(update.dtype), update), update)
