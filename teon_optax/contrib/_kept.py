"""What a state keeps, compared with the updates that it is for."""

from typing import Any

import jax
import numpy as np

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
    found = _shapes(kept)
    wanted = _shapes(expected)
    with_absent = _shapes(jax.tree.map(lambda leaf: 0, expected, is_leaf=lambda leaf: leaf is None))
    for path in sorted(found.keys() | wanted.keys()):
        has, needs = (
            f"shape {shapes[path]}" if path in shapes else "no array" for shapes in (found, wanted)
        )
        if has != needs and (path in wanted or path not in with_absent):
            raise ValueError(
                f"The state's `{name}` has {has} at {path!r}, where {needs} should be: this is the "
                "state of another model, or of other rules. Make a new one by `init(params)`, or "
                "restore that of this model and these rules."
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Lists the shape of every leaf by its path."""
    return {path: np.shape(leaf) for path, leaf in leaf_paths(tree)}
