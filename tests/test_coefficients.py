"""Quintics and cubics: published tables, greedy ones for any bound, and what `method` means."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import scipy.optimize

from teon_optax import polar, polar_express
from teon_optax._polar.coefficients import Method, greedy, resolve

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
NAMES = "'polar_express', 'schatten', 'fast', 'jordan', 'dion', 'you', 'svd'"


def polynomial(method) -> Method:
    resolved = resolve(method)
    assert isinstance(resolved, Method)
    return resolved


def distance_to_one(triples, lower):
    """sup |p(x) - 1| over [lower, 1]."""
    x = np.geomspace(lower, 1, 20_001)
    return np.abs(oracles.composed(x, triples, norm=1) - 1).max()


def slowed(triples, safety=1.01):
    """All but the last divided by 1.01, 1.01^3, 1.01^5; the first once more, for its norm."""
    times = np.r_[np.ones(len(triples) - 1), 0]
    times[0] += 1
    powers = (safety ** (n * np.array([1, 3, 5])) for n in times)
    return [
        np.array(step) / power[: len(step)] for step, power in zip(triples, powers, strict=True)
    ]


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


@pytest.mark.parametrize("steps", [0, -1, 2.5, 5.0, True, np.int64(0), "5", None, 10**9])
def test_polar_express_refuses_steps(steps):
    with pytest.raises(
        ValueError, match=r"`polar_express\(steps=.*\)`: steps should be a positive"
    ):
        polar_express(steps)


@pytest.mark.parametrize("lower", [0, 1, -1e-3, 2, math.nan, True, "1e-3", None])
def test_polar_express_refuses_lower_bounds(lower):
    with pytest.raises(ValueError, match=r"`polar_express\(lower=.*\)`: lower should be between"):
        polar_express(5, lower)


@pytest.mark.parametrize(
    "safety", [0.99, 0, -1, math.inf, math.nan, True, "1", None, 11, 1e61, 1e100, 10**99]
)
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


DEGREES = [(3,), (3, 3), (5, 3), (3, 5), (5, 5, 3, 3), (3, 5, 3, 5), (3,) * 12]


def greedy_by_linear_programs(degrees, lower):
    """The same composition by another way: each polynomial from a linear program on a grid."""
    upper, steps = 1.0, []
    for degree in degrees:
        lowest = max(lower, 0.02407327424182761 * upper if degree == 5 else 0)
        angles = np.linspace(0, np.pi, 2001)
        x = (lowest + upper) / 2 + (upper - lowest) / 2 * np.cos(angles)
        powers = (x / upper)[:, None] ** np.arange(1, degree + 1, 2)
        one, k = np.ones((len(x), 1)), powers.shape[1]
        program = scipy.optimize.linprog(
            np.r_[np.zeros(k), 1],
            A_ub=np.block([[powers, -one], [-powers, -one]]),
            b_ub=np.r_[np.ones(len(x)), -np.ones(len(x))],
            bounds=[(None, None)] * (k + 1),
        )
        step: Any = program.x[:k] / upper ** np.arange(1, degree + 1, 2)
        ends = oracles.composed(np.array([lower, upper]), [step], norm=1)
        step = step * (2 / ends.sum() if lowest > lower else 1)
        steps.append(step)
        lower = oracles.composed(lower, [step], norm=1)
        upper = 2 - lower
    return steps


@pytest.mark.parametrize("lower", [1e-3, 0.0115])
@pytest.mark.parametrize("degrees", DEGREES[:-1], ids=str)
def test_polynomials_of_mixed_degrees_are_what_linear_programs_find(degrees, lower):
    steps = greedy(degrees, lower, 1.0)
    assert [2 * len(step) - 1 for step in steps] == list(degrees)
    found = greedy_by_linear_programs(degrees, lower)
    for step, other in zip(steps, found, strict=True):
        np.testing.assert_allclose(step, other, rtol=1e-4)


@pytest.mark.parametrize("lower", [0.01, 0.1, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("degree", [3, 5])
def test_each_polynomial_is_the_best_by_equioscillation(degree, lower):
    """One extremum more than coefficients, of equal size and alternating sign: none is nearer."""
    (step,) = greedy((degree,), lower, 1.0)
    x = np.linspace(lower, 1, 200_001)
    error = oracles.composed(x, [step], norm=1) - 1
    inner = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
    if degree == 5 and lower < 0.024:  # Kept from the bottom of its interval.
        assert abs(error[0] + error[-1]) < 1e-9
    elif lower < 0.99:
        extrema = error[[0, *inner, -1]]
        assert len(extrema) == len(step) + 1
        signs = (-1.0) ** np.arange(len(extrema))
        np.testing.assert_allclose(extrema, extrema[0] * signs, rtol=1e-6)
    assert np.abs(error).max() < 1.0


def test_any_mix_of_degrees_converges_as_far_as_its_degrees_go():
    for degrees in DEGREES:
        errors = [
            distance_to_one(greedy(degrees[:n], 0.1, 1.0), 0.1) for n in range(1, len(degrees) + 1)
        ]
        assert all(b <= a + 1e-12 for a, b in zip(errors, errors[1:], strict=False))
    assert distance_to_one(greedy(DEGREES[-1], 0.1, 1.0), 0.1) < 1e-6


def test_fast_is_two_quintics_and_two_cubics_from_a_schatten_4_start():
    method = polynomial("fast")
    raw = greedy((5, 5, 3, 3), 0.0115, 1.0)
    for step, expected in zip(method.coefficients, slowed(raw), strict=True):
        np.testing.assert_allclose(step, expected, rtol=1e-12)
    assert method.norm == "schatten4"
    # Without the safety factor, the final error is .12.
    assert abs(distance_to_one(raw, 0.0115) - 0.12) < 5e-3


@pytest.mark.promotes_dtypes
def test_dion_is_the_table_of_optax():
    """As its updates tell: the table itself is private."""
    params = {"w": jnp.float32(np.random.default_rng(0).normal(size=(8, 12)))}
    muon = optax.contrib.muon(1.0, ns_coeffs="dion", nesterov=False, weight_decay=0.0)
    updates: Any = muon.update(params, muon.init(params), params)[0]
    np.testing.assert_allclose(-np.sqrt(12 / 8) * polar(params["w"], "dion"), updates["w"], 0, 1e-5)


def test_pairs_are_cubics_wherever_triples_are_quintics():
    mixed = ((3.0, -3.0, 1.0), (1.5, -0.5), (1.5, -0.5))
    assert resolve(mixed) == (mixed, "frobenius")
    array: Any = np.array(mixed[1:])
    assert resolve(array) == (mixed[1:], "frobenius")
    assert resolve(((3, -3, 1), (1.5, -0.5, 0), (1.5, -0.5))) == resolve(mixed)


@pytest.mark.parametrize(
    "number", [1e39, -1e39, 1e300, 10**400], ids=["1e39", "-1e39", "1e300", "10**400"]
)
def test_coefficients_that_float32_does_not_hold_are_refused(number):
    methods: Any = (((number, 0, 0),), ((1.5, -0.5), (1.0, number)))
    for method in methods:
        with pytest.raises(ValueError, match="which is infinite in float32"):
            resolve(method)


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
        ((1.0,),),
        ((1.0, 2.0, 3.0, 4.0),),
        ((1.0, 2.0, 3.0), (1.0,)),
        ("ab", "abc"),
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
        ValueError, match="a non-empty tuple of triples .* or pairs .* of finite numbers"
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
