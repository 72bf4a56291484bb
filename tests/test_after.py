"""What may follow the polar factor, each against its paper's formula in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as D

from teon_optax import (
    Rule,
    add_cautious_weight_decay,
    normalize_matrices,
    orthogonalize,
    scale_by_normuon,
)

# How leaves hold matrices, and W (fan_out, fan_in) from there and back.
FOLLOWED = {
    "kernel": ((6, 10), Rule("w"), lambda M: [M.T], lambda W: W[0].T),
    "weight": ((10, 6), Rule("w", dims=D(1, 0)), lambda M: [M], lambda W: W[0]),
    "parts": (
        (6, 10),
        Rule("w", split=(4, 6)),
        lambda M: [M[:, :4].T, M[:, 4:].T],
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


@pytest.mark.parametrize("holding", FOLLOWED)
@pytest.mark.parametrize("normalize", ["none", "col", "row", "col_row", "row_col"])
def test_normalize_matrices_is_muon_plus(normalize, holding):
    shape, rule, to_weights, back = FOLLOWED[holding]
    update = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    transform = normalize_matrices([rule], normalize=normalize)
    tree = {"w": jnp.asarray(update), "bias": jnp.ones(3)}
    result, _ = transform.update(tree, transform.init(tree))
    weights = to_weights(np.float64(update))
    if normalize != "none":
        for i, W in enumerate(weights):
            for kind in normalize.split("_"):
                axis = {"col": 0, "row": 1}[kind]
                W = W / np.sqrt(np.sum(W**2, axis=axis, keepdims=True) + 1e-7)
            weights[i] = math.sqrt(W.shape[0] / W.shape[1]) * W
    np.testing.assert_allclose(result["w"], back(weights), rtol=1e-5, atol=1e-6)
    assert result["bias"] is tree["bias"]
    if normalize != "none":
        transform = normalize_matrices([rule], normalize=normalize, scale=0.2)
        rms = np.sqrt(np.mean(np.square(transform.update(tree, None)[0]["w"])))
        assert rms == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize("holding", FOLLOWED)
@pytest.mark.parametrize("rms", [None, 0.2])
def test_scale_by_normuon_is_normuon_on_each_layer(rms, holding):
    shape, rule, to_weights, back = FOLLOWED[holding]
    transform, moments = scale_by_normuon([rule], beta2=0.9, rms=rms), None
    state = types = None
    for step in range(3):
        update = np.random.default_rng(step).normal(size=shape).astype(np.float32)
        tree = {"w": jnp.asarray(update), "bias": jnp.ones(3)}
        state = transform.init(tree) if state is None else state
        types = types or jax.tree.map(jax.typeof, state)
        result, state = transform.update(tree, state)
        assert jax.tree.map(jax.typeof, state) == types
        weights = to_weights(np.float64(update))
        moments = moments or [0.0] * len(weights)
        for i, W in enumerate(weights):
            moments[i] = 0.9 * moments[i] + 0.1 * np.mean(W**2, axis=1, keepdims=True)
            N = W / (np.sqrt(moments[i]) + 1e-10)
            norm = np.linalg.norm(W) if rms is None else rms * math.sqrt(W.size)
            weights[i] = norm * N / np.linalg.norm(N)
        np.testing.assert_allclose(result["w"], back(weights), rtol=1e-5, atol=1e-6)
        assert result["bias"] is tree["bias"]


def test_normuon_of_zero_is_zero_and_16_bits_keep_their_dtype():
    tree = {"w": jnp.zeros((4, 6), "bfloat16")}
    transform = scale_by_normuon([Rule("w")])
    updates, state = transform.update(tree, transform.init(tree))
    assert updates["w"].dtype == "bfloat16" and not updates["w"].any()
    assert state.nu["w"].dtype == "float32" and state.nu["w"].shape == (1, 6)


@pytest.mark.parametrize("decay", [0.1, lambda count: 0.1])
def test_cautious_weight_decay_decays_where_update_and_param_agree(decay):
    rng = np.random.default_rng(2)
    updates, params = ({"w": rng.normal(size=(4, 6)).astype(np.float32)} for _ in range(2))
    updates["w"][0], params["w"][1] = 0, -1e-30
    updates["w"][1] = 1e-30  # the product is no number of float32
    transform = add_cautious_weight_decay(decay)
    result, _ = transform.update(updates, transform.init(params), params)
    u, x = np.float64(updates["w"]), np.float64(params["w"])
    np.testing.assert_allclose(result["w"], u + 0.1 * (u * x >= 0) * x, rtol=1e-6)
    masked = add_cautious_weight_decay(decay, {"w": False})
    result, _ = masked.update(updates, masked.init(params), params)
    np.testing.assert_array_equal(result["w"], updates["w"])
    with pytest.raises(ValueError, match="params"):
        transform.update(updates, transform.init(params))


@pytest.mark.parametrize("normalize", ["rows", None, "none_col"])
def test_an_unknown_normalization_is_refused(normalize):
    with pytest.raises(ValueError, match=r"`normalize=.*` should be one of \('none', 'col'"):
        normalize_matrices(normalize=normalize)


@pytest.mark.promotes_dtypes
def test_all_of_them_chain_after_orthogonalize():
    rng = np.random.default_rng(4)
    params = {name: jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for name in ("q", "k")}
    params["bias"] = jnp.ones(4)
    coupling = [Rule("(?P<slice>q|k)")]
    optimizer = optax.chain(
        optax.trace(0.95, nesterov=True),
        orthogonalize(coupling),
        normalize_matrices(coupling),
        scale_by_normuon(coupling, rms=0.2),
        add_cautious_weight_decay(0.1),
        optax.scale_by_learning_rate(0.02),
    )

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    new, after = step(*step(params, state))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def assert_same_on(mesh, specs, rule, shape):
    """Updates and the second moment, with types that stay."""
    transform = optax.chain(normalize_matrices([rule]), scale_by_normuon([rule]))
    tree = {"w": jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)}
    alone, _ = jax.jit(transform.update)(tree, transform.init(tree))
    for spec in specs:
        put = {"w": jax.device_put(tree["w"], NamedSharding(mesh, spec))}
        with jax.set_mesh(mesh):
            state = transform.init(put)
            result, after = jax.jit(transform.update)(put, state)
        assert jax.tree.map(jax.typeof, (result, after)) == jax.tree.map(jax.typeof, (put, state))
        np.testing.assert_allclose(result["w"], alone["w"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("rule", [Rule("w"), Rule("w", split=2)], ids=str)
def test_what_follows_is_the_same_on_a_mesh(kind, rule):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    assert_same_on(mesh, (P("data", None), P(None, "data")), rule, (8, 16))


@pytest.mark.slow
@pytest.mark.parametrize("split", [8, (11, 5)], ids=str)
def test_a_mesh_may_cut_through_parts(split):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = P(None, ("data", "model")), P("data", "model")
    assert_same_on(mesh, specs, Rule("w", split=split), (4, 16))


def test_the_second_moment_mirrors_params():
    params = {"w": jnp.ones((4, 6)), "bias": jnp.ones(6), "frozen": None}
    transform = scale_by_normuon([Rule("w")])
    state = transform.init(params)
    assert state.nu["bias"] == optax.MaskedNode() and state.nu["frozen"] is None
    marked = optax.tree.map_params(
        transform, lambda leaf: leaf.shape, state, transform_non_params=lambda leaf: "other"
    )
    assert marked.nu["w"] == (1, 6)


@pytest.mark.parametrize("transform", [normalize_matrices, scale_by_normuon])
def test_rules_may_be_a_generator_and_are_checked_at_once(transform):
    tree = {"w": 1.0 + jnp.arange(24.0).reshape(4, 6)}
    once = transform(rule for rule in [Rule("w")])
    first, state = once.update(tree, once.init(tree))
    second, _ = once.update(tree, state)
    assert not jnp.array_equal(first["w"], tree["w"])
    assert not jnp.array_equal(second["w"], tree["w"])
    with pytest.raises(ValueError, match="`rules='w'` should be a tuple of `Rule`"):
        transform("w")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"beta2": 1.0}, "`beta2=1.0` should be a number, at least 0 and less than 1"),
        ({"beta2": "0.9"}, "`beta2='0.9'` should be a number"),
        ({"rms": -0.2}, "`rms=-0.2` should be a number, at least 0"),
        ({"eps": None}, "`eps=None` should be a number"),
        ({"eps": math.nan}, "`eps=nan` should be a number"),
    ],
    ids=str,
)
def test_what_is_no_number_in_range_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        scale_by_normuon(**arguments)
    if "eps" in arguments:
        with pytest.raises(ValueError, match=words):
            normalize_matrices(**arguments)


def test_cautious_weight_decay_passes_what_is_absent():
    updates, params = {"w": jnp.ones(2), "frozen": None}, {"w": jnp.ones(2), "frozen": jnp.ones(3)}
    transform = add_cautious_weight_decay(0.5)
    result, _ = transform.update(updates, transform.init(params), params)
    assert result["frozen"] is None and result["w"].tolist() == [1.5, 1.5]
