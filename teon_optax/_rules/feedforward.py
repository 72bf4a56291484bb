"""What is an expert, a router, a low-rank factor, or gate and up in one."""

from optax.contrib import MuonDimensionNumbers as D

from teon_optax._rules.axes import fans, matrix_dims, out_axis, reader_dims
from teon_optax._rules.names import says
from teon_optax._rules.roles import FALLBACK, Role, others, refused
from teon_optax._rules.siblings import Siblings
from teon_optax._rules.tree import Leaf


def low_rank(leaf: Leaf, around: Siblings) -> Role | None:
    """LoRA factors, by name or because two siblings multiply to the shape of a third."""
    if says("low rank", *leaf.keys):
        ends = "b", "up"
        is_second = any(key.lower().endswith(ends) for key in (leaf.keys[-1], leaf.name))
    else:
        is_second = _is_second_factor(leaf, around)
        if is_second is None:
            return None
    if len(leaf.shape) == 2:
        axis = out_axis(leaf, around)
        dims = matrix_dims(1 if axis is None else axis)
    else:
        dims = reader_dims("dphk"[: len(leaf.shape)])
    return Role("lora_b" if is_second else "lora_a", dims)


def _is_second_factor(leaf: Leaf, around: Siblings) -> bool | None:
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
            is_called = len(beside) == 1 and {leaf.name.lower(), other.name.lower()} == {"a", "b"}
            if is_base or is_called:
                return leaf is (second if leaf.weight != "weight" else first)
    return None


def mixture(leaf: Leaf, around: Siblings) -> Role | None:
    """Routers and experts; nothing of an expert is Q, K or V."""
    modules = [key for key in leaf.keys[: leaf.depth] if not key.isdecimal()]
    words, module = [*modules, leaf.name], ["", *modules][-1]
    is_gate = leaf.says("gate") and not says("shared", module)
    has_experts = says("mixture", module) or f"{leaf.home}/experts".lstrip("/") in around.modules
    is_router = says("router", *words) or leaf.path in around.routers
    # A gate to one number, as of a shared expert.
    is_router |= 1 in leaf.shape and any(
        other.path in around.routers for other in around.matrices[leaf.home]
    )
    if len(leaf.shape) == 2 and (is_router or (is_gate and has_experts)):
        return FALLBACK
    is_expert = leaf.path in around.experts or says("experts", *words)
    is_expert |= says("mixture", module) and len(leaf.shape) > 2
    if not is_expert or any(says("shared", key) for key in words):
        return None
    if len(leaf.shape) > 2:
        return gating(leaf, around) or _batch(leaf, around)
    return _packed(leaf, around) or hidden(leaf, around)


def _batch(leaf: Leaf, around: Siblings) -> Role:
    """Matrices in the last two axes; two in one, side by side, where their partner shows it."""
    axis, rank = out_axis(leaf, around), len(leaf.shape)
    if axis is None:
        last = rank - 1
        both = [Role("hidden", D(last - 1, last)), Role("hidden", D(last, last - 1))]
        return refused("(in, out) or (out, in)?", both)
    return Role("hidden", matrix_dims(axis, rank), split=_halves(leaf, axis, around))


def _packed(leaf: Leaf, around: Siblings) -> Role | None:
    """Asks whether a matrix holds all experts, one after another, as DBRX keeps them."""
    place = next((i for i, key in enumerate(leaf.keys) if says("experts", key)), None)
    if place is None or any(number is not None for number in leaf.numbers[place : leaf.depth]):
        return None
    routers = [m for m in around.inside(leaf) if says("router", *m.keys)]
    sizes = {size for router in routers for size in router.shape} - {*leaf.shape}
    counts = [size for size in sorted(sizes) if leaf.shape[0] % size == 0]
    choices = [Role("hidden", D(1, 0), split=count) for count in counts[:1]]
    return refused("are experts one after another in one matrix?", [*choices, *others(leaf)])


def gating(leaf: Leaf, around: Siblings) -> Role | None:
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


def _halves(leaf: Leaf, axis: int, around: Siblings) -> int:
    """2 where a matrix holds gate and up side by side, twice what the down projection reads."""
    if leaf.says("packed", "recurrent", "latent", "projection"):
        return 1
    out, into = leaf.shape[-2:][axis], leaf.shape[-2:][1 - axis]
    beside = [m for m in around.matrices[leaf.home] if len(m.shape) == len(leaf.shape)]
    sizes = [fans(other, around) for other in beside if other is not leaf]
    down = (out // 2, into)
    is_plain = any(out in fan or (fan[1] == out // 2 and fan != down) for fan in sizes)
    return 2 if out % 2 == 0 and down in sizes and not is_plain and len(sizes) < 4 else 1


def hidden(leaf: Leaf, around: Siblings) -> Role:
    """The role of a matrix that no other test has told."""
    axis = out_axis(leaf, around)
    if axis is None and leaf.shape[0] != leaf.shape[1]:
        return refused("haliax has (out, in) and (in, out).", others(leaf))
    axis = axis or 0  # both fans of a square matrix are equal
    return Role("hidden", matrix_dims(axis), split=_halves(leaf, axis, around))
