"""Sizes of the models of `train_gpt`. Flags are checked against them before JAX is loaded."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model.

    Attributes:
        width: Size of the residual stream.
        depth: Number of blocks.
        heads: Number of attention heads; divides the width.
        hidden: Size of the MLP's hidden layer.
        vocab_size: Number of tokens.
        context: Longest sequence; the learned positions have this many rows.
        positions: `learned` adds an embedding, `rotary` turns queries and keys.
        norm: `layer` (with mean and without bias) or `rms`.
        activation: `gelu` has matrices up and down, `swiglu` also a gate.
        tied: Whether the embedding is also the output head.
        dtype: What the blocks compute in; parameters and logits are float32.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    vocab_size: int
    context: int
    positions: Literal["learned", "rotary"]
    norm: Literal["layer", "rms"]
    activation: Literal["gelu", "swiglu"]
    tied: bool
    dtype: Literal["float32", "bfloat16"] = "float32"


def gpt(width: int, depth: int, heads: int, context: int) -> ModelConfig:
    """A GPT-2: learned positions, LayerNorm, GELU, tied head, no biases."""
    return ModelConfig(
        width, depth, heads, 4 * width, 50257, context, "learned", "layer", "gelu", tied=True
    )


def llama(width: int, hidden: int, depth: int, heads: int) -> ModelConfig:
    """A LLaMA: rotary positions, RMSNorm, SwiGLU, a head of its own."""
    return ModelConfig(
        width, depth, heads, hidden, 32000, 1024, "rotary", "rms", "swiglu", tied=False
    )


# The LLaMA sizes are those of the GaLore paper (arXiv 2403.03507), whose names are rounded:
# 58, 134, 368 and 1339 million parameters.
MODELS = {
    "tiny": dataclasses.replace(llama(128, 352, 4, 2), vocab_size=256, context=128, tied=True),
    "gpt-small": gpt(768, 12, 12, 2048),
    "gpt-base": gpt(1024, 24, 16, 4096),
    "gpt-large": gpt(1280, 36, 20, 1024),
    "llama-60m": llama(512, 1376, 8, 8),
    "llama-130m": llama(768, 2048, 12, 12),
    "llama-350m": llama(1024, 2736, 24, 16),
    "llama-1b": llama(2048, 5461, 24, 32),
}
