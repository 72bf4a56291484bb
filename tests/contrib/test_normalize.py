"""`normalize_matrices` against Muon+ in float64."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from weights import WEIGHTS

from teon_optax import contrib


@pytest.mark.parametrize("holding", WEIGHTS)
@pytest.mark.parametrize("normalize", ["none", "col", "row", "col_row", "row_col"])
def test_normalize_matrices_is_muon_plus(normalize, holding):
    shape, rule, to_weights, back = WEIGHTS[holding]
    update = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    transform: Any = contrib.normalize_matrices([rule], normalize=normalize)
    tree = {"w": jnp.asarray(update), "bias": jnp.ones(3)}
    result, _ = transform.update(tree, transform.init(tree))
    weights = to_weights(np.float64(update))
    if normalize != "none":
        for i, W in enumerate(weights):
            for direction in normalize.split("_"):
                axis = {"col": 0, "row": 1}[direction]
                W = W / np.sqrt(np.sum(W**2, axis=axis, keepdims=True) + 1e-7)
            weights[i] = math.sqrt(W.shape[0] / W.shape[1]) * W
    np.testing.assert_allclose(result["w"], back(weights), rtol=1e-5, atol=1e-6)
    assert result["bias"] is tree["bias"]
    if normalize != "none":
        transform = contrib.normalize_matrices([rule], normalize=normalize, scale=0.2)
        rms = np.sqrt(np.mean(np.square(transform.update(tree, None)[0]["w"])))
        assert rms == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize("normalize", ["rows", None, "none_col"])
def test_an_unknown_normalization_is_refused(normalize):
    with pytest.raises(ValueError, match=r"`normalize=.*` should be one of \('none', 'col'"):
        contrib.normalize_matrices(normalize=normalize)
