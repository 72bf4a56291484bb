"""How long an update is: the paper's scale, Muon's, and a root mean square."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from teon_optax import Rule, orthogonalize, plan
from teon_optax._scaling import scaling


def rms(arrays):
    return np.sqrt(np.mean(np.square(np.asarray(arrays, np.float64))))


@pytest.mark.parametrize(
    ("fan_in", "fan_out", "spectral", "muon"),
    [(4, 16, 2, 2), (16, 4, 1 / 2, 1), (9, 9, 1, 1)],
    ids=["widening", "narrowing", "square"],
)
@pytest.mark.parametrize("K", [1, 2])
def test_named_scales_know_one_layer_s_fans_alone(K, fan_in, fan_out, spectral, muon):
    rank = min(K * fan_in, fan_out)
    assert scaling("spectral")(fan_in, fan_out, K, rank) == spectral
    assert scaling("muon")(fan_in, fan_out, K, rank) == muon


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)], ids=str)
def test_a_number_is_the_rms_of_a_full_rank_update(shape, K, mode):
    kernels = np.random.default_rng(0).normal(size=(K, *shape))
    rank = min(oracles.unfolding(kernels, mode).shape)
    update = scaling(0.2)(shape[0], shape[1], K, rank) * np.array(oracles.joint(kernels, mode))
    np.testing.assert_allclose(rms(update), 0.2, rtol=1e-12)


def test_it_is_so_for_every_group_of_a_tree_the_last_shorter_run_too():
    rng = np.random.default_rng(1)
    params, rules = {}, []
    for mode in (1, 2, 3):
        for shape in ((4, 30), (30, 4)):
            name = f"{mode}-{shape[0]}"
            params[name] = jnp.asarray(rng.normal(size=(5, *shape)), jnp.float32)
            rules.append(Rule(name, stack=3, mode=mode, layer_axis=0))
    transform = orthogonalize(rules, method="svd", scale=0.2)
    updates, _ = jax.jit(transform.update)(params, transform.init(params))
    for group in plan(params, rules).groups:
        name = group.members[0].partition("[")[0]
        run = updates[name][group.layers[0] : group.layers[-1] + 1]
        np.testing.assert_allclose(rms(run), 0.2, rtol=4 * 30 * oracles.EPS)


def test_a_traced_number_is_a_scale_too():
    result = jax.jit(lambda r: scaling(r)(4, 9, 2, 8))(jnp.float32(0.2))
    np.testing.assert_allclose(result, 0.2 * math.sqrt(2 * 4 * 9 / 8), rtol=4 * oracles.EPS)


@pytest.mark.parametrize("scale", [1, 0.2, np.float32(0.2), np.array(0.2, np.float32)], ids=repr)
def test_any_positive_number_is_a_scale(scale):
    np.testing.assert_allclose(scaling(scale)(4, 4, 1, 4), 2 * float(scale), rtol=4 * oracles.EPS)


@pytest.mark.parametrize(
    "scale", ["nope", "", 0, -0.2, math.inf, math.nan, None, (), [0.2]], ids=repr
)
def test_what_is_no_scale_is_refused(scale):
    words = f"`scale={scale!r}` should be 'spectral' (sqrt(fan_out / fan_in), the paper's), 'muon'"
    with pytest.raises(ValueError, match=re.escape(words)):
        scaling(scale)
