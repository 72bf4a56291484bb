# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "numpyro==0.22.0",
#   "flax==0.12.8",
#   "jax==0.10.2",
#   "orbax-checkpoint==0.12.8",
#   "optax==0.2.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""NumPyro: stochastic variational inference, whose network is a Flax module."""

import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import orbax.checkpoint as ocp
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import optax_to_numpyro
from shared import SAVED, STEPS, check

from teon_optax import Rule, plan, teon

FEATURES, WIDTH, LAYERS = 8, 64, 4


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="input")(x)
        for layer in range(LAYERS):
            x = x + nn.relu(nn.Dense(WIDTH, name=f"hidden_{layer}")(x))
        return nn.Dense(1, name="output")(x)[:, 0]


def model(x, y):
    network = flax_module("network", Network(), input_shape=(1, FEATURES))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(network(x), noise), obs=y)


rules = [Rule(r"hidden_(?P<layer>\d+)/kernel", stack=2)]
optimizer = teon(0.01, rules)
svi = SVI(model, AutoNormal(model), optax_to_numpyro(optimizer), Trace_ELBO(num_particles=16))

x = jax.random.normal(jax.random.key(0), (256, FEATURES))
y = jnp.tanh(x[:, 0] - 2 * x[:, 1])
start = svi.init(jax.random.PRNGKey(1), x, y)
print(plan(svi.optim.get_params(start.optim_state), rules))


def run(steps, state):
    return svi.run(None, steps, x, y, init_state=state, progress_bar=False)


# NumPyro has no checkpoints of its own; a state is a pytree, which Orbax saves.
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    first = run(SAVED, start)
    checkpointer.save(f"{folder}/saved", first.state)
    checkpointer.wait_until_finished()
    second = run(STEPS - SAVED, first.state)
    restarted = run(STEPS - SAVED, checkpointer.restore(f"{folder}/saved", start))
check([*first.losses, *second.losses], restarted.losses)
