"""Gradients as bad days bring them: every method, mode and shape, with stacks of up to 5 layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers
from spectra import function_of

from teon_optax import Rule, orthogonalize, plan, polar_express, teon

METHODS = ["polar_express", "schatten", "fast", "jordan", "dion", "you", "svd"]
MODES = [1, 2, 3]
SHAPES = {"row": (1, 9), "column": (9, 1), "flat": (3, 200), "square": (8, 8), "tall": (32, 8)}
DEPTH, K = 10, 5  # Two groups, in one batch.
HALF, SINGLE = 2e-2, 1e-3


def each_mode_of(methods):
    """One method in one mode is quick."""
    cases = [
        pytest.param(
            (method, mode),
            id=f"{method}-{mode}",
            marks=[] if (method, mode) == (METHODS[0], 1) else [pytest.mark.slow],
        )
        for method in methods
        for mode in MODES
    ]
    return pytest.mark.parametrize("update", cases, indirect=True)


each_method_and_mode = each_mode_of(METHODS)
# Their 16 bits become 32 before anything is computed, by one code for all methods.
a_few_methods_and_each_mode = each_mode_of(METHODS[:2])


def gaussian(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(DEPTH, *shape)) for name, shape in SHAPES.items()}


class Update:
    """Updates of layers along the first axis, as float64; their dtype is that of the gradients."""

    def __init__(self, method, mode):
        self.method, self.mode = method, mode
        transform = orthogonalize([Rule("", stack=K, mode=mode, layer_axis=0)], method=method)
        self.compiled = jax.jit(lambda tree: transform.update(tree, optax.EmptyState())[0])

    def __call__(self, tree, dtype="float32"):
        updates = self.compiled({name: jnp.asarray(leaf, dtype) for name, leaf in tree.items()})
        assert {leaf.dtype for leaf in updates.values()} == {jnp.dtype(dtype)}
        return {
            name: np.asarray(leaf.astype("float32"), np.float64) for name, leaf in updates.items()
        }


@pytest.fixture(scope="module")
def update(request):
    """Of a method in a mode, compiled for float32."""
    update = Update(*request.param)
    update(gaussian())
    return update


def assert_near(updates, expected, tolerance):
    """Relative to each group."""
    for name, leaf in updates.items():
        for group in (slice(K), slice(K, None)):
            difference = np.linalg.norm(leaf[group] - expected[name][group])
            assert difference <= tolerance * np.linalg.norm(expected[name][group]), name


@each_method_and_mode
def test_zero_gradients_give_exactly_zero(update):
    updates = update(
        {name: 0 * leaf for name, leaf in gaussian().items()},
    )
    for leaf in updates.values():
        np.testing.assert_array_equal(leaf, 0)


@each_method_and_mode
def test_a_zero_layer_stays_zero_and_leaves_the_others_their_update(update):
    tree = {name: leaf.copy() for name, leaf in gaussian().items()}
    for leaf in tree.values():
        leaf[1] = 0
    updates = update(tree)
    function = function_of(update.method)
    for name, leaf in tree.items():
        # Vectors of the SVD are accurate to eps times the condition.
        assert np.abs(updates[name][1]).max() <= (1e-4 if update.method == "svd" else 0)
        live = [0, 2, 3, 4]
        fan_in, fan_out = SHAPES[name]
        expected = oracles.joint(leaf[live].astype(np.float32), update.mode, function)
        for layer, matrix in zip(live, expected, strict=True):
            matrix = np.sqrt(fan_out / fan_in) * matrix
            error = np.abs(updates[name][layer] - matrix).max()
            assert error < SINGLE * np.abs(expected).max() * np.sqrt(fan_out / fan_in)


def assert_scale_does_not_matter(update, dtype, tolerance):
    tree = gaussian()
    expected = update(tree, dtype)
    for scale in (1e-30, 1e-10, 1e10, 1e30):
        scaled = {name: scale * leaf for name, leaf in tree.items()}
        assert_near(update(scaled, dtype), expected, tolerance)


@each_method_and_mode
def test_scale_of_gradients_does_not_matter_from_1e_30_to_1e30(update):
    assert_scale_does_not_matter(update, "float32", SINGLE)


@a_few_methods_and_each_mode
def test_scale_of_bfloat16_gradients_does_not_matter_from_1e_30_to_1e30(update):
    assert_scale_does_not_matter(update, "bfloat16", HALF)


@each_method_and_mode
def test_groups_1e25_apart_in_scale_share_a_batch_as_if_alone(update):
    tree = gaussian()
    apart = {name: leaf.copy() for name, leaf in tree.items()}
    for leaf in apart.values():
        leaf[:K] *= 1e-12
        leaf[K:] *= 1e13
    assert_near(update(apart), update(tree), SINGLE)


@each_method_and_mode
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_its_group_and_in_no_other(bad, update):
    tree = gaussian()
    for leaf in tree.values():
        leaf[1, 0, 0] = bad
    updates, expected = update(tree), update(gaussian())
    for name, leaf in updates.items():
        assert not np.isfinite(leaf[:K]).any(), name
        np.testing.assert_array_equal(leaf[K:], expected[name][K:])


@a_few_methods_and_each_mode
def test_float16_gradients_at_the_end_of_their_range(update):
    """Squares of 6e4 are far beyond float16, and so are sums of two."""
    tree = {name: 6e4 * leaf / np.abs(leaf).max() for name, leaf in gaussian().items()}
    small = {name: leaf / 2**12 for name, leaf in tree.items()}
    expected = update(small, "float16")
    assert_near(update(tree, "float16"), expected, HALF)


def subnormal(update, dtype, scale):
    """Updates of subnormal gradients, and of the same gradients times `1 / scale`."""
    tree = {name: np.clip(leaf, -1, 1) for name, leaf in gaussian().items()}
    small = {name: scale * leaf for name, leaf in tree.items()}
    return update(small, dtype), update(tree, dtype)


@each_method_and_mode
def test_subnormal_gradients_give_an_update_or_zero(update):
    """A backend may flush them to zero, and may not make more of them than is there."""
    updates, expected = subnormal(update, "float32", 1e-39)
    for name, leaf in updates.items():
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() < 2 * np.abs(expected[name]).max()


@a_few_methods_and_each_mode
def test_subnormal_float16_gradients_are_worth_the_bits_that_they_have(update):
    """They are normal numbers of float32, with which the library computes; 8 bits remain."""
    assert_near(*subnormal(update, "float16", 2.0**-16), 0.1)


scales = st.floats(-25, 25).map(lambda exponent: 10.0**exponent)
spectra = st.one_of(
    st.floats(0, 6).map(lambda e: np.geomspace(1, 10.0**-e, 8)),
    st.integers(1, 8).map(lambda rank: np.float64(np.arange(8) < rank)),
    st.floats(0, 3).map(lambda power: np.arange(1, 9.0) ** -power),
)


@pytest.mark.slow
@pytest.mark.parametrize("update", [("polar_express", 1)], indirect=True, ids=["polar_express-1"])
@given(spectrum=spectra, scale=scales, seed=st.integers(0, 2**16))
def test_update_in_float32_is_the_method_s_whatever_spectrum_and_scale(
    update, spectrum, scale, seed
):
    """Directions above 5e-3 of the largest are kept above 0.6, and none is enlarged."""
    rng = np.random.default_rng(seed)
    stack = oracles.with_spectrum(rng, K * 8, 8, spectrum)
    tree = gaussian() | {
        "square": np.concatenate([scale * stack.reshape(K, 8, 8), np.ones((2, 8, 8))])
    }
    result = update(tree)["square"][:K].reshape(K * 8, 8)
    assert np.linalg.norm(result, 2) < 1.2
    U, s, Vt = np.linalg.svd(stack, full_matrices=False)
    kept = s >= 5e-3 * s[0]
    along = U[:, kept].T @ result @ Vt[kept].T
    assert np.linalg.eigvalsh((along + along.T) / 2)[0] > 0.6


@pytest.mark.slow
@given(spectra, st.integers(0, 2**16))
def test_12_steps_in_float64_are_accurate_to_1e_9(spectrum, seed):
    spectrum = np.maximum(spectrum, 1e-3)
    M = oracles.with_spectrum(np.random.default_rng(seed), 16, 8, spectrum)
    with jax.enable_x64(True):
        transform: Any = orthogonalize([Rule("")], method=polar_express(12), scale="muon")
        updates, _ = transform.update({"w": jnp.float64(M)}, optax.EmptyState())
    assert updates["w"].dtype == "float64"
    assert oracles.distance(updates["w"], oracles.reshaped_spectrum(M)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.promotes_dtypes
def test_training_in_16_bits_is_that_in_32_but_for_their_rounding(dtype):
    """Gradients, momentum and params, matched and fallback leaves, 3 steps from 6e4 to 6e-5."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 6, 8))
    tree = {"layers": {"kernel": kernel / 10, "bias": np.zeros((4, 8))}}
    optimizer = teon(0.02, [Rule("kernel", stack=2, layer_axis=0), Rule("bias", stack=0)])

    def train(dtype):
        params: Any = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
        state = optimizer.init(params)
        for scale in (6e4, 1.0, 6e-5):
            gradients = np.clip(scale * rng.normal(size=kernel.shape), -6e4, 6e4)
            gradients = {"layers": {"kernel": gradients, "bias": gradients.sum(1) / 1e5}}
            gradients = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), gradients)
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["layers"])

    start = rng.bit_generator.state
    expected = train("float32")
    rng.bit_generator.state = start
    result = train(dtype)
    for name, leaf in result.items():
        moved = np.abs(expected[name] - tree["layers"][name]).max()
        assert moved > 0.01
        # Params themselves are rounded three times, to 8 or 11 bits.
        rounding = 3 * float(jnp.finfo(dtype).eps) * np.abs(expected[name]).max()
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=HALF * moved + rounding)


dims = st.one_of(
    st.none(),
    st.builds(
        MuonDimensionNumbers,
        st.integers(-3, 3) | st.tuples(st.integers(-1, 2), st.integers(0, 3)),
        st.integers(-3, 3),
    ),
)
arguments = st.fixed_dictionaries(
    {
        "pattern": st.sampled_from(["w", r"h_(?P<layer>\d+)", r"(?P<layer>\w)", "(", "", "none"]),
        "stack": st.integers(-1, 3) | st.just(2.0),
        "mode": st.integers(0, 4),
        "dims": dims,
        "layer_axis": st.none() | st.integers(-4, 4),
        "split": st.integers(0, 4) | st.lists(st.integers(0, 4), max_size=3).map(tuple),
    }
)
leaves = st.builds(
    jax.ShapeDtypeStruct,
    st.lists(st.integers(0, 6), max_size=4).map(tuple),
    st.sampled_from(["float32", "bfloat16", "complex64", "int32"]),
)


@given(arguments, st.lists(leaves, min_size=1, max_size=3))
def test_a_rule_fits_its_leaves_or_is_refused_by_name(arguments, leaves):
    params = {f"h_{number}": {"w": leaf} for number, leaf in enumerate(leaves)}
    try:
        rule = Rule(**arguments)
    except ValueError as error:
        pattern = arguments["pattern"]
        assert f"Rule({pattern!r}" in str(error) or f'Rule(r"{pattern}"' in str(error)
        return
    try:
        planned = plan(params, [rule])
    except ValueError as error:
        assert str(rule) in str(error)
        assert any(f"'h_{number}/w'" in str(error) for number in range(len(leaves)))
        return
    members = {
        path.split(":")[0].split("[")[0] for group in planned.groups for path in group.members
    }
    assert members | set(planned.fallback) == {f"h_{n}/w" for n in range(len(leaves))}
    assert not members & set(planned.fallback)
