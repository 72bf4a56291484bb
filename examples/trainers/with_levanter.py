# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "marin-levanter==0.2.227.dev40316220070",
#   "jax==0.11.2",
#   "optax==0.2.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# override-dependencies = ["optax==0.2.8"]
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""Levanter: an `OptimizerConfig` of teon's own, and a Llama in its `Trainer`."""

import dataclasses
import tempfile
from pathlib import Path

import equinox as eqx
import haliax as hax
import jax
from levanter.checkpoint import CheckpointerConfig
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from levanter.models.lm_model import LmExample
from levanter.optim.config import OptimizerConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig
from optax.contrib import MuonDimensionNumbers
from shared import SAVED, STEPS, VOCABULARY, check, text

from teon_optax import Rule, plan, teon

# Scanned layers are axis 0; heads are axes of their own, grouped by the head of keys they share.
RULES = [
    Rule("q_proj/weight", stack=2, layer_axis=0, dims=MuonDimensionNumbers(4, (1, 2, 3))),
    Rule("(k|v)_proj/weight", stack=2, layer_axis=0, dims=MuonDimensionNumbers(3, (1, 2))),
    Rule("o_proj/weight", layer_axis=0, dims=MuonDimensionNumbers((2, 3), 1)),
    Rule("mlp/.*_proj/weight", layer_axis=0, dims=MuonDimensionNumbers(2, 1)),
]


@OptimizerConfig.register_subclass("teon")
@dataclasses.dataclass(frozen=True)
class TeonConfig(OptimizerConfig):
    learning_rate: float = 0.01

    def build(self, num_train_steps):
        return teon(self.lr_scheduler(num_train_steps), RULES)


BATCH, POSITION = hax.Axis("batch", 16), hax.Axis("position", 33)
MODEL = LlamaConfig(
    max_seq_len=POSITION.size,
    hidden_dim=64,
    intermediate_dim=192,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
)


def init():
    return LlamaLMHeadModel.init(hax.Axis("vocab", VOCABULARY), MODEL, key=jax.random.PRNGKey(0))


def loss_of(model, example, *, key=None):
    return model.compute_next_token_loss(example, key=key)


def train(folder, num_steps, resume):
    """Losses of the steps up to `num_steps`, from the beginning or from the checkpoint."""
    checkpointer = CheckpointerConfig(
        base_path=folder,
        append_run_id_to_base_path=False,
        save_interval=None,
        keep=[{"every": SAVED}],
    )
    config = TrainerConfig(
        id="teon",
        tracker=NoopConfig(),
        train_batch_size=BATCH.size,
        num_train_steps=num_steps,
        checkpointer=checkpointer,
        load_checkpoint=resume,
        require_accelerator=False,
        log_dir=Path(folder),
    )
    losses = {}  # by step: Levanter calls its hooks again after the last one
    with Trainer(config, TeonConfig(lr_schedule="constant").build(STEPS), loss_of) as trainer:
        trainer.add_hook(lambda info: losses.update({info.step: info.loss}), every=1)
        state = trainer.initial_state(jax.random.PRNGKey(0), model_init=init)
        batches = hax.named(text()[int(state.step) :], ("step", BATCH, POSITION))
        examples = [hax.vmap(LmExample.causal, BATCH)(b) for b in batches.unbind("step")]
        trainer.train(state, examples)
    return list(losses.values())


print(plan(eqx.filter(init(), eqx.is_inexact_array), RULES))
with tempfile.TemporaryDirectory() as folder:
    train(folder, SAVED, resume=False)
    restarted = train(folder, STEPS, resume=True)
with tempfile.TemporaryDirectory() as folder:
    check(train(folder, STEPS, resume=False), restarted)
