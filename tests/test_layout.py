"""A leaf and its matrices: a bijection, in the order that a rule writes."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, orthogonalize, polar_express
from teon_optax._plan.layout import layout_of, to_leaf, to_matrices

D = MuonDimensionNumbers


def matrices(leaf, rule):
    return [np.asarray(part) for part in to_matrices(leaf, layout_of(leaf.shape, rule))]


@st.composite
def leaves_and_rules(draw):
    """Any number of axes, each of some role, written in any order and from either end."""
    ndim = draw(st.integers(2, 6))
    shape = draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    axes = draw(st.permutations(range(ndim)))
    count_in = draw(st.integers(1, ndim - 1))
    count_out = draw(st.integers(1, ndim - count_in))
    fan_in, fan_out = axes[:count_in], axes[count_in : count_in + count_out]
    rest = axes[count_in + count_out :]
    layer_axis = draw(st.sampled_from([None, *rest]))
    cuts = draw(st.sets(st.integers(1, shape[fan_out[0]] - 1))) if shape[fan_out[0]] > 1 else []
    bounds = [0, *sorted(cuts), shape[fan_out[0]]]
    sizes = tuple(int(size) for size in np.diff(bounds))
    split = len(sizes) if len(set(sizes)) == 1 and draw(st.booleans()) else sizes

    def written(axis) -> Any:
        return None if axis is None else axis - ndim * draw(st.booleans())

    dims = D(tuple(map(written, fan_in)), tuple(map(written, fan_out)))
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    rule = Rule("w", dims=dims, layer_axis=written(layer_axis), split=split)
    return leaf, rule


@given(leaves_and_rules())
def test_to_leaf_is_the_inverse_of_to_matrices(example):
    leaf, rule = example
    read = layout_of(leaf.shape, rule)
    np.testing.assert_array_equal(to_leaf(to_matrices(leaf, read), read), leaf, strict=True)


@given(leaves_and_rules())
def test_every_number_is_in_one_matrix_of_the_right_shape(example):
    leaf, rule = example
    read = layout_of(leaf.shape, rule)
    parts = matrices(leaf, rule)
    rest = read.size(read.fan_out[1:])
    equal = 1 if len(set(read.sizes)) > 1 else len(read.sizes)
    layers, alone, fan_in = (read.size(a) for a in (read.layer, read.batch, read.fan_in))
    assert [part.shape for part in parts] == [
        (layers, alone * equal, fan_in, size * rest) for size in read.sizes[::equal]
    ]
    everything = np.concatenate([part.ravel() for part in parts])
    np.testing.assert_array_equal(np.sort(everything), leaf.ravel())


W = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("leaf", "rule", "expected"),
    [
        pytest.param(W[0, 0], Rule("w"), [W[:1, :1, :, :]], id="a matrix is (fan_in, fan_out)"),
        pytest.param(
            W[0, 0],
            Rule("w", dims=D(1, 0)),
            [W[:1, :1].swapaxes(2, 3)],
            id="torch's order is turned round",
        ),
        pytest.param(W[0], Rule("w", layer_axis=0), [W[0][:, None]], id="layers come first"),
        pytest.param(
            W[0],
            Rule("w", layer_axis=1),
            [W[0].transpose(1, 0, 2)[:, None]],
            id="layers in the middle",
        ),
        pytest.param(
            W[0],
            Rule("w", layer_axis=-1),
            [W[0].transpose(2, 0, 1)[:, None]],
            id="layers counted from the end",
        ),
        pytest.param(W[0], Rule("w", dims=D(1, 2)), [W[:1]], id="axes without a role are a batch"),
        pytest.param(
            W,
            Rule("w", dims=D(2, 3), layer_axis=1),
            [W.transpose(1, 0, 2, 3)],
            id="layers before the batch",
        ),
        pytest.param(
            W[0],
            Rule("w", dims=D(0, (1, 2))),
            [W[0].reshape(1, 1, 3, 20)],
            id="several axes of fan_out",
        ),
        pytest.param(
            W[0],
            Rule("w", dims=D((0, 1), 2)),
            [W[0].reshape(1, 1, 12, 5)],
            id="several axes of fan_in",
        ),
        pytest.param(
            W[0],
            Rule("w", dims=D((1, 0), 2)),
            [W[0].transpose(1, 0, 2).reshape(1, 1, 12, 5)],
            id="fan_in in the order written",
        ),
        pytest.param(
            W[0],
            Rule("w", dims=D(0, (2, 1))),
            [W[0].transpose(0, 2, 1).reshape(1, 1, 3, 20)],
            id="fan_out in the order written",
        ),
        pytest.param(
            W[0, 0],
            Rule("w", split=5),
            [np.stack([W[0, 0, :, i : i + 1] for i in range(5)])[None]],
            id="equal parts are one array, each alone",
        ),
        pytest.param(
            W[0, 0],
            Rule("w", split=(2, 3)),
            [W[:1, :1, :, :2], W[:1, :1, :, 2:]],
            id="parts by size",
        ),
        pytest.param(
            W[0],
            Rule("w", dims=D(0, (1, 2)), split=2),
            [np.stack([W[0, :, :2].reshape(3, 10), W[0, :, 2:].reshape(3, 10)])[None]],
            id="parts of the first fan_out axis",
        ),
        pytest.param(
            W[0],
            Rule("w", dims=D(1, 2), split=5, join=("parts", "heads")),
            [np.stack([W[0, h, :, i : i + 1] for i in range(5) for h in range(3)])[:, None]],
            id="joined parts and heads count as layers, part by part",
        ),
    ],
)
def test_matrices_are_layers_batch_fan_in_fan_out(leaf, rule, expected):
    parts = matrices(leaf, rule)
    assert len(parts) == len(expected)
    for part, one in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(part, one, strict=True)


@pytest.mark.parametrize(
    ("shape", "rule", "words"),
    [
        ((3,), Rule("w"), "1 axes are left for fan_in and fan_out, not 2: pass `dims="),
        ((2, 3, 4), Rule("w"), "3 axes are left for fan_in and fan_out, not 2"),
        ((3, 4), Rule("w", layer_axis=0), "1 axes are left for fan_in and fan_out, not 2"),
        ((3, 4), Rule("w", dims=D(0, 2)), "axes (2,) are not all among its 2 axes: correct dims"),
        ((3, 4), Rule("w", dims=D(-3, 1)), "axes (-3,) are not all among its 2 axes"),
        ((3, 4), Rule("w", layer_axis=2), "axes (2,) are not all among its 2 axes"),
        ((3, 4), Rule("w", dims=D(0, -2)), "dims and layer_axis overlap: name each axis once"),
        ((2, 3, 4), Rule("w", dims=D(1, 2), layer_axis=-1), "dims and layer_axis overlap"),
        ((3, 0), Rule("w"), "it has an empty axis: leave it out with `stack=0`"),
        ((0, 3, 4), Rule("w", layer_axis=0), "it has an empty axis"),
        ((3, 4), Rule("w", split=3), "split=3 does not fit its first fan_out axis of length 4"),
        ((3, 4), Rule("w", split=8), "split=8 does not fit its first fan_out axis of length 4"),
        ((3, 4), Rule("w", split=(1, 2)), "split=(1, 2) does not fit its first fan_out axis of"),
    ],
    ids=str,
)
def test_a_rule_that_does_not_fit_the_shape_is_refused(shape, rule, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        layout_of(shape, rule)


def program_length(params, rules):
    """Lines of the compiled update."""
    update = orthogonalize(rules, method=polar_express(1)).update
    lowered = jax.jit(lambda tree: update(tree, optax.EmptyState(), tree)[0]).lower(params)
    return (lowered.compile().as_text() or "").count("\n")


@pytest.mark.parametrize("join", [(), "parts"], ids=str)
def test_a_program_does_not_grow_with_equal_parts(join):
    params = {f"block_{i}": jax.ShapeDtypeStruct((8, 64), jnp.float32) for i in range(4)}
    pattern = r"block_(?P<layer>\d+)"
    whole = program_length(params, [Rule(pattern, stack=2)])
    parts = program_length(params, [Rule(pattern, stack=2, split=32, join=join)])
    assert parts < 1.5 * whole


def test_a_split_is_refused_before_its_sizes_are_listed():
    with pytest.raises(ValueError, match="split=1000000000000 does not fit its first fan_out axis"):
        layout_of((4, 6), Rule("w", split=10**12))
