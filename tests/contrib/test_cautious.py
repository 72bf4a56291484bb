"""`add_cautious_weight_decay` against its formula in float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from teon_optax import contrib


@pytest.mark.parametrize("decay", [0.1, lambda count: 0.1])
def test_cautious_weight_decay_decays_where_update_and_param_agree(decay):
    rng = np.random.default_rng(2)
    updates, params = ({"w": rng.normal(size=(4, 6)).astype(np.float32)} for _ in range(2))
    updates["w"][0], params["w"][1] = 0, -1e-30
    updates["w"][1] = 1e-30  # the product is no number of float32
    transform: Any = contrib.add_cautious_weight_decay(decay)
    result, _ = transform.update(updates, transform.init(params), params)
    u, x = np.float64(updates["w"]), np.float64(params["w"])
    np.testing.assert_allclose(result["w"], u + 0.1 * (u * x >= 0) * x, rtol=1e-6)
    masked: Any = contrib.add_cautious_weight_decay(decay, {"w": False})
    result, _ = masked.update(updates, masked.init(params), params)
    np.testing.assert_array_equal(result["w"], updates["w"])
    with pytest.raises(ValueError, match="params"):
        transform.update(updates, transform.init(params))


def test_cautious_weight_decay_passes_what_is_absent():
    updates, params = {"w": jnp.ones(2), "frozen": None}, {"w": jnp.ones(2), "frozen": jnp.ones(3)}
    transform: Any = contrib.add_cautious_weight_decay(0.5)
    result, _ = transform.update(updates, transform.init(params), params)
    assert result["frozen"] is None and result["w"].tolist() == [1.5, 1.5]


@pytest.mark.parametrize("decay", [float("nan"), -0.1, float("inf"), "much"])
def test_what_is_no_rate_is_refused(decay):
    with pytest.raises(ValueError, match=r"`weight_decay=.*` should be a number, at least 0, or a"):
        contrib.add_cautious_weight_decay(decay)


@pytest.mark.parametrize("mask", ["kernel", {"w": 1.0}, True])
def test_what_is_no_tree_of_booleans_is_refused(mask):
    with pytest.raises(ValueError, match=r"`mask=.*` should be a tree of booleans or a function"):
        contrib.add_cautious_weight_decay(0.1, mask)
