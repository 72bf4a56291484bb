"""What kind of leaf it is: each piece of evidence removes readings, and says why in a few words.

The pieces come in the order of their strength. One that would leave no reading of a leaf is
overruled by what came before: a name never overrules a proof.
"""

import itertools
import math
from collections import Counter

from teon_optax._reading.axes import Said, fit
from teon_optax._reading.leaves import Leaf
from teon_optax._reading.names import says
from teon_optax._reading.network import Network, Shape, fans, out_axis
from teon_optax._reading.readings import ENDS, FALLBACK, Reading, Splits, fan, readings_of


def only(why: str, *kinds: str) -> Said:
    """Keeps readings of these kinds alone."""
    return Said(lambda reading: reading.kind in kinds, why)


def open_to(why: str, *kinds: str) -> Said:
    """Keeps readings of these kinds, and leaves it to people to choose from them."""
    return Said(lambda reading: reading.kind in kinds, why, True)


def never(why: str, *kinds: str) -> Said:
    """Removes readings of these kinds."""
    return Said(lambda reading: reading.kind not in kinds, why)


def no_matrix(leaf: Leaf, net: Network) -> Said | None:
    """Keeps biases, norms, what is no array of floats, and what is longer than 1 along one axis.

    It stands for the reason that it gives: others would send these leaves to the fallback as well.
    """
    if not leaf.is_float or 0 in leaf.shape:
        return only("no array of floats" if 0 not in leaf.shape else "empty", "constant")
    if leaf.is_vector:
        return only("vector, by name", "vector")
    is_narrow = leaf.is_bare and sum(size > 1 for size in leaf.shape) < 2
    if len(leaf.shape) < 2 or (is_narrow and leaf.shape != (1, 1)):
        return only("vector, by its shape", "vector")
    return None


def mixer(leaf: Leaf, net: Network) -> Said | None:
    """Asks about what mixes the heads of an attention rather than leads from a width to another."""
    return open_to("may mix heads", "vector", "hidden") if leaf.path in net.mixers else None


def low_rank(leaf: Leaf, net: Network) -> Said | None:
    """Keeps LoRA factors, by name or because two of them multiply to what is beside them."""
    if "low rank" in leaf.called:
        called = next(key for key in reversed(leaf.keys) if says("low rank", key))
        names = called, leaf.keys[-1], leaf.name
        is_second = any(key.lower().endswith(("b", "up")) for key in names)
        return only("low-rank factor, by name", "lora_b" if is_second else "lora_a")
    if (is_second := _is_second_factor(leaf, net)) is not None:
        why = "low-rank factor: two multiply to the shape of a matrix beside them"
        return only(why, "lora_b" if is_second else "lora_a")
    if _is_narrow(leaf, net):
        return open_to("leads through a narrow size: a factor or an adapter", "lora_a", "hidden")
    return never("", "lora_a", "lora_b")


def _is_second_factor(leaf: Leaf, net: Network) -> bool | None:
    """Tells whether it is the second of two factors of a matrix; None where it is neither."""
    count = len(net.matrices[leaf.home]) - 1
    above, _, module = leaf.home.rpartition("/")
    bases = net.named(above, module)
    named = net.named_before(leaf)
    if not (bases or named or count in (1, 2)):
        return None
    beside = net.beside(leaf)
    bases = [*bases, *(beside if len(beside) == 2 else named)]
    for other in beside:
        for first, second in ((leaf, other), (other, leaf)):
            rank, inner, outer = first.shape[-1], first.shape[:-1], second.shape[1:]
            if second.shape[0] != rank or rank >= min(max(inner), max(outer)):
                continue
            is_base = any(base is not other and base.shape == inner + outer for base in bases)
            names = [factor.name.lower() for factor in (first, second)]
            order = ["b", "a"] if leaf.weight == "weight" else ["a", "b"]
            if is_base or (len(beside) == 1 and names == order):
                return leaf is (second if leaf.weight != "weight" else first)
    return None


def _is_narrow(leaf: Leaf, net: Network) -> bool:
    """Tells whether two matrices, alone in their module, lead through a quarter of their widths.

    They may be factors of one matrix, or an adapter; a bias between shows the latter. Two of which
    each follows the other may be an MLP, too, unless a name or the stream tells which size is wide.
    """
    held = net.matrices[leaf.home]
    is_pair = len(held) == 2 and all(len(each.shape) == 2 for each in held)
    if not is_pair or leaf.home not in net.blocks or leaf.says("latent"):
        return False
    is_leaf = not any(home.startswith(f"{leaf.home}/") for home in net.matrices)
    if not is_leaf or any(net.biases(each) for each in held):
        return False
    sizes = [fans(each, net) for each in held]
    stream = net.stream_of(leaf) | net.norm_widths(leaf)
    is_mlp = len(stream) != 1 and sizes[0] == sizes[1][::-1] and "adapter" not in leaf.called
    return not is_mlp and any(
        first[1] == second[0]
        and 4 * first[1] <= min(first[0], second[1])
        and first[1] not in stream
        for first, second in (sizes, sizes[::-1])
    )


def router(leaf: Leaf, net: Network) -> Said | None:
    """Keeps routers, by name or because a matrix leads to as many as there are experts beside."""
    modules = [key for key in leaf.keys[: leaf.depth] if not key.isdecimal()]
    module = ["", *modules][-1]
    if len(leaf.shape) != 2:
        is_called = leaf.path not in net.experts and says("router", module, leaf.name)
        return only("router, by name", "router") if is_called else never("", "router")
    has_experts = says("mixture", module) or f"{leaf.home}/experts".lstrip("/") in net.within
    is_gate = leaf.says("gate") and not says("shared", module)
    is_gate = is_gate and (has_experts or leaf.shape in _packing(leaf.home, net))
    is_gate = is_gate and not any(other.says("router") for other in net.beside(leaf))
    # A gate to one number, as of a shared expert.
    is_one = 1 in leaf.shape and any(other.path in net.routers for other in net.beside(leaf))
    if leaf.path in net.routers:
        return only(f"router of {min(leaf.shape)} experts", "router")
    if says("router", *modules, leaf.name) or is_gate:
        return only("router, by name", "router")
    return only("gate of a shared expert", "router") if is_one else never("", "router")


def experts(leaf: Leaf, net: Network) -> Said | None:
    """Keeps a batch of matrices for experts; nothing of an expert is Q, K or V."""
    words = [*(key for key in leaf.keys[: leaf.depth] if not key.isdecimal()), leaf.name]
    module = ["", *words][-2]
    if any(says("shared", key) for key in words):
        return None
    is_expert = leaf.path in net.experts or says("experts", *words)
    if not is_expert and not (says("mixture", module) and len(leaf.shape) > 2):
        return None
    if not (is_expert or leaf.says("mlp") or _has_way_back(leaf, net)):
        return None
    count = net.experts.get(leaf.path)
    why = f"one of {count} experts" if count else "expert, by name"
    if len(leaf.shape) == 2:
        return only(why, "hidden")
    batches = ("b", "p") if leaf.says("gating") else ("b",)
    return Said(lambda r: r.kind == "hidden" and r.axes[0] in batches and "l" not in r.axes, why)


def _has_way_back(leaf: Leaf, net: Network) -> bool:
    """Tells whether a matrix beside it leads back, for each of as many experts.

    What sends tokens to slots, (d, experts, slots), has no such matrix.
    """
    beside = (other.shape for other in net.beside(leaf) if len(other.shape) > 2)
    back = leaf.shape[:-3:-1]
    return any(shape[0] == leaf.shape[0] and shape[-2:] == back for shape in beside)


def counted(router: Shape, shape: Shape) -> int:
    """Counts the experts that a matrix may hold one after another, by a router; 0 for none."""
    if len(router) != 2 or len(shape) != 2:
        return 0
    for count, width in (sorted(router), sorted(router, reverse=True)):
        sides = [size for size in shape if size != width] or [width]
        is_counted = width in shape and sides[0] % count == 0
        if count not in shape and (is_counted or count * width in shape):
            return count
    return 0


def packed(leaf: Leaf, net: Network) -> list[int]:
    """Lists how many experts may lie in a matrix, one after another, as DBRX keeps them.

    They may where it is called experts, or where several beside it are as well so many times as
    long as a router or a gate counts.
    """
    place = next((i for i, key in enumerate(leaf.keys) if says("experts", key)), None)
    if len(leaf.shape) != 2 or "shared" in leaf.called:
        return []
    if place is not None:
        routers = {other.shape for other in net.inside(leaf) if "router" in other.called}
        if any(number is not None for number in leaf.numbers[place : leaf.depth]):
            return []
    else:
        routers = _packing(leaf.home, net)
    return sorted({count for each in routers if (count := counted(each, leaf.shape))})[:1]


def _packing(home: str, net: Network) -> set[Shape]:
    """Lists what may count experts that lie one after another in two matrices of a module."""
    if home not in net.packing:
        held, shapes = net.matrices[home], Counter(leaf.shape for leaf in net.matrices[home])
        routers = {m.shape for m in held if m.says("router", "gate") and m.path not in net.routers}
        net.packing[home] = {
            router
            for router in routers
            if sum(count for shape, count in shapes.items() if counted(router, shape) > 1) > 1
        }
    return net.packing[home]


def end(leaf: Leaf, net: Network) -> Said | None:
    """Keeps embeddings and heads by name, but for a module in a block that joins its widths."""
    if not leaf.is_end:
        return None
    is_module = leaf.home in net.blocks and leaf.weight != "" and len(leaf.shape) == 2
    if is_module and all(size in net.linked or is_shared(size, leaf, net) for size in leaf.shape):
        return None
    is_table = says("table", *leaf.keys[-2:], leaf.name)
    return only(f"{'table' if is_table else 'head'}, by name", "table" if is_table else "head")


def is_shared(size: int, leaf: Leaf, net: Network) -> bool:
    """Tells whether another matrix in the block has this size too."""
    return any(
        size in other.shape
        for other in net.inside(leaf)
        if (other.names, other.shape) != (leaf.names, leaf.shape)
    )


def convolution(leaf: Leaf, net: Network) -> Said | None:
    """Keeps convolutions, by name or by an image's axes and a bias for each channel."""
    rank = len(leaf.shape)
    is_called = says("convolution", *(leaf.keys if rank > 2 else [leaf.name]))
    if rank == 2:
        if leaf.home in net.blocks and says("convolution", *leaf.keys[-2:]):
            if all(is_shared(size, leaf, net) for size in leaf.shape):
                return open_to("beside a convolution", "convolution", "hidden")
            is_called = True
        why = "convolution, by name"
        return only(why, "convolution") if is_called else never("", "convolution")
    if is_called:
        return only("convolution, by name", "convolution")
    out_first = leaf.weight == "weight"
    spatial = leaf.shape[2:] if out_first else leaf.shape[:-2]
    channels = leaf.shape[:2] if out_first else leaf.shape[-2:]
    is_image = rank in (4, 5) and leaf.weight != "" and len({*spatial}) == 1
    is_image &= max(spatial) <= max(channels)
    if is_image and (net.biases(leaf) != [] or 1 in channels or spatial[0] % 2):
        if not leaf.letter and not leaf.in_attention or 1 in channels:
            return only("convolution: an image's axes, and channels", "convolution")
    return None


def parts_of(leaf: Leaf) -> int:
    """Counts the parts that a name tells of: 3 for Q, K and V, 2 for two of them, else 1."""
    if leaf.says("packed") and leaf.in_attention or leaf.says("fused"):
        return 3
    return 2 if leaf.says("fused pair") and not leaf.says("latent") else 1


def projection(leaf: Leaf, net: Network) -> Said | None:
    """Keeps Q, K and V by name, beside each other or in attention."""
    if not leaf.letter:
        return None
    letters = net.letters(leaf)
    if not leaf.weight and letters[leaf.letter].weight:
        return None
    # Alone, `value` may be a critic's head, and an array `query` what is learned to attend with.
    output = net.output_of(leaf)
    has_output = leaf.weight and output is not None and output.weight and output.says("output")
    is_alone = len(letters) + bool(has_output) < 2
    if is_alone and not (leaf.weight and (leaf.in_attention or leaf.home in net.blocks)):
        return None
    # The V of a gated feed forward has no Q or K beside it, but a way back from its width.
    if {*letters} == {"v"} and not leaf.in_attention:
        if any(other.shape == leaf.shape[::-1] != leaf.shape for other in net.partners(leaf)):
            return None
    # RWKV's feed forward has a key (d, f) and a value (f, d): one follows the other.
    key, value = letters.get("k"), letters.get("v")
    if key and value and not leaf.in_attention and key.shape == value.shape[::-1] != value.shape:
        return None
    return Said(lambda r: r.kind == "qkv" and not has_parts(r), "by name")


def latent(leaf: Leaf, net: Network) -> Said | None:
    """Keeps the projections of latent attention, of which the second makes heads of the vector."""
    if not leaf.says("latent"):
        return never("", "latent")
    if len(leaf.shape) == 2 and not leaf.says("latent up"):
        return only("to a latent vector, by name", "hidden")
    return only("from a latent vector, by name", "latent")


def output(leaf: Leaf, net: Network) -> Said | None:
    """Keeps the output projection of attention: so called, or all that is left beside Q, K, V."""
    above, module = ["", "", *leaf.keys[: leaf.depth]][-2:]
    in_module = says("attention", module)
    projections = net.attentions[leaf.attention].projections
    with_projections = any(other is not leaf for other in projections)
    is_called = leaf.says("output") or (in_module and leaf.name.startswith("linear"))
    is_below = says("attention", above) and says("output", module)
    is_several = len(net.letters(leaf)) != 1 and len(leaf.shape) == 3
    is_left = not net.unlike(leaf) and (in_module or is_several) and 1 not in leaf.shape
    if is_below or is_called and (in_module or with_projections):
        return only("by name", "out")
    if with_projections and is_left:
        return only("output projection: all that is left beside Q, K and V", "out")
    return None


def unnamed(leaf: Leaf, net: Network) -> Said | None:
    """Keeps Q, K, V or the output projection where the other matrices of a module show them.

    Without such matrices it is none of them. It stands for models that name no projection.
    """
    if leaf.says("output", "fused", "fused pair", "latent", "packed", "einsum"):
        return None
    if len(leaf.shape) > 2:
        return _unnamed_heads(leaf, net)
    output = net.output_of(leaf)
    if {*net.letters(leaf)} == {"k", "v"} and output is not None and not leaf.says("reads"):
        if fans(output, net) == fans(leaf, net)[::-1]:
            return open_to("beside K, V and an output projection", "qkv", "out")
    readers, writers = _attention_shapes(leaf, net)
    if leaf in readers:
        return only("Q, K or V: three read one width, and the fourth goes back to it", "qkv")
    if writers == [leaf]:
        return only("output projection: it goes back to what three others read", "out")
    if leaf in writers:
        return open_to("may be Q, K, V and output", "qkv", "out")
    return None


def no_attention(leaf: Leaf, net: Network) -> Said | None:
    """Removes Q, K, V and the output projection where neither a name nor a fit tells of them."""
    if unnamed(leaf, net) is not None:
        return None
    kinds = "qkv", "out"
    return Said(lambda r: r.kind not in kinds or has_parts(r), "")


def _unnamed_heads(leaf: Leaf, net: Network) -> Said | None:
    """Keeps leaves (d, h, k) beside another (h, k, d): Q, K and V if there are three of them."""
    if len(leaf.shape) != 3 or leaf.hides_axes or not 1 < len(net.matrices[leaf.home]) < 9:
        return None  # attention has few matrices: a gate and norms beside the four
    beside = [other for other in net.matrices[leaf.home] if len(other.shape) == 3]
    if len(beside) < 2 or {"q", "k"} <= net.letters(leaf).keys():
        return None
    is_turned = leaf.weight == "weight"
    reads = Reading("qkv", "ooi" if is_turned else "ioo")
    writes = {2: "oi" if is_turned else "io", 3: "oii" if is_turned else "iio"}
    named = net.output_of(leaf)
    outputs = []
    for output in [named] if named else beside:
        readers = [m for m in beside if m is not output]
        if not readers or len(output.shape) not in writes:
            continue
        other = Reading("out", writes[len(output.shape)])
        if all(fit(m, reads, output, other) for m in readers):
            outputs.append(output)
    is_inside = leaf.home in net.blocks or leaf.in_attention
    if len(outputs) == 1 and len(beside) == 4 and is_inside:
        if leaf is outputs[0]:
            return only("output projection: it reads the heads of three others", "out")
        return only("Q, K or V: one of three whose heads the fourth reads", "qkv")
    return open_to("may be Q, K, V and output", "qkv", "out", "hidden") if outputs else None


def _attention_shapes(leaf: Leaf, net: Network) -> tuple[list[Leaf], list[Leaf]]:
    """Lists what is Q, K or V in a module without names, and what may be the output projection.

    Four matrices are attention if three read one width, two of these (K and V) are equal, and the
    fourth goes back to that width, from that of the third or of all. In a block, they may be if it
    goes back from half of the third: Q lies beside a gate. In a module that is called attention,
    three equal ones may be too.
    """
    beside = net.matrices[leaf.home]
    if not leaf.home or len(beside) not in (3, 4):
        return [], []
    rows = ("projection", "output", "fused", "gate", "recurrent", "reads", "writes")
    is_named = any(says(row, key) for row in rows for m in beside for key in (m.name, *m.keys[:-1]))
    is_named |= any(other.is_end or len(other.shape) != 2 for other in beside)
    if is_named:
        return [], []
    sizes = [fans(other, net) for other in beside]
    is_numbered = len({other.names[other.depth] for other in beside}) == 1 and not leaf.in_attention
    is_chain = is_numbered and all(a[1] == b[0] for a, b in itertools.pairwise(sizes))
    writers = []
    for place, (writer, (into, out)) in enumerate(zip(beside, sizes, strict=True)):
        ins, outs = zip(*(sizes[:place] + sizes[place + 1 :]) or [((), ())], strict=True)
        closes = {*ins} == {out} and len({*outs}) < 3 and len(beside) == 4 and not is_chain
        if closes and outs.count(into) in (1, 3):
            writers.append(writer)
        elif closes and outs.count(2 * into) == 1 and leaf.home in net.blocks:
            writers += beside
    if leaf.in_attention and len(beside) == 3 and len({*sizes}) == 1:
        return [], beside
    return [other for other in beside if writers and other not in writers], writers


def parts(leaf: Leaf, net: Network) -> tuple[tuple[str, Splits], ...]:
    """Lists by kind what may lie one after another in a leaf: the splits that a rule may have."""
    whole: list[int | tuple[int, ...]] = []
    halves: list[int | tuple[int, ...]] = [*packed(leaf, net)]
    if (count := parts_of(leaf)) > 1:
        whole = [*_unequal(leaf, net), *([] if leaf.says("gated") else [count])]
    elif _thirds(leaf, net):
        whole = [3, *_unequal(leaf, net)]
    if is_pair(leaf, net):
        whole += _unequal(leaf, net)
        halves.append(2)
    if _halves(leaf, net):
        halves.append(2)
    together = _together(leaf, net)
    return ("qkv", tuple(together or whole)), ("hidden", tuple(together or halves))


def _together(leaf: Leaf, net: Network) -> list[tuple[int, ...]]:
    """Lists the parts of what may be Q, K, V and the way into a feed forward in one.

    PaLM's parallel layers have one matrix for all that two others read, Flux's single blocks one
    for all that another reads; gate and up are equal.
    """
    is_few = len(net.matrices[leaf.home]) < 5 and leaf.home in net.blocks
    is_apart = net.attentions[leaf.attention].projections != []
    if len(leaf.shape) != 2 or not is_few or is_apart or _halves(leaf, net):
        return []
    (into, out), beside = fans(leaf, net), _beside_alike(leaf, net)
    read = [size for size, writes in beside if writes == into]
    if len(read) == 1:
        ways = read[0] - into
        splits = [(into, into, into, *[ways] * count) for count in (1, 2) if ways > 0]
        return [split for split in splits if sum(split) == out and out % read[0]]
    found: list[tuple[int, ...]] = []
    is_chain = any(other.names == leaf.names for other in net.beside(leaf))
    for heads, ways in itertools.permutations(() if is_chain or len(beside) > 2 else read, 2):
        for count in (2, 1):
            keys = (out - heads - count * ways) // 2
            split = (heads, keys, keys, *[ways] * count)
            if keys > 0 and heads % keys == 0 and sum(split) == out:
                found.append(split)
    return found


def views(leaf: Leaf, net: Network) -> list[Reading]:
    """Lists how Q, K and V may lie in turns: by heads, or by groups of queries with a K and a V.

    Gate and up may as well, one column of each after another. The length of a head shows in the
    output projection, or in a norm of heads; where neither does, three lengths are likely. A gate
    of heads lies behind their values.
    """
    if is_pair(leaf, net) or _may_alternate(leaf, net):
        *rest, first, last = leaf.shape
        if out_axis(leaf, net) == 0:
            return [Reading("hidden", "b" * len(rest) + "obi", 1, (*rest, first // 2, 2, last))]
        return [Reading("hidden", "b" * len(rest) + "iob", 1, (*rest, first, last // 2, 2))]
    if (count := parts_of(leaf)) == 1 or len(leaf.shape) > 3:
        return []
    found, output = [], net.output_of(leaf)
    lengths = {output.shape[1]} if output is not None and len(output.shape) == 3 else set()
    lengths |= net.head_lengths(leaf)
    if len(leaf.shape) == 3:
        d, heads, length = leaf.shape
        if length % count == 0:
            found.append(Reading("qkv", "iobo", view=(d, heads, count, length // count)))
        for k in sorted(lengths) if count == 3 else ():
            queries = length // k - 2
            if length % k == 0 and queries > 1:
                view = (d, heads, queries + 2, k)
                found.append(Reading("qkv", "iopo", (queries, 1, 1), view))
        return found
    sides = output.shape if output is not None else ()
    read = {*sides} if len(sides) < 3 else {a * b for a, b in itertools.pairwise(sides)}
    is_gated = leaf.says("gated")
    for axis in (0, 1):
        d, length = leaf.shape[1 - axis], leaf.shape[axis]
        for k in [] if is_gated else sorted(lengths):
            if length % (count * k) == 0:
                found.append(_turned("obo", 1, (length // (count * k), count, k), d, axis))
        for total in sorted(read, reverse=True) if count == 3 else ():
            wide = 2 * total if is_gated else total
            keys = (length - wide) // 2
            if keys < 1 or wide + 2 * keys != length or total % keys:
                continue
            each = total // keys
            split = (1, 1, each, each) if is_gated else (each, 1, 1)
            for k in sorted(lengths) or _likely_lengths(total, keys):
                if keys % k == 0 and len({*split}) > 1:
                    view = (keys // k, sum(split), k)
                    found.append(_turned("opo", split, view, d, axis))
                elif keys % k == 0 and not lengths:
                    found.append(_turned("obo", 1, (keys // k, len(split), k), d, axis))
    return [*dict.fromkeys(found)]


def _likely_lengths(queries: int, keys: int) -> list[int]:
    """Lists three lengths that the heads of keys of this width may have, two heads at least.

    The likely ones are about four times as many as there are heads of queries, as the 128 of 32
    heads in Llama 3 8B (arXiv 2407.21783, table 3) are.
    """
    fits = [k for k in range(2, keys // 2 + 1) if keys % k == 0]
    return sorted(fits, key=lambda k: abs(math.log(k * k / (4 * queries))))[:3]


def _turned(
    axes: str, split: int | tuple[int, ...], view: tuple[int, ...], d: int, axis: int
) -> Reading:
    """Reads the long axis of a matrix by a view, behind fan_in or before it."""
    whole = (d, *view) if axis else (*view, d)
    return Reading("qkv", f"i{axes}" if axis else f"{axes}i", split, whole)


def fused(leaf: Leaf, net: Network) -> Said | None:
    """Keeps parts by name, or as thirds show them; without either, there are none.

    It stands for parts in turns under names that no library of the collection has.
    """
    count = parts_of(leaf)
    if count > 1:
        name = {2: "K and V", 3: "Q, K and V"}[count]
        return Said(is_part, f"{name} in one, by name", True)
    if (thirds := _thirds(leaf, net)) == "certain":
        why = "Q, K and V in one: three times as wide as what it is beside"
        return Said(lambda r: r.kind == "qkv" and r.split == 3, why)
    if _together(leaf, net):
        return Said(is_part, "may be Q, K, V and a feed forward's way in", True)
    if thirds or is_pair(leaf, net):
        why = "may be Q, K and V in one" + (", or gate and up" if is_pair(leaf, net) else "")
        return Said(is_part, why, True)
    return Said(lambda r: r.kind != "qkv" or not has_parts(r), "")


def is_part(reading: Reading) -> bool:
    """Tells whether a reading is several of Q, K and V in one, or one whole matrix."""
    return reading.kind == "hidden" or reading.kind == "qkv" and has_parts(reading)


def has_parts(reading: Reading) -> bool:
    """Tells whether a reading has several parts."""
    return reading.split != 1 or "p" in reading.axes or reading.view is not None


def _beside_alike(leaf: Leaf, net: Network) -> list[tuple[int, int]]:
    return [fans(other, net) for other in net.beside(leaf) if len(other.shape) == 2]


def _may_be_fused(leaf: Leaf, net: Network) -> bool:
    """Tells whether a matrix without a name of its own lies in a block or in attention, with few.

    A block whose modules have no names has four of attention and three of a feed forward.
    """
    count = len(net.matrices[leaf.home])
    rows = "projection", "recurrent", "mlp" if count > 2 else "fused"
    is_inside = (leaf.home in net.blocks or leaf.in_attention) and count < 8
    return len(leaf.shape) == 2 and not leaf.hides_axes and is_inside and not leaf.says(*rows)


def is_pair(leaf: Leaf, net: Network) -> bool:
    """Tells whether it may be gate and up, or Q and halves, beside a square matrix alone."""
    if not _may_be_fused(leaf, net) or parts_of(leaf) > 1:
        return False
    into, out = fans(leaf, net)
    return (out, into) == (2 * into, into) and _beside_alike(leaf, net) == [(into, into)]


def _thirds(leaf: Leaf, net: Network) -> str:
    """Tells whether a matrix is three times as wide as what a matrix beside it reads.

    It is "certain" to be Q, K and V in attention, beside one matrix alone, "possible" elsewhere.
    """
    if not _may_be_fused(leaf, net):
        return ""
    beside, (into, out), shapes = net.beside(leaf), fans(leaf, net), _beside_alike(leaf, net)
    if into % 3 == 0 and (into // 3, out) in shapes and len(beside) == 1 and not leaf.says("mlp"):
        return "possible"
    is_read = any(out in shape for shape in shapes) or any(other.letter for other in beside)
    if is_read or (out // 3, into) not in shapes or out % 3:
        return ""
    return "certain" if leaf.in_attention and len(beside) == 1 else "possible"


def _unequal(leaf: Leaf, net: Network) -> list[tuple[int, ...]]:
    """Lists Q as wide as the output projection reads, with K and V the halves of what is left.

    With a gate behind them (`qkvz`), V and the gate are as wide as that, and Q and K are halves.
    """
    output = net.output_of(leaf)
    if output is None or len(leaf.shape) not in (2, 3) or len(output.shape) not in (2, 3):
        return []
    found = []
    for axis in (0, 1) if len(leaf.shape) == 2 else (1,):
        widths = {*output.shape} if len(leaf.shape) == 2 else {output.shape[0], output.shape[1]}
        for heads in sorted(widths, reverse=True):
            is_gated = leaf.says("gated")
            rest = leaf.shape[axis] - heads * (2 if is_gated else 1)
            half = rest // 2
            if rest > 0 and rest % 2 == 0 and (half != heads or is_gated) and half <= heads:
                found.append((half, half, heads, heads) if is_gated else (heads, half, half))
    return [*dict.fromkeys(found)]


def _halves(leaf: Leaf, net: Network) -> bool:
    """Tells whether gate and up lie side by side: twice what the down projection reads."""
    if leaf.says("packed", "recurrent", "latent", "projection") or parts_of(leaf) > 1:
        return False
    if len(leaf.shape) < 2 or _is_output(leaf) or says("writes", leaf.name, leaf.keys[-2:][0]):
        return False
    into, out = fans(leaf, net)
    if out % 2:
        return False
    pairs, ins, outs = _fans_at(leaf.home, len(leaf.shape), net)
    down, is_own = (out // 2, into), not leaf.letter and not _is_output(leaf)
    if not pairs[down] or ins[out] - (into == out) * is_own or outs[out] - is_own:
        return False
    is_plain = outs[out // 2] > (pairs[down] if into == out // 2 else 0)
    if is_plain or not (sum(outs.values()) - is_own < 4 or leaf.says("reads")):
        return False
    stream = net.stream_of(leaf)
    widths = stream | (net.norm_widths(leaf) if out > into else set())
    # An MLP of positions, of which 2 come in, reads another size.
    return len(stream) != 1 or into in widths or leaf.home not in net.blocks


def _may_alternate(leaf: Leaf, net: Network) -> bool:
    """Tells whether gate and up may take turns, as in the experts with biases of gpt-oss."""
    return len(leaf.shape) == 3 and net.bias_axis(leaf) is not None and _halves(leaf, net)


def _is_output(leaf: Leaf) -> bool:
    named = [key for key in leaf.keys[: leaf.depth] if not key.isdecimal()]
    return leaf.says("output") and says("attention", *named[-1:])


def _fans_at(
    home: str, rank: int, net: Network
) -> tuple[Counter[tuple[int, int]], Counter[int], Counter[int]]:
    """Counts (fan_in, fan_out) of a module's matrices of a rank, but for projections, and each."""
    if (home, rank) not in net.fans:
        held = (m for m in net.around[home] if len(m.shape) == rank)
        pairs = Counter(fans(m, net) for m in held if not m.letter and not _is_output(m))
        ins: Counter[int] = Counter()
        outs: Counter[int] = Counter()
        for (into, out), count in pairs.items():
            ins[into] += count
            outs[out] += count
        net.fans[home, rank] = pairs, ins, outs
    return net.fans[home, rank]


def halves(leaf: Leaf, net: Network) -> Said | None:
    """Keeps gate and up side by side where the down projection shows them."""
    if _halves(leaf, net) and not is_pair(leaf, net):
        return Said(lambda r: r.kind != "hidden" or has_parts(r), "gate and up in one")
    return None


def gating(leaf: Leaf, net: Network) -> Said | None:
    """Keeps gate and up along an axis of two, by name or as the down projection shows them."""
    rank, is_named = len(leaf.shape), leaf.says("gating")
    if rank < 3 or 2 not in leaf.shape or leaf.letter or leaf.in_attention or parts_of(leaf) > 1:
        return None
    beside = [fans(m, net) for m in net.beside(leaf) if len(m.shape) == rank - 1]
    if not is_named and not (len(beside) == 1 if leaf.is_bare else leaf.home in net.blocks):
        return None
    is_first = is_named or leaf.is_bare and leaf.shape[0] == 2
    downs = [(into, out) for into, out in beside if is_first or into != out]

    def keeps(reading: Reading) -> bool:
        return reading.kind == "hidden" and "p" in reading.axes

    def fits(reading: Reading) -> bool:
        if not keeps(reading) or reading.axes.count("o") > 1:
            return False
        return (fan(reading.axes, leaf.shape, "o"), fan(reading.axes, leaf.shape, "i")) in downs

    if any(fits(reading) for reading in readings_of(leaf.shape, ())):
        return Said(fits, "gate and up, which the down projection reads")
    return Said(keeps, "gate and up, by name") if is_named else None


def bare(leaf: Leaf, net: Network) -> Said | None:
    """Removes matrices from what is an array of a block: a scale of heads, a state or a table."""
    if leaf.weight or leaf.home not in net.blocks or leaf.says("mlp") or len(leaf.shape) != 2:
        return None
    is_several = leaf.shape[0] * leaf.shape[1] in net.stream_of(leaf)
    if is_several or 1 in leaf.shape or leaf.shape in net.head_shapes(leaf):
        return only("vector of each head", "vector")
    is_named = leaf.says("projection", "output", "fused")
    if not is_named and not all(net.is_linked(axis, leaf) for axis in (0, 1)):
        return open_to("an array of a block that nothing follows", "table", "hidden")
    return None


def place(leaf: Leaf, net: Network) -> Said | None:
    """Keeps or removes tables, inputs and heads by the sizes that a matrix connects.

    Inside of a block it is none. Outside it is hidden where both sides are widths of the network; a
    size of its own is that of an input, an output or a table. Nothing shows one in a tree with one
    matrix.
    """
    if len(leaf.shape) != 2:
        if leaf.hides_axes:
            return never("", *FALLBACK)
        axis = net.bias_axis(leaf)
        if axis is not None and leaf.shape[-2:][axis] == 1:
            return only("head: leads to 1 number", "head")
        is_table = leaf.shape[0] == 1 and leaf.is_bare and leaf.home not in net.blocks
        return only("table: one for all", "table") if is_table else None
    sizes, widths = fans(leaf, net), net.widths | net.linked
    written = widths | net.looked_up
    reads_state = sizes[0] in net.states and sizes[1] % sizes[0] != 0
    is_cell = leaf.path in net.gates or ("recurrent" in leaf.called and not reads_state)
    if leaf.home in net.blocks or not widths or is_cell:
        return never("", *FALLBACK)
    if sizes[::-1] in net.vocabularies and not leaf.says("reads"):
        if sizes[0] == sizes[1]:
            return open_to("as large as a table", "head", "hidden")
        if _is_inside_series(leaf, net):
            return never("", *FALLBACK)
        return only("head: as wide as the vocabulary", "head")
    is_named = leaf.says("mlp", "projection", "output", "reads", "writes")
    is_named |= not net.blocks and bool(leaf.weight or leaf.rows)
    if net.widths.issuperset(sizes):
        return never("", *FALLBACK) if is_named else never("", "vector", "convolution")
    into, out = sizes[0] not in written, sizes[1] not in widths
    if not (into or out):
        is_layer = leaf.says("mlp") or net.bias_axis(leaf) is not None
        is_inside = is_layer and net.ends.isdisjoint(sizes)
        return never("", *FALLBACK) if is_inside else never("", "vector", "convolution")
    if into and out:
        return only(f"nothing else is {sizes[0]} or {sizes[1]} wide", *ENDS)
    is_image = "convolution" in leaf.called  # patches
    is_several = any(sizes[0] % width == 0 for width in net.widths - {1})
    if into and is_several and leaf.says("mlp") and not is_image:
        return open_to(f"an input, or {sizes[0]} is several widths side by side", "input", "hidden")
    may_be_gates = sizes[1] in (3 * sizes[0], 4 * sizes[0])
    may_be_gates = may_be_gates and _fans_at(leaf.home, 2, net)[0][sizes] == 2
    if out and (sizes[1] in net.channels or may_be_gates):
        return open_to(f"a head, or another makes {sizes[1]} too", "head", "hidden")
    verb = "writes" if into else "reads"
    kinds = ("input", "table") if into else ("head",)
    return only(f"{kinds[0]}: nothing {verb} {sizes[0] if into else sizes[1]}", *kinds)


def _is_inside_series(leaf: Leaf, net: Network) -> bool:
    """Tells whether a matrix of its own numbered series comes behind it, back from its width."""
    back, series = fans(leaf, net)[::-1], net.alike(leaf)
    return any(fans(other, net) == back for other in series[series.index(leaf) + 1 :])


def chain_end(leaf: Leaf, net: Network) -> Said | None:
    """Keeps the first and the last of numbered modules whose size no other module has.

    Only where the others of its series have other shapes: `convs/0` reads the input of a network,
    and the last one makes its output.
    """
    if len(leaf.shape) != 2 or leaf.home not in net.blocks:
        return None
    for column, number in enumerate(leaf.numbers[: leaf.depth]):
        if number:
            place = leaf.places[column + 1]
            numbers = net.series_numbers(leaf, column)
            is_series = column in net.varying[leaf.names]
            if len(numbers) < 2 or not is_series or net.repeating[leaf.names, leaf.array_shape]:
                continue
            into, out = fans(leaf, net)
            if int(number) == min(numbers) and net.is_own(into, place):
                return only(f"input: nothing writes {into}", "input")
            if int(number) == max(numbers) and net.is_own(out, place):
                return only(f"head: nothing reads {out}", "head")
    if _starts_chain(leaf, net):
        return open_to(f"nothing writes {fans(leaf, net)[0]}: an input?", "input", "hidden")
    return None


def _starts_chain(leaf: Leaf, net: Network) -> bool:
    """Tells whether it begins a numbered chain in a block, and nothing writes its fan_in."""
    series = net.alike(leaf)
    if leaf is not series[0] or not any(leaf.numbers[leaf.depth :]):
        return False
    into, out = fans(leaf, net)
    follows = into != out and any(fans(other, net)[0] == out for other in series[1:])
    is_several = any(into % width == 0 for width in net.stream_of(leaf) if width > 1)
    return follows and not is_several and net.is_source(leaf, into)


# In the order of their strength.
EVIDENCE = (
    no_matrix, mixer, low_rank, router, experts, end, fused, convolution, projection, latent,
    output, unnamed, no_attention, halves, gating, bare, chain_end, place,
)  # fmt: skip


def nameless(leaf: Leaf, net: Network) -> Said:
    """Keeps a matrix and a table: nothing in the path tells which it is."""
    if leaf.box == "penzai":
        return only("penzai keeps names out of the path (`label` has them)", "hidden", "table")
    if leaf.path.isdecimal():
        return only("a list keeps no names", "hidden", "table")
    return only("an embedding or a projection, which are shared", "hidden", "table")
