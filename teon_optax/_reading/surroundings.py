"""What stands around a leaf: its module, the blocks, the widths, routers and experts."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from teon_optax._reading.blocks import Names, held_by_blocks, is_end, repeated_blocks, stream_width
from teon_optax._reading.names import says
from teon_optax._reading.tree import Leaf, above


class Surroundings(NamedTuple):
    """What a tree shows of its modules, by their paths; "" is the root."""

    matrices: dict[str, list[Leaf]]  # by home
    vectors: dict[str, dict[str, int]]  # sizes of 1-D leaves by name
    biases: dict[str, tuple[int, ...]]  # shapes of biases of more axes, by the module around
    unscanned: set[str]  # modules with a 1-D leaf inside
    blocks: dict[str, Names]  # by home inside a repeated block: the names on the way to it
    held: dict[Names, list[Leaf]]  # what blocks of these names hold, once for all layers
    streams: dict[Names, set[int]]  # the size, or sizes, that most matrices in such blocks have
    widths: set[int]  # what a matrix outside of blocks may connect
    linked: set[int]  # fan_out of one matrix outside of blocks and fan_in of another
    ends: set[int]  # those of them that may as well be the input and the output of a network
    vocabularies: set[tuple[int, int]]  # sizes of embeddings, the vocabulary first
    routers: set[str]  # paths
    mixtures: set[str]  # modules that hold a router and its experts
    experts: set[str]  # paths
    modules: set[str]  # all that hold a leaf
    twins: dict[tuple[str, ...], int]  # modules, the same number where all inside is the same
    networks: set[str]  # numbered modules that are no layers, but whole networks
    numbered: dict[tuple[str, str], list[str]]  # by the module around and the name: modules
    varying: dict[Names, set[int]]  # by a path's names: the segments whose number differs

    def stream_of(self, leaf: Leaf) -> set[int]:
        """The width of the residual stream around a leaf, or several that it may be."""
        block = self.blocks.get(leaf.home)
        return self.widths if block is None else self.streams[block]

    def repeats(self, leaf: Leaf, column: int) -> list[str]:
        """The modules that differ from the one around a leaf at most in the number of a segment."""
        return self.numbered["/".join(leaf.keys[:column]), leaf.names[column]]

    def inside(self, leaf: Leaf) -> list[Leaf]:
        """The matrices of the block around a leaf, once for all its layers."""
        found = self.held.get(self.blocks.get(leaf.home, ()), [])
        return [other for other in found if other.is_matrix]


def surroundings_of(leaves: Sequence[Leaf]) -> Surroundings:
    """Finds blocks first, then what is inside of them and what is outside."""
    floats = [leaf for leaf in leaves if leaf.is_float and 0 not in leaf.shape]
    matrices: dict[str, list[Leaf]] = {}
    vectors: dict[str, dict[str, int]] = {}
    unscanned: set[str] = set()
    biases = {
        leaf.path.rpartition("/")[0]: leaf.shape
        for leaf in floats
        if leaf.keys[-1] in ("bias", "b") and len(leaf.shape) > 1
    }
    for leaf in floats:
        if len(leaf.shape) == 1:
            vectors.setdefault(leaf.path.rpartition("/")[0], {})[leaf.keys[-1]] = leaf.shape[0]
            unscanned.update(above(leaf.path))
        elif leaf.is_matrix:
            matrices.setdefault(leaf.home, []).append(leaf)
    numbered: dict[tuple[str, str], dict[str, None]] = {}
    for leaf in leaves:
        for column, number in enumerate(leaf.numbers):
            if number is not None:
                series = "/".join(leaf.keys[:column]), leaf.names[column]
                numbered.setdefault(series, {})["/".join(leaf.keys[: column + 1])] = None
    numbers: dict[Names, set[tuple[str | None, ...]]] = {}
    for leaf in leaves:
        numbers.setdefault(leaf.names, set()).add(leaf.numbers)
    varying = {
        names: {c for c, column in enumerate(zip(*held, strict=True)) if len({*column}) > 1}
        for names, held in numbers.items()
    }
    blocks, networks, twins = repeated_blocks(floats)
    in_blocks = held_by_blocks(floats, blocks)
    streams = {names: stream_width(inside, matrices) for names, inside in in_blocks.items()}
    outside = [leaf for leaf in floats if leaf.is_matrix and leaf.home not in blocks]
    plain = [leaf for leaf in outside if len(leaf.shape) == 2 and not is_end(leaf)]
    squares = {leaf.shape[0] for leaf in plain if leaf.shape[0] == leaf.shape[1]}
    squares |= {min(leaf.shape) for leaf in plain if leaf.says("state")}
    widths = set().union(squares, *streams.values())
    tables = {leaf.shape for leaf in outside if len(leaf.shape) == 2 and is_vocabulary(leaf)}
    modules = {module for leaf in floats for module in above(leaf.path)}
    routers, mixtures, experts = _mixtures(matrices, blocks)
    return Surroundings(
        matrices, vectors, biases, unscanned, blocks, in_blocks, streams, widths,
        *_linked(outside, widths), tables, routers, mixtures, experts, modules, twins, networks,
        {key: [*held] for key, held in numbered.items()}, varying,
    )  # fmt: skip


def is_vocabulary(leaf: Leaf) -> bool:
    """Whether it is called as an embedding, and not as one of positions."""
    return says("table", *leaf.keys[-2:]) and not says("positions", *leaf.keys)


def _linked(outside: Iterable[Leaf], widths: set[int]) -> tuple[set[int], set[int]]:
    """Sizes by which matrices outside of blocks follow each other, and those that may be ends.

    Before them may be a convolution, whose channels are flattened together with the image, and
    after them a head. In a numbered series of more than two, which may be an MLP, a matrix follows
    those of lower numbers alone. A size may be an end where the matrices lead from it back to it,
    as the pixels of an autoencoder do and the noise of a denoiser, unless it is the width of a
    square matrix, lies inside a series, or between two that are called `up` and `down`.
    """
    steps: list[tuple[Leaf, int, int]] = []
    channels = set()
    for leaf in outside:
        first, last = leaf.shape[0], leaf.shape[-1]
        out, into = (first, last) if leaf.keys[-1].startswith("weight") else (last, first)
        if len(leaf.shape) > 2 and says("convolution", *leaf.keys):
            channels.add(out)
        elif len(leaf.shape) == 2 and (not is_end(leaf) or says("head", *leaf.keys[-2:])):
            steps.append((leaf, into, out))
    flat = {into for _, into, _ in steps if any(into % channel == 0 for channel in channels - {1})}
    linked, inside = {*flat}, widths | flat
    lengths = Counter((leaf.home, leaf.names) for leaf, _, _ in steps)
    for size in {into for _, into, _ in steps} & {out for _, _, out in steps}:
        before = [leaf for leaf, _, out in steps if out == size]
        after = [leaf for leaf, into, _ in steps if into == size]
        first, last = _numbers_of(before, min), _numbers_of(after, max)
        follows = any(
            lengths[series] == 2 or first[series] < last[series]
            for series in first.keys() & last.keys()
        )
        ways_in = {leaf.home: leaf.shape for leaf in before if leaf.says("reads")}
        mlps = [
            ways_in[leaf.home] for leaf in after if leaf.says("writes") and leaf.home in ways_in
        ]
        if follows or len(first.keys() | last.keys()) > 1:
            linked.add(size)
        if follows or mlps:
            inside.update({size}, *mlps)
    ways = {(into, out) for _, into, out in steps}
    return linked, {size for size in linked - inside if _leads_back(size, ways)}


def _numbers_of(
    leaves: Iterable[Leaf], choose: Callable[[list[int], list[int]], list[int]]
) -> dict[tuple[str, Names], list[int]]:
    """For each series the numbers of its first leaf, or of its last."""
    found: dict[tuple[str, Names], list[int]] = {}
    for leaf in leaves:
        numbers, series = (
            [int(number) for number in leaf.numbers if number],
            (leaf.home, leaf.names),
        )
        found[series] = choose(found.get(series, numbers), numbers)
    return found


def _leads_back(size: int, ways: set[tuple[int, int]]) -> bool:
    """Whether some matrices one after another lead from a size back to it."""
    reached: set[int] = set()
    while more := {out for into, out in ways if into in reached | {size}} - reached:
        reached |= more
    return size in reached


def _mixtures(
    matrices: dict[str, list[Leaf]], blocks: dict[str, Names]
) -> tuple[set[str], set[str], set[str]]:
    """Paths of routers (width, E), and of what is beside them E times: the experts.

    Experts are leaves of three axes and more that begin with E and have the router's width, or
    numbered modules, E in all, of three matrices at most.
    """
    below: dict[str, list[Leaf]] = {}
    for held in matrices.values():
        for leaf in held:
            for module in {*above(leaf.path), leaf.home}:
                below.setdefault(module, []).append(leaf)
    routers, mixtures, experts = set(), set(), set()
    for home, held in matrices.items():
        if says("attention", *home.split("/")[-1:]):
            continue
        for router in (leaf for leaf in held if len(leaf.shape) == 2):
            # A router may have a module to itself, beside the experts.
            around = [home.rpartition("/")[0]] if len(held) == 1 and home in blocks else []
            for module in (home, *around):
                if found := _experts_of(router, module, below[module]):
                    routers.add(router.path)
                    mixtures.add(module)
                    experts.update(leaf.path for leaf in found)
                    break
    return routers, mixtures, experts


def _experts_of(router: Leaf, module: str, inside: Sequence[Leaf]) -> list[Leaf]:
    """What is inside of a module as often as a matrix there has rows or columns."""
    for count, width in (router.shape[::-1], router.shape):
        tall = [
            leaf
            for leaf in inside
            if len(leaf.shape) > 2 and leaf.shape[0] == count and width in leaf.shape[1:]
            and not leaf.letter and not says("attention", *leaf.keys)
        ]  # fmt: skip
        if len(tall) > 1:
            return tall
        depth = module.count("/") + 1 if module else 0
        numbered: dict[str, dict[str, list[Leaf]]] = {}
        for leaf in inside:
            if len(leaf.numbers) > depth + 1 and leaf.numbers[depth] is not None:
                modules = numbered.setdefault(leaf.names[depth], {})
                modules.setdefault(leaf.keys[depth], []).append(leaf)
        for modules in numbered.values():
            held = [leaf for leaves in modules.values() for leaf in leaves]
            few = len(held) <= 3 * count and all(width in leaf.shape for leaf in held)
            if len(modules) == count > 1 and few and not says("layers", *modules):
                return held
    return []
