"""What a state keeps, compared with the updates that it is for."""

from typing import Any

import jax.numpy as jnp

from teon_optax._paths import leaf_paths


def check_kept(name: str, kept: Any, expected: Any) -> None:
    """Raises if arrays of a state, perhaps restored, are not those of such updates.

    NumPy's rules would broadcast an array of another shape in silence.

    Args:
      name: Field of the state that holds the arrays.
      kept: The tree in that field.
      expected: Tree of arrays of the shapes that `kept` should have at the same paths. Where it has
        None, as where a leaf gets no gradient, `kept` may have anything.
    """
    found = {path: jnp.shape(leaf) for path, leaf in leaf_paths(kept)}
    wanted = {path: jnp.shape(leaf) for path, leaf in leaf_paths(expected)}
    for path, shape in wanted.items():
        if found.get(path) != shape:
            has = f"shape {found[path]}" if path in found else "no array"
            raise ValueError(
                f"The state's `{name}` has {has} at {path!r}, where {shape} is needed: this is the "
                "state of another model, or of other rules. Make a new one by `init(params)`, or "
                "restore that of this model and these rules."
            )
