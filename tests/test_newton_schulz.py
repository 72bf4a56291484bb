"""Batches of matrices: against U p(S) V^T in float64, for every method, shape and spectrum."""

import collections
import functools
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import variants
from absl.testing import parameterized
from oracles import distance, rounding
from spectra import function_of

from teon_optax import polar, polar_express
from teon_optax._polar.coefficients import resolve
from teon_optax._polar.newton_schulz import orthogonalize_batches, orthogonalize_columns
from teon_optax._polar.numerics import Numerics
from tests.emulation import with_products_in

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
POLYNOMIALS = {
    "polar_express": "polar_express",
    "schatten": "schatten",
    "fast": "fast",
    "jordan": "jordan",
    "dion": "dion",
    "you": "you",
    "own triples": polar_express(2, 0.3),
}
SHAPES = {"square": (12, 12), "wide": (12, 30), "tall": (30, 12)}
SPECTRUM = np.geomspace(1, 0.1, 12)
EPS = float(np.finfo(np.float32).eps)


def tolerance(s, method, eps=EPS):
    return rounding(s, method != "svd", eps)


def example(shape, singular_values):
    m, n = shape
    return oracles.with_spectrum(np.random.default_rng(0), m, n, singular_values)


class PolarTest(variants.TestCase):
    @variants.with_and_without_jit
    @parameterized.parameters("svd", "polar_express")
    def test_result_is_the_method_s_function_of_the_singular_values(self, method):
        M = example(SHAPES["wide"], SPECTRUM)
        result = self.variant(functools.partial(polar, method=method))(jnp.float32(M))
        exact = oracles.reshaped_spectrum(M, function_of(method))
        self.assertLess(distance(result, exact), tolerance(SPECTRUM, method))


@pytest.mark.parametrize("method", ["svd", "polar_express"])
@pytest.mark.parametrize("shape", ["square", "tall"])
def test_square_and_tall_matrices_are_as_exact_as_wide_ones(shape, method):
    M = example(SHAPES[shape], SPECTRUM)
    exact = oracles.reshaped_spectrum(M, function_of(method))
    assert distance(polar(jnp.float32(M), method), exact) < tolerance(SPECTRUM, method)


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomial_is_as_near_to_the_polar_factor_as_its_coefficients_say(name):
    M = example(SHAPES["wide"], SPECTRUM)
    result = polar(jnp.float32(M), POLYNOMIALS[name])
    p = function_of(POLYNOMIALS[name])
    error = np.abs(p(SPECTRUM) - 1).max()
    assert distance(result, oracles.reshaped_spectrum(M)) < error + rounding(SPECTRUM)
    # The same, without the slack of the polynomial's own error.
    assert distance(result, oracles.reshaped_spectrum(M, p)) < rounding(SPECTRUM)


HARD = {
    **{f"condition 1e{e}": np.geomspace(1, 10.0**-e, 32) for e in range(1, 7)},
    **{f"rank {rank}": np.ones(rank) for rank in (1, 5, 16)},
    **{f"rank {rank}, condition 1e3": np.geomspace(1, 1e-3, rank) for rank in (5, 16)},
}


def at_ends_of_intervals(triples):
    """Singular values that some step maps to the end of the next step's interval."""
    x = np.geomspace(1e-13, 1, 20_001)
    found, y = [np.ones(1)], x
    for triple in triples[:-1]:
        y = oracles.composed(y, [triple], norm=1)
        found.append(x[1:-1][(y[1:-1] >= y[:-2]) & (y[1:-1] >= y[2:])])
    return np.concatenate(found)


def searched(rng, d, triples):
    """[spectra, d], of Frobenius norm 1: powers, levels, and ends of intervals beside the rest."""
    spectra = [np.geomspace(1, 10.0**-e, d) for e in np.arange(3, 12, 0.25)]
    for _ in range(60):
        levels = np.r_[1, 10.0 ** rng.uniform(-6, 0, 2)]
        spectra.append(levels[np.sort(rng.integers(0, 3, d))] * (np.arange(d) < rng.integers(1, d)))
    ends = at_ends_of_intervals(triples)
    for value in np.r_[1.0, rng.choice(ends, min(len(ends), 150), replace=False)]:
        copies = rng.integers(1, 4)
        rest = np.r_[np.full(copies, value), rng.choice([0, 1e-6, 1e-4]), np.zeros(d)][: d - 1]
        spectra.append(np.r_[np.sqrt(max(1 - np.sum(rest**2), 0.01)), rest])
    spectra = np.array([s if s.any() else np.eye(d)[0] for s in spectra])
    return spectra / np.linalg.norm(spectra, axis=1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (16, 256)], ids=str)
@pytest.mark.parametrize(
    ("steps", "lower"),
    [(7, 1e-4), (12, 1e-3), (10, 1e-6), (20, 1e-6), (15, 1e-8), (6, 1e-12), (30, 1e-12)],
)
def test_no_spectrum_makes_any_polar_express_diverge(steps, lower, shape):
    """Rounding lifts singular values above intervals on which the next quintic converges."""
    rng, triples = np.random.default_rng(0), polar_express(steps, lower)
    spectra = searched(rng, min(shape), triples)
    matrices = oracles.with_spectrum(rng, shape[0], shape[1], spectra)
    results = np.asarray(polar(jnp.float32(matrices), triples), np.float64)
    exact = oracles.composed(np.geomspace(1e-13, 1, 20_001), triples, norm=1).max()
    assert np.linalg.norm(results, 2, axis=(1, 2)).max() < 1.1 * exact


@pytest.mark.parametrize("peak", [1e-44, 1e-38, 1e-30, 1e30, 3.4e38])
def test_one_entry_beyond_all_others_leaves_an_update_neither_infinite_nor_zero(peak):
    M = np.random.default_rng(0).normal(size=(4, 8, 12)).astype(np.float32)
    M[:, 3, 5] = peak
    for method in (polar_express(20, 1e-8), "schatten"):
        results = np.asarray(polar(jnp.asarray(M), method), np.float64)
        largest = np.linalg.norm(results, 2, axis=(1, 2))
        assert 0.8 < largest.min() and largest.max() < 1.15


# One is worked off in the direct form, the other in segments of Gram matrices.
FORMS = {"direct": (32, 32), "segments": (32, 64)}


@functools.cache
def of_hard_spectra(form, steps):
    matrices = [example(FORMS[form], s) for s in HARD.values()]
    results = polar(jnp.float32(np.stack(matrices)), polar_express(steps))
    return dict(zip(HARD, zip(matrices, np.asarray(results, np.float64), strict=True), strict=True))


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("form", FORMS)
def test_12_steps_in_float32_hold_for_any_condition_and_rank(form, name):
    _, result = of_hard_spectra(form, 12)[name]
    # In exact arithmetic 12 steps for 1e-3 leave the largest value at 1; where rounding errors
    # grow, it reaches 1e30.
    assert 1 - rounding([1] * 32) < np.linalg.norm(result, 2) < 1.05


@pytest.mark.parametrize("name", ["condition 1e1", "condition 1e2"])
@pytest.mark.parametrize("form", FORMS)
def test_12_steps_in_float32_give_the_polar_factor_of_a_well_conditioned_matrix(form, name):
    M, result = of_hard_spectra(form, 12)[name]
    error = np.abs(function_of(polar_express(12))(HARD[name]) - 1).max()
    bound = error + rounding(HARD[name])
    assert distance(result, oracles.reshaped_spectrum(M)) < bound < 0.05


def test_5_steps_in_one_segment_hold_for_any_condition_and_rank():
    p = function_of(polar_express(5))
    for M, result in of_hard_spectra("segments", 5).values():
        largest = p(np.linalg.svd(M, compute_uv=False)).max()
        assert np.linalg.norm(result, 2) < largest + 0.05


def test_the_svd_keeps_directions_of_a_zero_singular_value_at_zero():
    M = example((16, 24), np.ones(5))
    exact = oracles.reshaped_spectrum(M, lambda s: s > 0.5)
    assert distance(polar(jnp.float32(M), "svd"), exact) < rounding([1] * 16)


@pytest.mark.parametrize("method", ["svd", "polar_express", "schatten", "fast", "jordan"])
def test_zero_gives_zero(method):
    np.testing.assert_array_equal(polar(jnp.zeros((12, 30)), method), np.zeros((12, 30)))


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-40, 2.0**40, 2.0**127])
def test_length_of_the_matrix_does_not_matter(factor):
    M = jnp.float32(example((12, 30), SPECTRUM))
    np.testing.assert_array_equal(polar(factor * M), polar(M))


def test_16_bit_matrices_are_worked_on_in_float32():
    M = jnp.asarray(example((12, 30), SPECTRUM), "bfloat16")
    result = polar(M)
    exact = oracles.reshaped_spectrum(M, function_of("polar_express"))
    assert result.dtype == "bfloat16"
    # One rounding to the result's dtype: half an eps in each number.
    last = float(jnp.finfo("bfloat16").eps) / 2 * np.linalg.norm(exact)
    s = np.linalg.svd(np.asarray(M, np.float64), compute_uv=False)
    assert distance(result, exact) < rounding(s) + last


@pytest.mark.parametrize("method", ["svd", "polar_express"])
def test_float64_stays_float64(method):
    M = example((12, 30), SPECTRUM)
    with jax.enable_x64(True):
        result = polar(jnp.float64(M), method)
    assert result.dtype == jnp.float64
    exact = oracles.reshaped_spectrum(M, function_of(method))
    assert distance(result, exact) < tolerance(SPECTRUM, method, float(np.finfo(np.float64).eps))


@pytest.mark.parametrize("count", [300, 301], ids=["two equal chunks", "a chunk and a remainder"])
def test_a_batch_beyond_the_cache_gives_what_its_matrices_give_alone(count):
    M = np.random.default_rng(2).normal(size=(count, 24, 40)).astype(np.float32)
    assert M.nbytes > 2**20
    method = POLYNOMIALS["own triples"]
    results = np.asarray(polar(jnp.asarray(M), method))
    for one, result in zip(M, results, strict=True):
        s = np.linalg.svd(one, compute_uv=False)
        assert distance(result, oracles.reshaped_spectrum(one, function_of(method))) < rounding(s)


NORMS = {"polar_express": 2, "schatten": 4, "fast": 4, "svd": 2}


def orthogonalized(batch, method, eps, numerics=None):
    numerics = numerics or Numerics(resolve(method))
    return orthogonalize_batches([jnp.asarray(batch, jnp.float32)], [1.0], numerics, eps)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", NORMS)
def test_eps_shortens_a_factor_by_n_over_n_plus_eps(method, shape):
    """n is the norm that the method divides by: Frobenius, or Schatten-4."""
    M = example(SHAPES[shape], SPECTRUM)
    lengths = np.array([1e-12, 1e-8, 1e-4, 1.0, 1e30])
    batch = lengths[:, None, None] * M
    n = lengths * np.linalg.norm(SPECTRUM, NORMS[method])
    exact = oracles.reshaped_spectrum(M, function_of(method))
    for result, each in zip(orthogonalized(batch, method, 1e-8), n, strict=True):
        bound = tolerance(SPECTRUM, method) + 4 * EPS
        assert distance(result, each / (each + 1e-8) * exact) < bound


@pytest.mark.parametrize("method", NORMS)
@pytest.mark.parametrize("eps", [0, 0.0, None])
def test_an_eps_of_zero_makes_no_other_program(method, eps):
    batch = jax.ShapeDtypeStruct((2, 12, 30), jnp.float32)
    numerics = Numerics(resolve(method))

    def program(*eps):
        run = lambda M: orthogonalize_batches([M], [1.0], numerics, *eps)  # noqa: E731
        return jax.jit(run).lower(batch).as_text()

    assert program(eps) == program()
    assert program(1e-8) != program()


@pytest.mark.parametrize("peak", [0.0, 1e-44, 1e-38, 1e-30, 1e30, 3.4e38])
@pytest.mark.parametrize("eps", [1e-30, 1e-8, 1.0])
def test_eps_gives_numbers_for_every_magnitude(peak, eps):
    M = jnp.full((1, 8, 12), peak)
    (result,) = np.asarray(orthogonalized(M, "polar_express", eps), np.float64)
    n = float(np.float32(peak)) * np.sqrt(96)
    exact = oracles.composed(1.0, polar_express(5), norm=1) * n / (n + eps)
    # Below 1e-38 some machines have no numbers: what is zero there has a factor of zero.
    assert abs(np.linalg.norm(result, 2) - exact) < rounding([1] * 8) or (
        peak < 1e-38 and not result.any()
    )


def test_a_traced_eps_is_as_good_as_a_number():
    M = 1e-9 * example((12, 30), SPECTRUM)[None]
    traced = jax.jit(functools.partial(orthogonalized, method="schatten"))(M, eps=1e-8)
    np.testing.assert_allclose(traced, orthogonalized(M, "schatten", 1e-8), rtol=1e-5, atol=1e-7)


BF16 = jax.lax.DotAlgorithmPreset.BF16_BF16_F32


def on(backend):
    return mock.patch.object(jax, "default_backend", lambda: backend)


@pytest.mark.parametrize("shape", [(9, 9), (9, 21), (65, 193)], ids=str)
@pytest.mark.parametrize("method", ["polar_express", "schatten", "fast"])
def test_bf16_products_by_name_are_those_that_one_pass_of_bf16_is(method, shape):
    """Operands are rounded before products read them, or in each: the numbers are the same."""
    M = jnp.float32(np.random.default_rng(0).normal(size=(2, *shape)))
    results = []
    for precision in (BF16, jax.lax.Precision.DEFAULT):
        numerics = Numerics(resolve(method), precision)
        run = functools.partial(orthogonalized, method=method, eps=0, numerics=numerics)
        with on("gpu"):
            results.append(np.asarray(with_products_in("bf16", run)(M)))
    np.testing.assert_array_equal(*results)


def roundings(jaxpr):
    """How often each matrix becomes one of bf16, and how many operands of products are of bf16."""
    counts, operands = collections.Counter(), 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"] == jnp.bfloat16:
            counts[eqn.invars[0]] += 1
        if eqn.primitive.name == "dot_general":
            assert {var.aval.dtype for var in eqn.invars} == {jnp.dtype("bfloat16")}
            assert eqn.outvars[0].aval.dtype == jnp.float32
            operands += 2
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            more = roundings(inner)
            counts, operands = counts + more[0], operands + more[1]
    return counts, operands


@pytest.mark.parametrize("shape", [(8, 8), (8, 16), (64, 192)], ids=str)
def test_a_matrix_that_several_products_of_bf16_read_is_rounded_once(shape):
    numerics = Numerics(resolve("polar_express"), BF16)
    run = functools.partial(orthogonalized, method=None, eps=0, numerics=numerics)
    with on("gpu"):
        counts, operands = roundings(jax.make_jaxpr(run)(jnp.zeros((1, *shape))).jaxpr)
    assert set(counts.values()) == {1} and len(counts) < 0.8 * operands


def test_on_a_cpu_bf16_products_by_name_have_operands_of_float32():
    """XLA has no product of two bf16 matrices in float32 there."""
    run = functools.partial(orthogonalized, method=None, eps=0)
    numerics = Numerics(resolve("polar_express"), BF16)
    jaxpr = jax.make_jaxpr(functools.partial(run, numerics=numerics))(jnp.zeros((1, 10, 25)))
    assert "bf16[" not in str(jaxpr)


def test_chunks_are_shortened_one_by_one():
    rng = np.random.default_rng(2)
    M = rng.normal(size=(300, 24, 40)) * 10.0 ** rng.uniform(-12, 0, (300, 1, 1))
    result = np.asarray(orthogonalized(M, "jordan", 1e-8), np.float64)
    n = np.linalg.norm(M, axis=(1, 2))[:, None, None]
    alike = np.asarray(orthogonalized(M, "jordan", 0), np.float64)
    np.testing.assert_allclose(result, n / (n + 1e-8) * alike, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("method", ["polar_express", "schatten"])
def test_columns_of_several_devices_have_the_eps_of_the_whole_matrix(method, devices):
    """With 8 devices a column is shorter than high: every step multiplies it twice."""
    M = 1e-8 * example((12, 32), SPECTRUM)
    numerics = Numerics(resolve(method)).of(jnp.dtype("float32"))

    def on_a_device(columns):
        total, largest = (lambda x: jax.lax.psum(x, "x")), (lambda x: jax.lax.pmax(x, "x"))
        return orthogonalize_columns(columns, 2.0, total, largest, numerics, 1e-8)

    columns = jnp.float32(M.reshape(12, devices, -1).swapaxes(0, 1))
    result = jax.vmap(on_a_device, axis_name="x")(columns).swapaxes(0, 1).reshape(12, 32)
    n = 1e-8 * np.linalg.norm(SPECTRUM, NORMS[method])
    exact = 2 * n / (n + 1e-8) * oracles.reshaped_spectrum(M, function_of(method))
    assert distance(result, exact) < 2 * tolerance(SPECTRUM, method)


def test_the_derivative_of_a_shortened_factor_is_that_of_the_formula():
    M = 1e-8 * np.eye(4)[None]
    function = lambda t: orthogonalized(t * jnp.float32(M), "jordan", 1e-8).sum()  # noqa: E731
    n = 2e-8
    slope = 4 * oracles.composed(0.5, JORDAN, norm=1) * n * 1e-8 / (n + 1e-8) ** 2
    np.testing.assert_allclose(jax.grad(function)(1.0), slope, rtol=1e-4)


def function_of_a_matrix(M):
    """Frobenius norms of one, in the matrix's own directions."""
    return M / jnp.linalg.norm(M, axis=(1, 2), keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_function_is_a_method(shape):
    M = 1e3 * example(SHAPES[shape], SPECTRUM)
    seen = []

    def method(batch):
        seen.append((batch.shape, batch.dtype))
        return function_of_a_matrix(batch)

    result = polar(jnp.asarray(M, jnp.bfloat16), method)
    given = np.asarray(jnp.asarray(M, jnp.bfloat16), np.float64)
    np.testing.assert_allclose(
        np.asarray(result, np.float64), given / np.linalg.norm(given), rtol=2e-2, atol=1e-6
    )
    # Not higher than wide, in float32, and as they are: a function may depend on their length.
    assert seen == [((1, *sorted(SHAPES[shape])), jnp.float32)]
    np.testing.assert_array_equal(polar(jnp.float32(M), lambda M: M), np.float32(M))


def test_the_norm_beside_eps_is_frobenius_where_a_function_is_the_method():
    M = 1e-8 * example((12, 30), SPECTRUM)[None]
    n = np.linalg.norm(M)
    result = orthogonalized(M, function_of_a_matrix, 1e-8)
    np.testing.assert_allclose(result, M / n * n / (n + 1e-8), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda M: M[:, :, :-1], r"float32\[1, 3, 4\]"),
        (lambda M: M.swapaxes(1, 2), r"float32\[1, 5, 3\]"),
        (lambda M: M[0], r"float32\[3, 5\]"),
        (lambda M: M.astype(jnp.bfloat16), r"bfloat16\[1, 3, 5\]"),
        (lambda M: 1.0, r"float32\[\]"),
    ],
)
def test_a_function_that_changes_shape_or_dtype_is_refused(function, found):
    with pytest.raises(
        ValueError, match=r"made of matrices of float32\[1, 3, 5\] what has " + found
    ):
        polar(jnp.ones((3, 5)), function)


def exact_derivative(M, dM):
    """Of U V^T, by differences in float64 of 24 digits that cancel to 16."""
    h = 1e-5
    ahead, behind = (oracles.reshaped_spectrum(M + t * dM) for t in (h, -h))
    return (ahead - behind) / (2 * h)


@pytest.mark.parametrize(
    "M",
    [np.eye(3), 5 * np.eye(3, 6), np.diag([2.0, 2.0, 1.0]), example((4, 7), [2, 1, 1, 0.5])],
    ids=["identity", "wide", "two equal", "wide, two equal"],
)
def test_the_svd_s_derivative_exists_where_singular_values_are_equal(M):
    """That of U and V does not: the polar factor's does, on all matrices of full rank."""
    dM = np.random.default_rng(1).normal(size=M.shape)
    weights = np.random.default_rng(2).normal(size=M.shape)
    with jax.enable_x64(True):
        run = functools.partial(polar, method="svd")
        _, forward = jax.jvp(run, (jnp.float64(M),), (jnp.float64(dM),))
        backward = jax.grad(lambda M: jnp.vdot(weights, run(M)))(jnp.float64(M))
    expected = exact_derivative(M, dM)
    np.testing.assert_allclose(forward, expected, atol=1e-8)
    np.testing.assert_allclose(np.vdot(backward, dM), np.vdot(weights, expected), atol=1e-8)


@pytest.mark.parametrize("method", [*NORMS, "jordan"])
@pytest.mark.parametrize("M", [np.eye(3), np.zeros((3, 3)), np.ones((3, 5))], ids=str)
def test_gradients_are_finite_also_of_what_has_no_derivative(method, M):
    gradient = jax.grad(lambda M: polar(M, method).sum())(jnp.float32(M))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("method", [polar_express(1), polar_express(2), "polar_express", "fast"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 12), (64, 192)], ids=str)
def test_without_jit_the_numbers_are_the_same(method, shape, backend):
    """`jax.disable_jit` runs loops in Python, and refuses one of length zero."""
    M = jnp.float32(np.random.default_rng(0).normal(size=shape))
    with on(backend):
        compiled = polar(M, method)
        with jax.disable_jit():
            np.testing.assert_allclose(polar(M, method), compiled, atol=1e-4)
