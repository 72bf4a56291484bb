"""Modes 1, 2 and 3: how the K matrices of a group become one joint matrix, and K again."""

import jax
import numpy as np

# How [groups, K, batch, fan_in, fan_out] is transposed, so that flattening gives joint matrices.
_ORDERS = {1: (0, 2, 1, 3, 4), 2: (0, 2, 3, 1, 4), 3: (0, 2, 1, 3, 4)}


def joint_shape(K: int, fan_in: int, fan_out: int, mode: int) -> tuple[int, int]:
    """Shape of the mode's unfolding of K matrices (fan_in, fan_out), up to a transposition.

    The paper's W is (fan_out, fan_in), so its mode 1, which shares fan_out, joins kernels along
    fan_in.
    """
    unfoldings = {1: (K * fan_in, fan_out), 2: (fan_in, K * fan_out), 3: (K, fan_in * fan_out)}
    return unfoldings[mode]


def unfold(stacks: jax.Array, mode: int) -> jax.Array:
    """Stacks [groups, K, batch, fan_in, fan_out] to joint matrices [groups x batch, m, n]."""
    _, K, _, fan_in, fan_out = stacks.shape
    return stacks.transpose(_ORDERS[mode]).reshape(-1, *joint_shape(K, fan_in, fan_out, mode))


def fold(joint: jax.Array, shape: tuple[int, ...], mode: int) -> jax.Array:
    """Joint matrices back to stacks of this shape, in which -1 may stand for the groups."""
    order = _ORDERS[mode]
    return joint.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
