"""What each leaf of a tree is for: a rule without its pattern, or a doubt and the choices."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from optax.contrib import MuonDimensionNumbers as D

from teon_optax._rules import names
from teon_optax._rules.names import anywhere, stem
from teon_optax._rules.rule import fan_axes
from teon_optax._rules.tree import Leaf, Tree, bias_axis, heads_of, leaves_of, survey


class Reading(NamedTuple):
    """The arguments of a rule but the pattern; with a `doubt`, the readings to choose from."""

    stack: int = 1
    dims: D | None = None
    layer_axis: int | None = None
    split: int | tuple[int, ...] = 1
    doubt: str = ""
    choices: tuple["Reading", ...] = ()


FALLBACK = Reading(0)
UNNAMED = Reading(0, doubt="no name tells what it is")

# Gemma's einsums, heads first; `attn_vec_einsum` (heads, size, width) beside them proves it.
_EINSUMS = {
    **dict.fromkeys(["q_einsum", "k_einsum", "v_einsum"], (D(1, (0, 2)), 1)),
    "kv_einsum": (D(2, (0, 1, 3)), 2),
    "qkv_einsum": (D(2, (0, 1, 3)), 3),
}
# How a Q, K or V of so many axes may lie, (dims, layer_axis), in a kernel and in a `weight`.
_KERNELS: dict[int, list[tuple[D | None, int | None]]] = {
    2: [(None, None), (D(1, 0), None)],
    3: [(D(0, (1, 2)), None), (None, 0), (None, 1), (D(1, (0, 2)), None)],
    4: [(D(1, (2, 3)), 0), (D(0, (2, 3)), 1), (D(0, (1, 2, 3)), None), (D(2, (0, 1, 3)), None)],
}
_WEIGHTS: dict[int, list[tuple[D | None, int | None]]] = {
    2: [(D(1, 0), None), (None, None)],
    3: [(D(2, (0, 1)), None), (D(0, (1, 2)), None), (D(2, 1), 0)],
    4: [(D(3, (1, 2)), 0), (D(1, (2, 3)), 0), (D(3, (0, 1, 2)), None), (D(0, (1, 2, 3)), None)],
}
# The same for other matrices: output projections and experts.
_OTHERS: dict[int, list[tuple[D | None, int | None]]] = {
    2: _KERNELS[2],
    3: [(dims, None) for dims in (D((0, 1), 2), D((1, 2), 0), D(0, (1, 2)), D(1, 2), D(2, 1))],
    4: [(D((0, 1, 2), 3), None), (D((1, 2, 3), 0), None), (D(0, (1, 2, 3)), None)],
}


def readings(params: Any) -> list[tuple[Leaf, Reading | None]]:
    """Every leaf with its reading, in the tree's order; None for what is no array above 1-D."""
    leaves = leaves_of(params)
    tree = survey(leaves)
    return [(leaf, _read(leaf, tree) if len(leaf.array_shape) > 1 else None) for leaf in leaves]


def _read(leaf: Leaf, tree: Tree) -> Reading:
    if not leaf.is_float or len(leaf.shape) < 2 or 0 in leaf.shape or _is_apart(leaf, tree):
        return FALLBACK
    readers = (_read_unnamed, _read_fused, _read_projection, _read_einsum, _read_other)
    reading = next(filter(None, (reader(leaf, tree) for reader in readers)))
    choices = tuple(_along_layers(choice, leaf) for choice in reading.choices)
    return _along_layers(reading, leaf)._replace(choices=choices)


def _along_layers(reading: Reading, leaf: Leaf) -> Reading:
    """What one layer's reading is for an array that counts layers along an axis."""
    axis = leaf.layer_axis
    if axis is None or reading.stack == 0:
        return reading
    dims = reading.dims and jax.tree.map(lambda a: a + (a >= axis), reading.dims)
    return reading._replace(dims=dims, layer_axis=axis)


def _doubt(question: str, choices: Iterable[Reading]) -> Reading:
    return Reading(0, doubt=question, choices=(*choices, FALLBACK))


def _options(leaf: Leaf, stack: int, split: int = 1) -> Iterator[Reading]:
    projections = _WEIGHTS if leaf.keys[-1] == "weight" else _KERNELS
    options = projections if stack > 1 else _OTHERS
    for dims, axis in options.get(len(leaf.shape), []):
        matrix = [a for a in range(len(leaf.shape)) if a != axis]
        first = fan_axes(dims)[1][0] if dims else matrix[-1]
        if leaf.shape[first] % split == 0 and None in (axis, leaf.layer_axis):
            yield Reading(stack, dims, axis, split)


def _is_apart(leaf: Leaf, tree: Tree) -> bool:
    """Whether a name says embedding, head, norm, bias, router or LoRA factor."""
    keys = leaf.keys
    home, role = leaf.place
    is_gate = names.GATE.fullmatch(role) and "experts" not in keys
    has_experts = anywhere(names.MIXTURE, keys) or f"{home}/experts".lstrip("/") in tree.modules
    return (
        leaf.is_vector
        or anywhere(names.EMBEDDING, [role, *keys[-2:-1]])
        or anywhere(names.HEAD, [role, *keys[-2:-1]])
        or anywhere(names.ROUTER, keys)
        or anywhere(names.LORA, keys)
        or bool(is_gate and has_experts)
    )


def _read_unnamed(leaf: Leaf, tree: Tree) -> Reading | None:
    if leaf.box == "penzai":
        return _doubt("penzai keeps names out of the path (`label` has them).", _options(leaf, 1))
    if leaf.place[1] == "pytree" and leaf.keys[-2].isdecimal():  # eqx.nn.Shared
        return _doubt("an embedding or a projection?", _options(leaf, 1))
    return None


def _out_axis(leaf: Leaf, tree: Tree) -> int | None:
    """The fan_out axis of a matrix, None where it cannot be known."""
    home, role = leaf.place
    axis = bias_axis(leaf, tree)
    if axis is None and role in ("c_fc", "c_proj"):  # Hugging Face's GPT-2 keeps kernels (out, in)
        attention = f"{home.rpartition('/')[0]}/attn".lstrip("/")
        fused = (tree.weights.get((module, "c_attn")) for module in (home, attention))
        axis = next((_fused_axis(beside, tree, 3) for beside in fused if beside), None)
    if axis is None and not leaf.hides_axes:
        axis = 0 if leaf.keys[-1].startswith("weight") else 1
    return axis


def _dims(out_axis: int) -> D | None:
    return None if out_axis == 1 else D(1, 0)


def _read_fused(leaf: Leaf, tree: Tree) -> Reading | None:
    home, role = leaf.place
    is_packed = names.PACKED.fullmatch(role) and anywhere(names.ATTENTION, home.split("/"))
    parts = 3 if is_packed or names.FUSED.fullmatch(role) else 2
    if parts == 2 and not names.FUSED_PAIR.fullmatch(role):
        return None
    axis = _fused_axis(leaf, tree, parts)
    if axis is not None:
        return Reading(2, _dims(axis), split=parts)
    choices = (*_options(leaf, 2, parts), *_options(leaf, 1))
    return _doubt("where do its parts lie (`split=` also takes their sizes)?", choices)


def _fused_axis(leaf: Leaf, tree: Tree, parts: int) -> int | None:
    """The axis along which a matrix is Q, K and V one after another, where sizes prove it."""
    home, role = leaf.place
    if len(leaf.shape) != 2 or role == "query_key_value":  # Megatron's is cut by heads first
        return None
    partner = tree.weights.get((home, "o" if parts == 3 else "q"))
    sizes = sorted(partner.shape) if partner and len(partner.shape) == 2 else None
    bias = bias_axis(leaf, tree)

    def fits(axis: int) -> bool:
        part, other = leaf.shape[axis] / parts, leaf.shape[1 - axis]
        is_equal = part == other if sizes is None else sorted((part, other)) == sizes
        return is_equal and part.is_integer() and bias in (None, axis)

    axes = [axis for axis in (0, 1) if fits(axis)]
    if len(axes) != 1:
        return None
    # A kernel (3n, n) may still be (in, out) with thirds of n, but not where n has none.
    usual = axes[0] == _out_axis(leaf, tree) or leaf.shape[1 - axes[0]] % parts
    return axes[0] if usual or sizes is not None else None


def _read_projection(leaf: Leaf, tree: Tree) -> Reading | None:
    home, role = leaf.place
    if not names.PROJECTION.fullmatch(role):
        return None
    # Alone, `value` may be a critic's head, and an array `query` what is learned to attend with.
    around = home.split("/")
    in_block = anywhere(names.ATTENTION, around) or anywhere(names.LAYERS, around)
    is_module = names.WEIGHT.fullmatch(leaf.keys[-1]) or leaf.keys[-1].isdecimal()
    letters = "qkvo" if is_module else "qkv"
    is_alone = sum((home, letter) in tree.weights for letter in letters) < 2
    if is_alone and not (in_block and is_module):
        return None
    if len(leaf.shape) == 2 and (axis := _out_axis(leaf, tree)) is not None:
        return Reading(2, _dims(axis))
    heads, size = heads_of(home, tree)
    if len(leaf.shape) == 3 and leaf.shape[2] == size and heads % leaf.shape[1] == 0:
        return Reading(2, D(0, (1, 2)))
    return _doubt("which axes are heads, layers, fan_in?", _options(leaf, 2))


def _read_einsum(leaf: Leaf, tree: Tree) -> Reading | None:
    home, role = leaf.place
    if role == "gating_einsum":
        linear = tree.weights.get((home, "linear"))
        hidden = linear.shape if linear else ()
        in_out, out_in = Reading(1, D(1, (0, 2)), split=2), Reading(1, D(2, (0, 1)), split=2)
        fits = leaf.shape == (2, *hidden[::-1]), leaf.shape == (2, *hidden)
        if sum(fits) == 1:
            return in_out if fits[0] else out_in
        return _doubt("(2, in, out) or (2, out, in)?", (in_out, out_in))
    if role not in _EINSUMS:
        return None
    dims, split = _EINSUMS[role]
    beside = tree.weights.get((home, "o"))
    if beside and beside.place[1] == "attn_vec_einsum" and len(beside.shape) == 3:
        heads, size, width = beside.shape
        *parts, own_heads = leaf.shape[:-2] or (0,)
        fits = leaf.shape[-2:] == (width, size) and parts == ([split] if split > 1 else [])
        if fits and heads % own_heads == 0:
            return Reading(2, dims, split=split)
    return _doubt("which axes are heads, layers, fan_in?", _options(leaf, 2, split))


def _read_other(leaf: Leaf, tree: Tree) -> Reading:
    home, role = leaf.place
    rank = len(leaf.shape)
    is_output = names.OUTPUT.fullmatch(role) and any(heads_of(home, tree))
    if rank == 3 and (is_output or role == "attn_vec_einsum"):
        return Reading(1, D((0, 1), 2))
    if anywhere(names.CONVOLUTION, leaf.keys if rank > 2 else [role]):
        return FALLBACK
    if rank > 2 and not leaf.hides_axes:
        return _experts(leaf)
    axis = _out_axis(leaf, tree) if rank == 2 else None
    if axis is None and (rank > 2 or leaf.shape[0] != leaf.shape[1]):
        return _doubt("haliax has (out, in) and (in, out).", _options(leaf, 1))
    axis = axis or 0  # both fans of a square matrix are equal
    inside = home.split("/")
    is_hidden = anywhere(names.LAYERS, inside) or any(key.isdecimal() for key in inside)
    if leaf.shape[axis] in tree.vocabularies and not is_hidden:
        return FALLBACK  # a head without a name
    return Reading(1, _dims(axis))


def _experts(leaf: Leaf) -> Reading:
    """Experts are matrices in the last two axes; what else has three or more is not known."""
    is_shared = any(stem(key).startswith("shared") for key in leaf.keys)
    if is_shared or not anywhere(names.EXPERTS, leaf.keys):
        return UNNAMED
    last, before = len(leaf.shape) - 1, len(leaf.shape) - 2
    return Reading(1, D(last, before) if leaf.keys[-1] == "weight" else D(before, last))
