"""How one leaf may hold the paper's weights, W (fan_out, fan_in)."""

import numpy as np
from optax.contrib import MuonDimensionNumbers as D

from teon_optax import Rule

# Shape of the leaf, rule, the weights that it holds, and the leaf that holds such weights.
WEIGHTS = {
    "kernel": ((6, 10), Rule("w"), lambda M: [M.T], lambda W: W[0].T),
    "weight": ((10, 6), Rule("w", dims=D(1, 0)), lambda M: [M], lambda W: W[0]),
    "parts": (
        (6, 10),
        Rule("w", split=(4, 6)),
        lambda M: [M[:, :4].T, M[:, 4:].T],
        lambda W: np.concatenate([each.T for each in W], axis=1),
    ),
    "equal parts": (
        (6, 12),
        Rule("w", split=3),
        lambda M: [part.T for part in np.split(M, 3, axis=1)],
        lambda W: np.concatenate([each.T for each in W], axis=1),
    ),
    "heads": (
        (6, 3, 4),
        Rule("w", dims=D(0, 2), join="heads"),
        lambda M: list(M.transpose(1, 2, 0)),
        lambda W: np.array(W).transpose(2, 0, 1),
    ),
    "scanned, as one matrix": (
        (2, 6, 3, 4),
        Rule("w", 2, dims=D(1, (2, 3)), layer_axis=0),
        lambda M: list(M.reshape(2, 6, 12).transpose(0, 2, 1)),
        lambda W: np.array(W).transpose(0, 2, 1).reshape(2, 6, 3, 4),
    ),
}
