"""`alignment`: its bounds, both of their ends, and which side is which."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, alignment, default_rules, plan

EPS = float(np.finfo(np.float32).eps)
LAYER = r"block_(?P<layer>\d+)/kernel"


def tree(kernels, dtype=np.float32):
    return {
        f"block_{i}": {"kernel": np.asarray(kernel).astype(dtype)}
        for i, kernel in enumerate(kernels)
    }


def measured(kernels, rank=1, dtype: Any = np.float32):
    (group,) = alignment(tree(kernels, dtype), [Rule(LAYER, stack=len(kernels))], rank)
    return group


def with_sides(us, vs):
    """Kernels (fan_in, fan_out) of W_k = U_k V_k^T."""
    return [V @ U.T for U, V in zip(us, vs, strict=True)]


def orthonormal(rng, d, columns):
    return np.linalg.qr(rng.normal(size=(d, columns)))[0]


def oracle(kernels, rank):
    """Ratios and overlaps, pair by pair, in float64 and in the paper's layout."""
    weights = [np.asarray(kernel, np.float64).T for kernel in kernels]
    separate = sum(np.linalg.norm(W, "nuc") for W in weights)
    ratios = [separate / np.linalg.norm(oracles.unfolding(kernels, mode), "nuc") for mode in (1, 2)]
    us, vs = zip(*[(U, Vt.T) for U, _, Vt in map(np.linalg.svd, weights)], strict=True)
    pairs = [(i, j) for j in range(len(kernels)) for i in range(j)]
    overlaps = [
        np.mean([np.linalg.norm(A[i][:, :rank].T @ A[j][:, :rank]) ** 2 / rank for i, j in pairs])
        for A in (us, vs)
    ]
    return ratios, overlaps


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(9, 5), (5, 9)])
def test_ratios_and_overlaps_are_those_of_their_definitions(fan_in, fan_out, rank):
    rng = np.random.default_rng(0)
    # Leading singular values far apart: rounding turns the vectors by eps over their distance.
    kernels = [
        oracles.with_spectrum(rng, fan_in, fan_out, [9, 7, 5, 3, 1]).astype(np.float32)
        for _ in range(3)
    ]
    group = measured(kernels, rank)
    ratios, overlaps = oracle(kernels, rank)
    tolerance = 3 * EPS * max(fan_in, fan_out) * 9 / 2
    assert np.allclose(group.ratios, ratios, atol=tolerance, rtol=0)
    assert np.allclose(group.overlaps, overlaps, atol=tolerance, rtol=0)
    assert abs(group.overlaps[0] - group.overlaps[1]) > 0.01  # so that exchanged sides would fail


@given(
    st.sampled_from([(2, 3, 5), (3, 4, 4), (4, 6, 1)]),
    st.integers(0, 2**32 - 1),
    st.floats(-30, 30),
)
def test_ratios_are_between_one_and_root_K_and_overlaps_between_zero_and_one(shape, seed, exponent):
    K, *fans = shape
    kernels = 10.0**exponent * np.random.default_rng(seed).normal(size=shape)
    group = measured(kernels, rank=2)
    tolerance = 10 * EPS * max(fans)
    assert all(1 - tolerance <= ratio <= math.sqrt(K) + tolerance for ratio in group.ratios)
    assert all(0 <= overlap <= 1 for overlap in group.overlaps)


@pytest.mark.parametrize("K", [2, 3])
def test_the_ratio_is_one_where_left_spaces_are_orthogonal_and_root_K_where_grams_are_equal(K):
    rng = np.random.default_rng(1)
    apart = np.hsplit(orthonormal(rng, 6, 2 * K), K)
    together = [orthonormal(rng, 7, 2)] * K
    group = measured(with_sides(us=apart, vs=together), rank=2)
    tolerance = 20 * EPS
    assert np.allclose(group.ratios, (1, math.sqrt(K)), atol=tolerance, rtol=0)
    assert np.allclose(group.overlaps, (0, 1), atol=tolerance, rtol=0)


def test_mode_1_is_favoured_where_layers_share_their_right_vectors():
    rng = np.random.default_rng(2)
    apart, together = np.hsplit(orthonormal(rng, 6, 4), 2), [orthonormal(rng, 6, 2)] * 2
    assert measured(with_sides(us=apart, vs=together)).favoured == 1
    assert measured(with_sides(us=together, vs=apart)).favoured == 2


def test_mode_1_is_favoured_where_neither_mode_is_better():
    symmetric = np.random.default_rng(3).normal(size=(2, 5, 5))
    symmetric = symmetric + symmetric.transpose(0, 2, 1)
    kernels = [*symmetric]
    for order in (kernels, kernels[::-1]):
        assert measured(order).favoured == 1


def test_neither_the_order_nor_the_size_of_the_layers_matters():
    kernels = np.random.default_rng(4).normal(size=(3, 5, 4))
    group, other = measured(kernels, 2), measured(-1e3 * kernels[[2, 0, 1]], 2)
    assert np.allclose(group.ratios, other.ratios, rtol=20 * EPS)
    assert np.allclose(group.overlaps, other.overlaps, atol=100 * EPS)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_the_size_of_all_layers_does_not_matter(size):
    kernels = np.random.default_rng(0).normal(size=(2, 4, 6))
    expected, found = measured(kernels), measured(size * kernels)
    # Numbers below 1.2e-38 have 20 bits here.
    np.testing.assert_allclose(jax.tree.leaves(found[2:]), jax.tree.leaves(expected[2:]), rtol=1e-4)


@pytest.mark.parametrize("stacks", [2, (), (0,), (2.0,), ("2",), "24", (True,)], ids=repr)
def test_stacks_that_are_no_positive_integers_are_refused(stacks):
    with pytest.raises(ValueError, match=re.escape(f"`alignment(stacks={stacks!r})`: stacks")):
        alignment({"block_0": jnp.eye(2)}, [Rule("block")], stacks=stacks)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_any_dtype_is_measured_in_float32(dtype):
    kernels = np.random.default_rng(5).normal(size=(2, 5, 4)).astype(dtype)
    assert measured(kernels, dtype=dtype) == measured(kernels.astype(np.float32))


def test_float64_is_measured_in_float64():
    kernels = np.random.default_rng(6).normal(size=(2, 5, 4))
    with jax.enable_x64(True):
        group = measured(kernels, dtype=np.float64)
    ratios, overlaps = oracle(kernels, 1)
    assert np.allclose(group.ratios, ratios, rtol=1e-13)
    assert np.allclose(group.overlaps, overlaps, rtol=1e-11)


def test_a_rank_above_that_of_a_layer_takes_all_of_its_vectors():
    kernels = np.random.default_rng(7).normal(size=(2, 3, 5))
    assert measured(kernels, rank=9) == measured(kernels, rank=3)
    assert measured(kernels, rank=9).overlaps[1] == pytest.approx(1)  # both span the fan_in side


def test_groups_are_the_runs_of_the_plan_that_have_two_layers_at_least():
    kernels = np.random.default_rng(8).normal(size=(5, 4, 4))
    momentum = tree(kernels) | {"head": {"kernel": np.ones((4, 9), np.float32)}}
    rules = [Rule(LAYER, stack=2), Rule("head")]
    groups = alignment(momentum, rules)
    assert [group.layers for group in groups] == [(0, 1), (2, 3)]
    assert [group.members for group in groups] == [
        group.members for group in plan(momentum, rules).groups[:2]
    ]
    for group, pair in zip(groups, (kernels[:2], kernels[2:4]), strict=True):
        assert (group.ratios, group.overlaps) == measured(pair)[2:]


def test_rules_of_stack_1_give_no_group():
    groups = alignment(tree(np.ones((3, 4, 4))), [Rule(LAYER)])
    assert groups == ()
    assert len(str(groups).splitlines()) == 1


def test_no_rules_are_the_default_rules():
    rng = np.random.default_rng(9)
    momentum = {
        f"block_{i}": {
            "attention": {
                name: {"kernel": rng.normal(size=(4, 4)).astype(np.float32)}
                for name in ("query", "key", "value", "out")
            }
        }
        for i in range(2)
    }
    groups = alignment(momentum)
    assert groups == alignment(momentum, default_rules(momentum))
    assert sorted(group.members[0] for group in groups) == [
        f"block_0/attention/{name}/kernel" for name in ("key", "query", "value")
    ]


def test_scanned_fused_and_transposed_leaves_are_read_by_their_rule():
    rng = np.random.default_rng(10)
    q, k = rng.normal(size=(2, 2, 5, 4)).astype(np.float32)
    fused = np.concatenate([q, k], axis=2).transpose(2, 0, 1)  # (fan_out, layers, fan_in)
    rule = Rule("fused", stack=2, dims=MuonDimensionNumbers(2, 0), layer_axis=1, split=2)
    first, second = alignment({"fused": fused}, [rule], rank=2)
    assert first.members == ("fused:0[0]", "fused:0[1]")
    tolerance = functools.partial(pytest.approx, abs=100 * EPS)
    for group, pair in ((first, q), (second, k)):
        assert group.ratios == tolerance(measured(pair, 2).ratios)
        assert group.overlaps == tolerance(measured(pair, 2).overlaps)


def test_experts_average_their_overlaps_and_add_their_nuclear_norms():
    experts = np.random.default_rng(11).normal(size=(2, 3, 5, 4))  # layers, experts
    experts[:, 0] *= 10
    rule = Rule(LAYER, stack=2, dims=MuonDimensionNumbers(1, 2))
    (group,) = alignment(tree(experts), [rule], 2)
    alone = [measured(experts[:, i], 2) for i in range(3)]
    tolerance = functools.partial(pytest.approx, abs=100 * EPS)
    assert group.overlaps == tolerance(np.mean([one.overlaps for one in alone], axis=0))
    nuclear = [[np.linalg.norm(W, "nuc") for W in experts[:, i]] for i in range(3)]
    for mode in (1, 2):
        joint = sum(
            sum(norms) / one.ratios[mode - 1] for norms, one in zip(nuclear, alone, strict=True)
        )
        assert group.ratios[mode - 1] == tolerance(np.sum(nuclear) / joint)


def test_zero_momentum_has_no_ratio_and_favours_the_papers_mode():
    group = measured(np.zeros((2, 4, 4)))
    assert np.isnan(group.ratios).all()
    assert group.favoured == 1


def test_leaves_that_are_sharded_are_measured_as_whole_ones():
    kernels = np.random.default_rng(12).normal(size=(2, 8, 4)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        momentum = jax.device_put(tree(kernels), jax.NamedSharding(mesh, jax.P("x")))
        (group,) = alignment(momentum, [Rule(LAYER, stack=2)])
    assert group == measured(kernels)


def test_the_table_has_a_row_per_group_and_says_which_mode_is_favoured():
    rng = np.random.default_rng(13)
    apart, together = np.hsplit(orthonormal(rng, 6, 2), 2), [orthonormal(rng, 6, 1)] * 2
    pairs = with_sides(apart, together) + with_sides(together, apart)
    assert str(alignment(tree(pairs), [Rule(LAYER, stack=2)])).splitlines() == [
        "group           layers  u overlap  v overlap  r mode 1  r mode 2  favours mode",
        "block_0/kernel     0-1       0.00       1.00      1.00      1.41             1",
        "block_2/kernel     2-3       1.00       0.00      1.41      1.00             2",
    ]


@pytest.mark.parametrize("K", [2, 4])
def test_the_hurdle_is_zero_at_one_end_of_the_ratio_and_one_at_the_other(K):
    rng = np.random.default_rng(14)
    apart, together = np.hsplit(orthonormal(rng, 8, K), K), [orthonormal(rng, 8, 1)] * K
    assert np.allclose(measured(with_sides(apart, together)).hurdles, (0, 1), atol=50 * EPS)


def test_the_favoured_k_and_mode_have_the_lowest_hurdle():
    """Outputs of pairs are orthogonal in `near`, inputs in `other`; in `far`, outputs of all."""
    rng = np.random.default_rng(15)
    few, many = np.hsplit(orthonormal(rng, 8, 2), 2), np.hsplit(orthonormal(rng, 8, 4), 4)
    same = [orthonormal(rng, 8, 1)] * 4
    series = {"near": (few * 2, same), "far": (many, same), "other": (same, few * 2)}
    momentum = {
        name: {str(i): np.float32(kernel) for i, kernel in enumerate(with_sides(*sides))}
        for name, sides in series.items()
    }
    groups = alignment(momentum, [Rule(r"/(?P<layer>\d+)", stack=2)], stacks=(2, 4))
    assert groups.favoured == {"near/*": (1, 2), "far/*": (1, 4), "other/*": (2, 2)}
    assert str(groups).splitlines()[-4:] == [
        "series   favours mode  K",
        "far/*               1  4",
        "near/*              1  2",
        "other/*             2  2",
    ]
    assert [len(group.members) for group in groups] == [2] * 6 + [4] * 3
    assert alignment(momentum, [Rule(r"/(?P<layer>\d+)", stack=2)]) == groups[:6]


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, "1"])
def test_a_rank_that_is_no_positive_integer_is_refused(rank):
    with pytest.raises(ValueError, match=r"alignment\(rank=.*should be a positive integer"):
        alignment(tree(np.ones((2, 4, 4))), [Rule(LAYER, stack=2)], rank)
