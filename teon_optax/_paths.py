"""What rules and plans see of a tree: the paths of leaves, their shapes and dtypes."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from jax.tree_util import FlattenedIndexKey, GetAttrKey

_WRAPPER_ATTRIBUTES = ("value", "data_array")
# Trees and rules that are kept: a program has few, each in two or three dtypes.
_CACHE_SIZE = 64

Result = TypeVar("Result")


class LeafType(NamedTuple):
    """Shape and dtype of a leaf; no dtype for what is no array."""

    shape: tuple[int, ...]
    dtype: Any


def tree_types(tree: Any) -> tuple[Any, tuple[LeafType, ...]]:
    """Finds the structure of a tree, and the types of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, leaf_types(leaves)


def leaf_types(leaves: Sequence[Any]) -> tuple[LeafType, ...]:
    """Finds the types of leaves."""
    types = [LeafType(np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves]
    if not {type(size) for shape, _ in types for size in shape} <= {int}:
        types = [LeafType(_plain(shape), dtype) for shape, dtype in types]
    return tuple(types)


def _plain(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Makes Python's integers of NumPy's, which are equal to them and no JSON."""
    return tuple(int(size) if isinstance(size, np.integer) else size for size in shape)


def cached(function: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps results by structure, types and rules, so that a second trace costs a look-up.

    Nodes of a user's own may hold what cannot be hashed, or not be compared with that of another
    tree, such as NumPy's arrays; such trees are read each time.
    """
    keeping = functools.lru_cache(_CACHE_SIZE)(lambda _, arguments: function(*arguments))

    @functools.wraps(function)
    def call(*arguments: Any) -> Result:
        # An error of the function itself is not kept, and comes again.
        with contextlib.suppress(Exception):
            return keeping(_spelled(arguments), arguments)
        return function(*arguments)

    return call


def _spelled(arguments: tuple[Any, ...]) -> tuple[str, ...]:
    """Writes structures as text: equal keys may read differently, as 1 and True do in a path."""
    return tuple(str(each) for each in arguments if isinstance(each, jax.tree_util.PyTreeDef))


def leaf_paths(tree: Any) -> list[tuple[str, Any]]:
    """Lists every path with its leaf, in the tree's order."""
    leaves, structure = jax.tree.flatten(tree)
    return list(zip(paths_of(structure), leaves, strict=True))


@cached
def paths_of(structure: Any) -> tuple[str, ...]:
    """Lists the paths that rules are searched in, one for each leaf, in the tree's order.

    The path is `keystr` with "/" between keys, without the keys that boxes add at the end: `value`
    of a Flax variable or partitioned box, `data_array` and the flattened index of a named array.
    These have no siblings: `nnx.Optimizer` shows a variable to `init` and its bare array to
    `update`, while a dataclass may call its V projection `value`. None and what `optax.masked` took
    out are no leaves here, though still siblings.
    """

    def is_absent(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    tree = structure.unflatten(range(structure.num_leaves))
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_absent)
    children: dict[tuple[Any, ...], set[Any]] = {}
    for keys, _ in flat:
        for depth, key in enumerate(keys):
            children.setdefault(keys[:depth], set()).add(key)

    def is_wrapper(keys: tuple[Any, ...]) -> bool:
        last = keys[-1]
        is_attribute = isinstance(last, GetAttrKey) and last.name in _WRAPPER_ATTRIBUTES
        only_child = len(children[keys[:-1]]) == 1
        return only_child and (is_attribute or isinstance(last, FlattenedIndexKey))

    paths: list[str] = []
    for keys, leaf in flat:
        if is_absent(leaf):
            continue
        while keys and is_wrapper(keys):
            keys = keys[:-1]
        paths.append(jax.tree_util.keystr(keys, simple=True, separator="/"))
    return tuple(paths)
