"""Flax linen, with the attention, scans and boxes of Flax and with modules of one's own."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from checks import check, filled
from tasks import (
    IMAGES,
    INPUTS,
    TOKENS,
    A,
    D,
    E,
    F,
    G,
    H,
    K,
    N,
    R,
    V,
    attend,
    label_loss,
    next_token_loss,
)

Dense = functools.partial(nn.Dense, use_bias=False)


class Attention(nn.Module):
    """Grouped-query attention of `nn.Dense`."""

    @nn.compact
    def __call__(self, x, memory=None):
        def heads(name, number, x):
            return Dense(number * K, name=name)(x).reshape(*x.shape[:-1], number, K)

        memory = x if memory is None else memory
        read = heads("query", H, x), heads("key", G, memory), heads("value", G, memory)
        return Dense(D, name="out")(attend(*read).reshape(*x.shape[:-1], A))


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Dense(D, name="down")(nn.silu(Dense(F, name="gate")(x)) * Dense(F, name="up")(x))


class Block(nn.Module):
    attention: Any = functools.partial(Attention, name="attn")
    mlp: Any = functools.partial(Gated, name="mlp")

    @nn.compact
    def __call__(self, x):
        x = x + self.attention()(nn.LayerNorm()(x))
        return x + self.mlp()(x)


class Model(nn.Module):
    """Embedding, two blocks, a head without a name."""

    make: Any = Block
    repeat: int = 2

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, D)(tokens)
        for _ in range(self.repeat):
            x = self.make()(x)
        return Dense(V)(x)


def problem(model, inputs=TOKENS, loss=next_token_loss):
    """Parameters, and the loss as a function of them."""
    params = filled(jax.eval_shape(model.init, jax.random.key(0), inputs)["params"])
    return params, lambda params: loss(model.apply({"params": params}, inputs))


def test_dense_layers_with_grouped_queries_and_a_gated_mlp():
    check("linen-dense", *problem(Model()))


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
@pytest.mark.parametrize(
    "name", ["SelfAttention", "MultiHeadDotProductAttention", "MultiHeadAttention"]
)
def test_attention_of_flax(name):
    # Attention wider than the stream: width and heads x size differ.
    attention = functools.partial(getattr(nn, name), num_heads=H, qkv_features=A, out_features=D)
    check(f"linen-{name}", *problem(Model(functools.partial(Block, attention))))


def in_scan(block, axis, length=3, name="layers"):
    """Blocks of one module, with their layers along an axis of every leaf."""

    def body(module, x, _):
        return module(x), None

    scan = nn.scan(body, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)
    return lambda: lambda x: scan(block(name=name), x, None)[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_scan(axis):
    name = "MultiHeadDotProductAttention"
    attention = functools.partial(getattr(nn, name), num_heads=H, qkv_features=A, out_features=D)

    def both():
        dense = in_scan(Block, axis, name="dense_layers")()
        heads = in_scan(functools.partial(Block, attention), axis)()
        return lambda x: heads(dense(x))

    check(f"linen-scan-{axis}", *problem(Model(both, 1)))


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block(name="layers_1")(Block(name="layers_0")(x))


def test_scan_over_a_pattern_of_blocks_asks_which_number_counts_the_layers():
    check("linen-scan-pattern", *problem(Model(in_scan(Pair, 0), 1)))


def test_remat_and_partitioned_boxes():
    def boxed(features, name=None):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(features, use_bias=False, kernel_init=init, name=name)

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return boxed(D, "down")(nn.silu(boxed(F, "up")(x)))

    model = Model(functools.partial(nn.remat(Block), mlp=functools.partial(Mlp, name="mlp")))
    params, loss = problem(model)
    boxes = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_box) if is_box(leaf)]
    assert len(boxes) == 4
    check("linen-remat-partitioned", params, loss)


def is_box(node):
    return isinstance(node, nn.Partitioned)


class Experts(nn.Module):
    """A router's mixture of `E` matrices each way, made by `nn.vmap`."""

    @nn.compact
    def __call__(self, x):
        untyped: Any = nn.vmap  # `in_axes=None`, which it documents, is no int
        vmap = functools.partial(
            untyped,
            in_axes=None,
            out_axes=-1,
            axis_size=E,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        gates = jax.nn.softmax(Dense(E, name="router")(x))
        return jnp.einsum("bnde,bne->bnd", vmap(Gated)(name="experts")(x), gates)


def test_experts_are_a_batch():
    model = Model(functools.partial(Block, mlp=functools.partial(Experts, name="moe")))
    check("linen-experts", *problem(model))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(D, (3, 3))(images))
        x = nn.relu(nn.Conv(D, (3, 3), feature_group_count=D)(x))
        x = nn.relu(nn.Conv(F, (3,))(x.mean(1)))
        return nn.Dense(5, name="classifier")(nn.Dense(D)(x.mean(1)))


def test_convolutions_go_to_the_fallback():
    check("linen-convolutions", *problem(Convolutions(), IMAGES, label_loss))


class Adapted(nn.Module):
    """A Dense with a low-rank update."""

    features: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        a = self.param("lora_a", init, (x.shape[-1], R))
        b = self.param("lora_b", init, (R, self.features))
        return Dense(self.features, name="base")(x) + x @ a @ b


def test_lora_factors_go_to_the_fallback():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + Adapted(D, name="down")(nn.relu(Adapted(F, name="up")(x)))

    class Adapter(nn.Module):
        @nn.compact
        def __call__(self, x):
            for index in range(2):
                x = Mlp(name=f"block_{index}")(x)
            return nn.Dense(V, name="classifier")(x)

    check("linen-lora", *problem(Adapter(), INPUTS, label_loss))


def test_tied_embeddings_are_one_leaf_of_the_fallback():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(V, D)
            positions = self.param("pos_embedding", nn.initializers.normal(0.1), (1, N, D))
            x = embed(tokens) + positions
            for _ in range(2):
                x = Block()(x)
            return embed.attend(x)

    check("linen-tied", *problem(Tied()))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x, memory):
        x = x + Attention(name="self_attention")(x)
        x = x + Attention(name="encoder_decoder_attention")(x, memory)
        return x + Gated(name="mlp")(x)


class Translator(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(V, D, name="shared_embedding")
        memory, x = embed(tokens[:, ::-1]), embed(tokens)
        for index in range(2):
            memory = memory + Attention(name=f"encoder_layers_{index}")(memory)
        for index in range(2):
            x = Decoder(name=f"decoder_layers_{index}")(x, memory)
        return Dense(V, name="logits_dense")(x)


def test_encoder_and_decoder_stacks_never_mix():
    check("linen-encoder-decoder", *problem(Translator()))
