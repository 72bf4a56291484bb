"""Which modules are layers of a network, and which are networks of their own."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from teon_optax._reading.leaves import HOLE, Leaf, Names, grouped
from teon_optax._reading.names import says


class Blocks(NamedTuple):
    """Says which modules repeat, as layers do.

    Attributes:
      names: By home, the names on the way to the block that it is in.
      networks: Modules that repeat, but are whole networks.
      twins: Modules, with the same number where all that is inside is the same.
    """

    names: dict[str, Names]
    networks: set[str]
    twins: dict[str, int]


def repeated_blocks(leaves: Sequence[Leaf]) -> Blocks:
    """Finds the modules that are called layers, or that repeat one inner structure."""
    inside = grouped(
        leaves,
        lambda leaf: [leaf.places[d + 1] for d in range(leaf.depth) if leaf.numbers[d] is not None],
    )
    depths = {module: module.count("/") + 1 for module in inside}
    for module, held in [*inside.items()]:
        if len(held) == 1 and len(held[0].names) == depths[module] + 1:
            del inside[module]  # an array that has a module to itself

    def series(module: str) -> tuple[str, str]:
        leaf, depth = inside[module][0], depths[module]
        return leaf.places[depth - 1], leaf.names[depth - 1]

    def inner(module: str) -> frozenset[tuple[Names, tuple[int, ...]]]:
        return frozenset((leaf.names[depths[module] :], leaf.shape) for leaf in inside[module])

    alike = grouped(inside, lambda module: [(series(module), inner(module))])
    found = {key for (key, _), modules in alike.items() if len(modules) > 1}
    all_series = grouped(inside, lambda module: [series(module)])
    repeated = {module: len(all_series[key]) for key in found for module in all_series[key]}
    networks = {module for module in repeated if _is_network(module, inside[module], repeated)}
    # A list of two may be two networks.
    listed = {module for module, count in repeated.items() if count == 2 and module.isdecimal()}
    layers = repeated.keys() - networks - listed
    names = {leaf.home: _block_around(leaf, repeated, layers) for leaf in leaves}
    blocks = {home: block for home, block in names.items() if block}
    twins = {module: number for number, modules in enumerate(alike.values()) for module in modules}
    return Blocks(blocks, networks, twins)


def _block_around(leaf: Leaf, repeated: Mapping[str, int], layers: set[str]) -> Names:
    """Gives the names on the way to the block that a leaf is in, none where it is in no block."""
    if leaf.block:
        return *leaf.names[: leaf.depth], re.sub(r"\d+", HOLE, leaf.block)
    called = leaf.layer_depth
    if called and leaf.names[called] == HOLE and called < leaf.depth:
        called += 1
    found = next((d for d in range(leaf.depth, 0, -1) if leaf.places[d] in layers), 0)
    if found and (not called or found < called and not _is_repeated(leaf, called, repeated)):
        return leaf.names[:found]
    if called:
        return leaf.names[:called]
    outermost = leaf.scanned.count("/")
    is_ensemble = says("network", *leaf.keys[outermost : leaf.depth])
    return leaf.names[: outermost + 1] if leaf.scanned and not is_ensemble else ()


def _is_repeated(leaf: Leaf, depth: int, repeated: Mapping[str, int]) -> bool:
    """Tells whether what is called a layer is one of several, and no part as `MlpBlock_0` is."""
    return leaf.scanned != "" or any(m in repeated for m in leaf.places[depth : depth + 2])


def _is_network(module: str, held: Sequence[Leaf], repeated: Mapping[str, int]) -> bool:
    """Tells whether a module is a whole network, as an ensemble's member is, and no layer.

    It is one if it holds repeated layers itself, a table or a head, or a chain of matrices both
    ends of which have a size that nothing else in the module has.
    """
    depth = module.count("/") + 1
    matrices = [leaf for leaf in held if leaf.is_matrix]
    if len(matrices) > 1 and says("network", held[0].noun(depth)):
        return True
    inner = [leaf for leaf in matrices if leaf.layer_depth > depth]
    if any(_is_repeated(leaf, leaf.layer_depth, repeated) for leaf in inner):
        return True
    if any(0 < leaf.layer_depth <= depth for leaf in matrices):
        return False
    if any(leaf.is_end for leaf in matrices):
        return True
    sizes = Counter(size for leaf in matrices for size in {*leaf.shape})
    for leaf in matrices:
        for place in range(depth + 1, leaf.depth + 1):
            count = repeated.get(leaf.places[place], 0)
            if count > (1 if place < leaf.depth else 2) and count not in sizes:  # no experts
                return True
    numbered = [m for m in matrices if len(m.shape) == 2 and m.numbers[m.depth] is not None]
    chains = grouped(numbered, lambda leaf: [(leaf.home, leaf.names[leaf.depth])]).values()
    return any(
        sizes[chain[0].shape[0]] == 1 and sizes[chain[-1].shape[-1]] == 1
        for chain in chains
        if len(chain) > 1
    )
