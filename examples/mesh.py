"""The program of `train_gpt` on a mesh of devices, in one process or several."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from examples import program
from examples.errors import UserError
from examples.options import Options

BATCH_AXES = ("replica", "data")
# What is found in a path first says along which axes of the mesh the leaf's axes are cut. Matrices
# that write to the residual stream are cut the other way round than those that read from it. The
# path of a moment ends as that of its parameter does.
SHARDING_RULES = (
    (r"attn/(query|key|value)/kernel$|mlp/(gate|up)/kernel$", ("data", "model")),
    (r"attn/out/kernel$|mlp/down/kernel$", ("model", "data")),
    (r"(embed|positions)/embedding$", ("model", "data")),
    (r"lm_head/kernel$", ("data", "model")),
)


def make(sizes: dict[str, int] | None) -> Mesh:
    """The mesh of these axes, or of the axis `data`, over all devices of all processes."""
    count = jax.device_count()
    sizes = sizes or {"data": count}
    if math.prod(sizes.values()) != count:
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"--mesh {text} is not made of {count} devices, which is what there is")
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def build(mesh: Mesh, options: Options, vocab_size: int) -> program.Program:
    """The program of `train_gpt` with its state and its batches on the mesh."""
    along = tuple(name for name in BATCH_AXES if name in mesh.shape)
    pieces = int(np.prod([mesh.shape[name] for name in along]))
    if options.batch_size % pieces:
        raise UserError(
            f"--batch-size {options.batch_size} cannot be cut for {pieces} devices of the axes "
            f"{', '.join(along)}"
        )
    single = program.build(options, vocab_size, functools.partial(place, mesh))
    on_mesh = NamedSharding(mesh, PartitionSpec(along or None))

    def with_batch(function: Callable[[Any, Any], Any]) -> Callable[[Any, np.ndarray], Any]:
        """Every process has the whole batch, and gives its devices their part."""
        return lambda state, batch: function(
            state, jax.make_array_from_callback(batch.shape, on_mesh, batch.__getitem__)
        )

    return single._replace(
        train_step=with_batch(single.train_step), eval_step=with_batch(single.eval_step)
    )


def place(mesh: Mesh, tree: Any) -> Any:
    """Shardings by the rules above; an axis that does not divide evenly stays whole."""

    def of_leaf(keys: Any, leaf: Any) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        names = next((names for pattern, names in SHARDING_RULES if re.search(pattern, path)), ())
        sizes = [mesh.shape.get(name, 0) for name in names]
        cut = [
            name if size and length % size == 0 else None
            for name, size, length in zip(names, sizes, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*cut))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)
