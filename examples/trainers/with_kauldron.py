# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "kauldron==1.4.4",
#   "gemma==4.0.1",
#   "protobuf==7.36.2",
#   "jax==0.12.0.1",
#   "optax==0.2.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""Kauldron: `optimizer=teon(...)` in its `Trainer`, and a small Gemma 3."""

import tempfile

import jax
import jax.numpy as jnp
from gemma import gm
from gemma.gm.nn.config import AttentionType, TransformerConfig
from kauldron import kd
from kauldron.train.metric_writer import NoopWriter
from shared import SAVED, STEPS, VOCABULARY, check, text

from teon_optax import plan, teon

BATCH = 16
SIZES = TransformerConfig(
    num_embed=VOCABULARY,
    embed_dim=64,
    hidden_dim=192,
    num_heads=4,
    head_dim=16,
    num_kv_heads=2,
    final_logit_softcap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL) * 2,
    sliding_window_size=8,
)
MODEL = gm.nn.Transformer(config=SIZES, tokens="batch.tokens", dtype=jnp.float32)
LOSS = kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds.logits", labels="batch.labels")


class Losses(NoopWriter):
    """Kauldron's writer of metrics, which keeps the losses in a list."""

    def write_step_metrics(self, *, step, aux, **others):
        LOSSES.append(aux.compute(flatten=True).loss_values["losses/total"])


LOSSES = []


def data():
    rows = text(BATCH).reshape(STEPS * BATCH, -1)
    examples = [{"tokens": row[:-1], "labels": row[1:, None]} for row in rows]
    return kd.data.py.DataSource(
        data_source=examples, batch_size=BATCH, shuffle=False, seed=0, num_workers=0
    )


def train(folder):
    """Losses of the steps that are left to do: Kauldron goes on from its last checkpoint."""
    LOSSES.clear()
    trainer = kd.train.Trainer(
        seed=0,
        workdir=folder,
        train_ds=data(),
        model=MODEL,
        num_train_steps=STEPS - 1,  # Kauldron takes a step more.
        train_losses={"cross_entropy": LOSS},
        optimizer=teon(0.01),
        checkpointer=kd.ckpts.Checkpointer(save_interval_steps=SAVED),
        writer=Losses(),
        log_metrics_every=1,
    )
    trainer.train()
    return list(LOSSES)


tokens = jnp.asarray(text()[0])
print(plan(jax.eval_shape(MODEL.init, jax.random.key(0), tokens)["params"]))
with tempfile.TemporaryDirectory() as folder:
    losses = train(folder)
    check(losses, train(folder))
