"""How a polar factor is computed: the precision, restarts and chunks."""

import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teon_optax import Rule, orthogonalize, polar, polar_express
from teon_optax._polar import numerics
from teon_optax._polar.coefficients import resolve
from teon_optax._polar.numerics import (
    Numerics,
    byte_limits,
    chunk_size,
    default_precision,
    restarts,
)

HIGHEST, DEFAULT = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
NEWTON_SCHULZ = ((1.5, -0.5, 0.0),) * 5
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


@pytest.mark.parametrize(
    ("backend", "dtype", "precision"),
    [
        ("cpu", jnp.float32, HIGHEST),
        ("cpu", jnp.float64, HIGHEST),
        ("tpu", jnp.float32, DEFAULT),
        ("tpu", jnp.float64, HIGHEST),
        ("gpu", jnp.float32, DEFAULT),
        ("gpu", jnp.float64, HIGHEST),
    ],
)
def test_products_are_exact_on_cpu_and_in_float64_and_one_pass_elsewhere(backend, dtype, precision):
    assert default_precision(backend, jnp.dtype(dtype)) == precision


@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_precision_that_is_given_stays_and_none_is_chosen_by_dtype(backend, dtype):
    with mock.patch.object(jax, "default_backend", lambda: backend):
        chosen = Numerics(None).of(jnp.dtype(dtype)).precision
        given = Numerics(None, DEFAULT).of(jnp.dtype(dtype)).precision
    assert (chosen, given) == (default_precision(backend, jnp.dtype(dtype)), DEFAULT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_computed_as_float32(dtype):
    assert Numerics(None).of(jnp.dtype(dtype)) == Numerics(None, HIGHEST)


class Device:
    """A device that says of itself what `jax.devices()` would."""

    def __init__(self, **known):
        self.__dict__.update(known)


@pytest.fixture
def on_gpus(monkeypatch):
    """Substitutes the backend and its devices."""

    def substitute(*capabilities):
        known = [{} if each is None else {"compute_capability": each} for each in capabilities]
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [Device(**each) for each in known])
        numerics._has_bf16_products.cache_clear()

    yield substitute
    numerics._has_bf16_products.cache_clear()


BF16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
BY_NAME = jax.lax.DotAlgorithmPreset.BF16_BF16_F32


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        (["8.0"], BY_NAME),
        (["8.9", "9.0"], BY_NAME),
        (["10.0"], BY_NAME),
        (["12.1"], BY_NAME),
        (["7.5"], DEFAULT),
        (["9.0", "7.0"], DEFAULT),
        (["gfx90a"], DEFAULT),
        ([None], DEFAULT),
        ([""], DEFAULT),
    ],
    ids=str,
)
def test_leaves_of_bf16_have_bf16_products_on_gpus_that_have_them(on_gpus, capabilities, precision):
    on_gpus(*capabilities)
    assert Numerics(None).of(BF16).precision == precision
    # Momentum is wider than its leaf, whose dtype decides.
    assert Numerics(None).of(FLOAT32, BF16).precision == precision
    for dtype, leaf in ((FLOAT32, None), (BF16, FLOAT32), (jnp.dtype("float16"), None)):
        assert Numerics(None).of(dtype, leaf).precision == DEFAULT
    assert Numerics(None).of(jnp.dtype("float64"), BF16).precision == HIGHEST
    assert Numerics(None, DEFAULT).of(BF16).precision == DEFAULT


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_leaves_of_bf16_are_as_others_are_elsewhere(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert Numerics(None).of(BF16) == Numerics(None).of(FLOAT32)


def test_devices_are_asked_once(on_gpus, monkeypatch):
    on_gpus("9.0")
    assert Numerics(None).of(BF16).precision == BY_NAME
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("asked again"))
    assert Numerics(None).of(BF16).precision == BY_NAME


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_the_precision_of_a_model_s_products_is_not_that_of_an_update(monkeypatch, backend):
    """That is global: updates would change with how a loss is computed."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    M = jax.ShapeDtypeStruct((8, 20), jnp.float32)
    programs = set()
    for precision in ("highest", "tensorfloat32", "bfloat16", None):
        with jax.default_matmul_precision(precision):
            programs.add(str(jax.make_jaxpr(lambda M: polar(M))(M)))
    assert len(programs) == 1


@pytest.mark.parametrize("shape", [(64, 160), (160, 64)], ids=str)
def test_numerics_restart_their_polynomial_by_shape_and_not_the_svd(shape):
    polynomial = resolve(NEWTON_SCHULZ)
    assert Numerics(polynomial, DEFAULT).restarts(*shape) == (2, 3)
    assert Numerics(polynomial, HIGHEST).restarts(*shape) == (5,)
    assert Numerics(None, HIGHEST).restarts(*shape) == ()


@pytest.mark.parametrize("precision", ["BF16_BF16_F32", jax.lax.DotAlgorithmPreset.BF16_BF16_F32])
def test_products_of_bf16_by_name_are_one_pass(precision):
    named, one_pass = (Numerics(resolve("polar_express"), p) for p in (precision, DEFAULT))
    assert named.restarts(64, 256) == one_pass.restarts(64, 256) == (2, 3)
    assert named.steps((2, 3)) == one_pass.steps((2, 3))
    counts = [each.product_count((2, 3), 4) for each in (named, one_pass)]
    assert counts == [4 * 5 + 2 * 5 + 1] * 2
    kernel = {"kernel": jnp.eye(8)}
    optimizer = orthogonalize([Rule("kernel")], precision=precision)
    updates: Any = optimizer.update(kernel, optimizer.init(kernel))[0]
    np.testing.assert_allclose(updates["kernel"], np.eye(8), atol=0.13)


@pytest.mark.parametrize(
    ("method", "segments"),
    [
        ("polar_express", (5,)),
        ("schatten", (4,)),
        ("fast", (4,)),
        ("jordan", (5,)),
        ("dion", (5,)),
        ("you", (3, 3)),
    ],
)
def test_restarts_of_methods_with_exact_products(method, segments):
    assert Numerics(resolve(method), HIGHEST).restarts(8, 12) == segments


@pytest.mark.parametrize(
    ("triples", "segments"),
    [
        (polar_express(6), (3, 3)),
        (polar_express(7), (3, 2, 2)),
        (polar_express(10), (3, 3, 2, 2)),
        (polar_express(10, 1e-6), (3, 3, 2, 2)),
        (polar_express(30, 1e-12), (3,) * 10),
        # Cubics grow by 1.5: 13 of them by 195, 15 by 438, 17 by 985.
        (NEWTON_SCHULZ * 3, (15,)),
        (NEWTON_SCHULZ * 5, (13, 12)),
        # Where one step alone grows too much, no segment is shorter.
        (((2000.0, 0.0, 0.0),) * 2, (1, 1)),
        # What is enlarged and then made smaller does not stay enlarged, and the other way round.
        (((0.1, 0.0, 0.0), (900.0, 0.0, 0.0), (0.1, 0.0, 0.0)), (3,)),
    ],
    ids=str,
)
def test_a_segment_of_exact_products_is_as_long_as_its_own_coefficients_allow(triples, segments):
    assert restarts(triples, (8, 12), HIGHEST) == segments


def growth(triples):
    """By how much a small singular value is enlarged, where every step enlarges it."""
    return math.prod(a for a, _, _ in triples)


@given(st.integers(1, 30), st.floats(-12, -0.1))
def test_no_segment_of_any_polar_express_grows_beyond_its_bound(steps, exponent):
    triples = polar_express(steps, 10**exponent)
    segments = restarts(triples, (8, 12), HIGHEST)
    ends = np.cumsum(segments)
    growths = [growth(triples[end - n : end]) for end, n in zip(ends, segments, strict=True)]
    assert max(growths[:-1], default=0) <= 256 and growths[-1] <= 1100


@pytest.mark.parametrize(
    ("steps", "segments"),
    [
        (1, (1,)),
        (2, (2,)),
        (3, (2, 1)),
        (4, (2, 2)),
        (5, (2, 1, 2)),
        (7, (2, 1, 2, 2)),
        (8, (2, 2, 2, 2)),
        (11, (2, 1, 2, 2, 2, 2)),
    ],
)
@pytest.mark.parametrize("shape", [(8, 12), (256, 512)], ids=str)
def test_one_pass_products_restart_after_two_steps_where_a_segment_more_costs_little(
    shape, steps, segments
):
    assert restarts(polar_express(steps), shape, DEFAULT) == segments


@pytest.mark.parametrize(("steps", "segments"), [(3, (2, 1)), (4, (2, 2)), (5, (2, 3))])
def test_one_pass_products_of_longer_matrices_join_an_odd_step_to_the_last(steps, segments):
    """There a segment more costs more than the accuracy that it brings."""
    assert restarts(polar_express(steps), (64, 256), DEFAULT) == segments


def test_one_pass_products_join_no_step_where_the_last_two_grow_too_much():
    """Errors of the Gram matrix that they are given grow by half the square of that."""
    assert restarts(polar_express(5, 1e-6), (64, 256), DEFAULT) == (2, 1, 2)
    assert restarts(JORDAN, (64, 256), DEFAULT) == (2, 1, 2)


def test_one_pass_products_join_no_step_where_a_product_more_costs_nothing():
    assert restarts(polar_express(5), (63, 256), DEFAULT) == (2, 1, 2)


@pytest.mark.parametrize(
    ("steps", "segments"),
    [
        (((7.0, -7.0), (6.0, -6.0), (2.0, -1.0)), (1, 2)),
        (((50.0, -1.0),) * 5, (1, 1, 1, 1, 1)),
        (((30.0, -1.0), (1.3, -0.1), (1.3, -0.1), (30.0, -1.0)), (2, 2)),
    ],
    ids=str,
)
def test_no_segment_of_one_pass_products_grows_by_more_than_40(steps, segments):
    assert restarts(steps, (64, 256), DEFAULT) == segments


@given(st.integers(1, 30), st.floats(-12, -0.1), st.sampled_from([(8, 12), (64, 256)]))
def test_segments_of_any_polar_express_keep_the_bounds_of_one_pass_products(steps, exponent, shape):
    triples = polar_express(steps, 10**exponent)
    segments = restarts(triples, shape, DEFAULT)
    for end, length in zip(np.cumsum(segments), segments, strict=True):
        if length == 3:
            assert end == steps and growth(triples[end - 2 : end]) <= 8
        else:
            assert length == 1 or growth(triples[end - length : end]) <= 40


def test_one_pass_products_are_slowed_by_what_their_rounding_may_enlarge():
    """By 5 % a step; at the end of a segment by its growth times 1.5 / 2^8 where that is more."""
    exact, one_pass = (Numerics(resolve("polar_express"), p) for p in (HIGHEST, DEFAULT))
    steps = exact.steps((5,))
    assert steps == polar_express(5)
    for segments, divisors in (
        ((1, 1, 1, 1, 1), (1.05, 1.05, 1.05, 1.05, 1)),
        ((2, 1, 2), (1.05, 1 + 1.5 * growth(steps[:2]) / 256, 1.05, 1.05, 1)),
        ((2, 3), (1.05, 1 + 1.5 * growth(steps[:2]) / 256, 1.05, 1.05, 1)),
    ):
        expected = np.array(steps) / np.array(divisors)[:, None]
        np.testing.assert_allclose(one_pass.steps(segments), expected, rtol=1e-15)
    assert Numerics(None, DEFAULT).steps(()) == ()


@pytest.mark.parametrize("precision", [HIGHEST, DEFAULT], ids=str)
@pytest.mark.parametrize("steps", [1, 4, 5, 12])
def test_nearly_square_matrices_take_the_direct_form(steps, precision):
    for columns in (1000, 1499):
        assert restarts(polar_express(steps), (1000, columns), precision) == (1,) * steps


@pytest.mark.parametrize("precision", [HIGHEST, DEFAULT], ids=str)
def test_from_a_joint_length_of_one_and_a_half_gram_matrices_are_cheaper(precision):
    assert len(restarts(polar_express(5), (8, 12), precision)) < 5


@pytest.mark.parametrize("precision", ["highest", "float32"])
def test_other_names_of_exact_products_take_the_same_restarts(precision):
    assert restarts(polar_express(5), (8, 16), precision) == (5,)


@pytest.mark.parametrize(
    "precision", [None, "default", "bfloat16", "high", jax.lax.Precision.HIGH, "tensorfloat32"]
)
def test_any_other_precision_takes_the_restarts_of_one_pass(precision):
    assert restarts(polar_express(5), (8, 16), precision) == (2, 1, 2)


shapes = st.tuples(st.integers(1, 300), st.integers(1, 3000))


@given(st.integers(1, 40), shapes, st.sampled_from([HIGHEST, DEFAULT]))
def test_segments_sum_to_the_steps(steps, shape, precision):
    segments = restarts(polar_express(steps, 1e-4), shape, precision)
    assert sum(segments) == steps and min(segments) >= 1


@given(st.integers(1, 500), st.integers(0, 600))
def test_a_chunk_is_the_largest_divisor_in_reach(count, most):
    size = chunk_size(count, most)
    limit = max(1, min(most, count))
    in_reach = [d for d in range(1, limit + 1) if count % d == 0 and d > limit / 2]
    assert size == max(in_reach, default=limit)


def test_everything_is_one_chunk_where_it_fits():
    assert chunk_size(24, 24) == chunk_size(24, 1000) == 24


def test_one_matrix_is_taken_at_a_time_where_none_fits():
    assert chunk_size(24, 0) == 1


def test_a_cpu_works_on_what_its_cache_holds_and_an_accelerator_on_more():
    assert byte_limits("cpu") < byte_limits("tpu") == byte_limits("gpu")
    for backend in ("cpu", "tpu"):
        whole, chunk = byte_limits(backend)
        assert whole >= chunk
