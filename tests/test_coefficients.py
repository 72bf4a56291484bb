"""The quintics: published tables, Polar Express for any bound, and what `method` means."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from teon_optax import polar, polar_express
from teon_optax._polar.coefficients import Method, resolve

# arXiv 2505.16932, for lower bound 1e-3.
PUBLISHED = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
YOU = (
    (3955, -8306, 5008),
    (3735, -6681, 3463),
    (3799, -6499, 3211),
    (4019, -6385, 2906),
    (2677, -3029, 1162),
    (2172, -1833, 682),
)
NAMES = "'polar_express', 'schatten', 'jordan', 'you', 'svd'"


def polynomial(method) -> Method:
    resolved = resolve(method)
    assert resolved is not None
    return resolved


def distance_to_one(triples, lower):
    """sup |p(x) - 1| over [lower, 1]."""
    x = np.geomspace(lower, 1, 20_001)
    return np.abs(oracles.composed(x, triples, norm=1) - 1).max()


def slowed(triples, safety=1.01):
    """All but the last divided by 1.01, 1.01^3, 1.01^5; the first once more, for its norm."""
    times = np.r_[np.ones(len(triples) - 1), 0]
    times[0] += 1
    return np.array(triples) / safety ** np.outer(times, [1, 3, 5])


def test_polar_express_is_the_published_table_to_6_digits():
    # The last published triple is nearest to the limit that all further steps take.
    np.testing.assert_allclose(polar_express(7, 1e-3, safety=1), PUBLISHED, rtol=1e-6)


def test_polar_express_ends_in_the_taylor_quintic():
    np.testing.assert_allclose(polar_express(12, 1e-3)[-1], (15 / 8, -10 / 8, 3 / 8), rtol=1e-9)


def test_a_longer_polar_express_starts_as_a_shorter_one():
    assert polar_express(9)[:4] == polar_express(5)[:4]
    assert polar_express(9, safety=1)[:5] == polar_express(5, safety=1)


@pytest.mark.parametrize(
    "lower", [1e-9, 1e-6, 1e-3, 5e-3, 0.02407, 0.0241, 0.1, 0.5, 0.9, 0.999999]
)
def test_polar_express_converges_for_any_lower_bound(lower):
    # Each step multiplies the lowest value by nearly 4 or more until the interval is short; then
    # some steps of an iteration of order 3 reach the rounding of float64.
    steps = math.ceil(math.log(1 / lower, 3.9)) + 6
    errors = [distance_to_one(polar_express(n, lower, 1), lower) for n in range(1, steps + 1)]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("lower", [0.03, 0.1, 0.5, 0.9])
def test_first_quintic_is_the_best_by_equioscillation(lower):
    """Four extrema of equal size and alternating sign: no odd quintic is nearer to 1."""
    x = np.linspace(lower, 1, 200_001)
    error = oracles.composed(x, polar_express(1, lower, safety=1), norm=1) - 1
    inner = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
    extrema = error[[0, *inner, -1]]
    assert len(extrema) == 4
    np.testing.assert_allclose(extrema, extrema[0] * np.array([1, -1, 1, -1]), rtol=1e-6)


@pytest.mark.parametrize("steps", [np.int64(3), np.int8(3)])
def test_polar_express_takes_integers_of_numpy(steps):
    assert polar_express(steps) == polar_express(3)


@pytest.mark.parametrize("steps", [0, -1, 2.5, 5.0, True, np.int64(0), "5", None])
def test_polar_express_refuses_steps(steps):
    with pytest.raises(
        ValueError, match=r"`polar_express\(steps=.*\)`: steps should be a positive"
    ):
        polar_express(steps)


@pytest.mark.parametrize("lower", [0, 1, -1e-3, 2, math.nan, True, "1e-3", None])
def test_polar_express_refuses_lower_bounds(lower):
    with pytest.raises(ValueError, match=r"`polar_express\(lower=.*\)`: lower should be between"):
        polar_express(5, lower)


@pytest.mark.parametrize("safety", [0.99, 0, -1, math.inf, math.nan, True, "1", None])
def test_polar_express_refuses_safety_factors(safety):
    with pytest.raises(
        ValueError, match=r"`polar_express\(safety=.*\)`: safety should be a number"
    ):
        polar_express(5, 1e-3, safety)


@pytest.mark.parametrize("steps", [1, 2, 8, 12])
@pytest.mark.parametrize("safety", [1.01, 1.1])
def test_safety_divides_what_each_quintic_but_the_last_sees_and_the_norm(steps, safety):
    raw = polar_express(steps, safety=1)
    np.testing.assert_allclose(polar_express(steps, safety=safety), slowed(raw, safety), rtol=1e-12)


def test_polar_express_method_is_the_paper_s():
    """5 steps for 1e-3, the safety factor once, on M / (1.01 |M|_F)."""
    method = polynomial("polar_express")
    np.testing.assert_allclose(method.coefficients, slowed(PUBLISHED[:5]), rtol=1e-6)
    assert method.norm == "frobenius"
    divided = [np.array(t) / 1.01 ** np.array([1, 3, 5]) for t in PUBLISHED[:4]]
    x = np.linspace(0, 1, 101)
    expected = oracles.composed(x, [*divided, PUBLISHED[4]], norm=1.01)
    np.testing.assert_allclose(oracles.composed(x, method.coefficients, norm=1), expected, 1e-5)


def test_schatten_is_4_steps_for_5e_3_from_a_schatten_4_start():
    method = polynomial("schatten")
    raw = polar_express(4, 5e-3, safety=1)
    np.testing.assert_allclose(method.coefficients, slowed(raw), rtol=1e-12)
    assert method.norm == "schatten4"


def test_jordan_is_the_published_table_on_the_plain_frobenius_norm():
    assert resolve("jordan") == (JORDAN, "frobenius")


def test_you_is_the_published_table_over_1024():
    triples, norm = polynomial("you")
    np.testing.assert_allclose(triples, np.array(YOU) / 1024, rtol=1e-15)
    assert norm == "frobenius"


def test_svd_is_no_polynomial():
    assert resolve("svd") is None


def test_a_tuple_of_jordan_s_triples_is_jordan():
    assert resolve(JORDAN) == resolve("jordan")


def test_a_tuple_of_you_s_triples_is_you():
    assert resolve([[n / 1024 for n in triple] for triple in YOU]) == resolve("you")


def test_polar_express_of_5_steps_is_the_method_polar_express():
    assert resolve(polar_express(5)) == resolve("polar_express")


@pytest.mark.parametrize("safety", [1, 1.01])
def test_triples_are_used_as_they_are_given(safety):
    """Also those that rounding makes diverge: what is safe is said by `safety` alone."""
    triples = polar_express(10, 1e-6, safety)
    assert resolve(triples) == (triples, "frobenius")


def test_arrays_of_triples_are_a_method_too():
    triples: Any = np.array(JORDAN)
    assert resolve(triples) == resolve("jordan")


def test_a_method_is_hashable_so_that_it_can_be_static():
    triples: Any = np.array(polar_express(3))
    assert hash(resolve(triples)) == hash(resolve(polar_express(3)))


@pytest.mark.parametrize("method", ["nope", "POLAR_EXPRESS", ""])
def test_an_unknown_name_lists_the_valid_ones(method):
    with pytest.raises(ValueError, match=f"`method='{method}'` is unknown: write one of {NAMES}"):
        resolve(method)


@pytest.mark.parametrize(
    "method",
    [
        (),
        5,
        None,
        (1.0, 2.0, 3.0),
        ((1.0, 2.0),),
        ((1.0, 2.0, 3.0, 4.0),),
        ((1.0, math.nan, 2.0),),
        ((math.inf, 0.0, 0.0),),
        (("a", "b", "c"),),
        ((True, 1, 2),),
        (("1", "2", "3"),),
        np.zeros((0, 3)),
    ],
    ids=repr,
)
def test_what_is_no_tuple_of_triples_is_refused(method):
    with pytest.raises(
        ValueError, match="a non-empty tuple of triples .* of finite numbers"
    ) as error:
        resolve(method)
    assert NAMES in str(error.value)


def test_traced_coefficients_are_told_what_to_name():
    """`optax.inject_hyperparams` makes arrays of what is one, traced ones under `jax.jit`."""
    triples = np.array(polar_express(2))
    words = "coefficients are constants of the program: under `optax.inject_hyperparams`, which"
    with pytest.raises(ValueError, match=words):
        jax.jit(lambda triples: polar(jnp.eye(2), triples))(triples)
    constant: Any = jnp.asarray(triples)
    jax.jit(lambda: polar(jnp.eye(2), constant)).lower()
