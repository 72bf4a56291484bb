"""Finds where leaves lie on the mesh, by the argument `shardings` and by types."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from teon_optax._arguments import warn_caller
from teon_optax._paths import leaf_paths, paths_of

_UNKNOWN = PartitionSpec(PartitionSpec.UNCONSTRAINED)
_OF_PARAMS = "shardings=jax.tree.map(lambda leaf: leaf.sharding, params)"


class Located(NamedTuple):
    """Says where leaves lie."""

    mesh: Mesh | AbstractMesh
    # By position in the tree, at least of the taken leaves; None is not known.
    specs: Mapping[int, PartitionSpec | None]
    typed: bool  # whether the leaves' types say so (explicit meshes), which operations respect

    @property
    def sizes(self) -> dict[str, int]:
        """Gives the sizes of the axes of the mesh, without those of length 1, which cut nothing."""
        return {name: size for name, size in self.mesh.shape.items() if size > 1}

    def cuts(self, index: int, ndim: int) -> list[tuple[str, ...]] | None:
        """Lists the axes of the mesh that cut each axis of a leaf; None if not all are known."""
        spec, known = self.specs[index], AxisType.Explicit if self.typed else AxisType.Auto
        if spec is None or set(self.mesh.axis_types) != {known}:
            return None
        given = [tuple(filter(self.sizes.__contains__, mesh_axes(names))) for names in spec]
        return given + [()] * (ndim - len(given))

    def gathered(self, index: int, leaf: jax.Array) -> jax.Array:
        """Gathers a leaf whole on every device, if its type would not let it be reshaped."""
        restricted = self.typed and cutting_axes(self.specs[index] or ())
        return self._placed(leaf, PartitionSpec()) if restricted else leaf

    def settled(self, index: int, leaf: jax.Array) -> jax.Array:
        """Holds a leaf, or what is kept of it, such as its momentum, where the leaf lies.

        Types do that on explicit meshes. On others the compiler would else compute it as the
        exchange wants it cut, and leave states there.
        """
        return leaf if self.typed else self._placed(leaf, self.specs[index])

    def entered(self, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Cuts a leaf as it enters the exchange, if typed; else `jax.shard_map` cuts it."""
        return self._placed(leaf, spec) if self.typed else leaf

    def returned(self, index: int, leaf: jax.Array) -> jax.Array:
        """Puts an update where its leaf lay."""
        return self._placed(leaf, self.specs[index])

    def is_mapped(self, leaf: jax.Array) -> bool:
        """Says whether `jax.vmap` maps over an axis that lies along an axis of the mesh.

        Nothing else can then lie along it, and jax says so when it is tried.
        """
        for name, size in self.sizes.items():
            probe = jnp.broadcast_to(jnp.sum(leaf), (size,))
            try:
                self._placed(probe, PartitionSpec(name))
            except Exception:  # jax has no public name for it.
                return True
        return False

    def everywhere(self, count: int) -> "Located":
        """Locates `count` other arrays on this mesh, each whole on every device."""
        return self._replace(specs=dict.fromkeys(range(count), PartitionSpec()))

    def _placed(self, leaf: jax.Array, spec: PartitionSpec | None) -> jax.Array:
        place = jax.sharding.reshard if self.typed else jax.lax.with_sharding_constraint
        return leaf if spec is None else place(leaf, NamedSharding(self.mesh, spec))


def _mesh_of(leaves: Iterable[Any]) -> Mesh | AbstractMesh:
    """Finds the mesh of leaves as far as types tell, or else the context's; it may be empty."""
    meshes = [*(jax.typeof(x).sharding.mesh for x in leaves), jax.sharding.get_abstract_mesh()]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[-1])


def mesh_axes(names: Any) -> tuple[str, ...]:
    """Lists the axes of the mesh in one entry of a spec."""
    known = () if names is None or names is PartitionSpec.UNCONSTRAINED else names
    return (known,) if isinstance(known, str) else tuple(known)


def _pieces(names: Any, mesh: Mesh | AbstractMesh) -> int:
    """Counts the pieces into which axes of the mesh cut an axis of an array."""
    return math.prod(mesh.shape[name] for name in mesh_axes(names))


def cutting_axes(spec: Iterable[Any]) -> list[str]:
    """Lists the axes of the mesh that a spec names."""
    return [name for names in spec for name in mesh_axes(names)]


class Shardings:
    """Holds the argument `shardings`, and whether its absence was noticed."""

    def __init__(self, tree: Any) -> None:
        # None is not known, as in `jax.jit(in_shardings=...)`, but would be no leaf.
        known = jax.tree.map(
            lambda leaf: _UNKNOWN if leaf is None else leaf, tree, is_leaf=lambda leaf: leaf is None
        )
        self._given = None if tree is None else dict(leaf_paths(known))
        self._noticed = False
        for path, leaf in (self._given or {}).items():
            if not isinstance(leaf, (PartitionSpec, Sharding)):
                raise ValueError(
                    f"`shardings` has {leaf!r} at {path!r}, where a `PartitionSpec` or "
                    f"`NamedSharding` should be: write `P('data', None)`, or `{_OF_PARAMS}`."
                )

    def check(self, params: Any, taken: Collection[int]) -> None:
        """Raises what can be known before an update, and notices the absence of shardings."""
        leaves, structure = jax.tree.flatten(params)
        if self._given is None:
            self._notice(structure, leaves, taken)
        else:
            self._specs(structure, leaves, taken, _mesh_of([leaves[index] for index in taken]))

    def locate(
        self, structure: Any, leaves: Sequence[Any], taken: Collection[int]
    ) -> Located | None:
        """Finds where the leaves of a tree lie; None if nothing is known.

        Args:
          structure: The structure of the tree.
          leaves: Its leaves.
          taken: Positions of those that are orthogonalized.

        Raises:
          ValueError: If shardings do not fit the taken leaves, or these are shards of a
            `shard_map`.
        """
        mesh = _mesh_of([leaves[index] for index in taken])
        if AxisType.Manual in mesh.axis_types:
            self._refuse_shards(structure, leaves, taken, mesh)
            if AxisType.Explicit not in mesh.axis_types:
                return None
        if AxisType.Explicit in mesh.axis_types:
            specs = {index: jax.typeof(leaves[index]).sharding.spec for index in taken}
            return Located(mesh, specs, typed=True)
        if self._given is None:
            self._notice(structure, leaves, taken)
            return None
        located = self._specs(structure, leaves, taken, mesh)
        bare = [own for own in self._given.values() if isinstance(own, PartitionSpec)]
        if located is None and any(map(cutting_axes, bare)):
            raise ValueError(
                f"`shardings` has {bare[0]}, but leaves lie on no mesh and none is set (`with "
                "mesh:` sets none): call `update` under `jax.set_mesh(mesh)`, or write "
                "`NamedSharding(mesh, spec)`."
            )
        return located

    def _refuse_shards(
        self,
        structure: Any,
        leaves: Sequence[Any],
        taken: Collection[int],
        mesh: Mesh | AbstractMesh,
    ) -> None:
        """Raises, in a `shard_map`, unless every device is known to have all of each leaf."""
        axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
        manual = [name for name, axis_type in axes if axis_type == AxisType.Manual]

        def varies(value: Any) -> bool:
            return bool(jax.typeof(value).manual_axis_type.varying)

        unchecked = not varies(jax.lax.axis_index(manual[0]))
        shards = [i for i in sorted(taken) if unchecked or self._given or varies(leaves[i])]
        if shards:
            path, leaf = paths_of(structure)[shards[0]], leaves[shards[0]]
            raise ValueError(
                f"This is inside a `jax.shard_map` over {tuple(manual)} (or `jax.pmap`), where "
                f"{path!r}, shape {np.shape(leaf)}, may be a device's own shard of a leaf, which "
                "is not to be orthogonalized alone: call `update` outside, under `jax.jit`. With "
                "`check_vma=True` and no `shardings`, leaves that are whole can be updated inside."
            )

    def _specs(
        self,
        structure: Any,
        leaves: Sequence[Any],
        taken: Collection[int],
        mesh: Mesh | AbstractMesh,
    ) -> Located | None:
        """Finds the shardings of leaves on the mesh of the taken ones; None if there is none."""
        paths = paths_of(structure)
        found = [self._lookup(path) for path in paths]
        named = [found[i] for i in taken if isinstance(found[i], NamedSharding)]
        # One that has devices can be used also where arguments of `jax.jit` lie on none.
        if named and (mesh.empty or named[0].mesh.shape_tuple == mesh.shape_tuple):
            mesh = named[0].mesh
        shapes = [np.shape(leaf) for leaf in leaves]
        wrong = [_problem(shape, own, mesh) for shape, own in zip(shapes, found, strict=True)]
        problems = [
            f"{paths[i]!r}, shape {shapes[i]}: {wrong[i]}" for i in sorted(taken) if wrong[i]
        ]
        if problems:
            raise ValueError(
                "`shardings` does not fit the leaves:\n  "
                + "\n  ".join(problems)
                + f"\nWrite a `PartitionSpec` with at most one entry per axis, or `{_OF_PARAMS}`."
            )
        if mesh.empty:
            return None
        specs = {
            i: None if wrong[i] else _even_spec(shape, found[i], mesh)
            for i, shape in enumerate(shapes)
        }
        return Located(mesh, specs, typed=False)

    def _lookup(self, path: str) -> Any:
        """Finds the sharding at a path, or at the nearest above it: the tree may be a prefix."""
        assert self._given is not None
        while path and path not in self._given:
            path = path.rpartition("/")[0]
        return self._given.get(path)

    def _notice(self, structure: Any, leaves: Sequence[Any], taken: Collection[int]) -> None:
        """Warns once of leaves that are cut in a way that a compiled update cannot see."""
        if self._noticed:
            return
        hidden = [index for index in sorted(taken) if _is_hidden(leaves[index])]
        if hidden:
            self._noticed = True
            path, leaf = paths_of(structure)[hidden[0]], leaves[hidden[0]]
            warn_caller(
                f"{len(hidden)} leaves are cut along axes of a mesh that are of type Auto, which a "
                f"compiled update cannot see: {path!r}, shape {leaf.shape}, {leaf.sharding.spec}, "
                f"for instance. The update is correct but slower: pass `{_OF_PARAMS}`, or make the "
                "mesh with `axis_types=(jax.sharding.AxisType.Explicit, ...)`."
            )


def placed_along(array: jax.Array, leaf: Any) -> jax.Array:
    """Puts an array where a leaf is known to lie, along those axes in which both are as long.

    That is known outside of `jax.jit`, on meshes of type Auto. A state that is made there then lies
    where updates will leave it.
    """
    own = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(own, NamedSharding) or AxisType.Auto not in own.mesh.axis_types:
        return array
    # An array with the axes of a view lies whole on every device.
    lengths = leaf.shape if leaf.ndim == array.ndim else ()
    axes = zip(own.spec, array.shape, lengths, strict=False)
    spec = PartitionSpec(*(names if size == whole else None for names, size, whole in axes))
    return jax.device_put(array, NamedSharding(own.mesh, spec, memory_kind=own.memory_kind))


def splittable(array: jax.Array, axis: int, sizes: Sequence[int]) -> jax.Array:
    """Gathers an array along an axis, unless an explicit mesh cuts parts of these sizes evenly."""
    own = jax.typeof(array).sharding
    pieces = _pieces(own.spec[axis], own.mesh)
    if all(size % pieces == 0 for size in sizes):
        return array
    spec = PartitionSpec(*own.spec[:axis], None, *own.spec[axis + 1 :])
    return jax.sharding.reshard(array, NamedSharding(own.mesh, spec))


def split_axis(array: jax.Array, axis: int, parts: int) -> jax.Array:
    """Splits an axis of n into (parts, n / parts), each part cut as it was: see `splittable`."""
    size = array.shape[axis] // parts
    array = splittable(array, axis, (size,))
    shape = (*array.shape[:axis], parts, size, *array.shape[axis + 1 :])
    spec = jax.typeof(array).sharding.spec
    return _reshaped(array, shape, (*spec[:axis], None, *spec[axis:]))


def merge_axes(array: jax.Array, axis: int) -> jax.Array:
    """Inverts `split_axis`: [.., parts, size, ..] becomes [.., parts x size, ..]."""
    shape = (*array.shape[:axis], -1, *array.shape[axis + 2 :])
    spec = jax.typeof(array).sharding.spec
    return _reshaped(array, shape, (*spec[:axis], *spec[axis + 1 :]))


def _reshaped(array: jax.Array, shape: Sequence[int], spec: Sequence[Any]) -> jax.Array:
    """Reshapes an array; its type (explicit meshes), if it says anything, gets this spec."""
    placed = NamedSharding(jax.typeof(array).sharding.mesh, PartitionSpec(*spec))
    return jnp.reshape(array, shape, out_sharding=placed if cutting_axes(spec) else None)


def as_shardings(shardings: Any) -> Shardings:
    """Checks the argument; one that is checked already keeps what it noticed."""
    return shardings if isinstance(shardings, Shardings) else Shardings(shardings)


def _is_hidden(leaf: Any) -> bool:
    """Tells whether a leaf is cut along axes of type Auto, which its type does not show."""
    own = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    named = isinstance(own, NamedSharding)
    return named and AxisType.Auto in own.mesh.axis_types and not own.is_fully_replicated


def _problem(shape: Sequence[int], own: Any, mesh: Mesh | AbstractMesh) -> str | None:
    """Says what is wrong with a leaf's sharding, if anything is."""
    if own is None:
        return "nothing in `shardings` is at its path or above it"
    if isinstance(own, NamedSharding):
        if own.mesh.shape_tuple != mesh.shape_tuple:
            return f"its mesh {dict(own.mesh.shape)} is not the other leaves' {dict(mesh.shape)}"
        own = own.spec
    if not isinstance(own, PartitionSpec):
        return None
    names = cutting_axes(own)
    if len(own) > len(shape):
        return f"{own} has {len(own)} entries for {len(shape)} axes"
    if len(set(names)) < len(names):
        return f"{own} names an axis of the mesh twice"
    if not mesh.empty and not set(names) <= set(mesh.axis_names):
        return f"{own} names an axis that the mesh {dict(mesh.shape)} does not have"
    return None


def _even_spec(shape: Sequence[int], own: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec | None:
    """Gives the spec if it cuts the shape into equal shards, else None."""
    own = own.spec if isinstance(own, NamedSharding) else own
    if not isinstance(own, PartitionSpec) or PartitionSpec.UNCONSTRAINED in tuple(own):
        return None
    pieces = [_pieces(names, mesh) for names in own]
    even = all(length % count == 0 for length, count in zip(shape, pieces, strict=False))
    return own if even else None
