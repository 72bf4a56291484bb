"""What is Q, K, V, several of them in one, or the output projection."""

import itertools

from optax.contrib import MuonDimensionNumbers as D

from teon_optax._reading.axes import (
    bias_axis,
    fans,
    heads_layout,
    matrix_dims,
    out_axis,
    output_of,
    parts_of,
    reader_dims,
    writer_dims,
    writer_layout,
)
from teon_optax._reading.blocks import is_end
from teon_optax._reading.names import says
from teon_optax._reading.roles import Role, ask_axes, others, projections, refused
from teon_optax._reading.surroundings import Surroundings
from teon_optax._reading.tree import Leaf


def fused(leaf: Leaf, around: Surroundings) -> Role | None:
    """Q, K and V (or K and V) in one array."""
    parts = 3 if leaf.says("packed") and leaf.in_attention else parts_of(leaf)
    if parts == 1:
        return _thirds(leaf, around)
    if len(leaf.shape) > 2:
        layout = heads_layout(leaf, output_of(leaf, around), around, parts)
        if layout and "p" in layout and not leaf.says("by heads"):
            return Role("qkv", reader_dims(layout), split=parts)
    elif (axis := _fused_axis(leaf, around, parts)) is not None:
        return Role("qkv", matrix_dims(axis), split=parts)
    equal = [] if leaf.says("gated") else projections(leaf, parts)
    split = f"`split={parts}` is for equal parts" if equal else "`split` is for parts"
    question = (
        f"Where do its parts lie? {split}, one after another; what is laid out by heads or groups "
        "cannot be split so."
    )
    choices = [*_unequal(leaf, around), *equal, *others(leaf)]
    return refused(question, dict.fromkeys(choices))


def _thirds(leaf: Leaf, around: Surroundings) -> Role | None:
    """An unnamed matrix three times as wide as what a matrix beside it reads, and read by none."""
    beside = [other for other in around.matrices[leaf.home] if other is not leaf]
    rows = ("projection", "recurrent", "mlp" if len(beside) > 1 else "fused")
    is_inside = leaf.home in around.blocks or leaf.in_attention
    if len(leaf.shape) != 2 or leaf.hides_axes or not is_inside or leaf.says(*rows):
        return None
    into, out = fans(leaf, around)
    shapes = [fans(other, around) for other in beside if len(other.shape) == 2]
    is_turned = (into // 3, out) in shapes and into % 3 == 0 and len(beside) == 1
    may_be_unequal = (out, into) == (2 * into, into) and shapes == [(into, into)]
    if is_turned or may_be_unequal:
        dims = matrix_dims(1 if (into, out) == leaf.shape else 0)
        pair = [Role("hidden", dims, split=2)] if may_be_unequal else []
        fused_ones = _unequal(leaf, around)
        choices = [*fused_ones, *pair] if leaf.in_attention else [*pair, *fused_ones]
        question = "Q, K and V in one, or gate and up?" if pair else "Q, K and V in one?"
        return refused(question, [*choices, *others(leaf)])
    is_read = any(out in shape for shape in shapes) or any(other.letter for other in beside)
    if is_read or (out // 3, into) not in shapes or out % 3:
        return None
    dims = matrix_dims(1 if (into, out) == leaf.shape else 0)
    thirds = Role("qkv", dims, split=3)
    if leaf.in_attention and len(beside) == 1:
        return thirds
    return refused("Q, K and V in one?", [thirds, Role("hidden", dims)])


def _unequal(leaf: Leaf, around: Surroundings) -> list[Role]:
    """Q as wide as the output projection reads, K and V the halves of what is left.

    With a gate behind them (`qkvz`), V and the gate are as wide as that, and Q and K are halves.
    """
    output = output_of(leaf, around)
    if output is None or len(output.shape) != len(leaf.shape):
        return []
    if len(leaf.shape) == 3:
        heads, dims, axis = output.shape[0], D(0, (1, 2)), 1
    else:
        axis = out_axis(leaf, around) or 0
        heads, dims = output.shape[1 - axis], matrix_dims(axis)
    is_gated = leaf.says("gated")
    rest = leaf.shape[axis] - heads * (2 if is_gated else 1)
    if rest <= 0 or rest % 2 or (rest == 2 * heads and not is_gated):
        return []
    half = rest // 2
    return [
        Role("qkv", dims, split=(half, half, heads, heads) if is_gated else (heads, half, half))
    ]


def _fused_axis(leaf: Leaf, around: Surroundings, parts: int) -> int | None:
    """The axis along which a matrix is Q, K and V one after another, where sizes prove it.

    They do where a part has the size of the matrix beside that it must match: of the output
    projection for Q, K and V, of Q for K and V. Without one, a part may be as long as the other
    axis; a kernel (3 n, n) may then still be (fan_in, fan_out), with thirds of n.
    """
    if len(leaf.shape) != 2 or leaf.says("by heads"):
        return None
    queries = (other for other in around.matrices[leaf.home] if other.letter == "q")
    partner = output_of(leaf, around) if parts == 3 else next(queries, None)
    sizes = sorted(partner.shape) if partner and len(partner.shape) == 2 else None
    proven = bias_axis(leaf, around) if parts == 3 else None
    fits = []
    for axis in (0, 1):
        part, other = leaf.shape[axis] / parts, leaf.shape[1 - axis]
        is_equal = part == other if sizes is None else sorted((part, other)) == sizes
        if is_equal and part.is_integer() and proven in (None, axis):
            fits.append(axis)
    if len(fits) != 1:
        return None
    usual = fits[0] == out_axis(leaf, around) or leaf.shape[1 - fits[0]] % parts
    return fits[0] if usual or sizes is not None else None


def projection(leaf: Leaf, around: Surroundings) -> Role | None:
    """Q, K and V projections, by name or by what is beside them."""
    if not leaf.letter:
        return _unnamed_projection(leaf, around)
    beside = around.matrices[leaf.home]
    letters = {other.letter: other for other in beside if other.letter}
    # Alone, `value` may be a critic's head, and an array `query` what is learned to attend with.
    has_output = leaf.weight and any(other.says("output") and other.weight for other in beside)
    is_alone = len(letters) + bool(has_output) < 2
    if is_alone and not (leaf.weight and (leaf.in_attention or leaf.home in around.blocks)):
        return None
    if len(leaf.shape) > 2:
        layout = heads_layout(leaf, output_of(leaf, around), around)
        return Role("qkv", reader_dims(layout)) if layout else ask_axes(leaf)
    # The V of a gated feed forward has no Q or K beside it, but a way back from its width.
    goes_back = any(other.shape == leaf.shape[::-1] != leaf.shape for other in beside)
    if {*letters} == {"v"} and not leaf.in_attention and goes_back:
        return None
    # RWKV's feed forward has a key (d, f) and a value (f, d): one follows the other.
    key, value = letters.get("k"), letters.get("v")
    if key and value and not leaf.in_attention and key.shape == value.shape[::-1] != value.shape:
        return None
    axis = out_axis(leaf, around)
    return ask_axes(leaf) if axis is None else Role("qkv", matrix_dims(axis))


def _unnamed_projection(leaf: Leaf, around: Surroundings) -> Role | None:
    """What the other matrices of a module show to be Q, K or V, or leave open."""
    if leaf.says("output", "fused", "fused pair", "latent", "packed", "einsum"):
        return None
    if len(leaf.shape) == 3:
        return _unnamed_heads(leaf, around)
    axis = out_axis(leaf, around)
    choices = [Role(name, matrix_dims(1 if axis is None else axis)) for name in ("qkv", "out")]
    letters = {other.letter for other in around.matrices[leaf.home]} - {""}
    output = output_of(leaf, around)
    if letters == {"k", "v"} and output is not None and not leaf.says("reads"):
        is_query = fans(output, around) == fans(leaf, around)[::-1]
        return refused("is it Q?", choices) if is_query else None
    readers, writers = _attention_shapes(leaf, around)
    if leaf in readers:
        return choices[0]
    if writers == [leaf]:
        return choices[1]
    return refused("which are Q, K, V and output?", choices) if leaf in writers else None


def _unnamed_heads(leaf: Leaf, around: Surroundings) -> Role | None:
    """Leaves (d, h, k) beside another (h, k, d): Q, K and V if there are three of them."""
    beside = [other for other in around.matrices[leaf.home] if len(other.shape) == 3]
    named = output_of(leaf, around)
    readers = {}
    for output in [named] if named else beside:
        layouts = {m.path: heads_layout(m, output, around) for m in beside if m is not output}
        if None not in layouts.values() and (len(layouts) > 1 or named):
            readers[output.path] = layouts
    if not readers:
        return None
    choices = [
        Role("qkv", reader_dims(found[leaf.path])) if leaf.path in found
        else Role("out", writer_dims("dhk" if "hkd" in found.values() else "hkd"))
        for found in readers.values()
    ]  # fmt: skip
    if len(choices) > 1 or len(readers[next(iter(readers))]) != 3:
        return refused("Q, K or V?", [*choices, *others(leaf)])
    return choices[0]


def _attention_shapes(leaf: Leaf, around: Surroundings) -> tuple[list[Leaf], list[Leaf]]:
    """What is Q, K or V in a module without names, and what may be the output projection instead.

    Four matrices are attention if three read one width, two of these (K and V) are equal, and the
    fourth goes back to that width, from that of the third or of all. If it comes from another, they
    may be. In a module that is called attention, three equal ones may be too.
    """
    beside = around.matrices[leaf.home]
    if not leaf.home or len(beside) not in (3, 4):
        return [], []
    rows = ("projection", "output", "fused", "gate", "recurrent", "reads", "writes")
    is_named = any(says(row, key) for row in rows for m in beside for key in (m.name, *m.keys[:-1]))
    is_named |= any(is_end(other) or len(other.shape) != 2 for other in beside)
    if is_named:
        return [], []
    sizes = [fans(other, around) for other in beside]
    is_numbered = len({other.names[other.depth] for other in beside}) == 1 and not leaf.in_attention
    is_chain = is_numbered and all(a[1] == b[0] for a, b in itertools.pairwise(sizes))
    writers = []
    for place, (writer, fan) in enumerate(zip(beside, sizes, strict=True)):
        ins, outs = zip(*(sizes[:place] + sizes[place + 1 :]) or [((), ())], strict=True)
        closes = {*ins} == {fan[1]} and len({*outs}) < 3 and outs.count(fan[0]) in (0, 1, 3)
        if closes and len(beside) == 4 and not is_chain:
            writers += [writer] if fan[0] in outs else beside
    if leaf.in_attention and len(beside) == 3 and len({*sizes}) == 1:
        return [], beside
    return [other for other in beside if writers and other not in writers], writers


def latent(leaf: Leaf, around: Surroundings) -> Role | None:
    """The up projections of latent attention, whose fan_in is a latent vector."""
    if not leaf.says("latent"):
        return None
    if len(leaf.shape) == 2:
        axis = out_axis(leaf, around)
        name = "latent" if leaf.says("latent up") else "hidden"
        return None if axis is None else Role(name, matrix_dims(axis))
    layout = heads_layout(leaf, output_of(leaf, around), around)
    return Role("latent", reader_dims(layout)) if layout else ask_axes(leaf)


def output(leaf: Leaf, around: Surroundings) -> Role | None:
    """The output projection of attention: so called, or all that is left beside Q, K and V."""
    beside = [other for other in around.matrices[leaf.home] if other is not leaf]
    above, module = ["", "", *leaf.keys[: leaf.depth]][-2:]
    rows = ("projection", "fused", "fused pair", "latent")
    with_projections = any(other.says(*rows) for other in beside)
    in_module = says("attention", module)
    is_called = leaf.says("output") or (in_module and leaf.name.startswith("linear"))
    is_below = says("attention", above) and says("output", module)
    is_left = all(other.letter for other in beside) and (in_module or len(leaf.shape) == 3)
    if not (is_below or (is_called and in_module)) and not (
        with_projections and (is_called or is_left)
    ):
        return None
    if len(leaf.shape) == 2:
        axis = out_axis(leaf, around)
        return None if axis is None else Role("out", matrix_dims(axis))
    layout = writer_layout(leaf, around) if len(leaf.shape) == 3 else None
    return Role("out", writer_dims(layout)) if layout else None
