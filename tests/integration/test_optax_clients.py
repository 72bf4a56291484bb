"""`teon` inside programs of others that take an Optax optimizer: NumPyro's SVI, jaxopt's solver.

Both come with the extra `clients`; without it these tests are skipped.
"""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from by_hand import trained

from teon_optax import plan, teon

X = jnp.asarray(np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32))
STEPS, LR = 20, 0.05
# Of one update: no joint matrix of the first two has a condition above 50 (the largest is 38).
ROUNDING = LR * oracles.rounding(np.geomspace(1, 50, 6))


def params():
    rng = np.random.default_rng(1)
    block = {"query": (6, 6), "key": (6, 6), "up": (6, 4), "down": (4, 6)}

    def kernels():
        return {
            name: {"kernel": jnp.asarray(rng.normal(size=shape).astype(np.float32)) / 3}
            for name, shape in block.items()
        }

    return {"block_0": kernels(), "block_1": kernels(), "norm": {"scale": jnp.ones(6)}}


def network(params, x):
    for block in (params["block_0"], params["block_1"]):
        x = x + jnp.tanh(x @ block["query"]["kernel"]) @ block["key"]["kernel"]
        x = x + jnp.tanh(x @ block["up"]["kernel"]) @ block["down"]["kernel"]
    return x * params["norm"]["scale"][None]


def loss(params, x):
    return 0.5 * jnp.sum((network(params, x) - jnp.flip(x, 1)) ** 2)


def test_numpyros_svi_does_the_steps_of_optax():
    """A likelihood with the network's mean; without latent sites, SVI maximizes it exactly."""
    numpyro = pytest.importorskip("numpyro")

    def model(x):
        kernels = numpyro.param("network$params", params())
        with numpyro.plate("rows", *x.shape[:1]):
            mean = numpyro.distributions.Normal(network(kernels, x), 1.0).to_event(1)
            numpyro.sample("y", mean, obs=jnp.flip(x, 1))

    optimizer = teon(LR, weight_decay=0.1)
    svi = numpyro.infer.SVI(model, lambda x: None, optimizer, numpyro.infer.Trace_ELBO())
    state = svi.init(jax.random.key(0), X)
    tree = svi.get_params(state)
    assert [group.layers for group in plan(tree).groups].count((0, 1)) == 2  # query and key
    step = jax.jit(svi.update)
    for _ in range(2):
        state, _ = step(state, X)
    direct = trained(optimizer, params(), jax.grad(lambda tree: loss(tree, X)), 2)
    chex.assert_trees_all_close(
        svi.get_params(state), {"network$params": direct}, atol=2 * ROUNDING
    )
    losses = svi.run(jax.random.key(0), STEPS, X, progress_bar=False).losses
    assert losses[-1] < losses[0] - 1


def test_numpyros_guides_are_vectors_and_train_by_the_fallback():
    numpyro = pytest.importorskip("numpyro")

    def model(x):
        weight = numpyro.sample("w", numpyro.distributions.Normal(jnp.zeros(6), 1.0).to_event(1))
        with numpyro.plate("rows", *x.shape[:1]):
            numpyro.sample("y", numpyro.distributions.Normal(x @ weight, 1.0), obs=x[:, 0])

    guide = numpyro.infer.autoguide.AutoNormal(model)
    elbo = numpyro.infer.Trace_ELBO()
    ours, theirs = [
        numpyro.infer.SVI(model, guide, optimizer, elbo).run(
            jax.random.key(0), 5, X, progress_bar=False
        )
        for optimizer in (teon(LR), optax.adamw(LR, 0.9, 0.95, weight_decay=0.0))
    ]
    chex.assert_trees_all_equal(ours.params, theirs.params)


def test_jaxopts_solver_does_the_steps_of_optax():
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        jaxopt = pytest.importorskip("jaxopt")
    optimizer = teon(LR, weight_decay=0.1)
    solver = jaxopt.OptaxSolver(loss, optimizer, maxiter=STEPS)
    solved, state = solver.run(params(), X)
    assert state.iter_num == STEPS
    assert loss(solved, X) < loss(params(), X) - 1
    stepped, state = params(), solver.init_state(params(), X)
    for _ in range(2):
        stepped, state = solver.update(stepped, state, X)
    direct = trained(optimizer, params(), jax.grad(lambda tree: loss(tree, X)), 2)
    chex.assert_trees_all_close(stepped, direct, atol=2 * ROUNDING)
