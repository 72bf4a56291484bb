# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "brax==0.14.2",
#   "jax==0.7.2",
#   "optax==0.2.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# override-dependencies = ["jax==0.7.2"]
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""Brax: PPO, whose optimizer is replaced, since it takes none, on a pendulum."""

import functools
import tempfile
import types
from pathlib import Path

import brax.envs
import jax
import jax.numpy as jnp
import optax
from brax.training.agents.ppo import train as ppo
from brax.training.agents.ppo.losses import PPONetworkParams
from brax.training.agents.ppo.networks import make_ppo_networks
from shared import STEPS, check

from teon_optax import Rule, plan, teon

# The hidden matrices of each network, two by two; its first and its last go to the fallback.
RULES = [Rule(r"(policy|value)/params/hidden_(?P<layer>[1-4])/kernel", stack=2)]


def optimizer(learning_rate):
    return teon(learning_rate, RULES, adam_learning_rate=3e-4)


# `train` makes `optax.adam(learning_rate)`, and calls `update` without parameters.
ppo.optax = types.SimpleNamespace(**vars(optax) | {"adam": optimizer})

MINIBATCHES, BATCH, UNROLL = 4, 32, 16
LAYERS = {"policy_hidden_layer_sizes": (64,) * 5, "value_hidden_layer_sizes": (64,) * 5}


def train(steps, folder=None, **options):
    """Losses of the steps, each of all its minibatches, and the networks after them."""
    losses = []
    _, networks, _ = ppo.train(
        environment=brax.envs.get_environment("inverted_pendulum", backend="spring"),
        num_timesteps=steps * MINIBATCHES * BATCH * UNROLL,
        episode_length=200,
        num_envs=BATCH,
        num_minibatches=MINIBATCHES,
        batch_size=BATCH,
        unroll_length=UNROLL,
        learning_rate=0.02,
        network_factory=functools.partial(make_ppo_networks, **LAYERS),
        normalize_observations=True,
        num_evals=steps + 1,
        run_evals=False,
        progress_fn=lambda _, metrics: losses.append(metrics["training/total_loss"]),
        save_checkpoint_path=folder,
        **options,
    )
    return losses, networks


network = make_ppo_networks(observation_size=4, action_size=1, **LAYERS)
policy, value = network.policy_network, network.value_network
params = PPONetworkParams(policy.init(jax.random.key(0)), value.init(jax.random.key(0)))
print(plan(params, RULES))

with tempfile.TemporaryDirectory() as folder:
    losses, networks = train(STEPS, folder)
    last = max(Path(folder).iterdir())
    # Brax saves networks and no optimizer's state, so that its restarts begin with a new momentum.
    _, restored = train(0, restore_checkpoint_path=last)
check(losses)
if not jax.tree.all(jax.tree.map(jnp.array_equal, networks, restored)):
    raise SystemExit("The checkpoint should give the networks again, exactly.")
print("The checkpoint gave the same networks.")
