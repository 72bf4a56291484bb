"""Which axes of a leaf are fan_in and fan_out: what is proven, and what is left to choose from."""

from optax.contrib import MuonDimensionNumbers as D

from teon_optax._reading.names import WEIGHT, match, says
from teon_optax._reading.surroundings import Surroundings
from teon_optax._reading.tree import Leaf

# How a projection of several heads may lie, a letter an axis: d is fan_in; p the parts of a fused
# one, h the heads and k their size are fan_out. Flax and MaxText keep d first, Gemma the heads,
# haliax and PyTorch d last.
READERS = {2: ("dk", "kd"), 3: ("dhk", "hdk", "hkd"), 4: ("phdk", "dphk", "pdhk", "phkd")}
# The same for what reads all heads (h, k) and writes d.
WRITERS = {2: ("kd", "dk"), 3: ("hkd", "dhk")}


def reader_dims(layout: str) -> D | None:
    """The axes of a projection, None for a matrix (fan_in, fan_out)."""
    fan_out = tuple(layout.index(letter) for letter in "phk" if letter in layout)
    return _dims((layout.index("d"),), fan_out)


def writer_dims(layout: str) -> D | None:
    """The axes of an output projection."""
    fan_in = tuple(layout.index(letter) for letter in "hk" if letter in layout)
    return _dims(fan_in, (layout.index("d"),))


def _dims(fan_in: tuple[int, ...], fan_out: tuple[int, ...]) -> D | None:
    """Writes dims as a rule does: None for a matrix (fan_in, fan_out)."""
    if (fan_in, fan_out) == ((0,), (1,)):
        return None
    return D(*(axes[0] if len(axes) == 1 else axes for axes in (fan_in, fan_out)))


def matrix_dims(out_axis: int, rank: int = 2) -> D | None:
    """The dims of a matrix in the last two axes, `out_axis` (0 or 1) of which is fan_out."""
    axes = (rank - 2,), (rank - 1,)
    return _dims(*(axes if out_axis else axes[::-1]))


def bias_axis(leaf: Leaf, around: Surroundings) -> int | None:
    """The axis as long as the bias beside the weight: fan_out, whatever the library."""
    *module, name = leaf.keys
    beside = around.vectors.get("/".join(module), {})
    if WEIGHT.fullmatch(name):
        beside = {key: size for key, size in beside.items() if key in ("bias", "b")}
    elif not name.isdecimal():  # a list [weight, bias] has numbers for names
        return None
    axes = [axis for axis, size in enumerate(leaf.shape) if size in beside.values()]
    return axes[0] if len(axes) == 1 else None


def _direction_axis(leaf: Leaf, around: Surroundings) -> int | None:
    """The fan_out axis of a matrix whose name says that it reads the stream, or writes it.

    Only where one side is as wide as the stream, and the other wider: `down` and `up` of an adapter
    go the other way.
    """
    stream = around.stream_of(leaf)
    axes = [axis for axis, size in enumerate(leaf.shape[-2:]) if size in stream]
    reads, writes = leaf.says("reads"), leaf.says("writes")
    if len(stream) != 1 or len(axes) != 1 or reads == writes or leaf.home not in around.blocks:
        return None
    is_wider = leaf.shape[-2:][1 - axes[0]] > leaf.shape[-2:][axes[0]]
    is_projection = match("projection", leaf.name) or match("output", leaf.name)
    return (1 - axes[0] if reads else axes[0]) if is_wider or is_projection else None


def out_axis(leaf: Leaf, around: Surroundings) -> int | None:
    """The fan_out axis of a matrix (0 or 1 of the last two), None where it cannot be known.

    The bias beside it proves it. Otherwise all matrices in a block whose arrays have the same name
    are taken to be alike: as two of them show at least and none denies, or as the library has it
    that uses this name.
    """
    axis = bias_axis(leaf, around) if len(leaf.shape) == 2 else None
    if axis is not None or leaf.hides_axes:
        return axis
    alike = [
        other
        for other in around.inside(leaf)
        if (len(other.shape), other.weight) == (len(leaf.shape), leaf.weight)
    ]
    votes = [vote for other in alike if (vote := _direction_axis(other, around)) is not None]
    votes += 2 * [vote for other in alike if (vote := bias_axis(other, around)) is not None]
    if len(votes) > 1 and len({*votes}) == 1:
        return votes[0]
    return 0 if leaf.keys[-1].startswith("weight") else 1


def output_of(leaf: Leaf, around: Surroundings) -> Leaf | None:
    """The output projection beside Q, K and V, by its name or as all that is left."""
    beside = [other for other in around.matrices.get(leaf.home, []) if other is not leaf]
    named = [other for other in beside if other.says("output")]
    unlike = [other for other in beside if not other.letter]
    in_attention = leaf.in_attention or len(beside) - len(unlike) > 1
    if not named and len(unlike) == 1 and in_attention:
        named = unlike
    return named[0] if named else None


def parts_of(leaf: Leaf) -> int:
    """3 for what is called Q, K and V in one, 2 for K and V, 1 for all else."""
    is_pair = leaf.says("fused pair") and not leaf.says("latent")
    return 3 if leaf.says("fused") else 2 if is_pair else 1


def heads_layout(
    leaf: Leaf, output: Leaf | None, around: Surroundings, parts: int = 1
) -> str | None:
    """The one layout of a projection with heads in which it fits the output projection beside."""
    if output is None or leaf.hides_axes or len(leaf.shape) < 3 or len(leaf.shape) > 4:
        return None
    fits = [
        layout
        for layout in READERS[len(leaf.shape)]
        for other in WRITERS.get(len(output.shape), ())
        if _fit(leaf, layout, output, other, parts)
    ]
    if leaf.says("einsum"):  # Gemma's keep the heads first
        fits = [layout for layout in fits if layout in ("hdk", "phdk")]
    usual = [layout for layout in fits if (layout[-1] == "d") == (leaf.weight == "weight")]
    fits = usual or fits
    # Where sizes agree, matrices scanned along an axis can have such shapes, unless names tell.
    is_named = says("multi head", leaf.home.rpartition("/")[2]) or output.says("einsum")
    sizes = output.shape if len(output.shape) == 3 else leaf.shape
    is_certain = is_named or (fits == ["dhk"] and len({*sizes}) == 3)
    return fits[0] if len(fits) == 1 and (is_certain or not_scanned(leaf, around)) else None


def writer_layout(leaf: Leaf, around: Surroundings) -> str | None:
    """The layout of an output projection of three axes, from what it fits beside it."""
    if leaf.says("einsum"):
        return "hkd"
    beside = [other for other in around.matrices[leaf.home] if other is not leaf]
    layouts = (heads_layout(other, leaf, around, parts_of(other)) for other in beside)
    found = next(filter(None, layouts), None)
    fused = (m.shape for m in beside if m.says("fused") and len(m.shape) == 3)
    if any(shape[::2] == (leaf.shape[2], leaf.shape[1]) for shape in fused):
        return "hkd"
    return found and ("dhk" if found[-1] == "d" else "hkd")


def not_scanned(leaf: Leaf, around: Surroundings) -> bool:
    """Whether a vector in the modules around, the root left out, shows that nothing is scanned."""
    keys = leaf.keys[: leaf.depth]
    modules = {"/".join(keys[:depth]) for depth in range(1, len(keys) + 1)}
    return leaf.layer_axis is not None or not around.unscanned.isdisjoint(modules or {""})


def _fit(leaf: Leaf, layout: str, output: Leaf, other: str, parts: int) -> bool:
    """Whether two projections agree in the number of heads, and in the width or in their size."""
    ours, theirs = (
        dict(zip(letters, shape, strict=True))
        for letters, shape in ((layout, leaf.shape), (other, output.shape))
    )
    if ours.get("p", parts) != parts or (layout[-1] == "d") != (other[0] == "d"):
        return False
    if "h" not in theirs:
        return theirs["k"] == ours.get("h", 1) * ours["k"] and theirs["d"] == ours["d"]
    heads, size = theirs["h"] % ours["h"] == 0, theirs["k"] == ours["k"]
    return heads and size or theirs["h"] == ours["h"] and ours["d"] != theirs["d"]


def options(leaf: Leaf, parts: int = 1) -> list[tuple[D | None, int | None]]:
    """All (dims, layer_axis) that a projection may have, the likely ones first."""
    rank, is_weight = len(leaf.shape), leaf.keys[-1] == "weight"
    layouts = [x for x in READERS.get(rank, ()) if rank == 2 or is_weight or x[-1] != "d"]
    layouts.sort(key=lambda layout: (layout[-1] == "d") != is_weight)
    fits = [
        reader_dims(layout)
        for layout in layouts
        if leaf.shape[next(i for i, letter in enumerate(layout) if letter != "d")] % parts == 0
    ]
    return _with_layers(leaf, fits, parts)


def other_options(leaf: Leaf) -> list[tuple[D | None, int | None]]:
    """All (dims, layer_axis) of what is no projection: output projection, experts, plain matrix."""
    rank = len(leaf.shape)
    if rank == 2:
        plain = [None, D(1, 0)] if leaf.keys[-1] != "weight" else [D(1, 0), None]
        return [(dims, None) for dims in plain]
    last = rank - 1
    front, back = tuple(range(last)), tuple(range(1, rank))
    experts = [D(last - 1, last), D(last, last - 1)] if rank == 3 else []
    return _with_layers(leaf, [D(front, last), D(back, 0), D(0, back), *experts])


def _with_layers(
    leaf: Leaf, fits: list[D | None], parts: int = 1
) -> list[tuple[D | None, int | None]]:
    """Some dims, and those of a leaf that is scanned along an axis.

    A module of layers without a number is scanned more often than not, so these come first there;
    where a number in the path counts layers already, they come last.
    """
    rank = len(leaf.shape)
    plain: list[tuple[D | None, int | None]] = [(dims, None) for dims in fits]
    if leaf.layer_axis is not None or not 2 < rank < 5 or parts > 1:
        return plain
    one_layer = reader_dims(READERS[rank - 1][-1 if leaf.keys[-1] == "weight" else 0])
    along = [(shifted(one_layer, axis), axis) for axis in (0, 1)]
    if {*leaf.numbers} != {None}:
        return [*plain, *along]
    is_stack = says("layers", *leaf.keys[: leaf.depth])
    return [*along, *plain] if is_stack else [*plain[:1], *along, *plain[1:]]


def shifted(dims: D | None, axis: int) -> D | None:
    """The dims of the whole leaf, for those of one layer's part of it without `axis`."""
    if dims is None:
        return None
    reduction, output = (
        tuple(a + (a >= axis) for a in ((axes,) if isinstance(axes, int) else axes))
        for axes in dims
    )
    return _dims(reduction, output)


def fans(leaf: Leaf, around: Surroundings) -> tuple[int, int]:
    """(fan_in, fan_out) of a matrix in the last two axes."""
    first, last = leaf.shape[-2:]
    return (last, first) if out_axis(leaf, around) == 0 else (first, last)
