# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "maxtext[tpu]==0.2.5",
#   "jax==0.12.0.1",
#   "optax==0.2.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# override-dependencies = ["libtpu; sys_platform == 'never'"]
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""MaxText: its `get_optimizer` replaced, a scanned Llama, and its command line."""

import json
import os
import pathlib
import tempfile

os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # or MaxText asks Google Cloud who it is

import maxtext.configs
from flax import nnx
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train
from shared import SAVED, STEPS, VOCABULARY, check

from teon_optax import plan, teon

BASE = pathlib.Path(maxtext.configs.__file__).parent / "base.yml"
OPTIONS = {
    "run_name": "teon",
    "hardware": "cpu",
    "decoder_block": "llama2",
    "base_emb_dim": 64,
    "base_mlp_dim": 192,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 16,
    "base_num_decoder_layers": 4,
    "vocab_size": VOCABULARY,
    "max_target_length": 32,
    "per_device_batch_size": 16,
    "dtype": "float32",
    "attention": "dot_product",
    "dataset_type": "synthetic",  # one batch, again and again
    "learning_rate": 0.01,
    "learning_rate_schedule_steps": 100,
    "checkpoint_period": SAVED,
    "async_checkpointing": False,
    "skip_jax_distributed_system": True,
    "enable_tensorboard": False,
    "log_config": False,
}


def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
    """What MaxText calls for its optimizer; it has no registry to add one to."""
    print(plan(nnx.state(model, nnx.Param)))
    return teon(learning_rate_schedule)


optimizers.get_optimizer = get_optimizer


def run(folder, steps):
    """Losses of the steps that are left to do: MaxText goes on from its last checkpoint."""
    metrics = pathlib.Path(folder, "metrics.jsonl")
    metrics.unlink(missing_ok=True)
    options = OPTIONS | {
        "base_output_directory": folder,
        "metrics_file": metrics,
        "steps": steps,
    }
    train.main(["train", str(BASE), *(f"{name}={value}" for name, value in options.items())])
    lines = map(json.loads, metrics.read_text().splitlines())
    return [line["learning/loss"] for line in lines]


with tempfile.TemporaryDirectory() as folder:
    losses = run(folder, STEPS)
with tempfile.TemporaryDirectory() as folder:
    run(folder, SAVED)
    check(losses, run(folder, STEPS))
