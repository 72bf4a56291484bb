"""Plain arrays: their batches, the paper's three unfoldings, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import variants
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from spectra import function_of

from teon_optax import mode_orthogonalize, polar, polar_express

EPS = np.finfo(np.float32).eps


def gaussian(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


def singular_values(kernels, mode=1):
    return np.linalg.svd(oracles.unfolding(kernels, mode), compute_uv=False)


def test_leading_axes_are_a_batch():
    M = gaussian(2, 3, 5, 9)
    result = polar(jnp.float32(M), "svd")
    assert result.shape == M.shape
    for index in np.ndindex(2, 3):
        tolerance = oracles.rounding(singular_values([M[index]]), squared=False)
        assert oracles.distance(result[index], oracles.reshaped_spectrum(M[index])) < tolerance


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((3,), np.float32), r"float32 of shape \(3,\)"),
        (np.zeros((3, 0), np.float32), r"float32 of shape \(3, 0\)"),
        (np.zeros((3, 3), np.int32), r"int32 of shape \(3, 3\)"),
        (np.zeros((3, 3), np.complex64), r"complex64 of shape \(3, 3\)"),
        (np.zeros((3, 3), bool), r"bool of shape \(3, 3\)"),
    ],
    ids=["vector", "empty", "integers", "complex", "booleans"],
)
def test_what_has_no_polar_factor_is_refused(array, found):
    words = r"`polar\(matrix\)` takes a real floating array of at least 2 axes, .*; got " + found
    with pytest.raises(ValueError, match=words):
        polar(array)


def test_polar_refuses_an_unknown_method():
    with pytest.raises(
        ValueError, match="`method='nope'` is unknown: write one of 'polar_express'"
    ):
        polar(jnp.eye(2), "nope")


class ModeOrthogonalizeTest(variants.TestCase):
    @variants.with_and_without_jit
    @parameterized.product(mode=[1, 2, 3], method=["svd", "polynomial"])
    def test_unfolding_of_each_stack_is_orthogonalized_and_folded_back(self, mode, method):
        """T[:, :, k] = W_k is a transposed kernel; no two of m, n and K agree."""
        T = gaussian(2, 4, 7, 3)
        method = "svd" if method == "svd" else polar_express(2, 0.1)
        orthogonalize = functools.partial(mode_orthogonalize, mode=mode, method=method)
        result = self.variant(orthogonalize)(jnp.float32(T))
        function = function_of(method)
        for stack in range(2):
            kernels = [T[stack, :, :, k].T for k in range(3)]
            tolerance = oracles.rounding(singular_values(kernels, mode), method != "svd")
            for k, exact in enumerate(oracles.joint(kernels, mode, function)):
                np.testing.assert_allclose(result[stack, :, :, k], exact.T, atol=tolerance)


@pytest.mark.parametrize("mode", [1, 2])
def test_one_layer_is_muon_in_modes_1_and_2(mode):
    T = jnp.float32(gaussian(4, 7, 1))
    alone = polar(T[:, :, 0], "svd")
    tolerance = oracles.rounding(singular_values([T[:, :, 0]]), squared=False)
    assert oracles.distance(mode_orthogonalize(T, mode, "svd")[:, :, 0], alone) < tolerance


def test_one_layer_in_mode_3_is_its_direction():
    T = jnp.float32(gaussian(4, 7, 1))
    result = mode_orthogonalize(T, 3, "svd")
    np.testing.assert_allclose(result, T / jnp.linalg.norm(T), atol=oracles.rounding([1] * 7))


@pytest.mark.parametrize("mode", [0, 4, -1, "1", None, True, 1.0])
def test_only_modes_1_2_and_3_exist(mode):
    with pytest.raises(
        ValueError, match=r"`mode_orthogonalize\(mode=.*\)`: mode should be 1, 2 or"
    ):
        mode_orthogonalize(jnp.ones((2, 2, 2)), mode)


def test_mode_orthogonalize_refuses_a_matrix():
    words = r"`mode_orthogonalize\(tensor\)` takes .* at least 3 axes, .* shape \(2, 2\)"
    with pytest.raises(ValueError, match=words):
        mode_orthogonalize(jnp.eye(2))


CUTS = [("data",), (None, "data"), ("data", "model"), ("model", "data")]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("method", ["svd", "polar_express"])
def test_a_matrix_that_an_explicit_mesh_cuts_has_its_factor_where_it_lies(method, cut):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    M = jnp.float32(gaussian(4, 8))
    with jax.set_mesh(mesh):
        placed = jax.device_put(M, NamedSharding(mesh, PartitionSpec(*cut)))
        for run in (polar, jax.jit(polar, static_argnames="method")):
            result = run(placed, method=method)
            assert result.sharding.is_equivalent_to(placed.sharding, 2)
            np.testing.assert_allclose(result, polar(M, method), atol=1e-5)


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize(
    "cut", [("data",), (None, "data"), (None, None, "data"), ("model", "data")]
)
def test_a_stack_that_an_explicit_mesh_cuts_has_its_factor_where_it_lies(mode, cut):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    T = jnp.float32(gaussian(4, 6, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(T, NamedSharding(mesh, PartitionSpec(*cut)))
        result = mode_orthogonalize(placed, mode)
        assert result.sharding.is_equivalent_to(placed.sharding, 3)
        np.testing.assert_allclose(result, mode_orthogonalize(T, mode), atol=1e-5)
