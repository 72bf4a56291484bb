# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "flax==0.12.8",
#   "jax==0.10.2",
#   "optax==0.2.8",
#   "orbax-checkpoint==0.12.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""Flax nnx: `nnx.Optimizer`, `nnx.ModelAndOptimizer`, scanned blocks, and LoRA."""

import functools
import tempfile

import jax
import optax
import orbax.checkpoint as ocp
from flax import nnx
from shared import SAVED, VOCABULARY, check, text

from teon_optax import Rule, plan, teon

WIDTH, HEADS, LAYERS, RANK = 64, 4, 4, 4


class Block(nnx.Module):
    def __init__(self, linear, rngs):
        self.norm1, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(4)
        )
        self.up = linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        y = self.norm1(x)
        heads = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        query, key, value = (f(y).reshape(heads) for f in (self.query, self.key, self.value))
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, linear=nnx.Linear, scanned=False, *, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)
        self.scanned = scanned
        if scanned:
            make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(functools.partial(Block, linear)))
            self.blocks = make(rngs)
        else:
            self.blocks = nnx.List([Block(linear, rngs) for _ in range(LAYERS)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        if self.scanned:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.blocks
            )
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(x)


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def step(model, optimizer, tokens):
    trained = nnx.DiffState(0, optimizer.wrt)
    loss, gradients = nnx.value_and_grad(loss_of, argnums=trained)(model, tokens)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def step_of_both(both, tokens):
    loss, gradients = nnx.value_and_grad(loss_of)(both.model, tokens)
    both.update(gradients)
    return loss


def train(title, make_model, wrt=nnx.Param, rules=None, both=False):
    """Trains, and again from the checkpoint; `both` keeps model and optimizer in one object."""

    def start(seed):
        model = make_model(rngs=nnx.Rngs(seed))
        optimizer = teon(0.01, rules)
        if both:
            return (nnx.ModelAndOptimizer(model, optimizer, wrt=wrt),)
        return model, nnx.Optimizer(model, optimizer, wrt=wrt)

    params = nnx.state(make_model(rngs=nnx.Rngs(0)), wrt)
    print(f"\n{title}\n{plan(params, rules)}")
    objects, take_step = start(seed=0), step_of_both if both else step
    losses = []
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        for done, tokens in enumerate(text()):
            if done == SAVED:
                checkpointer.save(f"{folder}/saved", nnx.state(objects))
            losses.append(take_step(*objects, tokens))
        checkpointer.wait_until_finished()
        objects = start(seed=1)
        nnx.update(objects, checkpointer.restore(f"{folder}/saved", nnx.state(objects)))
    check(losses, [take_step(*objects, tokens) for tokens in text()[SAVED:]])


train("nnx.Optimizer", GPT)
train("nnx.ModelAndOptimizer", GPT, both=True)
train("scanned blocks", functools.partial(GPT, scanned=True))
# The default rules leave LoRA's factors to the fallback; these couple them over two blocks.
rules = [Rule(r"blocks/(?P<layer>\d+)/(query|key|value)/lora", stack=2), Rule("lora")]
adapted = functools.partial(GPT, functools.partial(nnx.LoRALinear, lora_rank=RANK))
train("LoRA", adapted, wrt=nnx.LoRAParam, rules=rules)
