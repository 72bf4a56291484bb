"""Which axes are fan_in, fan_out, layers, a batch or parts: what proves it, fits, or is usual."""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from teon_optax._reading.leaves import Leaf
from teon_optax._reading.names import says
from teon_optax._reading.network import Network, orientation, out_axis
from teon_optax._reading.readings import Reading, fan, sizes

Left = Callable[[Leaf], Sequence[Reading]]


class Said(NamedTuple):
    """Says what a piece of evidence tells of a leaf: which readings stay, and why the others go.

    Where it `is_open`, all that stays is left to choose from: weaker evidence of the kind is not
    asked.
    """

    keeps: Callable[[Reading], bool]
    why: str
    is_open: bool = False


def matrices(keeps: Callable[[Reading], bool], why: str) -> Said:
    """Removes matrices that a test does not keep; kinds of the fallback have no axes to test."""
    return Said(lambda reading: not reading.is_matrix or keeps(reading), why)


def by_bias(leaf: Leaf, net: Network, left: Left) -> Said | None:
    """Keeps the axes of fan_out that the bias beside has, alone or together with a batch."""
    biases = [tuple(size for size in shape if size > 1) for shape in net.biases(leaf)]
    if not biases:
        return None

    def keeps(reading: Reading) -> bool:
        shape = reading.view or leaf.shape
        outs = [sizes(reading.axes, shape, letters) for letters in ("op", "opbl")]
        wanted = {tuple(size for size in each if size > 1) for each in outs}
        wanted |= {(fan(reading.axes, shape, letters),) for letters in ("op", "opb")}
        are_views = {(math.prod(bias),) for bias in biases if reading.view}
        return not wanted.isdisjoint({*biases, *are_views})

    fused = [
        r
        for r in left(leaf)
        if r.kind == "qkv" and r.split != 1 and r.view is None and len(leaf.shape) == 2
    ]
    if fused and not any(keeps(r) and _part_fits(leaf, r, net.output_of(leaf), net) for r in fused):
        return None
    return matrices(keeps, "the bias has fan_out")


def unscanned(leaf: Leaf, net: Network, left: Left) -> Said | None:
    """Removes axes of layers where a vector in the modules around shows that nothing is scanned."""
    keys = leaf.keys[: leaf.depth]
    modules = {"/".join(keys[:depth]) for depth in range(1, len(keys) + 1)}
    is_called = says("multi head", leaf.home.rpartition("/")[2]) or _is_einsum(leaf, net)
    if leaf.path in net.experts or not net.unscanned.isdisjoint(modules or {""}) or is_called:
        return matrices(lambda r: "l" not in r.axes, "a vector beside it has no axis of layers")
    return None


def _is_einsum(leaf: Leaf, net: Network) -> bool:
    output = leaf if leaf.says("output") else net.output_of(leaf)
    return output is not None and output.says("einsum")


def by_stream(leaf: Leaf, net: Network, left: Left) -> Said | None:
    """Keeps Q, K and V that read the stream, and output projections that write it."""
    stream = net.norm_widths(leaf)
    if len(leaf.shape) < 3 or leaf.hides_axes or not stream:
        return None

    def keeps(reading: Reading) -> bool:
        letters = {"qkv": "i", "out": "o"}.get(reading.kind)
        shape = reading.view or leaf.shape
        return letters is None or fan(reading.axes, shape, letters) in stream

    return matrices(keeps, f"the stream is {' or '.join(map(str, sorted(stream)))} wide")


def einsum(leaf: Leaf, net: Network, left: Left) -> Said | None:
    """Keeps heads that come first, as Gemma has them.

    It stands for einsums beside no other leaf that tells, of a model that was made smaller.
    """
    if len(leaf.shape) < 3 or not leaf.says("einsum") or not _is_einsum(leaf, net):
        return None
    return matrices(lambda r: r.axes in ("oio", "poio", "iio"), "einsums keep heads first")


def by_parts(leaf: Leaf, net: Network, left: Left) -> Said | None:
    """Keeps parts of equal size that fit what is beside: the output projection, or Q for K and V.

    Without either, a part may be as long as the other axis; a kernel (3 n, n) may then still be
    (fan_in, fan_out), with thirds of n. Parts of unequal sizes fit as well where they lie by heads
    or groups, so they are never certain.
    """
    fused = [r for r in left(leaf) if r.kind == "qkv" and r.split != 1 and r.view is None]
    is_named = leaf.says("fused", "fused pair") or leaf.says("packed") and leaf.in_attention
    if not fused or leaf.says("by heads") or not is_named:
        return None
    if len(leaf.shape) > 2:
        output = net.output_of(leaf)
        others = [r for r in left(output) if r.is_matrix] if output else []
        fits = {r for r in fused if output and any(fit(leaf, r, output, o) for o in others)}
        is_certain = all("p" in r.axes for r in fits)
    else:
        queries = (other for other in net.beside(leaf) if other.letter == "q")
        equal = [r for r in fused if isinstance(r.split, int)]
        partner = net.output_of(leaf) if any(r.split == 3 for r in equal) else next(queries, None)
        fits = {r for r in equal if _part_fits(leaf, r, partner, net)}
        if (proven := net.bias_axis(leaf)) is not None:
            fits = {r for r in fits if r.axes.index("o") == proven}
        usual = ("oi", "io")[1 if (axis := out_axis(leaf, net)) is None else axis]
        if (
            not partner
            and any(r.axes == usual for r in equal)
            and {r.axes for r in fits} != {usual}
        ):
            return None
        is_certain = True
    if fits:
        keeps = fits if is_certain else {*fits, *(r for r in left(leaf) if r.kind == "hidden")}
        return Said(lambda r: r in keeps, "each part fits what is beside")
    if any(isinstance(r.split, tuple) for r in fused):
        return Said(
            lambda r: r.kind != "qkv" or isinstance(r.split, tuple) or r.view is not None,
            "equal parts do not fit",
        )
    return None


def _part_fits(leaf: Leaf, reading: Reading, partner: Leaf | None, net: Network) -> bool:
    """Tells whether a part of a matrix has the size of the matrix beside that it must match."""
    into, out = fan(reading.axes, leaf.shape, "i"), fan(reading.axes, leaf.shape, "o")
    part = out // reading.split if isinstance(reading.split, int) else reading.split[0]
    if partner is None or len(partner.shape) != 2:
        return part == into
    if sorted((part, into)) == sorted(partner.shape):
        return True
    is_proven = net.bias_axis(leaf) == reading.axes.index("o")
    return is_proven and {*partner.shape} == {part}


def alike(leaf: Leaf, net: Network, left: Left) -> Said | None:
    """Keeps the axes of Q for a gate beside it, which is as long as all its heads."""
    if leaf.letter or leaf.says("output") or "out" in _kinds(left(leaf)):
        return None
    other = net.letters(leaf).get("q")
    if other is None or other.home != leaf.home or len(other.shape) < 3 or len(left(other)) > 1:
        return None
    axes = left(other)[0].axes
    flat = re.sub("o+", "o", axes)
    shapes = {axes: other.shape, flat: tuple(fan(axes, other.shape, letter) for letter in flat)}
    wanted = [("hidden", each) for each, shape in shapes.items() if shape == leaf.shape]
    return Said(lambda r: r[:2] in wanted, "as Q beside") if wanted else None


def by_partner(leaf: Leaf, net: Network, left: Left) -> Said | None:
    """Keeps Q, K and V that agree in heads and sizes with the output projection, and it with them.

    Only where an axis is open; of two matrices without heads `orientation` tells.
    """
    if leaf.hides_axes or not net.attentions[leaf.attention].has_heads:
        return None
    kinds = _kinds(left(leaf))
    if kinds in ({"qkv"}, {"latent"}):
        outputs = [other for other in net.partners(leaf) if _kinds(left(other)) == {"out"}]
        if not outputs or max(len(leaf.shape), len(outputs[0].shape)) < 3:
            return None
        theirs = [reading for reading in left(outputs[0]) if reading.is_matrix]
        keeps = {r for r in left(leaf) if any(fit(leaf, r, outputs[0], o) for o in theirs)}
        return matrices(keeps.__contains__, "it fits the output projection")
    if kinds != {"out"}:
        return None
    readers = [m for m in net.partners(leaf) if _kinds(left(m)) & {"qkv", "latent"}]
    readers = [m for m in readers if max(len(m.shape), len(leaf.shape)) > 2]
    keeps = {r for r in left(leaf) if r.is_matrix}
    for reader in readers:
        theirs = [each for each in left(reader) if each.kind in ("qkv", "latent")]
        fits = {r for r in keeps if any(fit(reader, each, leaf, r) for each in theirs)}
        keeps = fits or keeps
    return matrices(keeps.__contains__, "it fits Q, K and V") if readers else None


def _kinds(readings: Sequence[Reading]) -> set[str]:
    return {reading.kind for reading in readings if reading.is_matrix}


def fit(leaf: Leaf, reading: Reading, output: Leaf, other: Reading) -> bool:
    """Tells whether a projection and an output projection agree in heads, and in width or size."""
    ours, theirs, shape = reading.axes, other.axes, reading.view or leaf.shape
    for letter in "l" if reading.view else "lb":
        if sizes(ours, shape, letter) != sizes(theirs, output.shape, letter):
            return False
    if "l" in ours and ours.index("l") != theirs.index("l"):
        return False  # a scan has one axis for all
    heads, read = sizes(ours, shape, "o"), sizes(theirs, output.shape, "i")
    width, stream = fan(ours, shape, "i"), fan(theirs, output.shape, "o")
    if isinstance(reading.split, tuple):
        heads[0] = reading.split[0] * (heads[0] if "p" in ours else 1)
    elif "p" not in ours:
        heads[0] //= reading.split
    if len(heads) == 1 or len(read) == 1:
        is_key = leaf.letter in ("k", "v") and math.prod(read) % math.prod(heads) == 0
        return (math.prod(heads) == math.prod(read) or is_key) and width == stream
    if read[-1] == heads[-1] and math.prod(read[:-1]) % math.prod(heads[:-1]) == 0:
        return True
    return read[0] == heads[0] and width != stream


def last_is_out(leaf: Leaf, net: Network, left: Left) -> Said | None:
    """Keeps projections whose last axis is fan_out, for arrays that are called kernels."""
    if len(leaf.shape) < 3 or leaf.hides_axes or not leaf.weight:
        return None
    if leaf.weight.startswith("weight"):  # AlphaFold 3 has both orders
        return None
    return Said(
        lambda r: r.kind != "qkv" or r.axes[-1] != "i", "kernels of projections end with fan_out"
    )


def by_convention(leaf: Leaf, net: Network, left: Left) -> Said | None:
    """Keeps (in, out) for kernels and (out, in) for weights, where the tree does not deny it."""
    if leaf.hides_axes:
        return None
    found = [r for r in left(leaf) if r.is_matrix]
    axis, why = orientation(leaf, net)
    is_parted = any("p" in r.axes or r.kind == "qkv" and (r.split != 1 or r.view) for r in found)
    if is_parted or len({reading.split for reading in found}) > 1:
        if axis is None or len(leaf.shape) != 2:
            return None
        turned = ("io", "oi")[axis]
        return matrices(
            lambda r: r.kind != "hidden" or r.split not in (1, 2) or r.axes != turned, why
        )
    if axis is None and len({*leaf.shape[-2:]}) > 1:
        return None

    def keeps(reading: Reading) -> bool:
        axes = [letter for letter in reading.axes if letter in "io"]
        return axes[-1] == ("i" if axis == 0 else "o")

    return matrices(keeps, why)
