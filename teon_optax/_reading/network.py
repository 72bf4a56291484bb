"""What stands around a leaf: its module, the blocks, the widths, routers and experts."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from teon_optax._reading.blocks import repeated_blocks
from teon_optax._reading.leaves import Leaf, Names, grouped
from teon_optax._reading.names import says

Shape = tuple[int, ...]


class Attention:
    """Holds the matrices of a module called attention, or of a module that lies in none."""

    def __init__(self, matrices: list[Leaf]):
        self.matrices = matrices

    @cached_property
    def letters(self) -> dict[str, Leaf]:
        """Gives a matrix for each of q, k and v that it has."""
        return {leaf.letter: leaf for leaf in self.matrices if leaf.letter}

    @cached_property
    def projections(self) -> list[Leaf]:
        """Lists what is called Q, K or V, several of them in one, or latent."""
        rows = "projection", "fused", "fused pair", "latent"
        return [leaf for leaf in self.matrices if leaf.says(*rows)]

    @cached_property
    def has_heads(self) -> bool:
        """Tells whether a matrix has more than two axes."""
        return any(len(leaf.shape) > 2 for leaf in self.matrices)

    @cached_property
    def unlike(self) -> list[Leaf]:
        """Lists what is no Q, K or V by name."""
        return [leaf for leaf in self.matrices if not leaf.letter]

    @cached_property
    def outputs(self) -> list[Leaf]:
        """Lists what is called an output projection."""
        return [leaf for leaf in self.matrices if leaf.says("output")]


class Network:
    """Holds what a tree shows of its modules, by their places; "" is the root.

    Attributes:
      matrices: By home, the matrices there.
      within: By module, the matrices in it, those of modules inside included.
      attentions: The matrices by the module called attention, or by home outside of such modules.
      vectors: By module, the shapes of what is no matrix, by name.
      unscanned: Modules with a 1-D leaf inside, so that they are not scanned.
      blocks: By home inside a repeated block, the names on the way to it.
      networks: Numbered modules that are no layers, but whole networks.
      twins: Modules, the same number where all inside is the same.
      linked: Sizes that are fan_out of one matrix outside of blocks and fan_in of another.
      ends: Those of them that may as well be the input and the output of a network.
      routers: The paths of routers.
      mixtures: The modules that hold a router and its experts.
      experts: The paths of experts, and how many there are.
    """

    def __init__(self, leaves: Sequence[Leaf]):
        self.leaves = leaves
        self.floats = [leaf for leaf in leaves if leaf.is_float and 0 not in leaf.shape]
        matrices = [leaf for leaf in self.floats if leaf.is_matrix]
        self.matrices = grouped(matrices, lambda leaf: [leaf.home])
        self.within = grouped(matrices, lambda leaf: dict.fromkeys([*leaf.places[:-1], leaf.home]))
        attentions = grouped(matrices, lambda leaf: [leaf.attention])
        self.attentions = {place: Attention(held) for place, held in attentions.items()}
        self.vectors: dict[str, dict[str, Shape]] = {}
        for leaf in self.floats:
            if not leaf.is_matrix:
                self.vectors.setdefault(leaf.module, {})[leaf.keys[-1]] = leaf.shape
        self.unscanned = {
            module for leaf in self.floats if len(leaf.shape) == 1 for module in leaf.places[:-1]
        }
        self.blocks, self.networks, self.twins = repeated_blocks(self.floats)
        self.mixers = {leaf.path: leaf for leaf in self._mixers()}
        for leaf in self.mixers.values():
            self.matrices[leaf.home].remove(leaf)
            self.attentions[leaf.attention].matrices.remove(leaf)
        self.fans: dict[tuple[str, int], tuple[Counter[Any], Counter[int], Counter[int]]] = {}
        self.packing: dict[str, set[Shape]] = {}
        self.orientations: dict[str, tuple[int | None, str]] = {}
        self.linked, self.ends = self._chains()
        self.routers: set[str] = set()
        self.mixtures: set[str] = set()
        self.experts: dict[str, int] = {}
        self._find_mixtures()

    def _mixers(self) -> list[Leaf]:
        """Lists squares of a block that no other matrix in it can stand before or behind.

        Talking heads mix with them what the heads attend to. Whatever else there is is larger, and
        has another size on both sides, or heads before the last axis.
        """
        found = []
        for home, attention in self.attentions.items():
            held = attention.matrices
            is_attention = says("attention", home.rpartition("/")[2])
            if not is_attention and held[0].home not in self.blocks:
                continue
            block = self.held.get(self.blocks.get(held[0].home, ()), ())
            around = {leaf.shape for leaf in (*held, *block) if leaf.is_matrix}
            squares = {leaf.shape for leaf in held if len(leaf.shape) == 2}
            for shape in [s for s in squares if s[0] == s[1] > 1]:
                alike = [leaf for leaf in held if leaf.shape == shape]
                if any(leaf.letter for leaf in alike):
                    continue
                others = around - {shape}
                heads = [other for other in others if len(other) > 2 and other.count(shape[0]) == 1]
                edges = {s for o in others for s in (o[-1:] if o in heads else o)}
                is_least = all(math.prod(other) > math.prod(shape) for other in others)
                is_apart = is_least and shape[0] not in edges and len(held) - len(alike) > 1
                if is_apart:
                    found += alike
        return found

    @cached_property
    def numbered(self) -> dict[str, dict[str, dict[str, str]]]:
        """Gives by module and name the modules in it that differ in a number, and that number."""
        found: dict[str, dict[str, dict[str, str]]] = {}
        for leaf in self.leaves:
            steps = zip(leaf.places, leaf.places[1:], leaf.names, leaf.numbers, strict=False)
            for around, module, name, number in steps:
                if number is not None:
                    found.setdefault(around, {}).setdefault(name, {})[module] = number
        return found

    @cached_property
    def varying(self) -> dict[Names, set[int]]:
        """Finds the segments whose number differs, by the names of a path."""
        found = grouped(self.leaves, lambda leaf: [leaf.names])
        return {names: _varying(alike) for names, alike in found.items()}

    @cached_property
    def repeating(self) -> dict[tuple[Names, Shape], set[int]]:
        """Finds the segments whose number differs between leaves of one shape."""
        found = grouped(self.leaves, lambda leaf: [(leaf.names, leaf.array_shape)])
        return {kind: _varying(alike) for kind, alike in found.items()}

    @cached_property
    def held(self) -> dict[Names, list[Leaf]]:
        """Lists what blocks of some names hold, once for all layers."""
        blocks, inside = self.blocks, [leaf for leaf in self.floats if leaf.home in self.blocks]
        kinds = grouped(inside, lambda leaf: [(blocks[leaf.home], leaf.names, leaf.shape)])
        firsts = [alike[0] for alike in kinds.values()]
        return grouped(firsts, lambda leaf: [blocks[leaf.home]])

    @cached_property
    def streams(self) -> dict[Names, set[int]]:
        """Finds the size, or the sizes, that occur most in the matrices and norms of a block."""
        found = {}
        for names, inside in self.held.items():
            counts: Counter[int] = Counter()
            for leaf in inside:
                is_norm = len(leaf.shape) == 1 and leaf.module not in self.matrices
                if (leaf.is_matrix and not leaf.is_end) or is_norm:
                    weight = 2 if len(leaf.shape) == 2 else 1
                    counts.update(dict.fromkeys(leaf.shape, weight))
            most = max(counts.values(), default=0)
            found[names] = {size for size, count in counts.items() if count == most > 1}
        return found

    @cached_property
    def outside(self) -> list[Leaf]:
        """Lists the matrices outside of blocks."""
        return [leaf for leaf in self.floats if leaf.is_matrix and leaf.home not in self.blocks]

    @cached_property
    def widths(self) -> set[int]:
        """Finds the sizes that a matrix outside of blocks may connect."""
        plain = [leaf for leaf in self.outside if len(leaf.shape) == 2 and not leaf.is_end]
        squares = {leaf.shape[0] for leaf in plain if leaf.shape[0] == leaf.shape[1]}
        return set().union(squares, self.states, *self.streams.values())

    @cached_property
    def vocabularies(self) -> set[Shape]:
        """Finds the shapes of embeddings, but for those of positions; the vocabulary is first."""
        tables = [leaf for leaf in self.outside if says("table", *leaf.keys[-2:])]
        tables = [leaf for leaf in tables if "positions" not in leaf.called]
        return {leaf.shape for leaf in tables if len(leaf.shape) == 2}

    @cached_property
    def steps(self) -> list[tuple[Leaf, int, int]]:
        """Lists the matrices outside of blocks that are no tables, with fan_in and fan_out."""
        plain = (leaf for leaf in self.outside if len(leaf.shape) == 2)
        steps = (leaf for leaf in plain if not leaf.is_end or says("head", *leaf.keys[-2:]))
        return [(leaf, *fans(leaf, self)) for leaf in steps]

    @cached_property
    def gates(self) -> dict[str, int]:
        """Finds by path what makes the gates of a recurrent cell, and how wide its state is.

        A GRU has three gates and an LSTM four, each as wide as the state. One matrix makes them
        from the state, and another beside it from the input; or one does from both. Nothing else
        reads the gates. Of two that read as much, nothing else may make it: they may be heads.
        """
        ins, outs = ({step[side] for step in self.steps} for side in (1, 2))
        outs |= self.looked_up
        makers = [step for step in self.steps if step[2] not in ins]
        found = {}
        for (_, out), cell in grouped(makers, lambda step: [(step[0].home, step[2])]).items():
            read = [into for _, into, _ in cell]
            for state in (out / 3, out / 4):
                is_alone = len(cell) == 1 and state in ins - outs and read[0] - state in outs
                is_pair = (
                    len(cell) == 2 and state in read and (len({*read}) > 1 or state not in outs)
                )
                if is_alone or is_pair:
                    inside = {state, read[0]} if is_alone else {state, *outs}
                    found |= {leaf.path: int(state) for leaf, into, _ in cell if into in inside}
        return found

    @cached_property
    def states(self) -> set[int]:
        """Finds the widths of the states of recurrent cells, by name or by their gates."""
        called = (leaf.shape for leaf in self.outside if leaf.says("state"))
        return {min(shape) for shape in called if len(shape) == 2} | {*self.gates.values()}

    @cached_property
    def looked_up(self) -> set[int]:
        """Gives the widths of embeddings, which a matrix may read."""
        return {width for _, width in self.vocabularies}

    def _chains(self) -> tuple[set[int], set[int]]:
        """Finds the sizes by which matrices outside of blocks follow each other, and ends of them.

        Before them may be a convolution, whose channels are flattened together with the image, and
        after them a head, or blocks that read what none of them writes. In a numbered series of
        more than two, which may be an MLP, a matrix follows those of lower numbers alone, or reads
        an input beside what the one before it makes. A size may be an end where the matrices lead
        from it back to it, as the pixels of an autoencoder do and the noise of a denoiser, unless
        it is the width of a square matrix, lies inside a series, or between two that are called
        `up` and `down`.
        """
        steps = self.steps
        tall = (leaf for leaf in self.outside if len(leaf.shape) > 2)
        channels = {_made(leaf) for leaf in tall if "convolution" in leaf.called}
        leaves = [leaf for leaf, _, _ in steps]
        writers = grouped(leaves, lambda leaf: [fans(leaf, self)[1]])
        readers = grouped(leaves, lambda leaf: [fans(leaf, self)[0]])
        flat = {into for into in readers if any(into % size == 0 for size in channels - {1})}
        flat |= readers.keys() & self.channels
        linked, inside = flat | self._read_by_blocks | _beside_inputs(steps), self.widths | flat
        lengths = Counter(leaf.series for leaf in leaves)
        for size in (readers.keys() & writers.keys()) - {1}:
            before = grouped(writers[size], lambda leaf: [leaf.series])
            behind = grouped(readers[size], lambda leaf: [leaf.series])
            follows = any(
                lengths[series] == 2
                or min(map(_order, before[series])) < max(map(_order, behind[series]))
                for series in before.keys() & behind.keys()
            )
            ups = {leaf.home: leaf.shape for leaf in writers[size] if leaf.says("reads")}
            downs = [leaf.home for leaf in readers[size] if leaf.says("writes")]
            mlps = [ups[home] for home in downs if home in ups]
            if follows or len(before.keys() | behind.keys()) > 1:
                linked.add(size)
            if follows or mlps:
                inside.update({size}, *mlps)
        ways = {into: {fans(leaf, self)[1] for leaf in readers[into]} for into in readers}
        return linked, (linked - inside) & _circles(ways)

    @cached_property
    def _read_by_blocks(self) -> set[int]:
        """Finds the sizes that weights in blocks read, and that none of them writes."""
        inside = (leaf for held in self._inside.values() for leaf in held if leaf.weight)
        steps = [fans(m, self) for m in inside if len(m.shape) == 2 and not m.is_end]
        return {into for into, _ in steps} - {out for _, out in steps} - {1}

    def _find_mixtures(self) -> None:
        """Finds routers, the modules that hold one, and its experts.

        Experts are two leaves at least of one rank, three or more, that begin with E and have the
        router's width behind it; or numbered modules, E in all, of three matrices at most.
        """
        for home, held in self.matrices.items():
            if says("attention", *home.split("/")[-1:]):
                continue
            for router in (leaf for leaf in held if len(leaf.shape) == 2):
                count, width = sorted(router.shape)
                if count in (1, width):
                    continue
                # A router may have a module to itself, beside the experts.
                is_alone = len(held) == 1 and home in self.blocks
                for module in (home, *([home.rpartition("/")[0]] if is_alone else [])):
                    found = self._experts_along_axis(module, count, width)
                    is_inside = module in self.blocks or "router" in router.called
                    if not found and (is_inside or says("mixture", *module.split("/")[-1:])):
                        found = self._experts_as_modules(module, count, width)
                    if found:
                        self.routers.add(router.path)
                        self.mixtures.add(module)
                        self.experts.update({leaf.path: count for leaf in found})
                        break

    def _experts_along_axis(self, module: str, count: int, width: int) -> list[Leaf]:
        """Lists leaves that begin with the number of experts, if two or more have that width."""
        tall = [
            leaf
            for leaf in self._tall.get((module, count), ())
            if width in leaf.shape[1:] and not {"attention", "convolution"} & leaf.called
        ]
        is_of_one_rank = len({len(leaf.shape) for leaf in tall}) == 1
        is_image = all(leaf.shape[0] == leaf.shape[1] for leaf in tall)
        is_one_shape = len({leaf.shape for leaf in tall}) == 1 and {*tall[0].shape[1:]} != {width}
        is_mixture = is_of_one_rank or any(leaf.says("gating") for leaf in tall)
        return tall if len(tall) > 1 and is_mixture and not (is_image or is_one_shape) else []

    @cached_property
    def _tall(self) -> dict[tuple[str, int], list[Leaf]]:
        """Lists what has three axes or more, by each module around and the size of the first."""
        leaves = (leaf for held in self.matrices.values() for leaf in held)
        tall = (leaf for leaf in leaves if len(leaf.shape) > 2 and not leaf.letter)
        return grouped(
            tall,
            lambda leaf: dict.fromkeys((m, leaf.shape[0]) for m in (*leaf.places[:-1], leaf.home)),
        )

    def _experts_as_modules(self, module: str, count: int, width: int) -> list[Leaf]:
        """Lists the matrices of numbered modules, as many as there are experts."""
        for modules in self.numbered.get(module, {}).values():
            if len(modules) != count:
                continue
            held = [leaf for each in modules for leaf in self.within.get(each, ())]
            few = len(held) <= 3 * count and all(width in leaf.shape for leaf in held)
            if not few or any(says("layers", m.rpartition("/")[2]) for m in modules):
                continue
            letters = {leaf.letter for leaf in held}
            if not ({"q", "k"} <= letters or any(leaf.in_attention for leaf in held)):
                return held
        return []

    def stream_of(self, leaf: Leaf) -> set[int]:
        """Gives the width of the residual stream around a leaf, or several that it may be."""
        block = self.blocks.get(leaf.home)
        return self.widths if block is None else self.streams[block]

    def norm_widths(self, leaf: Leaf) -> set[int]:
        """Finds how long the norms of a leaf's block are, but for those of heads.

        Without norms, two matrices of the block or more that are no projections may share one
        width, or two sizes of which most have one.
        """
        return self._norm_widths.get(self.blocks.get(leaf.home, ()), set())

    @cached_property
    def _norm_widths(self) -> dict[Names, set[int]]:
        found = {}
        for names, inside in self.held.items():
            norms = {
                leaf.shape[0]
                for leaf in inside
                if len(leaf.shape) == 1
                and (leaf.module not in self.matrices or leaf.says("norm"))
                and not says("in attention", *leaf.keys[-2:-1])
            }
            plain = [{*leaf.shape} for leaf in inside if leaf.is_matrix and len(leaf.shape) == 2]
            shared = set.intersection(*plain) if plain else set()
            if len(shared) > 1 and len(plain) > 1:
                shared &= self.streams[names]
            found[names] = norms or (shared if len(shared) == 1 else set())
        return found

    def head_lengths(self, leaf: Leaf) -> set[int]:
        """Finds how long the norms of heads are inside a leaf's attention: its scales' lengths."""
        return {
            shape[0]
            for module, held in self.vectors.items()
            if module.startswith(f"{leaf.attention}/")
            and says("in attention", module.rpartition("/")[2])
            for shape in held.values()
            if len(shape) == 1
        }

    @cached_property
    def channels(self) -> set[int]:
        """Finds how many channels convolutions make, and what is biased like them."""
        tall = [m for held in self.matrices.values() for m in held if len(m.shape) > 2]
        found = {shape[0] for leaf in tall for shape in self.biases(leaf) if len(shape) == 1}
        return found | {_made(leaf) for leaf in tall if "convolution" in leaf.called}

    def series_numbers(self, leaf: Leaf, column: int) -> set[int]:
        """Lists the numbers of the modules that differ in one number from the one around a leaf."""
        modules = self.numbered[leaf.places[column]][leaf.names[column]]
        return {int(number) for each, number in modules.items() if number and each in self.within}

    def is_own(self, size: int, module: str) -> bool:
        """Tells whether all matrices that have a size lie in one module, on one side of each."""
        found = self._by_size.get(size, [])
        return (
            all(leaf.place.startswith(f"{module}/") for leaf in found)
            and all(leaf.shape.count(size) == 1 and len({*leaf.shape}) > 1 for leaf in found)
            and len({leaf.shape.index(size) for leaf in found}) == 1
        )

    def is_source(self, leaf: Leaf, size: int) -> bool:
        """Tells whether no matrix but those of a leaf's kind has a size, and no vector either."""
        names = leaf.names[leaf.depth - 1 :]
        others = (other for other in self._by_size[size] if not other.is_end)
        alike = all(other.names[other.depth - 1 :] == names for other in others)
        return alike and size not in self._lengths

    @cached_property
    def _lengths(self) -> set[int]:
        return {size for held in self.vectors.values() for shape in held.values() for size in shape}

    @cached_property
    def _by_size(self) -> dict[int, list[Leaf]]:
        """Lists the matrices that have a size."""
        matrices = (leaf for leaf in self.floats if leaf.is_matrix)
        return grouped(matrices, lambda leaf: {*leaf.shape})

    def repeats(self, leaf: Leaf, column: int) -> Collection[str]:
        """Lists the modules that differ from the one around a leaf in one number at most."""
        return self.numbered[leaf.places[column]][leaf.names[column]].keys()

    def inside(self, leaf: Leaf) -> list[Leaf]:
        """Lists the matrices of the block around a leaf, once for all its layers."""
        return self._inside.get(self.blocks.get(leaf.home, ()), [])

    @cached_property
    def _inside(self) -> dict[Names, list[Leaf]]:
        return {names: [m for m in held if m.is_matrix] for names, held in self.held.items()}

    def head_shapes(self, leaf: Leaf) -> set[Shape]:
        """Lists the shapes of heads that a projection makes and an output projection reads."""
        return self._head_shapes.get(self.blocks.get(leaf.home, ()), set())

    @cached_property
    def _head_shapes(self) -> dict[Names, set[Shape]]:
        found = {}
        for names, held in self._inside.items():
            tall = {m.shape for m in held if len(m.shape) == 3}
            fits = (s for s in tall if any(o[2] == s[0] and o[0] % s[1] == 0 for o in tall))
            found[names] = {shape[1:] for shape in fits}
        return found

    def is_linked(self, axis: int, leaf: Leaf) -> bool:
        """Tells whether a bare matrix follows another in the block, or a module there is as long.

        Squares of one size, which is no width, follow each other alone: they may mix heads.
        """
        size, (shapes, sizes) = leaf.shape[axis], self._plain[leaf.home]
        followed = sizes[1 - axis, size]
        if leaf.shape[1 - axis] == size:
            followed -= 1 if size in self.stream_of(leaf) else shapes[leaf.shape]
        names = self._weighted[self.blocks[leaf.home]].get(size, [])
        return followed > 0 or any(each != leaf.names for each in names[:2])

    @cached_property
    def _plain(self) -> dict[str, tuple[Counter[Shape], Counter[tuple[int, int]]]]:
        """Counts the shapes of 2-D matrices by home, and sizes with their axes."""
        found = {}
        for home, held in self.matrices.items():
            shapes = Counter(leaf.shape for leaf in held if len(leaf.shape) == 2)
            sizes: Counter[tuple[int, int]] = Counter()
            for shape, count in shapes.items():
                sizes.update(dict.fromkeys(enumerate(shape), count))
            found[home] = shapes, sizes
        return found

    @cached_property
    def _weighted(self) -> dict[Names, dict[int, list[Names]]]:
        """Lists by block and size the names of matrices that are the weights of modules."""
        return {
            names: {
                size: [*dict.fromkeys(leaf.names for leaf in leaves)]
                for size, leaves in grouped(
                    (leaf for leaf in held if leaf.weight), lambda leaf: {*leaf.shape}
                ).items()
            }
            for names, held in self._inside.items()
        }

    def beside(self, leaf: Leaf) -> list[Leaf]:
        """Lists the other matrices of a leaf's module."""
        return [other for other in self.matrices.get(leaf.home, []) if other is not leaf]

    def alike(self, leaf: Leaf) -> list[Leaf]:
        """Lists in order the matrices of a module that differ from a leaf in a number at most."""
        return self._alike[leaf.series]

    @cached_property
    def _alike(self) -> dict[tuple[str, Names], list[Leaf]]:
        matrices = (leaf for held in self.matrices.values() for leaf in held)
        return grouped(sorted(matrices, key=_order), lambda leaf: [leaf.series])

    @cached_property
    def around(self) -> dict[str, list[Leaf]]:
        """Lists the matrices of each home, with those inside that have a module to themselves.

        The latter, as `net_0/proj` of GEGLU beside `net_2`, have those around them.
        """
        found: dict[str, list[Leaf]] = {}
        above = {home: re.sub(r"/?[^/]*(/\d+)*$", "", home) for home in self.matrices}
        around = {*above.values()}
        for home, held in self.matrices.items():
            is_inside = home in self.blocks and len(self.blocks[home]) <= home.count("/")
            if len(held) > 1 or home in around or not is_inside:
                above[home] = home
            found.setdefault(above[home], []).extend(held)
        return {home: found[place] for home, place in above.items()}

    def named_before(self, leaf: Leaf) -> list[Leaf]:
        """Lists the matrices beside a leaf whose name its own continues, as `q_a` does q."""
        words = leaf.name.split("_")
        stems = ["_".join(words[:count]) for count in range(1, len(words))]
        return [other for stem in stems for other in self.named(leaf.home, stem)]

    def named(self, home: str, name: str) -> list[Leaf]:
        """Lists the matrices of a home that are called so."""
        return self._by_name.get((home, name), [])

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], list[Leaf]]:
        """Lists the matrices of one name in a home."""
        matrices = (leaf for held in self.matrices.values() for leaf in held)
        return grouped(matrices, lambda leaf: [(leaf.home, leaf.name)])

    def partners(self, leaf: Leaf) -> list[Leaf]:
        """Lists the other matrices of a leaf's attention, those in modules inside included."""
        return [m for m in self.attentions[leaf.attention].matrices if m is not leaf]

    def letters(self, leaf: Leaf) -> dict[str, Leaf]:
        """Gives a matrix of a leaf's attention for each of q, k and v that it has."""
        return self.attentions[leaf.attention].letters

    def unlike(self, leaf: Leaf) -> list[Leaf]:
        """Lists the partners of a leaf that are no Q, K or V by name, two or three at most."""
        return [m for m in self.attentions[leaf.attention].unlike[:3] if m is not leaf]

    def output_of(self, leaf: Leaf) -> Leaf | None:
        """Finds the output projection beside Q, K and V, by its name or as all that is left."""
        attention, unlike = self.attentions[leaf.attention], self.unlike(leaf)
        named = next((other for other in attention.outputs if other is not leaf), None)
        lettered = len(attention.matrices) - len(attention.unlike) - (leaf.letter != "")
        is_left = len(unlike) == 1 and (leaf.in_attention or lettered > 1)
        return unlike[0] if named is None and is_left else named

    def biases(self, leaf: Leaf) -> list[Shape]:
        """Lists the shapes of what is called the bias of a leaf, whatever the library."""
        name, held = leaf.keys[-1], self.vectors.get(leaf.module, {})
        if not leaf.is_bare and not name.isdecimal():
            names = {"bias", "b"}
        elif name.isdecimal():  # a list [weight, bias] has numbers for names
            following = str(int(name) + 1)
            names = {following} if len(held.get(following, ())) == 1 else set()
        else:
            names = {f"{name}_bias", f"{name}_b"}
            for word, bias in (("w", "b"), ("W", "b"), ("weight", "bias"), ("kernel", "bias")):
                names.add(re.sub(rf"(?<![a-zA-Z]){word}(?![a-zA-Z])|(?<=_){word}", bias, name))
        return [shape for key, shape in held.items() if key in names - {name}]

    def bias_axis(self, leaf: Leaf) -> int | None:
        """Gives which of a matrix's last two axes is as long as the bias beside it: fan_out.

        The matrix may be one of a batch, whose biases are one too.
        """
        found = {shape[-1] for shape in self.biases(leaf) if shape[:-1] == leaf.shape[:-2] != shape}
        axes = [axis for axis, size in enumerate(leaf.shape[-2:]) if size in found]
        return axes[0] if len(axes) == 1 else None

    def _direction(self, leaf: Leaf) -> int | None:
        """Gives the fan_out axis of a matrix whose name says that it reads or writes the stream.

        Only where one side is as wide as the stream, and the other wider: `down` and `up` of an
        adapter go the other way. K and V may read another stream, unless they are narrower.
        """
        if len(leaf.shape) == 3 and leaf.letter:
            ends = [leaf.shape[end] in self.norm_widths(leaf) for end in (0, -1)]
            return ends[0] * 1 if ends[0] != ends[1] else None
        stream = self.stream_of(leaf)
        if len(stream) != 1 or leaf.home not in self.blocks:
            return None
        axes = [axis for axis, size in enumerate(leaf.shape[-2:]) if size in stream]
        if len(axes) != 1:
            return None
        is_wider = leaf.shape[-2:][1 - axes[0]] > leaf.shape[-2:][axes[0]]
        is_key = leaf.is_bare and leaf.letter != "" and not is_wider
        reads, writes = leaf.says("reads", "fused") or is_key, leaf.says("writes")
        if reads == writes:
            return None
        is_projection = leaf.says("projection", "output")
        return (1 - axes[0] if reads else axes[0]) if is_wider or is_projection else None

    @cached_property
    def votes(self) -> dict[tuple[Names, str], list[int]]:
        """Lists the fan_out axes that the matrices of a block show.

        A bias, Q, K and V in one, and what has heads behind or before the stream count twice,
        another name once. They are told by the names of the block and by what their arrays are
        called.
        """
        found: dict[tuple[Names, str], list[int]] = {}
        for names, inside in self._inside.items():
            for leaf in inside:
                axes = [self._direction(leaf)] * (1 + leaf.says("fused"))
                axes += [self.bias_axis(leaf)] * 2
                if len(leaf.shape) > 2 and (leaf.letter or leaf.says("fused")):
                    widths = self.norm_widths(leaf)
                    reads = [axis for axis, size in enumerate(leaf.shape) if size in widths]
                    axes += [int(reads[0] < len(leaf.shape) - 1)] * 2 if len(reads) == 1 else []
                votes = found.setdefault((names, leaf.weight), [])
                votes += [axis for axis in axes if axis is not None]
        return found

    @cached_property
    def shown(self) -> dict[str, set[int]]:
        """Finds the fan_out axes that biases show, and chains of arrays, by the array's name."""
        found: dict[str, set[int]] = {}
        series: dict[Names, list[Leaf]] = {}
        for leaf in self.floats:
            if leaf.is_matrix and len(leaf.shape) == 2:
                if (axis := self.bias_axis(leaf)) is not None:
                    found.setdefault(leaf.weight, set()).add(axis)
                if leaf.is_bare and len(self.varying[leaf.names]) == 1:
                    series.setdefault(leaf.names, []).append(leaf)
        for chain in series.values():
            chain.sort(key=_order)
            steps = [(a.shape, b.shape) for a, b in itertools.pairwise(chain)]
            axes = {axis for axis in (0, 1) if all(a[axis] == b[1 - axis] for a, b in steps)}
            if len(axes) == 1:
                found.setdefault("", set()).update(axes)
        return found


def orientation(leaf: Leaf, net: Network) -> tuple[int | None, str]:
    """Finds the fan_out axis of a matrix, once for each leaf."""
    if leaf.path not in net.orientations:
        net.orientations[leaf.path] = _orientation(leaf, net)
    return net.orientations[leaf.path]


def _orientation(leaf: Leaf, net: Network) -> tuple[int | None, str]:
    """Finds the fan_out axis of a matrix (0 or 1 of the last two), and why; None if it is unknown.

    The bias beside it proves it. Otherwise all matrices in a block whose arrays have the same name
    are taken to be alike, as two of them show at least and none denies; then all of the tree; then
    it is as the library has it that uses this name. An array that is named as no library names the
    weight of a module is as a chain of such arrays shows.
    """
    axis = net.bias_axis(leaf)
    if axis is not None:
        return axis, "the bias is as long as fan_out"
    if leaf.hides_axes:
        return None, ""
    votes = net.votes.get((net.blocks.get(leaf.home, ()), leaf.weight), [])
    if len(votes) > 1 and len({*votes}) == 1:
        return votes[0], "as the matrices beside it show"
    shown = net.shown.get(leaf.weight, set())
    if len(shown) == 1:
        return min(shown), "as the other matrices of the tree show"
    if leaf.is_out_first:
        return 0, "weights are (out, in)"
    is_called = leaf.rows or leaf.name.isdecimal() or leaf.name.endswith("kernel")
    if (leaf.is_bare or leaf.weight.isdecimal()) and leaf.name and not is_called:
        return None, ""
    return 1, "kernels are (in, out)"


def out_axis(leaf: Leaf, net: Network) -> int | None:
    """Gives the fan_out axis of a matrix, 0 or 1 of the last two."""
    return orientation(leaf, net)[0]


def fans(leaf: Leaf, net: Network) -> tuple[int, int]:
    """Gives (fan_in, fan_out) of a matrix in the last two axes."""
    first, last = leaf.shape[-2:]
    return (last, first) if out_axis(leaf, net) == 0 else (first, last)


def _varying(leaves: Sequence[Leaf]) -> set[int]:
    """Finds the segments whose number differs between leaves."""
    columns = zip(*(leaf.numbers for leaf in leaves), strict=True)
    return {place for place, numbers in enumerate(columns) if len({*numbers}) > 1}


def _beside_inputs(steps: Sequence[tuple[Leaf, int, int]]) -> set[int]:
    """Finds sizes of what is read beside an input, and of what a series makes to stand beside one.

    The input is one that another matrix reads alone. Or it is narrower than what is made before it
    in a series, and read by no later one otherwise; or a number, which all of a series read, as the
    time is in a continuous flow.
    """
    ins, outs = {into for _, into, _ in steps}, {out for _, _, out in steps}
    inputs, between = ins - outs, ins & outs
    found = {into for into in inputs if any(into - each in between for each in inputs)}
    for chain in grouped(
        sorted(steps, key=lambda step: _order(step[0])), lambda step: [step[0].series]
    ).values():
        pairs = [*itertools.pairwise(chain)]
        is_timed = len(pairs) > 1 and all(into == made + 1 for (_, _, made), (_, into, _) in pairs)
        for place, ((_, before, made), (_, into, _)) in enumerate(pairs):
            if is_timed:
                found |= {made, into}
            elif into in between and made not in ins and into - made in inputs:
                found.add(made)
            elif made == before and 0 < into - made < made and into in inputs:
                later = {read - made for _, read, _ in chain[place + 2 :]}
                found |= {into} if later.isdisjoint({0, *outs}) else set()
    return found


def _made(convolution: Leaf) -> int:
    """Gives the channels that a convolution makes."""
    return convolution.shape[0 if convolution.is_out_first else -1]


def _order(leaf: Leaf) -> list[int]:
    """Lists the numbers of a path, which is 0 for Haiku's first module."""
    return [int(number or 0) for number in leaf.numbers]


def _circles(ways: dict[int, set[int]]) -> set[int]:
    """Finds the sizes that some matrices one after another lead from, and back to.

    Ends of chains are on no circle: they are taken off first, so that few sizes are left to follow.
    """
    back = {out: {*ins} for out, ins in grouped(ways, ways.__getitem__).items()}
    left, ends = ways.keys() & back.keys(), ways.keys() ^ back.keys()
    counts = {size: [len(way.get(size, ())) for way in (ways, back)] for size in left}
    while ends:
        end = ends.pop()
        for side, way in enumerate((back, ways)):
            for size in way.get(end, set()) & left:
                counts[size][side] -= 1
                if counts[size][side] == 0:
                    left.discard(size)
                    ends.add(size)
    found = set()
    while left:
        size = left.pop()
        circle = _reached(size, ways) & _reached(size, back)
        found |= circle
        left -= circle
    return found


def _reached(size: int, ways: dict[int, set[int]]) -> set[int]:
    """Finds the sizes that matrices one after another lead to from a size."""
    found: set[int] = set()
    more = {size}
    while more:
        more = set().union(*(ways.get(each, ()) for each in more)) - found
        found |= more
    return found
