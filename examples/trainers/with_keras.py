# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "keras==3.15.1",
#   "jax==0.10.2",
#   "orbax-checkpoint==0.12.8",
#   "optax==0.2.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""Keras on JAX: `stateless_call` in a step of one's own (`compile` takes Keras's optimizers)."""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import optax
import orbax.checkpoint as ocp
from keras import layers
from optax.contrib import MuonDimensionNumbers
from shared import SAVED, VOCABULARY, check, text

from teon_optax import Rule, default_rules, plan, teon

WIDTH, HEADS, LAYERS = 64, 4, 4


def gpt():
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(tokens)
    for k in range(LAYERS):
        y = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"attention_{k}")
        x = x + attention(y, y, use_causal_mask=True)
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * WIDTH, activation="gelu", name=f"up_{k}")(y)
        x = x + layers.Dense(WIDTH, name=f"down_{k}")(y)
    return keras.Model(tokens, layers.Dense(VOCABULARY, name="head")(x))


keras.utils.set_random_seed(0)
model = gpt()
params = {variable.path: variable.value for variable in model.trainable_variables}
order, fixed = list(params), [variable.value for variable in model.non_trainable_variables]
# Keras's attention has kernels of three axes: (width, heads, head size), and back at the output.
heads = [
    Rule(
        r"attention_(?P<layer>\d+)/(query|key|value)/kernel",
        stack=2,
        dims=MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2)),
    ),
    Rule("attention_output/kernel", dims=MuonDimensionNumbers((0, 1), 2)),
]
rules = default_rules(params, first=heads)
print(plan(params, rules))
optimizer = teon(0.01, rules)


def loss_of(params, tokens):
    # The order of Keras's list; a dict comes out of `jax.jit` in that of its keys.
    logits, _ = model.stateless_call([params[path] for path in order], fixed, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@jax.jit
def step(params, state, tokens):
    loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def save(folder, params, state):
    for variable in model.trainable_variables:
        variable.assign(params[variable.path])
    model.save_weights(f"{folder}/model.weights.h5")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/optimizer", state)


def restore(folder):
    model.load_weights(f"{folder}/model.weights.h5")
    params = {variable.path: variable.value for variable in model.trainable_variables}
    with ocp.StandardCheckpointer() as checkpointer:
        return params, checkpointer.restore(f"{folder}/optimizer", optimizer.init(params))


state = optimizer.init(params)
losses, restarted = [], []
with tempfile.TemporaryDirectory() as folder:
    for done, tokens in enumerate(text()):
        if done == SAVED:
            save(folder, params, state)
        params, state, loss = step(params, state, tokens)
        losses.append(loss)
    params, state = restore(folder)
for tokens in text()[SAVED:]:
    params, state, loss = step(params, state, tokens)
    restarted.append(loss)
check(losses, restarted)
