"""`normalize_matrices` against Muon+ and MuonEq in float64."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from weights import WEIGHTS

from teon_optax import Rule, contrib, orthogonalize


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
                squares = np.sum(W**2, axis=axis, keepdims=True)
                W = W / np.sqrt(squares + 1e-7 * squares.mean())
            weights[i] = math.sqrt(W.shape[0] / W.shape[1]) * W
    np.testing.assert_allclose(result["w"], back(weights), rtol=1e-5, atol=1e-6)
    assert result["bias"] is tree["bias"]
    if normalize != "none":
        transform = contrib.normalize_matrices([rule], normalize=normalize, scale=0.2)
        rms = np.sqrt(np.mean(np.square(transform.update(tree, None)[0]["w"])))
        assert rms == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize("normalize", ["col", "row", "col_row", "row_col"])
@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e-5, 1e20, 1e38])
def test_the_size_of_what_comes_in_does_not_matter(size, normalize):
    matrix = np.random.default_rng(2).uniform(-1, 1, (4, 6)).astype(np.float32)
    matrix[1], matrix[:, 2] = 0, 0  # what is zero stays zero
    # A power of two, so that nothing is rounded where the size changes; no denormal numbers.
    factor = np.float32(2.0 ** np.round(np.log2(size)))
    matrix[np.abs(matrix) < 0.1] = 0
    transform: Any = contrib.normalize_matrices([Rule("w")], normalize=normalize, eps=1e-3)
    expected, _ = transform.update({"w": jnp.asarray(matrix)}, None)
    result, _ = transform.update({"w": jnp.asarray(factor * matrix)}, None)
    assert np.any(expected["w"]) and not np.any(expected["w"][1])
    np.testing.assert_allclose(result["w"], expected["w"], rtol=1e-6)


def test_zero_stays_zero_and_what_is_not_finite_shows():
    transform: Any = contrib.normalize_matrices([Rule("w")])
    result, _ = transform.update({"w": jnp.zeros((2, 3))}, None)
    np.testing.assert_array_equal(result["w"], 0)
    for broken in (np.nan, np.inf):
        result, _ = transform.update({"w": jnp.ones((2, 3)).at[0, 0].set(broken)}, None)
        assert not np.isfinite(result["w"]).all()


def muon_eq(M, direction, svd):
    """Row or column normalization, then the polar factor: MuonEq's direction."""
    axis = {"col": 0, "row": 1}[direction]
    M = M / np.linalg.norm(M, axis=axis, keepdims=True)
    U, _, Vt = svd(M, full_matrices=False)
    return np.sqrt(M.shape[0] / M.shape[1]) * U @ Vt


@pytest.mark.parametrize("holding", WEIGHTS)
@pytest.mark.parametrize("direction", ["row", "col"])
@pytest.mark.parametrize("loss", [1e-5, 1.0])
def test_before_orthogonalize_it_is_muon_eq_whatever_the_loss_is_multiplied_by(
    loss, direction, holding
):
    shape, rule, to_weights, back = WEIGHTS[holding]
    rule = dataclasses.replace(rule, stack=1, join=())
    gradient = loss * np.random.default_rng(5).normal(size=shape).astype(np.float32)
    optimizer: Any = optax.chain(
        contrib.normalize_matrices([rule], normalize=direction), orthogonalize([rule], method="svd")
    )
    tree = {"w": jnp.asarray(gradient)}
    result, _ = optimizer.update(tree, optimizer.init(tree))
    expected = back([muon_eq(W, direction, np.linalg.svd) for W in to_weights(gradient)])
    np.testing.assert_allclose(result["w"], expected, atol=2e-5)


@pytest.mark.parametrize("normalize", ["rows", None, "none_col"])
def test_an_unknown_normalization_is_refused(normalize):
    with pytest.raises(ValueError, match=r"`normalize=.*` should be one of \('none', 'col'"):
        contrib.normalize_matrices(normalize=normalize)
