"""What is an expert, a router, a low-rank factor, or gate and up in one."""

from optax.contrib import MuonDimensionNumbers as D

from teon_optax._reading.axes import bias_axis, fans, matrix_dims, out_axis, reader_dims
from teon_optax._reading.names import says
from teon_optax._reading.roles import FALLBACK, Role, others, refused, unknown
from teon_optax._reading.surroundings import Surroundings
from teon_optax._reading.tree import Leaf


def low_rank(leaf: Leaf, around: Surroundings) -> Role | None:
    """LoRA factors, by name or because two matrices multiply to the shape of one beside them."""
    if says("low rank", *leaf.keys):
        ends = "b", "up"
        is_second = any(key.lower().endswith(ends) for key in (leaf.keys[-1], leaf.name))
    else:
        is_second = _is_second_factor(leaf, around)
        if is_second is None:
            return unknown(leaf) if _is_narrow(leaf, around) else None
    if len(leaf.shape) == 2:
        axis = out_axis(leaf, around)
        dims = matrix_dims(1 if axis is None else axis)
    else:
        dims = reader_dims("dphk"[: len(leaf.shape)])
    return Role("lora_b" if is_second else "lora_a", dims)


def _is_second_factor(leaf: Leaf, around: Surroundings) -> bool | None:
    """Whether it is the second of two factors of a matrix beside them; None where it is neither."""
    beside = [other for other in around.matrices[leaf.home] if other is not leaf]
    above, _, module = leaf.home.rpartition("/")
    bases = [base for base in around.matrices.get(above, []) if base.keys[base.depth] == module]
    bases += [base for base in beside if len(beside) == 2 or leaf.name.startswith(base.name + "_")]
    for other in beside:
        for first, second in ((leaf, other), (other, leaf)):
            rank, inner, outer = first.shape[-1], first.shape[:-1], second.shape[1:]
            if second.shape[0] != rank or rank >= min(max(inner), max(outer)):
                continue
            is_base = any(base is not other and base.shape == inner + outer for base in bases)
            names = [factor.name.lower() for factor in (first, second)]
            order = ["b", "a"] if leaf.weight == "weight" else ["a", "b"]
            is_called = len(beside) == 1 and names == order
            if is_base or is_called:
                return leaf is (second if leaf.weight != "weight" else first)
    return None


def _is_narrow(leaf: Leaf, around: Surroundings) -> bool:
    """Whether two matrices, alone in their module, lead through a quarter of their widths at most.

    They may be factors of one matrix, or an adapter; a bias between shows the latter. Two of which
    each follows the other may be an MLP, too, unless a name or the stream tells which size is wide.
    """
    held = around.matrices[leaf.home]
    is_pair = len(held) == 2 and all(len(each.shape) == 2 for each in held)
    is_pair &= not any(home.startswith(f"{leaf.home}/") for home in around.matrices)
    if not is_pair or leaf.home not in around.blocks or leaf.says("latent"):
        return False
    if any(bias_axis(each, around) is not None for each in held):
        return False
    sizes, stream = [fans(each, around) for each in held], around.stream_of(leaf)
    is_mlp = len(stream) != 1 and sizes[0] == sizes[1][::-1] and not says("adapter", *leaf.keys)
    return not is_mlp and any(
        first[1] == second[0] and 4 * first[1] <= min(first[0], second[1]) and stream != {first[1]}
        for first, second in (sizes, sizes[::-1])
    )


def mixture(leaf: Leaf, around: Surroundings) -> Role | None:
    """Routers and experts; nothing of an expert is Q, K or V."""
    modules = [key for key in leaf.keys[: leaf.depth] if not key.isdecimal()]
    words, module = [*modules, leaf.name], ["", *modules][-1]
    beside = [other for other in around.matrices[leaf.home] if other is not leaf]
    is_gate = leaf.says("gate") and not says("shared", module)
    is_gate &= not any(other.says("router") for other in beside)
    has_experts = says("mixture", module) or f"{leaf.home}/experts".lstrip("/") in around.modules
    has_experts |= is_gate and sum(_counted(leaf, other) > 1 for other in beside) > 1
    is_router = says("router", *words) or leaf.path in around.routers
    # A gate to one number, as of a shared expert.
    is_router |= 1 in leaf.shape and any(other.path in around.routers for other in beside)
    if len(leaf.shape) == 2 and (is_router or (is_gate and has_experts)):
        return FALLBACK
    is_expert = leaf.path in around.experts or says("experts", *words)
    is_expert |= says("mixture", module) and len(leaf.shape) > 2
    if any(says("shared", key) for key in words):
        return None
    if not is_expert:
        return _packed(leaf, around)
    if len(leaf.shape) > 2:
        return gating(leaf, around) or _batch(leaf, around)
    return _packed(leaf, around) or hidden(leaf, around)


def _batch(leaf: Leaf, around: Surroundings) -> Role:
    """Matrices in the last two axes; two in one, side by side, where their partner shows it."""
    axis, rank = out_axis(leaf, around), len(leaf.shape)
    if axis is None:
        last = rank - 1
        both = [Role("hidden", D(last - 1, last)), Role("hidden", D(last, last - 1))]
        return refused("(in, out) or (out, in)?", both)
    return Role("hidden", matrix_dims(axis, rank), split=_halves(leaf, axis, around))


def _packed(leaf: Leaf, around: Surroundings) -> Role | None:
    """Asks whether a matrix holds all experts, one after another, as DBRX keeps them.

    It may where it is called experts, or where several beside it are as well so many times as long
    as a router or a gate counts.
    """
    place = next((i for i, key in enumerate(leaf.keys) if says("experts", key)), None)
    if place is not None:
        routers = [m for m in around.inside(leaf) if says("router", *m.keys)]
        if any(number is not None for number in leaf.numbers[place : leaf.depth]):
            return None
    else:
        beside = around.matrices[leaf.home]
        routers = [m for m in beside if m.says("router", "gate") and m.path not in around.routers]
        routers = [m for m in routers if sum(_counted(m, other) > 1 for other in beside) > 1]
        if not any(_counted(router, leaf) for router in routers):
            return None
    counts = sorted({count for router in routers if (count := _counted(router, leaf))})
    first = [
        Role("hidden", D(1, 0), split=count) for count in counts[:1] if not leaf.shape[0] % count
    ]
    last = [Role("hidden", split=count) for count in counts[:1] if not leaf.shape[1] % count]
    return refused("are experts one after another in one matrix?", [*first, *last, *others(leaf)])


def _counted(router: Leaf, leaf: Leaf) -> int:
    """How many experts a matrix may hold one after another, by a router beside it; 0 for none."""
    if len(router.shape) != 2 or len(leaf.shape) != 2 or router is leaf:
        return 0
    for count, width in (sorted(router.shape), sorted(router.shape, reverse=True)):
        sides = [size for size in leaf.shape if size != width] or [width]
        is_counted = width in leaf.shape and sides[0] % count == 0
        if count not in leaf.shape and (is_counted or count * width in leaf.shape):
            return count
    return 0


def gating(leaf: Leaf, around: Surroundings) -> Role | None:
    """The gate and the up projection in one array (.., 2, in, out) or (.., 2, out, in)."""
    rank = len(leaf.shape)
    beside = [m for m in around.matrices[leaf.home] if len(m.shape) == rank - 1]
    is_named = leaf.says("gating")
    if rank < 3 or leaf.shape[-3] != 2 or not (is_named or (leaf.is_bare and len(beside) == 1)):
        return None
    choices = [
        Role("hidden", D(rank - 2, (rank - 3, rank - 1)), split=2),
        Role("hidden", D(rank - 1, (rank - 3, rank - 2)), split=2),
    ]
    batch, sizes = leaf.shape[:-3], leaf.shape[-2:]
    down = next((m.shape for m in beside if m.shape[:-2] == batch), ())
    fits = [r for r, size in zip(choices, (sizes[::-1], sizes), strict=True) if down[-2:] == size]
    if len(fits) == 1:
        return fits[0]
    return refused("(2, in, out) or (2, out, in)?", choices) if fits or is_named else None


def _halves(leaf: Leaf, axis: int, around: Surroundings) -> int:
    """2 where a matrix holds gate and up side by side, twice what the down projection reads."""
    if leaf.says("packed", "recurrent", "latent", "projection"):
        return 1
    out, into = leaf.shape[-2:][axis], leaf.shape[-2:][1 - axis]
    beside = [m for m in around.matrices[leaf.home] if len(m.shape) == len(leaf.shape)]
    sizes = [fans(other, around) for other in beside if other is not leaf]
    down = (out // 2, into)
    is_plain = any(out in fan or (fan[1] == out // 2 and fan != down) for fan in sizes)
    return 2 if out % 2 == 0 and down in sizes and not is_plain and len(sizes) < 4 else 1


def hidden(leaf: Leaf, around: Surroundings) -> Role:
    """The role of a matrix that no other test has told."""
    axis = out_axis(leaf, around)
    if axis is None and leaf.shape[0] != leaf.shape[1]:
        return refused("haliax has (out, in) and (in, out).", others(leaf))
    axis = axis or 0  # both fans of a square matrix are equal
    return Role("hidden", matrix_dims(axis), split=_halves(leaf, axis, around))
