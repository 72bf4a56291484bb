"""How a polar factor is computed: the precision, restarts and chunks."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teon_optax._polar.coefficients import resolve
from teon_optax._polar.precision import (
    Numerics,
    chunk_bytes,
    chunk_size,
    default_precision,
    restarts,
    shrinkage,
)

HIGHEST, DEFAULT = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
LONGEST = {HIGHEST: 5, DEFAULT: 3}


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


@pytest.mark.parametrize("shape", [(4, 10), (10, 4)], ids=str)
def test_numerics_restart_their_polynomial_by_shape_and_not_the_svd(shape):
    polynomial = resolve([(1.5, -0.5, 0.0)] * 5)
    assert Numerics(polynomial, DEFAULT).restarts(*shape) == (2, 3)
    assert Numerics(polynomial, HIGHEST).restarts(*shape) == (5,)
    assert Numerics(None, HIGHEST).restarts(*shape) == ()


@pytest.mark.parametrize(
    ("steps", "exact", "one_pass"),
    [
        (1, (1,), (1,)),
        (2, (2,), (2,)),
        (3, (3,), (2, 1)),
        (4, (4,), (2, 2)),
        (5, (5,), (2, 1, 2)),
        (6, (3, 3), (2, 2, 2)),
        (7, (4, 3), (2, 1, 2, 2)),
        (8, (4, 4), (2, 2, 2, 2)),
        (10, (5, 5), (2, 2, 2, 2, 2)),
        (11, (4, 4, 3), (2, 1, 2, 2, 2, 2)),
        (12, (4, 4, 4), (2, 2, 2, 2, 2, 2)),
    ],
)
def test_restarts_of_long_matrices(steps, exact, one_pass):
    assert restarts(steps, 2.0, HIGHEST) == exact
    assert restarts(steps, 2.0, DEFAULT) == one_pass


@pytest.mark.parametrize(("steps", "segments"), [(3, (2, 1)), (4, (2, 2)), (5, (2, 3))])
def test_one_pass_products_of_longer_matrices_join_an_odd_step_to_the_last(steps, segments):
    """There a segment more costs more than the accuracy that it brings."""
    assert restarts(steps, 4.0, DEFAULT) == segments


def test_matrices_get_room_after_a_rounded_segment_of_several_steps_alone():
    assert shrinkage(2, DEFAULT) > 1
    assert shrinkage(1, DEFAULT) == shrinkage(5, HIGHEST) == 1


@pytest.mark.parametrize("precision", [HIGHEST, DEFAULT], ids=str)
@pytest.mark.parametrize("steps", [1, 4, 5, 12])
def test_nearly_square_matrices_take_the_direct_form(steps, precision):
    assert restarts(steps, 1.0, precision) == (1,) * steps
    assert restarts(steps, 1.499, precision) == (1,) * steps


@pytest.mark.parametrize("precision", [HIGHEST, DEFAULT], ids=str)
def test_from_a_joint_length_of_one_and_a_half_gram_matrices_are_cheaper(precision):
    assert len(restarts(5, 1.5, precision)) < 5


@pytest.mark.parametrize("precision", ["highest", "float32"])
def test_other_names_of_exact_products_take_the_same_restarts(precision):
    assert restarts(5, 2.0, precision) == (5,)


@pytest.mark.parametrize(
    "precision", [None, "default", "bfloat16", "high", jax.lax.Precision.HIGH, "tensorfloat32"]
)
def test_any_other_precision_takes_the_restarts_of_one_pass(precision):
    assert restarts(5, 2.0, precision) == (2, 1, 2)


@given(st.integers(1, 60), st.floats(1, 100), st.sampled_from([HIGHEST, DEFAULT]))
def test_segments_sum_to_the_steps_and_are_never_too_long(steps, ratio, precision):
    segments = restarts(steps, ratio, precision)
    assert sum(segments) == steps
    assert 1 <= min(segments) and max(segments) <= LONGEST[precision]


@given(st.integers(1, 60))
def test_no_segment_of_exact_products_is_longer_than_the_first(steps):
    """What the last segment cannot correct, it keeps."""
    segments = restarts(steps, 2.0, HIGHEST)
    assert max(segments) == segments[0] and min(segments) == segments[-1]


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
    assert chunk_bytes("cpu") < chunk_bytes("tpu") == chunk_bytes("gpu")
