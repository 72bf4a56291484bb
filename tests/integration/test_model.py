"""The example's models: sizes, parameter paths, and what a position may see."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from examples.model import GPT, MODELS, attention_logits, rotate
from teon_optax import contrib

SMALL = {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "vocab_size": 31, "context": 12}
SMALL_GPT = dataclasses.replace(MODELS["gpt-small"], **SMALL)
SMALL_LLAMA = dataclasses.replace(MODELS["llama-60m"], **SMALL)
FAMILIES = pytest.mark.parametrize("config", [SMALL_GPT, SMALL_LLAMA], ids=["gpt", "llama"])


@functools.cache
def init(config):
    tokens = jnp.zeros((1, config.context), jnp.int32)
    return jax.jit(GPT(config).init)(jax.random.key(0), tokens)["params"]


@functools.cache
def compiled(config):
    return jax.jit(lambda params, tokens: GPT(config).apply({"params": params}, tokens))


def logits(config, tokens):
    float32 = dataclasses.replace(config, dtype="float32")
    return np.asarray(compiled(config)(init(float32), tokens))


def shapes(config):
    tokens = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
    tree = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }


def random_tokens(config, seed=0):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(2, config.context))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt-small", 124),
        ("gpt-base", 362),
        ("gpt-large", 774),
        ("llama-60m", 58.1),
        ("llama-130m", 134.1),
        ("llama-350m", 368.0),
        ("llama-1b", 1339),
    ],
)
def test_a_model_has_the_parameters_of_its_name(name, millions):
    count = sum(math.prod(shape) for shape in shapes(MODELS[name]).values())
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


def test_paths_name_the_block_and_the_projection():
    paths = shapes(SMALL_LLAMA)
    for block in range(2):
        for name in ("query", "key", "value", "out"):
            assert paths[f"block_{block}/attn/{name}/kernel"] == (16, 16)
        assert paths[f"block_{block}/mlp/up/kernel"] == (16, 24)
        assert paths[f"block_{block}/mlp/gate/kernel"] == (16, 24)
        assert paths[f"block_{block}/mlp/down/kernel"] == (24, 16)
    assert paths["lm_head/kernel"] == (16, 31)


def test_a_gpt_has_positions_and_no_gate_and_ties_its_head():
    paths = shapes(SMALL_GPT)
    assert paths["positions/embedding"] == (12, 16)
    assert not [path for path in paths if re.search("gate|lm_head|bias", path)]


@FAMILIES
def test_no_position_sees_a_later_token(config):
    tokens = random_tokens(config)
    changed = tokens.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % config.vocab_size
    before, after = logits(config, tokens), logits(config, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


@FAMILIES
def test_a_position_sees_the_order_of_earlier_tokens(config):
    tokens = random_tokens(config)
    swapped = tokens.copy()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert not np.allclose(logits(config, tokens)[:, 2:], logits(config, swapped)[:, 2:], atol=1e-7)


@FAMILIES
def test_an_untrained_model_is_undecided(config):
    weights = np.exp(logits(config, random_tokens(config)))
    probabilities = weights / weights.sum(axis=-1, keepdims=True)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=-1)
    np.testing.assert_allclose(entropy, math.log(config.vocab_size), rtol=0.01)


def test_bfloat16_leaves_parameters_and_logits_in_float32():
    config = dataclasses.replace(SMALL_LLAMA, dtype="bfloat16")
    tokens = random_tokens(config)
    exact, rounded = logits(SMALL_LLAMA, tokens), logits(config, tokens)
    params = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def test_rotation_keeps_lengths_and_sees_only_distances():
    vectors = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    repeated = [np.broadcast_to(vector, (1, 9, 1, 8)) for vector in vectors]
    query, key = map(np.asarray, jax.jit(lambda heads: [rotate(x) for x in heads])(repeated))
    lengths = np.linalg.norm(query, axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(vectors[0]) * np.ones((1, 9, 1)), rtol=1e-5)
    scores = np.einsum("bthd,bshd->ts", query, key)
    for distance in range(9):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, np.full_like(diagonal, diagonal[0]), atol=1e-4)
    assert np.ptp(scores[:, 0]) > 0.1


def largest_logits(config, params, tokens):
    """What the model reports, [layers, heads]."""
    model = GPT(config)
    _, sown = jax.jit(lambda p: model.apply({"params": p}, tokens, mutable=["logits"]))(params)
    return attention_logits(sown["logits"])


def test_reported_logits_are_the_largest_that_each_head_attends_by():
    tokens = random_tokens(SMALL_GPT)
    params = jax.tree.map(np.float64, init(SMALL_GPT))
    x = params["embed"]["embedding"][tokens] + params["positions"]["embedding"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    attn = params["block_0"]["attn"]
    q, k = ((x @ attn[name]["kernel"]).reshape(2, 12, 2, 8) for name in ("query", "key"))
    scores = np.einsum("bthd,bshd->hbts", q, k) / np.sqrt(8)
    expected = scores[..., np.tril(np.ones((12, 12), bool))].max((1, 2))
    reported = largest_logits(SMALL_GPT, init(SMALL_GPT), tokens)
    assert reported.shape == (2, 2)
    np.testing.assert_allclose(reported[0], expected, rtol=1e-4)


@pytest.mark.promotes_dtypes
@FAMILIES
@pytest.mark.parametrize("spec", [None, PartitionSpec("data", None), PartitionSpec(None, "data")])
def test_logits_that_grew_past_the_threshold_come_back_below_it(spec, config):
    tokens, threshold = random_tokens(config), 30.0
    params = jax.tree.map(lambda leaf: leaf, init(config))
    for layer in range(config.depth):
        for name in ("query", "key"):
            params[f"block_{layer}"]["attn"][name]["kernel"] *= 100
    if spec is not None:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, spec)
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                jax.device_put(leaf, cut if "attn" in str(path) else whole)
                if "norm" not in str(path)
                else jax.device_put(leaf, whole)
            ),
            params,
        )
    before = largest_logits(config, params, tokens)
    assert (before > 2 * threshold).any()
    transform = contrib.clip_qk(threshold)
    state = transform.init(params)
    # A layer is clipped by the logits that it had on what layers before it made then.
    for _ in range(config.depth):
        reported = largest_logits(config, params, tokens)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(transform.update)(zeros, state, params, attention_logits=reported)
        params = optax.apply_updates(params, updates)
    after = largest_logits(config, params, tokens)
    assert (after <= threshold * (1 + 1e-4)).all()
    assert (after[before > threshold] > threshold / 2).all()
