"""What a parameter tree shows of a model: siblings, widths, scanned layers."""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import FlattenedIndexKey, GetAttrKey

from teon_optax._rules.names import (
    EMBEDDING,
    LAYERS,
    MULTI_HEAD,
    NORM,
    OUTPUT,
    POSITIONS,
    PROJECTION,
    VECTOR,
    WEIGHT,
    anywhere,
    stem,
)
from teon_optax._rules.paths import leaf_paths


class Leaf(NamedTuple):
    """A leaf as names and shapes tell it; `shape` is one layer's, without `layer_axis`."""

    path: str
    shape: tuple[int, ...]
    array_shape: tuple[int, ...]
    is_float: bool
    box: str = ""  # "haliax" or "penzai": the axes have names, which the path does not show
    layer_axis: int | None = None

    @property
    def keys(self) -> list[str]:
        """The segments of the path."""
        return self.path.split("/")

    @property
    def place(self) -> tuple[str, str]:
        """The path of the module around, and what the leaf (or its own module) is called there."""
        keys = self.keys
        while len(keys) > 1 and (WEIGHT.fullmatch(keys[-1]) or keys[-1].isdecimal()):
            keys.pop()
        return "/".join(keys[:-1]), stem(keys[-1])

    @property
    def is_vector(self) -> bool:
        """Whether it is called as the biases and scales of a layer are."""
        return anywhere(VECTOR, self.keys[-1:]) or NORM.fullmatch(self.place[1]) is not None

    @property
    def hides_axes(self) -> bool:
        """Whether fan_in may come first or last: haliax has both, and the flag is static."""
        return self.box == "haliax" and self.keys[-1] == "weight"


class Tree(NamedTuple):
    """What siblings tell, by the path of a module; "" is the root."""

    weights: dict[tuple[str, str], Leaf]  # by role in the module: "q", "k", "v", "o", or its name
    vectors: dict[str, dict[str, int]]  # sizes of 1-D leaves by name
    above_vectors: set[str]  # modules with a 1-D leaf inside, so not scanned
    vocabularies: set[int]
    modules: set[str]


def leaves_of(params: Any) -> list[Leaf]:
    """Every leaf, in the tree's order, with scanned layers found."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    pairs = zip(leaf_paths(params), flat, strict=True)
    leaves = [_leaf(path, keys, value) for (path, value), (keys, _) in pairs]
    axes = _layer_axes(leaves)
    return [_one_layer(leaf, axes.get(_stack(leaf))) for leaf in leaves]


def _leaf(path: str, keys: tuple, value: Any) -> Leaf:
    shape, dtype = tuple(getattr(value, "shape", ())), getattr(value, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    box = ""
    if keys and isinstance(keys[-1], FlattenedIndexKey):
        box = "haliax"
    elif keys and isinstance(keys[-1], GetAttrKey) and keys[-1].name == "data_array":
        box = "penzai"
    return Leaf(path, shape, shape, is_float, box)


def _stack(leaf: Leaf) -> str:
    """The module above a leaf that is called layers and has no number: scanned, perhaps."""
    keys = leaf.keys
    depth = next((i for i, key in enumerate(keys[:-1]) if anywhere(LAYERS, [key])), None)
    if depth is None or keys[depth][-1].isdecimal() or keys[depth + 1].isdecimal():
        return ""
    return "/".join(keys[: depth + 1])


def _layer_axes(leaves: list[Leaf]) -> dict[str, int]:
    """The scanned modules, each with the one axis that has the same size in all its leaves."""
    stacks: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        if leaf.is_float and (module := _stack(leaf)):
            stacks.setdefault(module, []).append(leaf)
    found = {}
    for module, inside in stacks.items():
        axes = [axis for axis in (0, 1) if _counts_layers(inside, axis)]
        found |= {module: axes[0]} if len(axes) == 1 else {}
    return found


def _counts_layers(inside: list[Leaf], axis: int) -> bool:
    """Whether all leaves have this axis, and without it a norm or bias is as long as a matrix."""
    ranks = {len(leaf.shape) for leaf in inside}
    if min(ranks) < 2 or max(ranks) < 3 or len({leaf.shape[axis] for leaf in inside}) > 1:
        return False
    layer = [_one_layer(leaf, axis) for leaf in inside]
    sizes = {size for leaf in layer if not leaf.is_vector for size in leaf.shape}
    # An axis that norms have as well counts layers, not heads or experts.
    return any(leaf.is_vector and sizes.issuperset(leaf.shape) for leaf in layer)


def _one_layer(leaf: Leaf, axis: int | None) -> Leaf:
    if axis is None or not leaf.is_float:
        return leaf
    shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return leaf._replace(shape=shape, layer_axis=axis)


def _above(path: str) -> Iterator[str]:
    """The modules above a path, the root first."""
    keys = path.split("/")
    return ("/".join(keys[:depth]) for depth in range(len(keys)))


def without_numbers(leaves: Iterable[Leaf]) -> list[tuple[tuple[str, ...], tuple[str | None, ...]]]:
    """Each path in names and numbers: `a/layer_3` is ("a", "layer_"), (None, "3")."""
    children: dict[tuple[str, ...], set[str]] = {}
    paths = [
        [(tuple(map(stem, leaf.keys[:depth])), key) for depth, key in enumerate(leaf.keys)]
        for leaf in leaves
    ]
    for above, key in itertools.chain(*paths):
        children.setdefault(above, set()).add(key)

    def split(above: tuple[str, ...], key: str) -> tuple[str, str | None]:
        if match := re.fullmatch(r"(.*?)(\d+)", key, re.DOTALL):
            return match[1], match[2]
        # Haiku gives the first module of a name no number: block, block_1, block_2.
        is_first = f"{key}_1" in children[above] and f"{key}_0" not in children[above]
        return (f"{key}_", "") if is_first else (key, None)

    pairs = [[split(*step) for step in path] for path in paths]
    return [(tuple(name for name, _ in p), tuple(number for _, number in p)) for p in pairs]


def survey(leaves: Iterable[Leaf]) -> Tree:
    """The siblings of every leaf."""
    tree = Tree({}, {}, set(), set(), set())
    for leaf in leaves:
        if leaf.is_float:
            tree.modules.update(_above(leaf.path))
            _add(tree, leaf)
    return tree


def _add(tree: Tree, leaf: Leaf) -> None:
    home, role = leaf.place
    *module, name = leaf.keys
    if len(leaf.shape) == 1:
        tree.vectors.setdefault("/".join(module), {})[name] = leaf.shape[0]
        tree.above_vectors.update(_above(leaf.path))
    elif len(leaf.shape) > 1 and not leaf.is_vector:
        if match := PROJECTION.fullmatch(role):
            role = match[1][:1]
        tree.weights.setdefault((home, "o" if OUTPUT.fullmatch(role) else role), leaf)
    is_table = len(leaf.shape) == 2 and EMBEDDING.fullmatch(role)
    if is_table and not anywhere(LAYERS, module) and not anywhere(POSITIONS, leaf.keys):
        tree.vocabularies.update(leaf.shape[:1])


def bias_axis(leaf: Leaf, tree: Tree) -> int | None:
    """The axis as long as the bias beside the weight: fan_out, whatever the library."""
    *module, name = leaf.keys
    beside = tree.vectors.get("/".join(module), {})
    if WEIGHT.fullmatch(name):
        beside = {key: size for key, size in beside.items() if key in ("bias", "b")}
    elif not name.isdecimal():  # a list [weight, bias] has numbers for names
        return None
    axes = [axis for axis, size in enumerate(leaf.shape) if size in beside.values()]
    return axes[0] if len(axes) == 1 else None


def heads_of(home: str, tree: Tree) -> tuple[int, int]:
    """Number and size of the heads where a query is (width, heads, size) for certain, or zeros."""
    query, out = tree.weights.get((home, "q")), tree.weights.get((home, "o"))
    if query is None or out is None or len(query.shape) != 3 or query.keys[-1] == "weight":
        return 0, 0
    width, heads, size = query.shape
    block, _, module = home.rpartition("/")
    # With two equal sizes, matrices scanned along one of the axes can have these shapes as well.
    is_certain = (
        len({width, heads, size}) == 3
        or not tree.above_vectors.isdisjoint({home, block or home})
        or MULTI_HEAD.fullmatch(stem(module))
    )
    return (heads, size) if out.shape == (heads, size, width) and is_certain else (0, 0)
