"""Equinox: weights are (out, in), and filtered trees hold None."""

import functools
from typing import Any

import jax
from checks import check, filled, library
from tasks import IMAGES, TOKENS, D, E, F, H, K, V, label_loss, next_token_loss

eqx = library("equinox")


class Block(eqx.Module):
    ln: Any
    attn: Any
    mlp: Any

    def __init__(self, key):
        keys = jax.random.split(key)
        self.ln = eqx.nn.LayerNorm(D)
        self.attn = eqx.nn.MultiheadAttention(H, D, qk_size=K, vo_size=K, key=keys[0])
        self.mlp = eqx.nn.MLP(D, D, F, 1, key=keys[1])

    def __call__(self, x):
        h = jax.vmap(self.ln)(x)
        x = x + self.attn(h, h, h)
        return x + jax.vmap(self.mlp)(x)


class Experts(eqx.Module):
    """A router's mixture of `E` linear layers, made by `filter_vmap`."""

    ln: Any
    router: Any
    experts: Any

    def __init__(self, key):
        keys = jax.random.split(key, E)
        self.ln = eqx.nn.LayerNorm(D)
        self.router = eqx.nn.Linear(D, E, use_bias=False, key=key)
        make = functools.partial(eqx.nn.Linear, D, F, use_bias=False)
        self.experts = eqx.filter_vmap(lambda key: make(key=key))(keys)

    def __call__(self, x):
        def mixed(x):
            each = eqx.filter_vmap(lambda expert: expert(x))(self.experts)
            return jax.nn.softmax(self.router(x)) @ each

        return x + jax.vmap(mixed)(jax.vmap(self.ln)(x))[:, :D]


class Model(eqx.Module):
    embed: Any
    blocks: list
    head: Any

    def __init__(self, key, make=Block):
        self.embed = eqx.nn.Embedding(V, D, key=key)
        self.blocks = [make(key) for key in jax.random.split(key)]
        self.head = eqx.nn.Linear(D, V, use_bias=False, key=key)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


class Stacked(Model):
    """Blocks made by `filter_vmap`: layers along axis 0 of every leaf."""

    blocks: Any

    def __init__(self, key):
        super().__init__(key)
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(key, 3))

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def through(x, arrays):
            return eqx.combine(arrays, static)(x), None

        return jax.vmap(self.head)(jax.lax.scan(through, jax.vmap(self.embed)(tokens), arrays)[0])


def problem(make, inputs=TOKENS, loss=next_token_loss):
    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    params, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    return filled(params), lambda params: loss(jax.vmap(eqx.combine(params, static))(inputs))


def test_multihead_attention():
    params, loss = problem(Model)
    # What is no array was filtered out: None, and no leaf.
    assert any(leaf is None for leaf in jax.tree.leaves(params, is_leaf=lambda x: x is None))
    check("equinox", params, loss)


def test_filter_vmap():
    check("equinox-filter-vmap", *problem(Stacked))


def test_experts_are_a_batch():
    model = functools.partial(Model, make=Experts)
    check("equinox-experts", *problem(model))


def test_convolutions_go_to_the_fallback():
    class Convolutions(eqx.Module):
        conv: Any
        hidden: Any
        classifier: Any

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, D, 3, key=key)
            self.hidden = eqx.nn.Linear(D, F, key=key)
            self.classifier = eqx.nn.Linear(F, 5, key=key)

        def __call__(self, image):
            x = jax.nn.relu(self.conv(image.transpose(2, 0, 1))).mean((1, 2))
            return self.classifier(jax.nn.relu(self.hidden(x)))

    check("equinox-convolutions", *problem(Convolutions, IMAGES, label_loss))


def test_shared_layers_ask_for_a_rule():
    class Tied(eqx.Module):
        shared: Any
        blocks: list

        def __init__(self, key):
            model = Model(key)
            pair = model.embed, model.head
            self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
            self.blocks = model.blocks

        def __call__(self, tokens):
            embed, head = self.shared()
            x = jax.vmap(embed)(tokens)
            for block in self.blocks:
                x = block(x)
            return jax.vmap(head)(x)

    params, loss = problem(Tied)
    check("equinox-shared", params, loss)
