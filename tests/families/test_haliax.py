"""haliax: axes have names, and whether fan_out comes first is in neither path nor shape."""

from typing import Any

import jax
import pytest
from checks import check, filled, library
from tasks import TOKENS, D, E, F, H, K, V, next_token_loss

hax = library("haliax")
eqx = library("equinox")

# haliax calls what JAX deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:jax.core:DeprecationWarning")

Vocab, Embed, Mlp = hax.Axis("vocab", V), hax.Axis("embed", D), hax.Axis("mlp", F)
Heads, Size, Experts = hax.Axis("heads", H), hax.Axis("size", K), hax.Axis("experts", E)
Batch, Pos = (
    hax.Axis(name, size) for name, size in zip(("batch", "pos"), TOKENS.shape, strict=True)
)


class Block(eqx.Module):
    ln: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    up: Any
    down: Any

    @staticmethod
    def init(key, out_first=True):
        def linear(inside, outside):
            return hax.nn.Linear.init(inside, outside, key=key, use_bias=False, out_first=out_first)

        projections = (linear(Embed, (Heads, Size)) for _ in range(3))
        output = linear((Heads, Size), Embed)
        norm = hax.nn.LayerNorm.init(Embed)
        return Block(norm, *projections, output, linear(Embed, Mlp), linear(Mlp, Embed))

    def __call__(self, x):
        h = self.ln(x)
        query, key, value = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        key, value = (a.rename({"pos": "other"}) for a in (key, value))
        weights = hax.nn.softmax(hax.dot(query, key, axis="size"), axis="other")
        x = x + self.o_proj(hax.dot(weights, value, axis="other"))
        return x + self.down(hax.nn.gelu(self.up(x)))


class Mixture(eqx.Module):
    """A router's mixture of `E` linear layers."""

    router: Any
    experts: Any

    @staticmethod
    def init(key):
        router = hax.nn.Linear.init(Embed, Experts, key=key, use_bias=False)
        experts = hax.nn.MoELinear.init(Experts, Embed, Mlp, key=key, use_bias=False)
        return Mixture(router, experts)

    def __call__(self, x):
        gates = hax.nn.softmax(self.router(x), axis="experts")
        each = hax.dot(x, self.experts.weight, axis="embed")
        hidden = hax.dot(each, gates, axis="experts")
        return x + hidden["mlp", :D].rename({"mlp": "embed"})


class Model(eqx.Module):
    embed: Any
    blocks: Any
    head: Any

    @staticmethod
    def init(key, blocks):
        head = hax.nn.Linear.init(Embed, Vocab, key=key, use_bias=False)
        return Model(hax.nn.Embedding.init(Vocab, Embed, key=key), blocks, head)

    def __call__(self, tokens):
        x = self.embed(tokens)
        if isinstance(self.blocks, list):
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks.fold(x)
        return self.head(x)


def problem(blocks):
    def make(key):
        return Model.init(key, blocks(key))

    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    params, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    tokens = hax.named(TOKENS, (Batch, Pos))

    def loss(params):
        logits = eqx.combine(params, static)(tokens)
        return next_token_loss(logits.rearrange((Batch, Pos, Vocab)).array)

    return filled(params), loss


@pytest.mark.parametrize("out_first", [True, False])
def test_a_rule_says_where_fan_out_is(out_first):
    params, loss = problem(lambda key: [Block.init(key, out_first) for _ in range(2)])
    name = "haliax" if out_first else "haliax-in-first"
    check(name, params, loss)


def test_stacked():
    L = hax.Axis("layers", 3)

    def stacked(key):
        return hax.nn.Stacked.init(L, Block)(jax.random.split(key, 3))

    params, loss = problem(stacked)
    check("haliax-stacked", params, loss)


def test_experts_are_a_batch():
    params, loss = problem(lambda key: [Mixture.init(key) for _ in range(2)])
    check("haliax-experts", params, loss)
