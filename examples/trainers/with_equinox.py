# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "equinox==0.13.8",
#   "jax==0.10.2",
#   "optax==0.2.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""Equinox: a filtered model, `eqx.filter_jit`, and `eqx.tree_serialise_leaves`."""

import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from shared import SAVED, VOCABULARY, check, text

from teon_optax import plan, teon

WIDTH, HEADS, LAYERS = 64, 4, 4


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1])
        self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2])

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        y = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(y))


class GPT(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 2 + LAYERS)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[1])
        self.blocks = [Block(key) for key in keys[2:]]

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


@eqx.filter_value_and_grad
def loss_and_gradients(model, tokens):
    logits = jax.vmap(model)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


optimizer = teon(0.01)


@eqx.filter_jit
def step(model, state, tokens):
    loss, gradients = loss_and_gradients(model, tokens)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = optimizer.update(gradients, state, params)
    return eqx.apply_updates(model, updates), state, loss


def start(seed):
    model = GPT(jax.random.key(seed))
    return model, optimizer.init(eqx.filter(model, eqx.is_inexact_array))


model, state = start(seed=0)
print(plan(eqx.filter(model, eqx.is_inexact_array)))

losses, restarted = [], []
with tempfile.TemporaryDirectory() as folder:
    for done, tokens in enumerate(text()):
        if done == SAVED:
            eqx.tree_serialise_leaves(f"{folder}/saved.eqx", (model, state))
        model, state, loss = step(model, state, jnp.asarray(tokens))
        losses.append(loss)
    model, state = eqx.tree_deserialise_leaves(f"{folder}/saved.eqx", start(seed=1))
for tokens in text()[SAVED:]:
    model, state, loss = step(model, state, jnp.asarray(tokens))
    restarted.append(loss)
check(losses, restarted)
