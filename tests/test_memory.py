"""Leaves that are kept in the memory of the host: computed on the device, and put back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from teon_optax import (
    Rule,
    contrib,
    mode_orthogonalize,
    orthogonalize,
    polar,
    polar_express,
    scale_by_teon,
    teon,
)

# AdamW is Optax's.
pytestmark = pytest.mark.promotes_dtypes

RULES = (Rule(r"block_(?P<layer>\d+)/query", stack=2),)
QUICK = polar_express(1)
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
TRANSFORMS = {
    "orthogonalize": orthogonalize(RULES, method=QUICK),
    "scale_by_teon": scale_by_teon(RULES, method=QUICK),
    "teon": teon(0.02, RULES, method=QUICK, weight_decay=0.1),
    "orthogonalize_slices": contrib.orthogonalize_slices(RULES, "dct", method=QUICK),
    "normalize_matrices": contrib.normalize_matrices(RULES),
    "scale_by_normuon": contrib.scale_by_normuon(RULES),
}
ON_HOST = {
    "one device": SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"),
    "mesh": NamedSharding(MESH, PartitionSpec(), memory_kind="pinned_host"),
}


def params():
    rng = np.random.default_rng(0)
    shapes = {"block_0": {"query": (8, 6)}, "block_1": {"query": (8, 6)}, "bias": (6,)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def memories(tree):
    """Of all leaves but counts."""
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


class HostMemoryTest(variants.TestCase):
    @variants.with_and_without_jit
    @parameterized.product(transform=list(TRANSFORMS), place=list(ON_HOST))
    def test_leaves_of_the_host_are_updated_and_stay_there(self, transform, place):
        transform = TRANSFORMS[transform]
        expected, _ = transform.update(params(), transform.init(params()), params())
        own = jax.device_put(params(), ON_HOST[place])
        before = transform.init(own)
        updates, after = self.variant(transform.update)(own, before, own)
        assert memories(updates) == {"pinned_host"}
        assert memories(before) == memories(after) <= {"pinned_host"}
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)

    @variants.with_and_without_jit
    @parameterized.parameters("scale_by_teon", "teon")
    def test_a_state_of_the_host_serves_leaves_of_the_device(self, transform):
        transform = TRANSFORMS[transform]
        state = transform.init(params())
        expected, _ = transform.update(params(), state, params())
        kept = jax.device_put(state, ON_HOST["one device"])
        updates, after = self.variant(transform.update)(params(), kept, params())
        assert (memories(updates), memories(after)) == ({"device"}, {"pinned_host"})
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_polar_factors_are_kept_where_the_matrices_are():
    stack = jax.device_put(jnp.ones((3, 4, 2)), ON_HOST["one device"])
    for result in (polar(stack, QUICK), mode_orthogonalize(stack, 1, QUICK)):
        assert memories(result) == {"pinned_host"}
