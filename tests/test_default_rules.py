"""Which rules a tree gets: a table of model families, Flax models, and what is refused."""

import re
import warnings
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, default_rules, plan
from teon_optax._paths import leaf_paths

# No two sizes agree, so that a wrong reading cannot look right: width, heads, their size, both
# together, key-value heads, hidden, vocabulary, scanned layers, experts, positions, LoRA rank.
D, H, K, A, G, F, V, L, E, N, R = 6, 4, 5, 20, 2, 14, 19, 3, 8, 7, 9
LAST = "fallback"


def s2(fan_in, fan_out):
    return "TEON", fan_in, fan_out


def muon(fan_in, fan_out):
    return "Muon", fan_in, fan_out


def under(prefix, rows, suffix=""):
    return {f"{prefix}{path}{suffix}": row for path, row in rows.items()}


def turned(rows):
    """Matrices stored (out, in)."""
    return {path: (shape[::-1], verdict) for path, (shape, verdict) in rows.items()}


def scanned(rows, axis):
    return {
        path: ((*shape[:axis], L, *shape[axis:]), verdict)
        for path, (shape, verdict) in rows.items()
    }


# Path -> (shape, verdict). `*` is 0, 1, 2; `@` is Haiku's nothing, _1, _2.
QKV = {
    "query": ((D, A), s2(D, A)),
    "key": ((D, G * K), s2(D, G * K)),
    "value": ((D, G * K), s2(D, G * K)),
}
ATTENTION = QKV | {"out": ((A, D), muon(A, D))}
HEADS = {
    "query": ((D, H, K), s2(D, A)),
    "key": ((D, G, K), s2(D, G * K)),
    "value": ((D, G, K), s2(D, G * K)),
    "out": ((H, K, D), muon(A, D)),
}
HEAD_BIASES = {
    "query/bias": ((H, K), LAST),
    "key/bias": ((G, K), LAST),
    "out/bias": ((D,), LAST),
}
MLP = {"up": ((D, F), muon(D, F)), "down": ((F, D), muon(F, D))}
VECTORS = {"ln/scale": ((D,), LAST), "up/bias": ((F,), LAST)}
BLOCK = under("attn/", ATTENTION, "/kernel") | under("", MLP, "/kernel") | VECTORS
HEADS_BLOCK = under("attn/", HEADS, "/kernel") | under("attn/", HEAD_BIASES) | VECTORS
T5 = {name[0]: row for name, row in ATTENTION.items()}
LLAMA = under("self_attn/", {f"{name}_proj": row for name, row in T5.items()}, "/kernel")

FAMILIES = {
    "linen": under("Block_*/", BLOCK)
    | {
        "Embed_0/embedding": ((V, D), LAST),
        "pos_embedding": ((1, N, D), LAST),
        "learned/pos_embedding": ((N, D), LAST),
        "cls": ((1, 1, D), LAST),
        "lm_head/kernel": ((D, V + 1), LAST),
    },
    "linen with a nameless head": under("Block_*/", BLOCK)
    | {"Embed_0/embedding": ((V, D), LAST), "Dense_0/kernel": ((D, V), LAST)},
    "linen MLP": {
        "Embed_0/embedding": ((V, D), LAST),
        "Dense_0/kernel": ((D, F), muon(D, F)),
        "Dense_1/kernel": ((F, D), muon(F, D)),
        "Dense_2/kernel": ((D, V), LAST),
    },
    "widths of tables that are no vocabulary": {
        "pos_embed/embedding": ((N, D), LAST),
        "block_0/relative_bias/embedding": ((R, D), LAST),
        "Dense_0/kernel": ((D, N), muon(D, N)),
        "Dense_1/kernel": ((D, R), muon(D, R)),
    },
    "a hidden layer as wide as the vocabulary": {
        "embed/embedding": ((V, D), LAST),
        "block_*/up/kernel": ((D, V), muon(D, V)),
    },
    "linen MultiHeadDotProductAttention": under(
        "Block_*/MultiHeadDotProductAttention_0/", under("", HEADS, "/kernel") | HEAD_BIASES
    ),
    "linen SelfAttention": under("Block_*/SelfAttention_0/", HEADS, "/kernel"),
    "linen MultiHeadAttention, whole variables": under(
        "params/Block_*/MultiHeadAttention_0/", HEADS, "/kernel"
    ),
    "linen remat": under("CheckpointBlock_*/", BLOCK),
    "linen list in setup": under("blocks_*/", BLOCK),
    "linen attention without blocks": under("SelfAttention_*/", HEADS, "/kernel"),
    "one block": under("block/", HEADS_BLOCK | {"attn/query/kernel": ((D, H, K), muon(D, A))})
    | under("block/attn/", {"key/kernel": ((D, G, K), muon(D, G * K))})
    | under("block/attn/", {"value/kernel": ((D, G, K), muon(D, G * K))}),
    "scanned along axis 0": under("layers/", scanned(BLOCK, 0)),
    "scanned along axis 1": under("layers/", scanned(BLOCK, 1)),
    "scanned heads along axis 0": under("layers/", scanned(HEADS_BLOCK, 0)),
    "scanned heads along axis 1": under("layers/", scanned(HEADS_BLOCK, 1)),
    "scanned linen attention": under(
        "layers/", scanned(under("MultiHeadDotProductAttention_0/", HEADS, "/kernel"), 0)
    )
    | {"layers/LayerNorm_0/scale": ((L, D), LAST)},
    "scanned norms alone": {
        "layers/LayerNorm_0/scale": ((L, D), LAST),
        "layers/up/bias": ((L, F), LAST),
    },
    "experts": {
        "block_*/experts/kernel": ((E, D, F), muon(D, F)),
        "block_*/experts/bias": ((E, F), LAST),
        "block_*/router/kernel": ((D, E), LAST),
    },
    "a gate beside experts, and in an MLP": {
        "layers/*/mlp/gate/kernel": ((D, E), LAST),
        "layers/*/mlp/experts/gate/kernel": ((E, D, F), muon(D, F)),
        "layers/*/mlp/shared_expert/gate/kernel": ((D, F), muon(D, F)),
        "layers/*/block_sparse_moe/gate/kernel": ((D, E), LAST),
        "layers/*/block_sparse_moe/dense/up/kernel": ((D, F), muon(D, F)),
        "dense/*/mlp/gate/kernel": ((D, F), muon(D, F)),
    },
    "convolutions": {
        "Conv_0/kernel": ((3, 3, D, F), LAST),
        "Conv_1/kernel": ((3, 3, 1, F), LAST),
        "Conv_2/kernel": ((3, D, F), LAST),
        "embeddings/patch_embeddings/projection/kernel": ((4, 4, 3, D), LAST),
    },
    "recurrent cells": {
        "LSTMCell_0/hi/kernel": ((D, D), muon(D, D)),
        "LSTMCell_0/ii/kernel": ((F, D), muon(F, D)),
        "GRUCell_0/hz/kernel": ((D, D), muon(D, D)),
        "gru/dense_h/kernel": ((D, 3 * D), muon(D, 3 * D)),
        "cell/weight_hh": ((4 * D, D), muon(D, 4 * D)),
    },
    "flax ViT": under("model_0/Encoder1DBlock_*/MultiHeadDotProductAttention_1/", HEADS, "/kernel")
    | {"model_0/embedding/kernel": ((4, 4, 3, D), LAST)},
    "heads as modules": under("blocks/*/attn/heads/0/", QKV, "/kernel")
    | under("blocks/*/attn/heads/1/", QKV, "/kernel"),
    "stages of blocks": under("stage_0/block_*/attn/", ATTENTION, "/kernel")
    | under("stage_1/block_*/attn/", ATTENTION, "/kernel"),
    "encoder and decoder": under("encoder/layers_*/self_attention/", HEADS, "/kernel")
    | under("decoder/layers_*/self_attention/", HEADS, "/kernel")
    | under("decoder/layers_*/encoder_decoder_attention/", HEADS, "/kernel"),
    "flax wmt": under("encoderdecoderblock_*/MultiHeadDotProductAttention_0/", HEADS, "/kernel")
    | under("encoderdecoderblock_*/MultiHeadDotProductAttention_1/", HEADS, "/kernel"),
    "nnx": under("blocks/*/", HEADS_BLOCK) | {"emb/embedding": ((V, D), LAST)},
    "nnx Dict and attributes": under("d/h*/", BLOCK) | under("layer_*/", BLOCK),
    "nnx Sequential": {
        "seq/layers/0/kernel": ((D, F), muon(D, F)),
        "seq/layers/2/kernel": ((F, D), muon(F, D)),
    },
    "LoRA": under("blocks/*/attn/", ATTENTION, "/kernel")
    | {
        "blocks/*/attn/query/lora/lora_a": ((D, R), LAST),
        "blocks/*/attn/query/lora/lora_b": ((R, A), LAST),
    },
    "Haiku": under("gpt/block@/multi_head_attention/", QKV, "/w")
    | {
        "gpt/block@/multi_head_attention/linear/w": ((A, D), muon(A, D)),
        "gpt/block@/linear/w": ((D, F), muon(D, F)),
        "gpt/block@/linear_1/w": ((F, D), muon(F, D)),
        "gpt/block@/layer_norm/scale": ((D,), LAST),
        "gpt/block@/batch_norm/scale": ((1, 1, 1, D), LAST),
        "gpt/embed/embeddings": ((V, D), LAST),
        "gpt/pos_embs": ((N, D), LAST),
        "gpt/linear/w": ((D, V), LAST),
    },
    "Haiku attention without blocks": under("gpt/multi_head_attention@/", QKV, "/w"),
    "Haiku named in __init__": under("gpt/~/block_*/", QKV, "/w"),
    "Haiku layer_stack": under("__layer_stack_no_per_layer/own/", scanned(QKV, 0), "/w")
    | {"__layer_stack_no_per_layer/own/query/b": ((L, A), LAST)},
    "Equinox": under(
        "blocks/*/attn/", turned({f"{k}_proj": row for k, row in QKV.items()}), "/weight"
    )
    | {
        "blocks/*/attn/output_proj/weight": ((D, A), muon(A, D)),
        "blocks/*/mlp/layers/0/weight": ((F, D), muon(D, F)),
        "blocks/*/mlp/layers/1/weight": ((D, F), muon(F, D)),
        "blocks/*/ln1/weight": ((D,), LAST),
        "embed/weight": ((V, D), LAST),
        "head/weight": ((V + 1, D), LAST),
        "out/weight": ((V, D), LAST),
        "conv/weight": ((F, D, 3, 3), LAST),
        "conv/bias": ((F, 1, 1), LAST),
    },
    "Equinox filter_vmap": under("blocks/attn/", scanned(turned(QKV), 0), "/weight")
    | {"blocks/ln1/weight": ((L, D), LAST), "blocks/up/weight": ((L, F, D), muon(D, F))},
    "Equinox experts": {"blocks/*/experts/up/weight": ((E, F, D), muon(D, F))},
    "Equinox with the out axis last, as its bias says": {
        "blocks/*/up/weight": ((D, F), muon(D, F)),
        "blocks/*/up/bias": ((F,), LAST),
    },
    "Hugging Face GPT-2": {
        "transformer/h/*/attn/c_attn/kernel": ((3 * D, D), s2(D, D)),
        "transformer/h/*/attn/c_proj/kernel": ((D, D), muon(D, D)),
        "transformer/h/*/mlp/c_fc/kernel": ((4 * D, D), muon(D, 4 * D)),
        "transformer/h/*/mlp/c_proj/kernel": ((D, 4 * D), muon(4 * D, D)),
        "transformer/wte/embedding": ((V, D), LAST),
        "transformer/wpe/embedding": ((N, D), LAST),
    },
    "Hugging Face GPT-2, only biases tell": {
        "transformer/h/*/attn/c_attn/kernel": ((3 * D, D), s2(D, D)),
        "transformer/h/*/attn/c_attn/bias": ((3 * D,), LAST),
        "transformer/h/*/mlp/c_fc/kernel": ((4 * D, D), muon(D, 4 * D)),
        "transformer/h/*/mlp/c_fc/bias": ((4 * D,), LAST),
    },
    "nanoGPT": {
        "h/*/attn/c_attn/kernel": ((D, 3 * D), s2(D, D)),
        "h/*/attn/c_proj/kernel": ((D, D), muon(D, D)),
        "h/*/mlp/c_fc/kernel": ((D, 4 * D), muon(D, 4 * D)),
        "h/*/mlp/c_proj/kernel": ((4 * D, D), muon(4 * D, D)),
    },
    "fused, heads wider than the stream": {
        "blocks/*/attn/qkv_proj/kernel": ((D, 3 * A), s2(D, A)),
        "blocks/*/attn/out_proj/kernel": ((A, D), muon(A, D)),
        "blocks/*/cross/to_q/kernel": ((D, A), s2(D, A)),
        "blocks/*/cross/to_kv/kernel": ((D, 2 * A), s2(D, A)),
    },
    "in_proj of attention, and of a state-space layer": {
        "layers/*/self_attn/in_proj/weight": ((3 * D, D), s2(D, D)),
        "layers/*/self_attn/out_proj/weight": ((D, D), muon(D, D)),
        "layers/*/mamba/in_proj/kernel": ((D, 3 * D), muon(D, 3 * D)),
        "layers/*/mamba/A_log": ((F, D), LAST),
    },
    "Hugging Face LLaMA": under("model/layers/*/", LLAMA)
    | {
        "model/layers/*/mlp/gate_proj/kernel": ((D, F), muon(D, F)),
        "model/layers/*/input_layernorm/weight": ((D,), LAST),
        "model/embed_tokens/embedding": ((V, D), LAST),
        "lm_head/kernel": ((D, V), LAST),
    },
    "BERT": under("bert/encoder/layer/*/attention/self/", QKV, "/kernel")
    | {
        "bert/encoder/layer/*/attention/output/dense/kernel": ((A, D), muon(A, D)),
        "bert/encoder/layer/*/output/dense/kernel": ((F, D), muon(F, D)),
        "bert/embeddings/word_embeddings/embedding": ((V, D), LAST),
        "bert/embeddings/token_type_embeddings/embedding": ((2, D), LAST),
        "cls/predictions/decoder/kernel": ((D, V), LAST),
    },
    "T5": under("decoder/block/*/layer/0/SelfAttention/", T5, "/kernel")
    | under("decoder/block/*/layer/1/EncDecAttention/", T5, "/kernel")
    | {
        "decoder/block/*/layer/2/DenseReluDense/wi/kernel": ((D, F), muon(D, F)),
        "decoder/block/*/layer/2/layer_norm/weight": ((D,), LAST),
        "shared/embedding": ((V, D), LAST),
    },
    "Gemma": {
        "layer_*/attn/q_einsum/w": ((H, D, K), s2(D, A)),
        "layer_*/attn/kv_einsum/w": ((2, G, D, K), s2(D, G * K)),
        "layer_*/attn/attn_vec_einsum/w": ((H, K, D), muon(A, D)),
        "layer_*/attn/_query_norm/scale": ((K,), LAST),
        "layer_*/mlp/gating_einsum": ((2, D, F), muon(D, F)),
        "layer_*/mlp/linear": ((F, D), muon(F, D)),
        "embedder/input_embedding": ((V, D), LAST),
    },
    "Gemma with an einsum each": {
        "layer_*/attn/q_einsum/kernel": ((H, D, K), s2(D, A)),
        "layer_*/attn/k_einsum/kernel": ((G, D, K), s2(D, G * K)),
        "layer_*/attn/v_einsum/kernel": ((G, D, K), s2(D, G * K)),
        "layer_*/attn/attn_vec_einsum/kernel": ((H, K, D), muon(A, D)),
    },
    "Gemma, fused and transposed": {
        "layer_*/attn/qkv_einsum/w": ((3, H, D, K), s2(D, A)),
        "layer_*/attn/attn_vec_einsum/w": ((H, K, D), muon(A, D)),
        "layer_*/mlp/gating_einsum": ((2, F, D), muon(D, F)),
        "layer_*/mlp/linear": ((F, D), muon(F, D)),
    },
    "MaxText": under("params/decoder/layers_*/self_attention/", HEADS, "/kernel")
    | {
        "params/decoder/layers_*/mlp/wi_0/kernel": ((D, F), muon(D, F)),
        "params/decoder/layers_*/mlp/wi_1/kernel": ((D, F), muon(D, F)),
        "params/decoder/layers_*/mlp/wo/kernel": ((F, D), muon(F, D)),
        "params/decoder/logits_dense/kernel": ((D, V), LAST),
        "params/token_embedder/embedding": ((V, D), LAST),
        "params/decoder/moe_layers_*/MoeBlock_0/gate/kernel": ((D, E), LAST),
        "params/decoder/moe_layers_*/MoeBlock_0/wi_0": ((E, D, F), muon(D, F)),
        "params/decoder/moe_layers_*/MoeBlock_0/wo": ((E, F, D), muon(F, D)),
    },
    "MaxText, scanned": under("params/decoder/layers/self_attention/", scanned(HEADS, 1), "/kernel")
    | {
        "params/decoder/layers/mlp/wi_0/kernel": ((D, L, F), muon(D, F)),
        "params/decoder/layers/pre_self_attention_layer_norm/scale": ((D, L), LAST),
        "params/decoder/moe_layers/MoeBlock_0/wi_0": ((E, L, D, F), muon(D, F)),
        "params/decoder/moe_layers/norm/scale": ((D, L), LAST),
    },
    "plain dicts": {
        "layers/*/wq": ((D, A), s2(D, A)),
        "layers/*/wk": ((D, A), s2(D, A)),
        "layers/*/wv": ((D, A), s2(D, A)),
        "layers/*/wo": ((A, D), muon(A, D)),
        "layers/*/w1": ((D, F), muon(D, F)),
        "layers/*/w2": ((F, D), muon(F, D)),
        "wte": ((V, D), LAST),
    },
    "lists of weights and biases": {
        "0/0": ((F, D), muon(D, F)),
        "0/1": ((F,), LAST),
        "1/0": ((F, V), muon(F, V)),
        "1/1": ((V,), LAST),
    },
    "names that hold other names": {
        "block_*/multi_head_attention/linear/kernel": ((D, F), muon(D, F)),
        "block_*/embed_proj/kernel": ((D, F), muon(D, F)),
        "block_*/output/kernel": ((D, F), muon(D, F)),
        "block_*/conv_module/Dense_0/kernel": ((D, F), muon(D, F)),
        "critics_*/value/kernel": ((D, 1), muon(D, 1)),
        "block_*/query": ((N, D), muon(N, D)),
    },
}

NUMBERS = {"*": ("0", "1", "2"), "@": ("", "_1", "_2")}


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def expanded(rows):
    """Every path with its row: three layers for each placeholder."""
    paths = {}
    for path, row in rows.items():
        mark = next((mark for mark in NUMBERS if mark in path), None)
        for number in NUMBERS[mark] if mark else ("",):
            paths[path.replace(mark, number) if mark else path] = row
    return paths


def nested(leaves):
    """The paths as nested dicts; the tree that flat keys with slashes give has the same paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def shapes(rows):
    return nested({path: array(*shape) for path, (shape, _) in expanded(rows).items()})


def leaf_of(member):
    """A member's leaf: `path:0` is a part of it and `path[3]` a slice."""
    return re.sub(r"(:\d+)?(\[\d+\])?$", "", member)


def verdicts(made):
    """Path -> what the plan does with it; a leaf in two places fails."""
    found: dict[str, Any] = dict.fromkeys(made.fallback, LAST)
    assert len(found) == len(made.fallback)
    for group in made.groups:
        assert group.rule.mode == 1
        verdict = "TEON" if group.rule.stack == 2 else "Muon", group.fan_in, group.fan_out
        assert all(
            found.setdefault(leaf_of(member), verdict) == verdict for member in group.members
        )
    return found


def refusal(params):
    with pytest.raises(ValueError, match="cannot tell how to read some leaves") as error:
        default_rules(params)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_of_a_family_gets_its_verdict(family):
    params = shapes(FAMILIES[family])
    expected = {path: verdict for path, (_, verdict) in expanded(FAMILIES[family]).items()}
    assert verdicts(plan(params, default_rules(params))) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rules_mean_the_default_rules(family):
    params = shapes(FAMILIES[family])
    assert plan(params) == plan(params, default_rules(params))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_takes_a_leaf_and_no_leaf_fits_two(family):
    params = shapes(FAMILIES[family])
    rules = default_rules(params)
    fits = [[rule for rule in rules if rule.search(path)] for path, _ in leaf_paths(params)]
    assert all(len(fit) <= 1 for fit in fits)
    assert {rule for fit in fits for rule in fit} == set(rules)


@pytest.mark.parametrize("family", FAMILIES)
def test_printed_rules_can_be_pasted_back(family):
    rules = default_rules(shapes(FAMILIES[family]))
    names = {"Rule": Rule, "MuonDimensionNumbers": MuonDimensionNumbers}
    assert tuple(eval(repr(rule), names) for rule in rules) == rules


@pytest.mark.parametrize("family", FAMILIES)
def test_joint_groups_are_pairs_of_neighbouring_layers_of_one_type(family):
    kinds = {path: kind for kind in FAMILIES[family] for path in expanded({kind: None})}
    for group in plan(shapes(FAMILIES[family])).groups:
        if group.rule.stack == 2:
            assert group.layers in {(0, 1), (2,)}
            assert len({kinds[leaf_of(member)] for member in group.members}) == 1


def test_depth_does_not_change_the_rules():
    def model(depth):
        return shapes(under("params/", {"embed/embedding": ((V, D), LAST)})) | {
            f"block_{layer}": shapes(BLOCK) for layer in range(depth)
        }

    assert default_rules(model(2)) == default_rules(model(96)) == default_rules(model(1))
    assert [str(rule) for rule in default_rules(model(2))] == [
        r'Rule(r"^block_(?P<layer>\d+)/attn/(key|query|value)/kernel$", stack=2)',
        r'Rule(r"^block_(?P<layer>\d+)/attn/out/kernel$")',
        r'Rule(r"^block_(?P<layer>\d+)/(down|up)/kernel$")',
        r'Rule(r"^params/embed/embedding$", stack=0)',
    ]


def test_self_and_cross_attention_never_share_a_group():
    members = [set(group.members) for group in plan(shapes(FAMILIES["flax wmt"])).groups]
    path = "encoderdecoderblock_{}/MultiHeadDotProductAttention_{}/query/kernel"
    assert {path.format(0, 0), path.format(1, 0)} in members
    assert {path.format(0, 1), path.format(1, 1)} in members


def test_haikus_first_block_has_no_number_and_is_layer_0():
    module = {"w": array(D, D)}
    params = {
        f"gpt/block{n}/attention/query": module for n in ("", *(f"_{i}" for i in range(1, 12)))
    }
    groups = plan(params).groups
    assert [group.layers for group in groups] == [(i, i + 1) for i in range(0, 12, 2)]
    assert groups[0].members == ("gpt/block/attention/query/w", "gpt/block_1/attention/query/w")


def test_a_leaf_that_differs_from_others_of_its_name_is_numbered_in_the_rules():
    layers = [array(D, 3, 3, F), array(F, D), array(F, F), array(D)]
    params = {"embed": array(F, D), "layers": [{"kernel": layer} for layer in layers]}
    with pytest.warns(UserWarning, match="No name and no size tells"):
        rules = default_rules(params)
    assert set(rules) == {
        Rule(r"^embed$", stack=0),
        Rule(r"^layers/(?P<layer>2)/kernel$"),
        Rule(r"^layers/0/kernel$", stack=0),
        Rule(r"^layers/1/kernel$", stack=0),
    }


def test_a_name_without_number_is_no_layer_where_another_is_0():
    module = {"query": {"w": array(D, D)}}
    made = plan({"block": module, "block_0": module, "block_1": module})
    assert {group.members for group in made.groups} == {
        ("block_0/query/w", "block_1/query/w"),
        ("block/query/w",),
    }


def test_names_are_escaped():
    params = {"a.b (c)": {"layers": [{"kernel": array(D, F)}]}}
    (rule,) = default_rules(params)
    assert plan(params, [rule]).groups
    assert not rule.search("axb (c)/layers/0/kernel")


class Box:
    """An array in a class that gives `jax.tree_util` no keys, as haliax's NamedArray."""

    def __init__(self, array):
        self.array = array


jax.tree_util.register_pytree_node(Box, lambda b: ((b.array,), None), lambda _, a: Box(*a))


class PenzaiArray(NamedTuple):
    """Has the key of penzai's named arrays."""

    data_array: Any


class Variable(NamedTuple):
    """Has the key of Flax's variables."""

    value: Any


# Name -> the leaves that cannot be read, and what is beside them.
UNREADABLE = {
    "scanned matrices, no norm that shows it": (
        {"layers/attn/query/kernel": (L, D, A)},
        {"layers/attn/out/kernel": (L, A, D)},
    ),
    "scanned along axis 1, no norm that shows it": (
        {"layers/attn/query/kernel": (D, L, A)},
        {"layers/attn/out/kernel": (A, L, D)},
    ),
    "scanned heads, no norm that shows it": (
        {"layers/attn/query/kernel": (L, D, H, K)},
        {"layers/attn/out/kernel": (L, H, K, D)},
    ),
    "a number in the path and a layer axis": (
        {
            "group/layers_0/attn/query/kernel": (L, D, A),
            "group/layers_0/attn/key/kernel": (L, D, A),
            "group/layers_1/attn/query/kernel": (L, D, A),
        },
        {"group/layers_0/attn/out/kernel": (L, A, D), "group/layers_0/ln/scale": (L, D)},
    ),
    "a scanned pattern of blocks": (
        {
            "layers/layers_0/attn/query/kernel": (L, D, A),
            "layers/layers_1/attn/query/kernel": (L, D, A),
        },
        {"layers/layers_0/ln/scale": (L, D), "layers/layers_0/down/kernel": (L, F, D)},
    ),
    "as many layers as the stream is wide": (
        {"layers/attn/query/kernel": (D, D, A)},
        {"layers/attn/out/kernel": (D, A, D)},
    ),
    "as many layers as each of the sizes": (
        {"layers/attn/query/kernel": (D, D, D)},
        {"layers/attn/out/kernel": (D, D, D), "layers/ln/scale": (D, D)},
    ),
    "as many layers as attention is wide": (
        {"group/layers_0/attn/query/kernel": (D, A, A)},
        {"group/layers_0/attn/out/kernel": (A, A, D), "group/layers_0/ln/scale": (D, A)},
    ),
    "scanned heads without an output projection": (
        {"layers/attn/query/kernel": (L, D, H, K)},
        {"layers/ln/scale": (L, D), "layers/down/kernel": (L, F, D)},
    ),
    "fused with a bias of another size": (
        {"layers/0/attn/qkv/kernel": (D, 3 * D)},
        {"layers/0/attn/qkv/bias": (D,), "layers/0/attn/out/kernel": (D, D)},
    ),
    "heads without an output projection": ({"blocks/0/attn/key/kernel": (D, H, K)}, {}),
    "key heads that do not divide the query's": (
        {"blocks/0/attn/key/kernel": (D, 3, K)},
        {"blocks/0/attn/query/kernel": (D, H, K), "blocks/0/attn/out/kernel": (H, K, D)},
    ),
    "linen Einsum": (
        {"Block_0/q_einsum/kernel": (H, D, K), "Block_0/k_einsum/kernel": (G, D, K)},
        {},
    ),
    "Gemma with other sizes": (
        {"layer_0/attn/kv_einsum/w": (2, 3, D, K)},
        {"layer_0/attn/attn_vec_einsum/w": (H, K, D)},
    ),
    "Gemma's square gate": (
        {"layer_0/mlp/gating_einsum": (2, D, D)},
        {"layer_0/mlp/linear": (D, D)},
    ),
    "Equinox filter_vmap without norms": ({"blocks/attn/query_proj/weight": (L, A, D)}, {}),
    "eqx.nn.Shared": ({"pytree/0/weight": (V, D)}, {}),
    "fused grouped query": (
        {"layers/0/attn/qkv_proj/kernel": (D, A + 10)},
        {"layers/0/attn/o_proj/kernel": (A, D)},
    ),
    "fused, divisible by three by accident": ({"layers/0/attn/qkv_proj/kernel": (D, A + 10)}, {}),
    "fused heads": ({"decoder/layers_0/self_attention/qkv_proj/kernel": (D, H + 2 * G, K)}, {}),
    "fused by heads first": ({"h/0/attention/query_key_value/kernel": (D, 3 * D)}, {}),
    "fused kernel that may be transposed": ({"h/0/attn/c_attn/kernel": (3 * D, D)}, {}),
    "fused square kernel": ({"h/0/attn/c_attn/kernel": (D, D)}, {}),
    "fused keys and values of another width": (
        {"blocks/0/attn/to_kv/kernel": (D, 2 * F)},
        {"blocks/0/attn/to_q/kernel": (D, A)},
    ),
    "numbers of which any may be the layer": (
        {"model_0/part_0/attn/query/kernel": (D, A), "model_0/part_1/attn/query/kernel": (D, A)},
        {},
    ),
    "one layer of layers": (
        {
            "layers_0/blocks_0/attn/query/kernel": (D, A),
            "layers_0/blocks_1/attn/query/kernel": (D, A),
        },
        {},
    ),
    "layers of layers": (
        {
            "layers_0/blocks_0/attn/query/kernel": (D, A),
            "layers_0/blocks_1/attn/query/kernel": (D, A),
            "layers_1/blocks_0/attn/query/kernel": (D, A),
        },
        {},
    ),
}


def arrays(leaves):
    return nested({path: array(*shape) for path, shape in leaves.items()})


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_can_be_read_in_two_ways_is_refused(case):
    unread, beside = UNREADABLE[case]
    message = refusal(arrays(unread | beside))
    assert set(re.findall(r'(?<![r\w])"([^"(^]+)"(?=,)', message)) == unread.keys()
    assert all(str(shape) in message for shape in unread.values())


@pytest.mark.parametrize("case", UNREADABLE)
def test_any_offered_rule_put_first_is_an_answer(case):
    unread, beside = UNREADABLE[case]
    params = arrays(unread | beside)
    entries = refusal(params).split(" Write one of\n")[1:]
    offers = [re.findall(r"^    (Rule\(.*\))  # ", entry, re.M) for entry in entries]
    names = {"Rule": Rule, "MuonDimensionNumbers": MuonDimensionNumbers}
    for choice in range(max(map(len, offers))):
        first = [eval(offer[min(choice, len(offer) - 1)], names) for offer in offers]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            rules = default_rules(params, first)
        assert rules[: len(first)] == tuple(first)
        made = plan(params, rules)
        members = {leaf_of(member) for group in made.groups for member in group.members}
        assert {*made.fallback, *members} == unread.keys() | beside.keys()


def test_a_refusal_shows_the_rules_and_what_their_axes_are():
    message = refusal(nested({"layers/attn/query/kernel": array(L, D, A)}))
    assert message.splitlines()[1:] == [
        '"layers/attn/query/kernel", shape (3, 6, 20): which axes are heads, layers, fan_in? '
        "Write one of",
        r'    Rule(r"^layers/attn/query/kernel$", stack=2, layer_axis=0)  # (layer, in, out)',
        r'    Rule(r"^layers/attn/query/kernel$", stack=2, layer_axis=1)  # (in, layer, out)',
        r'    Rule(r"^layers/attn/query/kernel$", dims=MuonDimensionNumbers(reduction_axis=0, '
        "output_axis=(1, 2)))  # (in, out, out)",
        r'    Rule(r"^layers/attn/query/kernel$", dims=MuonDimensionNumbers(reduction_axis=1, '
        "output_axis=(0, 2)))  # (out, in, out)",
        r'    Rule(r"^layers/attn/query/kernel$", stack=0)  # fallback',
    ]


def test_all_that_cannot_be_read_is_refused_at_once_and_not_layer_by_layer():
    paths = [f"blocks/{i}/attn/{name}/kernel" for i in range(12) for name in ("query", "key")]
    message = refusal(nested({path: array(D, H, K) for path in paths}))
    for name in ("query", "key"):
        assert f'"blocks/0/attn/{name}/kernel" (and 11 more with other numbers)' in message
    assert message.count("blocks/0") == 2 and message.count("Write one of") == 1
    few = [path for path in paths if path[7] in "012" and path[8] == "/"]
    message = refusal(nested({path: array(D, H, K) for path in few}))
    assert all(f'"{path}"' in message for path in few)


def test_a_fused_projection_is_offered_as_the_output_projection_shows_it():
    leaves = {"blocks/0/attn/Wqkv/kernel": (32, 48), "blocks/0/attn/out_proj/kernel": (32, 32)}
    _, entry = refusal(arrays(leaves)).split(" Write one of\n")
    likely, *_ = entry.splitlines()
    path = r"^blocks/(?P<layer>\d+)/attn/Wqkv/kernel$"
    assert likely == f'    Rule(r"{path}", stack=2, split=(32, 8, 8))  # (in, out)'
    assert "`split=3` is for equal parts" in refusal(arrays(leaves))
    assert "laid out by heads or groups cannot be split so" in refusal(arrays(leaves))


@pytest.mark.parametrize(
    ("leaves", "likely"),
    [
        (
            {"b/0/attn/in_proj_qkvz/kernel": (64, 224), "b/0/attn/out_proj/kernel": (96, 64)},
            'attn/in_proj_qkvz/kernel$", stack=2, split=(16, 16, 96, 96))  # (in, out)',
        ),
        (
            {"blocks/0/mlp/proj_1/kernel": (64, 128), "blocks/0/mlp/proj_2/kernel": (64, 64)}
            | {"blocks/0/mix/kernel": (64, 64)},
            'mlp/proj_1/kernel$", split=2)  # (in, out)',
        ),
        (
            {"b/0/moe/router": (8, 64), "b/0/moe/w1": (512, 64), "b/0/moe/w2": (512, 64)},
            'moe/w\\d+$", dims=MuonDimensionNumbers(reduction_axis=1, output_axis=0), split=8)'
            "  # (out, in)",
        ),
    ],
    ids=["Q, K, V and a gate", "gate and up", "experts"],
)
def test_the_likely_parts_of_a_matrix_are_offered_first(leaves, likely):
    _, entry = refusal(arrays(leaves)).split(" Write one of\n")
    assert entry.splitlines()[0].endswith(likely)


def test_arrays_of_a_list_are_offered_by_number_and_the_ends_as_the_fallbacks():
    params = [array(99, 64), array(64, 64), array(64), array(64, 64), array(64, 99)]
    _, ends, inside = refusal(params).split('\n"')
    assert ends.startswith('0", "4", shape (99, 64) or (64, 99)')
    assert ends.splitlines()[1] == '    Rule(r"^(0|4)$", stack=0)  # fallback'
    assert inside.splitlines()[1] == '    Rule(r"^(?P<layer>1|3)$")  # (in, out)'


def test_a_vmapped_ensemble_is_offered_as_a_batch():
    leaves = {"VmapMLP_0/Dense_0/kernel": (5, 17, 64), "VmapMLP_0/Dense_0/bias": (5, 64)}
    with pytest.warns(UserWarning, match=r"# \(batch, in, out\)"):
        default_rules(arrays(leaves))


def test_packed_experts_are_offered_as_parts():
    leaves = {"blocks/0/ffn/router/layer/kernel": (D, E), "blocks/0/ffn/experts/w1": (E * F, D)}
    message = refusal(arrays(leaves))
    assert (
        'ffn/experts/w1$", dims=MuonDimensionNumbers(reduction_axis=1, output_axis=0), split=8'
        in (message)
    )


def test_a_rule_beside_a_warning_can_be_pasted():
    params = arrays(
        {"blocks/0/up/kernel": (D, F), "blocks/0/down/kernel": (F, D), "zorp": (5, 2, 3)}
    )
    with pytest.warns(UserWarning, match="tells what these leaves are") as caught:
        rules = default_rules(params)
    assert Rule("^zorp$", stack=0) in rules
    (offer,) = re.findall(r"(Rule\(.*\))  # ", str(caught[0].message))
    rule = eval(offer, {"Rule": Rule, "MuonDimensionNumbers": MuonDimensionNumbers})
    assert "zorp" in {g.members[0] for g in plan(params, default_rules(params, [rule])).groups}


@pytest.mark.parametrize(
    "leaves",
    [
        {"blocks/0/q/lora_a": (D, 2), "blocks/0/q/lora_b": (2, D)},
        {"blocks/0/q/a": (D, 2), "blocks/0/q/b": (2, D)},
        {"embed/embedding": (V, D)},
    ],
)
def test_a_tree_of_which_nothing_is_orthogonalized_is_warned_of_once(leaves):
    with pytest.warns(UserWarning, match="No leaf is orthogonalized") as caught:
        rules = default_rules(arrays(leaves))
    assert len(caught) == 1 and not any(rule.stack for rule in rules)


def test_rules_put_first_leave_the_rest_to_the_defaults():
    params = nested({"layers/attn/query/kernel": array(L, D, A), "up/kernel": array(D, F)})
    first = Rule("query", stack=2, layer_axis=0)
    assert default_rules(params, [first]) == (first, Rule("^up/kernel$"))


def test_two_leaves_of_one_path_that_need_two_rules_are_refused():
    embed = {"embed": {"embed/w": array(V, D)}, "embed/embed": {"w": array(V, D, 1)}}
    assert len(default_rules(embed | {"up": {"kernel": array(D, F)}})) == 2
    params = {"a": {"b/kernel": array(D, F)}, "a/b": {"kernel": array(3, D, F)}}
    with pytest.raises(ValueError, match='"a/b/kernel", shape .* is the path of another leaf too'):
        default_rules(params)


@pytest.mark.parametrize(
    "leaves",
    [
        {"blocks/0/q_proj/weight": (H, K, D)},
        {"blocks/0/q_proj/weight": (D, H, K), "blocks/0/o_proj/weight": (H, K, D)},
        {"blocks/0/c_attn/weight": (D, 3, H, K)},
        {"stacked/q_proj/weight": (L, H, K, D), "stacked/ln/weight": (L, D)},
        {"moe/experts/weight": (E, D, F)},
        {"blocks/0/o_proj/weight": (D, H, K)},
        {"blocks/0/up/weight": (F, D)},
        {"blocks/0/attn/q_proj/weight": (A, D)},
    ],
)
def test_haliax_weights_are_refused_because_fan_out_may_be_first_or_last(leaves):
    message = refusal(nested({path: Box(array(*shape)) for path, shape in leaves.items()}))
    assert all(f'"{path}"' in message for path in leaves if "/ln/" not in path)


def test_haliax_weights_are_read_where_the_bias_tells_or_all_is_square():
    leaves = {"layers/0/up/weight": (F, D), "layers/0/up/bias": (F,), "layers/0/mix/weight": (D, D)}
    leaves |= {"layers/0/down/weight": (F, D), "layers/0/down/bias": (D,)}
    leaves |= {"embed/weight": (V, D)}
    found = verdicts(plan(nested({path: Box(array(*shape)) for path, shape in leaves.items()})))
    assert found == {
        "layers/0/up/weight": muon(D, F),
        "layers/0/down/weight": muon(F, D),
        "layers/0/mix/weight": muon(D, D),
        **dict.fromkeys(["layers/0/up/bias", "layers/0/down/bias", "embed/weight"], LAST),
    }


def test_penzai_is_refused_because_its_paths_hold_no_names():
    shapes = [(V, D), (D,), (D, G, H, K)]
    params = tuple(Variable(PenzaiArray(array(*shape))) for shape in shapes)
    message = refusal(params)
    assert '"0", shape (19, 6)' in message and '"2", shape (6, 2, 4, 5)' in message
    assert '"1"' not in message


def test_penzai_offers_a_rule_for_every_shape_and_rank():
    shapes = [(D, G, H, K), (D, G, K), (G, H, K, D), (D, G, K)]
    message = refusal(tuple(Variable(PenzaiArray(array(*shape))) for shape in shapes))
    assert '"0", shape (6, 2, 4, 5)' in message and "# (in, out, out, out)" in message
    assert '"2", shape (2, 4, 5, 6)' in message and "# (in, in, in, out)" in message
    assert '"1", "3", shape (6, 2, 5)' in message and "# (in, out, out)" in message


def test_wrapped_and_bare_leaves_get_the_same_rules():
    """`nnx.Optimizer` shows variables to `init` and arrays to `update`."""
    rows = under("blocks/*/", HEADS_BLOCK | under("attn/", {"value/kernel": HEADS["value"]}))
    bare = shapes(rows)
    assert default_rules(jax.tree.map(Variable, bare)) == default_rules(bare)


def test_heads_are_read_only_beside_an_output_projection_of_their_sizes():
    query, out = array(D, H, K), array(H, K, D)
    attention = {"query": {"kernel": query}, "out": {"kernel": out}}
    assert verdicts(plan({"blocks": [attention]}))["blocks/0/query/kernel"] == s2(D, A)
    attention["out"] = {"kernel": array(K, H, D)}
    assert '"blocks/0/query/kernel"' in refusal({"blocks": [attention]})


def test_heads_as_many_as_large_are_read_where_a_norm_shows_that_nothing_is_scanned():
    attention = {"query": {"kernel": array(D, H, H)}, "out": {"kernel": array(H, H, D)}}
    assert '"blocks/0/attn/query/kernel"' in refusal({"blocks": [{"attn": attention}]})
    assert '"attn/query/kernel"' in refusal({"attn": attention, "ln": {"scale": array(D)}})
    params = {"blocks": [{"attn": attention, "ln": {"scale": array(D)}}]}
    assert verdicts(plan(params))["blocks/0/attn/query/kernel"] == s2(D, H * H)
    params = {"Block_0": {"MultiHeadDotProductAttention_0": attention}}
    path = "Block_0/MultiHeadDotProductAttention_0/query/kernel"
    assert verdicts(plan(params))[path] == s2(D, H * H)


def test_scanned_norms_that_disagree_with_the_matrices_prove_no_layer_axis():
    leaves = {"layers/attn/query/kernel": (L, D, A), "layers/ln/scale": (N, D)}
    assert "layer_axis=0" in refusal(arrays(leaves))


def test_other_leaves_above_2d_go_to_the_fallback_with_one_warning():
    params = nested(
        {"mix/kernel": array(2, 4, 5), "odd": array(2, 2, 5, 2), "up/kernel": array(4, 5)}
    )
    with pytest.warns(UserWarning) as caught:
        rules = default_rules(params)
    (warning,) = caught
    message = str(warning.message)
    assert "No name and no size tells what these leaves are" in message
    assert '"mix/kernel", shape (2, 4, 5): 40.0%' in message
    assert '"odd", shape (2, 2, 5, 2): 40.0%' in message
    assert "up/kernel" not in message
    assert Rule("^odd$", stack=0) in rules
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(plan(params, rules).fallback) == {"mix/kernel", "odd"}


def test_shared_experts_with_a_third_axis_are_no_experts():
    with pytest.warns(UserWarning, match='"moe_block/shared_experts/kernel", shape .*: 100.0%'):
        (rule,) = default_rules({"moe_block": {"shared_experts": {"kernel": array(L, D, F)}}})
    assert rule.stack == 0


@pytest.mark.parametrize(
    "params", [(), {}, None, {"a": None}, 1.5, True, np.ones(3), jnp.ones(()), optax.MaskedNode()]
)
def test_trees_without_matrices_have_no_rules(params):
    assert default_rules(params) == ()


def test_an_array_alone_is_a_matrix():
    assert default_rules(np.ones((2, 3), np.float32)) == (Rule("^$"),)


def test_what_is_no_array_of_floats_goes_to_the_fallback():
    params = {
        "layers": [{"weight": jnp.ones((F, D)), "dropout": {"p": 0.1, "inference": False}}],
        "activation": jax.nn.gelu,
        "filtered": None,
        "masked": optax.MaskedNode(),
        "key": jax.random.key(0),
        "keys": jax.random.key_data(jax.random.split(jax.random.key(0), 3)),
        "step": jnp.zeros((), jnp.int32),
        "table": np.zeros((V, D), np.int8),
        "phase": np.zeros((D, D), np.complex64),
        "empty": np.zeros((0, D), np.float32),
    }
    rules = default_rules(params)
    assert rules[0] == Rule(r"^layers/(?P<layer>\d+)/weight$", dims=MuonDimensionNumbers(1, 0))
    assert verdicts(plan(params, rules)).pop("layers/0/weight") == muon(D, F)
    assert len(plan(params, rules).groups) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_numpy_jax_and_abstract_arrays_get_the_same_rules(dtype):
    kernel = jax.ShapeDtypeStruct((D, A), jnp.dtype(dtype))
    params = {f"block_{i}": {"query": {"kernel": kernel}} for i in range(2)}
    concrete = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    assert default_rules(params) == default_rules(concrete)
    assert default_rules(params)[0].stack == 2


def test_leaves_that_a_mask_took_out_change_no_other_leaf():
    params = shapes(under("block_*/", BLOCK))
    params["block_1"]["attn"]["query"]["kernel"] = optax.MaskedNode()
    assert default_rules(params) == default_rules(shapes(under("block_*/", BLOCK)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=10)(nn.LayerNorm()(x))
        hidden = nn.Dense(14)(nn.LayerNorm()(x))
        return x + nn.Dense(6)(nn.gelu(hidden))


class LinenModel(nn.Module):
    scan_axis: int | None = None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(19, 6)(tokens)
        if self.scan_axis is None:
            for _ in range(3):
                x = nn.remat(LinenBlock)()(x)
        else:
            x, _ = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": self.scan_axis},
                split_rngs={"params": True},
                length=3,
            )(LinenBlock(name="layers"), x, None)
        return nn.Dense(19)(x)


@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("scan_axis", [None, 0, 1])
def test_linen_model(scan_axis):
    tokens = jnp.zeros((1, 7), jnp.int32)
    params = jax.eval_shape(LinenModel(scan_axis).init, jax.random.key(0), tokens)
    made = plan(params)
    found = verdicts(made)
    attention = {path: verdict for path, verdict in found.items() if path.endswith("/kernel")}
    for path, verdict in attention.items():
        if re.search("query|key|value", path):
            assert verdict == s2(6, 10)
        elif "/out/" in path:
            assert verdict == muon(10, 6)
        elif "Dense_" in path and path != "params/Dense_0/kernel":
            assert verdict == (muon(6, 14) if "Dense_0" in path else muon(14, 6))
    rest = {path for path, verdict in found.items() if verdict == LAST}
    assert rest == {path for path in found if not path.endswith("/kernel")} | {
        "params/Dense_0/kernel"
    }
    assert [group.layers for group in made.groups if group.rule.stack == 2] == [(0, 1), (2,)] * 3


@pytest.mark.promotes_dtypes
def test_linen_partitioned_boxes_change_nothing():
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    boxed = jax.eval_shape(
        nn.Dense(8, kernel_init=kernel).init, jax.random.key(0), jnp.ones((1, 4))
    )
    assert default_rules(boxed) == default_rules(nn.unbox(boxed)) == (Rule("^params/kernel$"),)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 6, 10, decode=False, rngs=rngs)
        self.ln = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 14, rngs=rngs)
        self.down = nnx.Linear(14, 6, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.emb = nnx.Embed(19, 6, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.head = nnx.Linear(6, 19, rngs=rngs)


@pytest.mark.promotes_dtypes
def test_nnx_model():
    model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    rules = default_rules(state)
    assert rules == default_rules(nnx.to_pure_dict(state)) == default_rules(nnx.as_pure(state))
    assert [(rule.pattern, rule.stack) for rule in rules] == [
        (r"^blocks/(?P<layer>\d+)/attn/(key|query|value)/kernel$", 2),
        (r"^blocks/(?P<layer>\d+)/attn/out/kernel$", 1),
        (r"^blocks/(?P<layer>\d+)/(down|up)/kernel$", 1),
        (r"^blocks/\d+/attn/(key|query|value)/bias$", 0),
        (r"^emb/embedding$", 0),
        (r"^head/kernel$", 0),
    ]
    found = verdicts(plan(state, rules))
    assert found["blocks/0/attn/query/kernel"] == s2(6, 10)
    assert found["blocks/2/attn/out/kernel"] == muon(10, 6)


@pytest.mark.promotes_dtypes
def test_nnx_vmapped_layers_are_read_along_their_axis():
    make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
    layers = nnx.eval_shape(lambda: make(nnx.Rngs(0).split(3)))
    found = verdicts(plan({"layers": nnx.state(layers, nnx.Param)}))
    assert found["layers/attn/query/kernel"] == s2(6, 10)
    assert found["layers/up/kernel"] == muon(6, 14)


KEYS = st.sampled_from(
    ["layers", "blocks", "block", "block_1", "block_2", "0", "1", "10", "attn", "query", "key"]
    + ["value", "out", "qkv", "kv_proj", "c_attn", "c_proj", "c_fc", "q_einsum", "experts", "moe"]
    + ["gate", "embed", "head", "conv_0", "ln", "kernel", "w", "weight", "bias", "scale", "lora_a"]
    + ["attn_vec_einsum", "gating_einsum", "linear", "linear_1", "a.b", "(", "x y", "\u0663"]
)
LEAVES = st.one_of(
    st.builds(
        jax.ShapeDtypeStruct,
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 12]), max_size=5).map(tuple),
        st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32]),
    ),
    st.sampled_from([None, 1.0, True, optax.MaskedNode()]),
)
TREES = st.recursive(
    LEAVES,
    lambda inside: st.dictionaries(KEYS, inside) | st.lists(inside, max_size=3),
    max_leaves=40,
)


@given(TREES)
def test_any_tree_is_planned_or_refused(params):
    paths = [path for path, _ in leaf_paths(params)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            rules = default_rules(params)
    except ValueError as error:
        assert "cannot tell how to read" in str(error)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = plan(params, rules)
    assert verdicts(made).keys() == set(paths)
    for path, leaf in leaf_paths(params):
        fits = [rule for rule in rules if rule.search(path)]
        assert len(fits) <= 1
        if fits and len(np.shape(leaf)) > 1:
            assert fits[0].stack == 0 or jnp.issubdtype(leaf.dtype, jnp.floating)
