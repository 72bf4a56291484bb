"""Decoder-only transformers in Flax: a GPT-2 and a LLaMA block from one configuration.

Query, key and value are separate matrices, so the paths that an optimizer's rules see read
`block_0/attn/query/kernel`, `block_0/mlp/up/kernel` and so on.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from examples.options import MODELS, ModelConfig, gpt, llama

__all__ = ["GPT", "MODELS", "ModelConfig", "attention_logits", "gpt", "llama", "rotate"]

INIT_STD = 0.02
ROTARY_BASE = 10_000.0


def rotate(heads: jax.Array) -> jax.Array:
    """Turns queries or keys by their positions (rotary positions, arXiv 2104.09864).

    Args:
        heads: (batch, time, heads, size), with an even size.

    Returns:
        The same shape: feature pairs (i, i + size / 2) turned by `time * base^(-2 i / size)`.
    """
    _, time, _, size = heads.shape
    frequencies = ROTARY_BASE ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.outer(jnp.arange(time, dtype=jnp.float32), frequencies)[None, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(heads.dtype)


def _linear(config: ModelConfig, features: int, name: str, std: float = INIT_STD) -> nn.Dense:
    init = nn.initializers.normal(std)
    return nn.Dense(features, use_bias=False, dtype=config.dtype, kernel_init=init, name=name)


def _norm(config: ModelConfig, name: str) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(dtype=config.dtype, name=name)
    return nn.LayerNorm(use_bias=False, dtype=config.dtype, name=name)


def _residual_std(config: ModelConfig) -> float:
    """Scales as GPT-2 does: the sum of 2 depth branches starts as large as one of them."""
    return INIT_STD / (2 * config.depth) ** 0.5


def _largest_logits(query: jax.Array, key: jax.Array) -> jax.Array:
    """Finds each head's largest logit of (batch, time, heads, size), where positions may attend."""
    logits = jnp.einsum("bthd,bshd->bhts", query, key).astype(jnp.float32)
    may_attend = jnp.tril(jnp.ones(logits.shape[2:], bool))[None, None]
    return jnp.max(logits, (0, 2, 3), where=may_attend, initial=-jnp.inf) / query.shape[-1] ** 0.5


def attention_logits(sown: Mapping[str, Any]) -> jax.Array:
    """Stacks what the blocks of `GPT` sowed in "logits", for `teon_optax.contrib.clip_qk`.

    Args:
        sown: The collection "logits" of `model.apply(variables, tokens, mutable=["logits"])`.

    Returns:
        (layers, heads), the largest of each head in the batch.
    """
    layers = range(len(sown))
    return jnp.stack([sown[f"block_{layer}"]["attn"]["largest"][0] for layer in layers])


class Attention(nn.Module):
    """Causal multi-head attention. Each head's largest logit is sown in "logits", if asked for."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same."""
        config = self.config
        shape = (*x.shape[:-1], config.heads, config.width // config.heads)
        query, key, value = (
            _linear(config, config.width, name)(x).reshape(shape)
            for name in ("query", "key", "value")
        )
        if config.positions == "rotary":
            query, key = rotate(query), rotate(key)
        if self.is_mutable_collection("logits") and not self.is_initializing():
            self.sow("logits", "largest", _largest_logits(query, key))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return _linear(config, config.width, "out", _residual_std(config))(mixed.reshape(x.shape))


class MLP(nn.Module):
    """The position-wise part of a block."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same."""
        config = self.config
        up = _linear(config, config.hidden, "up")(x)
        if config.activation == "swiglu":
            hidden = nn.silu(_linear(config, config.hidden, "gate")(x)) * up
        else:
            hidden = nn.gelu(up)
        return _linear(config, config.width, "down", _residual_std(config))(hidden)


class Block(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same."""
        x = x + Attention(self.config, name="attn")(_norm(self.config, "attn_norm")(x))
        return x + MLP(self.config, name="mlp")(_norm(self.config, "mlp_norm")(x))


class GPT(nn.Module):
    """A decoder-only language model."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Predicts the next token at every position.

        Args:
            tokens: (batch, time) integers below `vocab_size`.

        Returns:
            (batch, time, vocab_size) logits in float32.
        """
        config = self.config
        init = nn.initializers.normal(INIT_STD)
        embed = nn.Embed(
            config.vocab_size, config.width, dtype=config.dtype, embedding_init=init, name="embed"
        )
        x = embed(tokens)
        if config.positions == "learned":
            x += nn.Embed(
                config.context,
                config.width,
                dtype=config.dtype,
                embedding_init=init,
                name="positions",
            )(jnp.arange(tokens.shape[1]))
        for layer in range(config.depth):
            x = Block(config, name=f"block_{layer}")(x)
        x = _norm(config, "final_norm")(x)
        head = embed.attend if config.tied else _linear(config, config.vocab_size, "lm_head")
        return head(x).astype(jnp.float32)
