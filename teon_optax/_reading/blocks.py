"""Which modules are layers of a network, and how wide the stream between them is."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from teon_optax._reading.leaves import HOLE, Leaf
from teon_optax._reading.names import says

Names = tuple[str, ...]  # of the segments of a path, numbers left out


def is_end(leaf: Leaf) -> bool:
    """Tells whether a leaf, its module or the one around is called an embedding or a head."""
    return says("table", *leaf.keys[-2:], leaf.name) or says("head", *leaf.keys[-2:], leaf.name)


def nouns(leaf: Leaf) -> Iterator[tuple[int, str]]:
    """Yields, for each module above an array, its depth and what stands before its number."""
    for depth in range(1, len(leaf.keys)):
        noun = leaf.names[depth - 1].partition(HOLE)[0]
        yield depth, noun or leaf.keys[max(depth - 2, 0)]


def called_layers(leaf: Leaf) -> Iterator[int]:
    """Yields the depths of the modules above an array that are called layers or blocks."""
    for depth, noun in nouns(leaf):
        is_numbered = leaf.numbers[depth - 1] is not None
        if says("layers", noun) or (is_numbered and says("layer", noun)):
            yield depth


def layer_depth(leaf: Leaf) -> int | None:
    """Finds the depth of the outermost module above a leaf that is called a layer or a block."""
    return next((depth for depth in called_layers(leaf) if depth <= leaf.depth), None)


class Blocks(NamedTuple):
    """Says which modules repeat, as layers do.

    Attributes:
      names: By home, the names on the way to the block that it is in.
      networks: Modules that repeat, but are whole networks.
      twins: Modules, with the same number where all that is inside is the same.
    """

    names: dict[str, Names]
    networks: set[str]
    twins: dict[tuple[str, ...], int]


def repeated_blocks(leaves: Sequence[Leaf]) -> Blocks:
    """Finds the modules that are called layers, or that repeat one inner structure."""
    inside: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves:
        for depth in range(1, leaf.depth + 1):
            if leaf.numbers[depth - 1] is not None:
                inside.setdefault(tuple(leaf.keys[:depth]), []).append(leaf)
    alike: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}
    series: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}
    for module, held in inside.items():
        if len(held) == 1 and len(held[0].names) == len(module) + 1:
            continue  # an array that has a module to itself
        inner = frozenset((leaf.names[len(module) :], leaf.shape) for leaf in held)
        name = held[0].names[len(module) - 1]
        alike.setdefault((module[:-1], name, inner), []).append(module)
        series.setdefault((module[:-1], name), []).append(module)
    found = {key[:2] for key, modules in alike.items() if len(modules) > 1}
    repeated = {module: len(series[key]) for key in found for module in series[key]}
    networks = {module for module in repeated if _is_network(module, inside[module], repeated)}
    listed = {m for m, count in repeated.items() if count == 2 and m[0].isdecimal() and len(m) == 1}
    blocks: dict[str, Names] = {}
    for leaf in leaves:
        depth = layer_depth(leaf)
        if depth is not None and leaf.names[depth] == HOLE and depth < leaf.depth:
            depth += 1
        modules = (tuple(leaf.keys[:d]) for d in range(leaf.depth, 0, -1))
        found = next((m for m in modules if m in repeated and m not in networks | listed), None)
        if found and (not depth or len(found) < depth and not _is_repeated(leaf, depth, repeated)):
            depth = len(found)
        if depth is None and leaf.scanned:
            outermost = leaf.scanned.count("/")
            is_ensemble = says("network", *leaf.keys[outermost : leaf.depth])
            depth = None if is_ensemble else outermost + 1
        if depth is not None:
            blocks[leaf.home] = leaf.names[:depth]
        if leaf.block:
            blocks[leaf.home] = *leaf.names[: leaf.depth], re.sub(r"\d+", HOLE, leaf.block)
    twins = {m: index for index, modules in enumerate(alike.values()) for m in modules}
    return Blocks(blocks, {"/".join(module) for module in networks}, twins)


def _is_repeated(leaf: Leaf, depth: int, repeated: dict[tuple[str, ...], int]) -> bool:
    """Tells whether what is called a layer is one of several, and no part as `MlpBlock_0` is."""
    return leaf.scanned != "" or any(tuple(leaf.keys[:d]) in repeated for d in (depth, depth + 1))


def _is_network(
    module: tuple[str, ...], held: Sequence[Leaf], repeated: dict[tuple[str, ...], int]
) -> bool:
    """Tells whether a module is a whole network, as an ensemble's member is, and no layer.

    It is one if it holds repeated layers itself, a table or a head, or a chain of matrices both
    ends of which have a size that nothing else in the module has.
    """
    depth = len(module)
    matrices = [leaf for leaf in held if leaf.is_matrix]
    name = module[-1] if depth == 1 or not module[-1].isdecimal() else module[-2]
    if len(matrices) > 1 and says("network", name):
        return True
    if any(layer_depth(leaf) is not None for leaf in matrices):
        return any(
            (inner := layer_depth(leaf) or 0) > depth and _is_repeated(leaf, inner, repeated)
            for leaf in matrices
        )
    if any(is_end(leaf) for leaf in matrices):
        return True
    sizes = Counter(size for leaf in matrices for size in set(leaf.shape))
    chains: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf in matrices:
        deeper = [tuple(leaf.keys[:d]) for d in range(depth + 1, leaf.depth + 1)]
        counts = [(repeated.get(m, 0), 1 if len(m) < leaf.depth else 2) for m in deeper]
        if any(count > few and count not in sizes for count, few in counts):  # no experts
            return True
        if len(leaf.shape) == 2 and leaf.numbers[leaf.depth] is not None:
            chains.setdefault((leaf.home, leaf.names[leaf.depth]), []).append(leaf)
    return any(
        sizes[chain[0].shape[0]] == 1 and sizes[chain[-1].shape[-1]] == 1
        for chain in chains.values()
        if len(chain) > 1
    )


def held_by_blocks(leaves: Iterable[Leaf], blocks: dict[str, Names]) -> dict[Names, list[Leaf]]:
    """Lists the leaves that blocks hold, by the names of these: once for all layers."""
    found: dict[Names, dict[tuple[Any, ...], Leaf]] = {}
    for leaf in leaves:
        if leaf.home in blocks:
            found.setdefault(blocks[leaf.home], {}).setdefault((leaf.names, leaf.shape), leaf)
    return {names: [*inside.values()] for names, inside in found.items()}


def stream_width(inside: Iterable[Leaf], matrices: dict[str, list[Leaf]]) -> set[int]:
    """Finds the sizes that occur most in a kind of block: in its matrices and in its norms."""
    counts: Counter[int] = Counter()
    for leaf in inside:
        is_norm = len(leaf.shape) == 1 and leaf.module not in matrices
        if (leaf.is_matrix and not is_end(leaf)) or is_norm:
            weight = 2 if len(leaf.shape) == 2 else 1
            counts.update(dict.fromkeys(leaf.shape, weight))
    most = max(counts.values(), default=0)
    return {size for size, count in counts.items() if count == most > 1}
