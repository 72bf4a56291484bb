"""What each leaf of a tree is, by the first test that tells."""

from typing import Any

from teon_optax._reading.attention import fused, latent, output, projection
from teon_optax._reading.axes import bias_axis, fans, shifted
from teon_optax._reading.blocks import is_end
from teon_optax._reading.feedforward import gating, hidden, low_rank, mixture
from teon_optax._reading.layers import layer_columns
from teon_optax._reading.names import says
from teon_optax._reading.roles import FALLBACK, Role, ask_axes, others, refused, unknown
from teon_optax._reading.surroundings import Surroundings, surroundings_of
from teon_optax._reading.tree import Leaf, leaves_of


def roles(params: Any) -> list[tuple[Leaf, Role | None, tuple[int | None, ...]]]:
    """Every leaf in the tree's order, its role, and which segments may count its layers.

    What is no array of two axes or more has no role.
    """
    leaves = leaves_of(params)
    around = surroundings_of(leaves)
    known: dict[tuple[Any, ...], tuple[Role, tuple[int | None, ...]]] = {}
    found = []
    for leaf in leaves:
        if len(leaf.array_shape) < 2:
            found.append((leaf, None, ()))
            continue
        # Equal layers are read once.
        modules = (tuple(leaf.keys[:depth]) for depth in range(1, len(leaf.keys)))
        module = next((m for m in modules if m in around.twins), ())
        key = around.twins.get(module), *leaf.keys[len(module) :], *leaf.array_shape
        if key not in known:
            known[key] = _role(leaf, around), layer_columns(leaf, around)
        found.append((leaf, *known[key]))
    return found


def _role(leaf: Leaf, around: Surroundings) -> Role:
    """The role that the first test gives a leaf, with its axes as they are in the whole array."""
    if not leaf.is_matrix or 0 in leaf.shape:
        return FALLBACK
    tests = (
        _nameless, low_rank, mixture, _end, fused, projection, latent, output, gating,
        _vector, _large, _outside, hidden,
    )  # fmt: skip
    role = next(filter(None, (test(leaf, around) for test in tests)))
    choices = tuple(_along_layers(choice, leaf) for choice in role.choices)
    return _along_layers(role, leaf)._replace(choices=choices)


def _along_layers(role: Role, leaf: Leaf) -> Role:
    """What one layer's role is for an array that counts layers along an axis."""
    if leaf.layer_axis is None or role.name in ("fallback", "refused", "unknown"):
        return role
    return role._replace(dims=shifted(role.dims, leaf.layer_axis), layer_axis=leaf.layer_axis)


def _nameless(leaf: Leaf, around: Surroundings) -> Role | None:
    """Leaves whose path holds no name at all."""
    if leaf.box == "penzai":
        return refused("penzai keeps names out of the path (`label` has them).", others(leaf))
    if leaf.name == "pytree" and leaf.keys[-2].isdecimal():  # eqx.nn.Shared
        return refused("an embedding or a projection?", others(leaf))
    if leaf.path.isdecimal():
        is_inside = (around.widths | around.linked - around.ends).issuperset(leaf.shape)
        choices = others(leaf) if is_inside else (FALLBACK, *others(leaf))
        return refused("a list keeps no names.", choices)
    return None


def _end(leaf: Leaf, around: Surroundings) -> Role | None:
    """Embeddings and heads by name, but for a module inside a block that joins its widths."""
    if not is_end(leaf):
        return None
    is_module = leaf.home in around.blocks and leaf.weight != "" and len(leaf.shape) == 2
    is_joined = is_module and all(
        size in around.linked or _is_shared(size, leaf, around) for size in leaf.shape
    )
    return None if is_joined else FALLBACK


def _is_shared(size: int, leaf: Leaf, around: Surroundings) -> bool:
    """Whether another matrix in the block has this size too."""
    return any(
        size in other.shape
        for other in around.inside(leaf)
        if (other.names, other.shape) != (leaf.names, leaf.shape)
    )


def _vector(leaf: Leaf, around: Surroundings) -> Role | None:
    """A bare array that is no matrix: a scale for each head, a state or a table in a block."""
    if leaf.weight or leaf.home not in around.blocks or leaf.says("mlp"):
        return None
    stream = around.stream_of(leaf)
    tall = [m.shape for m in around.inside(leaf) if len(m.shape) == 3]
    heads = [s[1:] for s in tall if any(o[2] == s[0] and o[0] % s[1] == 0 for o in tall)]
    is_vector = leaf.shape in heads or leaf.shape[0] * leaf.shape[-1] in stream or 1 in leaf.shape
    if len(leaf.shape) == 2 and is_vector or sum(size > 1 for size in leaf.shape) < 2:
        return FALLBACK
    own = [axis for axis in range(len(leaf.shape)) if not _is_linked(axis, leaf, around)]
    is_named = leaf.says("projection", "output", "fused")
    return unknown(leaf) if len(leaf.shape) == 2 and own and not is_named else None


def _is_linked(axis: int, leaf: Leaf, around: Surroundings) -> bool:
    """Whether a bare matrix follows another in the block, or a module there has the same size."""
    size, others = leaf.shape[axis], [m for m in around.inside(leaf) if m.names != leaf.names]
    beside = [m for m in around.matrices[leaf.home] if len(m.shape) == 2 and m is not leaf]
    follows = any(size == other.shape[1 - axis] for other in beside)
    return follows or any(other.weight and size in other.shape for other in others)


def _large(leaf: Leaf, around: Surroundings) -> Role | None:
    """What is none of the above: convolutions, and what to ask of three axes or more."""
    rank = len(leaf.shape)
    if rank == 2 and leaf.home in around.blocks and says("convolution", *leaf.keys[-2:]):
        is_joined = all(_is_shared(size, leaf, around) for size in leaf.shape)
        return unknown(leaf) if is_joined else FALLBACK
    if says("convolution", *(leaf.keys if rank > 2 else [leaf.name])):
        return FALLBACK
    if rank == 2:
        return None
    if leaf.hides_axes:
        return refused("haliax has (out, in) and (in, out).", others(leaf))
    spatial = leaf.shape[2:] if leaf.weight == "weight" else leaf.shape[:-2]
    is_image = rank == 4 and leaf.weight != "" and len({*spatial}) == 1
    is_table = leaf.shape[0] == 1 and leaf.is_bare and leaf.home not in around.blocks
    if is_table or (is_image and bias_axis(leaf, around) is not None):
        return FALLBACK
    is_named = leaf.says("output", "mlp", "reads", "writes", "experts", "shared")
    if leaf.home in around.blocks and leaf.weight and not is_named:
        return ask_axes(leaf)
    bias = around.biases.get(leaf.path.rpartition("/")[0])
    is_batch = bias is not None and bias[:-1] == leaf.shape[:-2]  # as members of an ensemble have
    return unknown(leaf, is_batch)


def _outside(leaf: Leaf, around: Surroundings) -> Role | None:
    """Matrices outside of blocks: hidden where both sides are widths of the network.

    A size of its own is that of an input, an output or a table. In a list of (weight, bias), which
    has no names, only a square matrix shows a width; nothing does in a tree with one matrix.
    """
    is_listed = all(key.isdecimal() for key in leaf.keys)
    widths = around.widths if is_listed else around.widths | around.linked
    if leaf.home in around.blocks or not widths or says("recurrent", *leaf.keys):
        return None
    sizes = fans(leaf, around)
    if sizes[::-1] in around.vocabularies and not leaf.says("reads"):
        return FALLBACK if sizes[0] != sizes[1] else unknown(leaf)  # a head without a name
    is_named = not around.blocks or leaf.says("mlp", "projection", "output", "reads", "writes")
    if around.widths.issuperset(sizes):
        return None if is_named else unknown(leaf)
    if widths.issuperset(sizes):
        is_inside = leaf.says("mlp") and around.ends.isdisjoint(sizes)
        return None if is_inside else unknown(leaf)
    return FALLBACK
