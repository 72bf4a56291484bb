"""Flax nnx."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from checks import QUICKLY, check, filled
from flax import nnx
from tasks import TOKENS, A, D, F, H, R, V, next_token_loss

from teon_optax import plan, teon


class Block(nnx.Module):
    """Attention wider than the stream."""

    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(H, D, A, decode=False, rngs=rngs)
        self.ln = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.ln(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs, make: Any = Block):
        self.emb = nnx.Embed(V, D, rngs=rngs)
        self.blocks = nnx.List([make(rngs) for _ in range(2)])
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scanned(nnx.Module):
    """Layers along an axis of every leaf."""

    def __init__(self, rngs, axis):
        self.emb = nnx.Embed(V, D, rngs=rngs)
        axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
        make = nnx.vmap(Block, in_axes=0, out_axes=axes)
        self.layers = make(rngs.split(3) if hasattr(rngs, "split") else rngs)
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)
        self.axis = axis

    def __call__(self, tokens):
        axes = nnx.StateAxes({nnx.Param: self.axis, ...: 0})

        @functools.partial(nnx.scan, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        def through(block, x):
            return block(x)

        return self.head(through(self.layers, self.emb(tokens)))


def problem(make):
    """The state of the parameters, and the loss as a function of it."""
    graph, shapes, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
    return filled(shapes), lambda params: next_token_loss(nnx.merge(graph, params, rest)(TOKENS))


def test_multi_head_attention():
    check("nnx", *problem(Model))


def test_optimizer_of_nnx():
    """`nnx.Optimizer` shows variables to `init` and bare arrays to `update`."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
    assert plan(shapes) == plan(nnx.to_pure_dict(shapes))

    def losses(params):
        model = nnx.merge(graph, params)
        both = nnx.split((model, nnx.Optimizer(model, teon(0.02), wrt=nnx.Param)))

        def step(state, _):
            model, optimizer = nnx.merge(both[0], state)
            loss, gradients = nnx.value_and_grad(lambda m: next_token_loss(m(TOKENS)))(model)
            optimizer.update(model, gradients)
            return nnx.state((model, optimizer)), loss

        return jax.lax.scan(step, both[1], length=21)[1]

    before, *_, after = jax.jit(losses, compiler_options=QUICKLY)(filled(shapes))
    assert after < 0.9 * before


@pytest.mark.parametrize("axis", [0, 1])
def test_scan_of_vmapped_layers(axis):
    check(f"nnx-scan-{axis}", *problem(functools.partial(Scanned, axis=axis)))


def test_lora_factors_go_to_the_fallback():
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.q_proj = nnx.LoRALinear(D, A, lora_rank=R, use_bias=False, rngs=rngs)
            self.k_proj = nnx.LoRALinear(D, A, lora_rank=R, use_bias=False, rngs=rngs)
            self.down = nnx.Linear(A, D, use_bias=False, rngs=rngs)

        def __call__(self, x):
            query, key = self.q_proj(x), self.k_proj(x)
            weights = jax.nn.softmax(query @ key.mT)
            return x + self.down(weights @ key)

    check("nnx-lora", *problem(functools.partial(Model, make=Adapted)))


def test_a_shared_parameter_is_one_leaf():
    class Tied(Model):
        def __init__(self, rngs):
            super().__init__(rngs)
            del self.head
            self.tied = nnx.Linear(V, D, use_bias=False, rngs=rngs)
            self.tied.kernel = self.emb.embedding

        def head(self, x):
            return x @ self.tied.kernel.T

    check("nnx-tied", *problem(Tied))
