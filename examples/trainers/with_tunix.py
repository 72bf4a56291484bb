# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "google-tunix==0.1.7",
#   "qwix==0.1.8",
#   "jax==0.12.0.1",
#   "optax==0.2.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""Tunix: `PeftTrainer` trains its Llama, Qwen and Gemma, and a Llama by Qwix's LoRA."""

import tempfile
from pathlib import Path

import jax.numpy as jnp
import qwix
from flax import nnx
from optax.contrib import MuonDimensionNumbers
from shared import SAVED, STEPS, VOCABULARY, check, text
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3
from tunix.sft import utils
from tunix.sft.metrics_logger import Mode
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from teon_optax import Rule, plan, teon

SIZES = {
    "num_layers": 4,
    "embed_dim": 64,
    "hidden_dim": 192,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
}
LLAMA_SIZES = SIZES | {"vocab_size": VOCABULARY, "rope_theta": 10_000, "norm_eps": 1e-5}
GEMMA_SIZES = SIZES | {
    "num_embed": VOCABULARY,
    "sliding_window_size": 8,
    "param_dtype": jnp.float32,
}


def llama():
    return llama3.Llama3(llama3.ModelConfig(**LLAMA_SIZES), rngs=nnx.Rngs(0))


def qwen():
    return qwen3.Qwen3(qwen3.ModelConfig(**LLAMA_SIZES), rngs=nnx.Rngs(0))


def gemma():
    return gemma3.Gemma3(gemma3.ModelConfig(**GEMMA_SIZES), rngs=nnx.Rngs(0))


def llama_with_lora():
    model = llama()
    provider = qwix.LoraProvider(module_path=".*(q|k|v|o|gate|up|down)_proj", rank=4, alpha=8.0)
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())


# The default rules leave LoRA's factors to the fallback. Those of attention have an axis of heads.
LORA_RULES = [
    Rule(r"(?P<layer>\d+)/attn/(q|k|v)_proj/w_lora_a", stack=2),
    Rule(
        r"(?P<layer>\d+)/attn/(q|k|v)_proj/w_lora_b",
        stack=2,
        dims=MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2)),
    ),
    Rule("o_proj/w_lora_a", dims=MuonDimensionNumbers((0, 1), 2)),
    Rule("lora"),
]


def model_input(batch):
    mask = batch.input_mask
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def train(model, rules, max_steps, folder):
    """Losses of the steps that are left to do: `PeftTrainer` goes on from its last checkpoint."""
    config = TrainingConfig(
        eval_every_n_steps=STEPS,
        max_steps=max_steps,
        checkpoint_root_directory=str(folder),
        pbar_description=None,
    )
    optimizer = teon(0.01, rules)
    trainer = PeftTrainer(model, optimizer, config).with_gen_model_input_fn(model_input)
    trainer.train(TrainingInput(tokens, jnp.ones_like(tokens, bool)) for tokens in text())
    return trainer.metrics_logger.get_metric_history("", "loss", Mode.TRAIN)


for make_model in (llama, qwen, gemma, llama_with_lora):
    rules = LORA_RULES if make_model is llama_with_lora else None
    trained = nnx.LoRAParam if rules else nnx.Param
    print(f"\n{make_model.__name__}\n{plan(nnx.state(make_model(), trained), rules)}")
    with tempfile.TemporaryDirectory() as folder:
        losses = train(make_model(), rules, STEPS, Path(folder, "all"))
        train(make_model(), rules, SAVED, Path(folder, "begun"))
        check(losses, train(make_model(), rules, STEPS, Path(folder, "begun")))
