"""Trains a small GPT in Flax nnx with TEON, on the source of Python's standard library."""

import os
from pathlib import Path

import numpy as np
import optax
from flax import nnx

from teon_optax import plan, teon


class Block(nnx.Module):
    """Attention and an MLP, each after a norm and around a residual."""

    def __init__(self, rngs, width=128):
        self.attn_norm, self.mlp_norm = (nnx.RMSNorm(width, rngs=rngs) for _ in range(2))
        self.attn = nnx.MultiHeadAttention(4, width, use_bias=False, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        """Maps (batch, time, width) to the same."""
        x = x + self.attn(self.attn_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """A language model of bytes."""

    def __init__(self, rngs, width=128):
        self.embed, self.head = nnx.Embed(256, width, rngs=rngs), nnx.Linear(width, 256, rngs=rngs)
        self.blocks = nnx.Sequential(*[Block(rngs) for _ in range(4)])

    def loss(self, tokens):
        """Averages the loss of each byte, given those before it."""
        logits = self.head(self.blocks(self.embed(tokens[:, :-1])))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


model = GPT(nnx.Rngs(0))
print(plan(nnx.state(model, nnx.Param)))
optimizer = nnx.Optimizer(model, teon(0.01), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, tokens):
    """Changes model and optimizer, and returns the loss."""
    loss, gradients = nnx.value_and_grad(GPT.loss)(model, tokens)
    optimizer.update(model, gradients)
    return loss


files = sorted(Path(os.__file__).parent.glob("*.py"))
text = np.frombuffer(b"".join(map(Path.read_bytes, files)), np.uint8).astype(np.int32)
for step in range(101):
    starts = np.random.default_rng(step).integers(len(text) - 64, size=(16, 1))
    loss = train_step(model, optimizer, text[starts + np.arange(65)])
    if step % 20 == 0:
        print(f"step {step:3}, loss {loss:.2f}")
