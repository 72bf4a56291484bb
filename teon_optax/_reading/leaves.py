"""What a parameter tree shows of each leaf: its names, its numbers, its scanned layers."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import FlattenedIndexKey, GetAttrKey

from teon_optax._paths import leaf_paths
from teon_optax._reading.names import WEIGHT, letter_of, rows_of, says

Item = TypeVar("Item")
Key = TypeVar("Key")
Names = tuple[str, ...]  # of the segments of a path, numbers left out
HOLE = "\0"  # where a number was in a name
_TUPLE = re.compile(r"(\('?)(.*, .*?)('?\))")  # a key that is a tuple, as text


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf as names and shapes tell it; `shape` is one layer's, without `layer_axis`.

    `names` and `numbers` are the segments of its path taken apart: `a/h3_x` has the names ("a",
    "h\\0_x") and the numbers (None, "3").
    """

    path: str
    shape: tuple[int, ...]
    array_shape: tuple[int, ...]
    is_float: bool
    box: str = ""  # "haliax" or "penzai": the axes have names, which the path does not show
    names: tuple[str, ...] = ()
    numbers: tuple[str | None, ...] = ()
    layer_axis: int | None = None
    scanned: str = ""  # the module whose leaves all have that axis
    is_factor: bool = False  # a "b" beside an "a", so no bias
    is_alone: bool = False  # `q_proj/linear/kernel`, and no other matrix in `q_proj`
    block: str = ""  # `h0_`, where `h0_attn_q` and `h0_up` say it of themselves

    @cached_property
    def segments(self) -> list[str]:
        """Splits the path into the keys that it is made of, those of wrappers included."""
        return _split(self.path)[::2]

    @cached_property
    def separators(self) -> list[str]:
        """Gives what stands before, between and behind the segments."""
        between = _split(self.path)[1::2]
        found = _TUPLE.fullmatch(self.path)
        return [found[1], *between, found[3]] if found else ["", *between, ""]

    @cached_property
    def keys(self) -> list[str]:
        """Gives the segments without those of a wrapper, as of `weight/args/0`."""
        keys = self.segments
        for place in range(len(keys) - 2, 0, -1):
            is_wrapper = keys[place] in ("args", "raw_value") and WEIGHT.fullmatch(keys[place - 1])
            if is_wrapper and all(key.isdecimal() for key in keys[place + 1 :]):
                return keys[:place]
        return keys

    @cached_property
    def places(self) -> list[str]:
        """Joins the keys to the paths of the root, of each module around and of the leaf itself."""
        return [*above([*self.keys, ""])]

    @cached_property
    def place(self) -> str:
        """Joins the keys: the path, however the tree separates them."""
        return self.places[-1]

    @property
    def module(self) -> str:
        """Gives the place of what holds the array."""
        return self.places[-2]

    @cached_property
    def depth(self) -> int:
        """Counts the keys above the leaf, or above the module that holds only its weight.

        That module may be called as a projection, with another inside that has the weight.
        """
        depth = len(self.keys) - 1
        while depth and (WEIGHT.fullmatch(self.keys[depth]) or self.keys[depth].isdecimal()):
            depth -= 1
        return depth - self.is_alone

    @cached_property
    def home(self) -> str:
        """Gives the path of the module around, which for `h0_attn_q` ends with its block, `h0_`."""
        around = self.places[self.depth]
        return f"{around}/{self.block}".lstrip("/") if self.block else around

    @cached_property
    def name(self) -> str:
        """Gives what the leaf, or the module that holds only its weight, is called at home."""
        return self.keys[self.depth].removeprefix(self.block)

    @property
    def weight(self) -> str:
        """Gives what the array of a module is called, nothing where the array has a name itself."""
        return "" if self.is_bare else self.keys[-1]

    @property
    def is_out_first(self) -> bool:
        """Tells whether libraries that call an array so keep fan_out first, as PyTorch does.

        AlphaFold's `weights` are (in, out).
        """
        return self.keys[-1].startswith("weight") and self.keys[-1] != "weights"

    @property
    def is_bare(self) -> bool:
        """Tells whether it is an array at home rather than the weight of a module there."""
        return self.depth == len(self.keys) - 1

    @cached_property
    def is_vector(self) -> bool:
        """Tells whether it is called as the biases and scales of a layer are, or lies in a norm.

        A kernel in a norm is that of a layer which makes its scales.
        """
        name = self.keys[-1]
        is_called = says("vector", name) or (name == "b" and not self.is_factor)
        return is_called or (says("norm", self.name) and self.weight != "kernel")

    def says(self, *rows: str) -> bool:
        """Tells whether its name is in one of these rows of the table of names."""
        return not self.rows.isdisjoint(rows)

    @cached_property
    def rows(self) -> frozenset[str]:
        """Lists the rows of the table of names that its name is in."""
        return rows_of(self.name)

    @cached_property
    def called(self) -> frozenset[str]:
        """Lists the rows of the table of names that any segment of its path is in."""
        return frozenset().union(*map(rows_of, self.keys))

    @cached_property
    def letter(self) -> str:
        """Gives q, k or v for what is called as such a projection, nothing for others."""
        if self.says("projection"):
            return letter_of("projection", self.name)
        is_other = self.says("latent", "fused", "fused pair", "low rank")
        is_inside = self.weight and self.in_attention and not is_other
        return letter_of("in attention", self.name) if is_inside else ""

    @cached_property
    def in_attention(self) -> bool:
        """Tells whether a module around is called attention."""
        return says("attention", *self.keys[: self.depth])

    @property
    def series(self) -> tuple[str, Names]:
        """Gives what the leaves of one module have in common that differ in numbers alone."""
        return self.home, self.names

    @cached_property
    def attention(self) -> str:
        """Gives the place of the module called attention around it, or its home without one.

        Modules inside that are numbered may be heads, each with projections of its own.
        """
        depth = self.depth
        while depth and self.numbers[depth - 1] is None:
            if says("attention", self.keys[depth - 1]):
                return self.places[depth]
            depth -= 1
        return self.home

    @cached_property
    def is_end(self) -> bool:
        """Tells whether it, its module or the one around is called an embedding or a head."""
        return any(says(row, *self.keys[-2:], self.name) for row in ("table", "head"))

    def noun(self, depth: int) -> str:
        """Gives what the module at a depth is called; of a mere number, the module around."""
        return self.names[depth - 1].partition(HOLE)[0] or self.keys[max(depth - 2, 0)]

    @cached_property
    def layer_depths(self) -> list[int]:
        """Lists the depths of the modules around that are called layers or blocks."""
        return [
            depth
            for depth in range(1, len(self.keys))
            if says("layers", self.noun(depth))
            or (self.numbers[depth - 1] is not None and says("layer", self.noun(depth)))
        ]

    @cached_property
    def layer_depth(self) -> int:
        """Gives the first of these depths that is no deeper than the home, 0 without one."""
        return next((depth for depth in self.layer_depths if depth <= self.depth), 0)

    @property
    def is_matrix(self) -> bool:
        """Tells whether one layer's part has two axes or more and no vector's name."""
        return self.is_float and len(self.shape) > 1 and not self.is_vector

    @property
    def is_nameless(self) -> bool:
        """Tells whether the path holds no name at all."""
        is_shared = self.name == "pytree" and self.keys[-2].isdecimal()  # eqx.nn.Shared
        return self.box == "penzai" or is_shared or self.path.isdecimal()

    @property
    def hides_axes(self) -> bool:
        """Tells whether fan_in may come first or last: haliax has both, and the flag is static."""
        return self.box == "haliax" and self.keys[-1] == "weight"


def _split(path: str) -> list[str]:
    """Splits a path at slashes, at dots, and at the commas of a key that is a tuple of strings.

    `flax.traverse_util.flatten_dict` keeps paths as tuples, or with a separator in one key, as
    state dicts of PyTorch do with dots. Segments and separators take turns.
    """
    if found := _TUPLE.fullmatch(path):
        return re.split(r"('?, '?)", found[2])
    return re.split(r"(/|(?<=[\w)\]])\.(?=[A-Za-z_]|\d+(?:[./]|$)))", path)


def grouped(items: Iterable[Item], keys: Callable[[Item], Iterable[Key]]) -> dict[Key, list[Item]]:
    """Lists items by each of their keys, in their order."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        for key in keys(item):
            found.setdefault(key, []).append(item)
    return found


def above(keys: Sequence[str]) -> Iterator[str]:
    """Gives the places of the modules above a leaf, the root first."""
    place = ""
    for key in keys:
        yield place
        place = f"{place}/{key}" if place else key


def leaves_of(params: Any) -> list[Leaf]:
    """Lists every leaf, in the tree's order, with numbers taken apart and scanned layers found."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    pairs = zip(leaf_paths(params), flat, strict=True)
    leaves = [_leaf(path, keys, value) for (path, value), (keys, _) in pairs]
    factors = {leaf.path[:-1] + "b" for leaf in leaves if leaf.keys[-1] == "a"}
    leaves = [
        dataclasses.replace(leaf, names=names, numbers=numbers, is_factor=leaf.path in factors)
        for leaf, (names, numbers) in zip(leaves, _taken_apart(leaves), strict=True)
    ]
    alone = _alone(leaves)
    leaves = [
        dataclasses.replace(leaf, is_alone=True) if leaf.path in alone else leaf for leaf in leaves
    ]
    blocks = _named_blocks(leaves)
    leaves = [
        dataclasses.replace(leaf, block=found[0])
        if (found := _block_in(leaf)) and (leaf.names[: leaf.depth], found[1]) in blocks
        else leaf
        for leaf in leaves
    ]
    axes = _scanned_modules([leaf for leaf in leaves if leaf.is_float])
    return [_one_layer(leaf, axes) for leaf in leaves]


def _leaf(path: str, keys: tuple[Any, ...], value: Any) -> Leaf:
    """Reads a leaf, and the box that hides its axes' names, before its path is taken apart."""
    shape, dtype = tuple(getattr(value, "shape", ())), getattr(value, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    box = ""
    if keys and isinstance(keys[-1], FlattenedIndexKey):
        box = "haliax"
    elif keys and isinstance(keys[-1], GetAttrKey) and keys[-1].name == "data_array":
        box = "penzai"
    return Leaf(path, shape, shape, is_float, box)


def _taken_apart(leaves: Sequence[Leaf]) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Yields the names and numbers of every path.

    A number at the end of a segment always counts as one. One inside (`h0_attn`) does where another
    module beside has the same name with another number. The first module of a name has none in
    Haiku (block, block_1, block_2), so it gets an empty one.
    """
    beside: dict[str, set[str]] = {}
    places = [[re.sub(r"_?\d+", "", module) for module in above(leaf.segments)] for leaf in leaves]
    for leaf, modules in zip(leaves, places, strict=True):
        for module, key in zip(modules, leaf.segments, strict=True):
            beside.setdefault(module, set()).add(key)
    templates: dict[tuple[str, str], set[str]] = {}
    for module, keys in beside.items():
        for key in keys:
            for name, number in _with_holes(key):
                templates.setdefault((module, name), set()).add(number)

    def split(module: str, key: str) -> tuple[str, str | None]:
        if found := re.fullmatch(r"(.*?)(\d+)", key, re.DOTALL):
            return found[1] + HOLE, found[2]
        for name, number in _with_holes(key):
            if len(templates[module, name]) > 1:
                return name, number
        is_first = f"{key}_1" in beside[module] and f"{key}_0" not in beside[module]
        return (f"{key}_{HOLE}", "") if is_first else (key, None)

    known = {(module, key): split(module, key) for module in beside for key in beside[module]}
    for leaf, modules in zip(leaves, places, strict=True):
        pairs = [known[step] for step in zip(modules, leaf.segments, strict=True)]
        yield tuple(name for name, _ in pairs), tuple(number for _, number in pairs)


def _alone(leaves: Sequence[Leaf]) -> set[str]:
    """Finds weights in a module that is the only one inside of a projection, but for adapters."""

    def projections(leaf: Leaf) -> Iterator[str]:
        is_scale = leaf.is_bare and sum(size > 1 for size in leaf.shape) < 2
        if leaf.is_matrix and not is_scale and "low rank" not in leaf.called:
            for module, key in zip(leaf.places[1:], leaf.keys[: leaf.depth], strict=False):
                if not rows_of(key).isdisjoint(("projection", "fused", "output")):
                    yield module

    return {
        held[0].path
        for module, held in grouped(leaves, projections).items()
        if len(held) == 1 and module == held[0].places[held[0].depth] and not held[0].is_bare
    }


def _block_in(leaf: Leaf) -> re.Match[str] | None:
    """Finds `h0_` in a name such as `h0_attn_q`; the match's group is what precedes the number."""
    has_words = HOLE in leaf.names[leaf.depth].rstrip(HOLE)
    return re.match(r"(.*?)\d+_", leaf.keys[leaf.depth]) if has_words else None


def _named_blocks(leaves: Sequence[Leaf]) -> set[tuple[tuple[str, ...], str]]:
    """Finds blocks that names alone show: the modules around, and what precedes the number.

    Several matrices then have each of several numbers.
    """
    found: dict[tuple[Any, ...], dict[str, set[str | None]]] = {}
    for leaf in leaves:
        if leaf.is_matrix and (block := _block_in(leaf)):
            numbers = found.setdefault((leaf.names[: leaf.depth], block[1]), {})
            numbers.setdefault(leaf.names[leaf.depth], set()).add(leaf.numbers[leaf.depth])
    return {
        block
        for block, numbers in found.items()
        if len(numbers) > 1 and all(len(each) > 1 for each in numbers.values())
    }


def _with_holes(key: str) -> Iterator[tuple[str, str]]:
    """Yields, for each number in a segment, the segment with a hole there, and the number."""
    for found in re.finditer(r"\d+", key):
        yield key[: found.start()] + HOLE + key[found.end() :], found[0]


def _scanned_modules(leaves: Sequence[Leaf]) -> dict[str, int]:
    """Finds the outermost modules whose leaves all count layers along one axis, which is 0 or 1."""

    def first_axes(leaf: Leaf) -> set[tuple[int, int]]:
        return {*enumerate(leaf.shape[:2])} if len(leaf.shape) > 1 else set()

    inside = grouped(leaves, lambda leaf: leaf.places[:-1])
    shared = {module: set.intersection(*map(first_axes, held)) for module, held in inside.items()}
    outermost = grouped(leaves, lambda leaf: [m for m in leaf.places[:-1] if shared[m]][:1])
    counted = {
        module: [axis for axis, _ in shared[module] if _counts_layers(held, axis)]
        for module, held in outermost.items()
    }
    return {module: axes[0] for module, axes in counted.items() if len(axes) == 1}


def _counts_layers(inside: Sequence[Leaf], axis: int) -> bool:
    """Tells whether an axis that all leaves have counts layers, rather than heads or experts.

    It does where norms have it too: a vector beside no matrix, which without the axis is as long as
    some side of a matrix. In a module that is called layers, a bias will do.
    """
    around = os.path.commonprefix([leaf.keys[:-1] for leaf in inside])
    if max(len(leaf.shape) for leaf in inside) < 3 or says("experts", *around):
        return False
    is_numbered = any(number is not None for leaf in inside for number in leaf.numbers[:-2])
    is_called = says("layers", *around) and not is_numbered
    weighted = {leaf.module for leaf in inside if len(leaf.shape) > 2}
    sizes, vectors, unnamed = set(), [], {}
    for leaf in inside:
        shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
        is_norm = len(shape) == 1 and leaf.module not in weighted
        if leaf.is_vector and (is_norm or is_called):
            vectors.append(shape)
        elif not leaf.is_vector:
            if is_norm:
                unnamed[leaf.names] = shape
            else:
                sizes.update(shape)
    vectors += [shape for shape, count in Counter(unnamed.values()).items() if count > 1]
    return any({1} != {*shape} <= sizes for shape in vectors)


def _one_layer(leaf: Leaf, axes: dict[str, int]) -> Leaf:
    """Gives a leaf the shape of one layer, if a module around it is scanned along an axis."""
    module = next((m for m in leaf.places[:-1] if m in axes), None)
    if module is None or not leaf.is_float:
        return leaf
    axis = axes[module]
    shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return dataclasses.replace(leaf, shape=shape, layer_axis=axis, scanned=module)
