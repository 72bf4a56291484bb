"""`scale_by_normuon` against NorMuon in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from weights import WEIGHTS

from teon_optax import Rule, contrib


@pytest.mark.parametrize("holding", WEIGHTS)
@pytest.mark.parametrize("rms", [None, 0.2])
def test_scale_by_normuon_is_normuon_on_each_layer(rms, holding):
    shape, rule, to_weights, back = WEIGHTS[holding]
    transform: Any = contrib.scale_by_normuon([rule], beta2=0.9, rms=rms)
    moments = state = types = None
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
    transform: Any = contrib.scale_by_normuon([Rule("w")])
    updates, state = transform.update(tree, transform.init(tree))
    assert updates["w"].dtype == "bfloat16" and not updates["w"].any()
    assert state.nu["w"].dtype == "float32" and state.nu["w"].shape == (1, 6)


@pytest.mark.parametrize("rms", [None, 0.2])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e19, 1e20, 1e37])
def test_finite_updates_of_any_size_stay_finite_and_keep_their_norm(size, rms):
    update = np.float32(size) * np.random.default_rng(6).uniform(0.1, 1, (4, 6)).astype(np.float32)
    transform: Any = contrib.scale_by_normuon([Rule("w")], rms=rms)
    tree = {"w": jnp.asarray(update)}
    state = transform.init(tree)
    for _ in range(3):
        result, state = transform.update(tree, state)
        length = np.sqrt(np.mean(np.square(np.float64(result["w"]))))
        expected = rms or np.sqrt(np.mean(np.square(np.float64(update))))
        np.testing.assert_allclose(length, expected, rtol=1e-5)
        assert np.isfinite(state.nu["w"]).all()


def test_a_state_of_another_model_or_of_other_rules_is_refused():
    params = {"w": jnp.ones((4, 6)), "v": jnp.ones((2, 3))}
    transform: Any = contrib.scale_by_normuon([Rule("w")])
    state = transform.init(params)

    def update_with(nu):
        return transform.update(params, optax.ScaleByRmsState(nu))

    with pytest.raises(
        ValueError, match=r"`nu` has shape \(4, 6\) at 'w', where shape \(1, 6\) sh"
    ):
        update_with(state.nu | {"w": jnp.ones((4, 6))})
    other: Any = contrib.scale_by_normuon([Rule("v")])
    with pytest.raises(ValueError, match="`nu` has shape .* at 'v', where no array should be"):
        transform.update(params, other.init(params))
    with pytest.raises(ValueError, match="`nu` has no array at 'w', where shape"):
        update_with({"w": optax.MaskedNode(), "v": optax.MaskedNode()})
    frozen, after = transform.update({"w": None, "v": params["v"]}, state)
    assert frozen["w"] is None
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ["beta2", "rms", "eps"])
def test_a_schedule_is_told_who_calls_it(name):
    arguments: Any = {name: lambda count: 0.2}
    words = rf"inject_hyperparams\(scale_by_normuon\)\(\.\.\., {name}=schedule\)"
    with pytest.raises(ValueError, match=words):
        contrib.scale_by_normuon(**arguments)


def test_a_schedule_may_be_injected():
    build: Any = optax.inject_hyperparams(contrib.scale_by_normuon)
    transform = build([Rule("w")], rms=lambda count: 0.3)
    tree = {"w": jnp.ones((4, 6))}
    result, _ = transform.update(tree, transform.init(tree))
    np.testing.assert_allclose(result["w"], 0.3, rtol=1e-6)


def test_the_second_moment_mirrors_params():
    params = {"w": jnp.ones((4, 6)), "bias": jnp.ones(6), "frozen": None}
    transform: Any = contrib.scale_by_normuon([Rule("w")])
    state = transform.init(params)
    assert state.nu["bias"] == optax.MaskedNode() and state.nu["frozen"] is None
    marked: Any = optax.tree.map_params(
        transform, lambda leaf: leaf.shape, state, transform_non_params=lambda leaf: "other"
    )
    assert marked.nu["w"] == (1, 6)


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
        contrib.scale_by_normuon(**arguments)
    if "eps" in arguments:
        with pytest.raises(ValueError, match=words):
            contrib.normalize_matrices(**arguments)
