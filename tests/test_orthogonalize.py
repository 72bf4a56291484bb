"""Leaves become updates: against the SVD of explicitly stacked layers, however leaves hold them."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import variants
from absl.testing import parameterized
from optax.contrib import MuonDimensionNumbers
from spectra import function_of

from teon_optax import Rule, orthogonalize, plan, polar_express, scale_by_teon, teon

D = MuonDimensionNumbers
# What a polynomial makes of singular values is known exactly, and two steps compile fast.
METHODS = ("svd", polar_express(2, 0.1))


# Compilation is most of the time of these tests, and no claim of theirs.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_llvm_disable_expensive_passes": True})


def gaussian(count, *shape):
    rng = np.random.default_rng([count, *shape])
    return list(rng.normal(size=(count, *shape)).astype(np.float32))


def in_runs(kernels, K, mode, method):
    """The paper's update of consecutive layers, and how far rounding may move it."""
    function = function_of(method)
    fan_in, fan_out = kernels[0].shape
    scale = np.sqrt(fan_out / fan_in)
    updates, tolerance = [], 0
    for start in range(0, len(kernels), K):
        run = kernels[start : start + K]
        updates += [scale * layer for layer in oracles.joint(run, mode, function)]
        rounding = oracles.rounding(singular_values(run, mode), method != "svd")
        tolerance = max(tolerance, scale * rounding)
    return updates, tolerance


def singular_values(kernels, mode):
    return np.linalg.svd(oracles.unfolding(kernels, mode), compute_uv=False)


def updates_of(tree, rules, method, compiled: Callable = quick_jit) -> Any:
    transform = orthogonalize(rules, method=method)
    return compiled(transform.update)(tree, transform.init(tree))[0]


# Every mode, K and orientation. Layers 8, 9, 10, .. show that numbers are not ordered as words; the
# last run is shorter than K.
DEPTHS = {1: 2, 2: 3, 3: 4, 4: 5, 12: 13}
SHAPES = {"tall": (30, 4), "wide": (4, 30)}
# (mode, K, shape)
GRID = [(mode, K, shape) for mode in (1, 2, 3) for K in DEPTHS for shape in SHAPES]


def kernels_of(case):
    _, K, shape = case
    return gaussian(DEPTHS[K], *SHAPES[shape])


def name_of(case):
    return "-".join(map(str, case))


@pytest.fixture(scope="module", params=METHODS, ids=["svd", "polynomial"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def updates_of_grid(method):
    """All cases from one compilation, as leaves of their own and as scanned ones."""
    tree, rules = {"leaves": {}, "scanned": {}}, []
    for case in GRID:
        mode, K, shape = case
        name, axis = name_of(case), list(SHAPES).index(shape)
        kernels = [jnp.asarray(kernel) for kernel in kernels_of(case)]
        tree["leaves"][name] = {f"block_{8 + i}": kernel for i, kernel in enumerate(kernels)}
        tree["scanned"][name] = jnp.stack(kernels, axis)
        rules.append(Rule(rf"^leaves/{name}/block_(?P<layer>\d+)$", stack=K, mode=mode))
        rules.append(Rule(f"^scanned/{name}$", stack=K, mode=mode, layer_axis=axis))
    return updates_of(tree, rules, method)


@pytest.mark.parametrize("case", GRID, ids=name_of)
def test_layers_in_leaves_of_their_own_get_the_paper_s_update(case, method, updates_of_grid):
    mode, K, _ = case
    expected, tolerance = in_runs(kernels_of(case), K, mode, method)
    result = updates_of_grid["leaves"][name_of(case)]
    for i, layer in enumerate(expected):
        np.testing.assert_allclose(result[f"block_{8 + i}"], layer, atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", GRID, ids=name_of)
def test_layers_along_the_first_or_second_axis_of_a_leaf_get_the_paper_s_update(
    case, method, updates_of_grid
):
    mode, K, shape = case
    expected, tolerance = in_runs(kernels_of(case), K, mode, method)
    result = updates_of_grid["scanned"][name_of(case)]
    whole = np.stack(expected, list(SHAPES).index(shape))
    np.testing.assert_allclose(result, whole, atol=tolerance, rtol=0)


class Holding(NamedTuple):
    """How leaves hold the kernels of some types, and the rule that says so."""

    rule: Rule
    types: int
    depth: int
    fan_in: int
    fan_out: int
    leaves: Callable[[np.ndarray], Any]  # from kernels [type, layer, fan_in, fan_out]

    def kernels(self):
        return np.stack(gaussian(self.types * self.depth, self.fan_in, self.fan_out)).reshape(
            self.types, self.depth, self.fan_in, self.fan_out
        )


def by_number(T):
    """A leaf per layer: 9, 10, 11."""
    return {f"block_{9 + i}": layer for i, layer in enumerate(T)}


NUMBER = r"/block_(?P<layer>\d+)$"
HOLDINGS = {
    "scans one after another, a run across both": Holding(
        Rule(NUMBER, stack=2, layer_axis=0), 1, 6, 4, 10, lambda T: by_number([T[0, :3], T[0, 3:]])
    ),
    "layers along axis 1 in numbered leaves": Holding(
        Rule(NUMBER, stack=4, layer_axis=1),
        1,
        6,
        4,
        10,
        lambda T: by_number([T[0, :3].swapaxes(0, 1), T[0, 3:].swapaxes(0, 1)]),
    ),
    "heads of a query": Holding(
        Rule(NUMBER, stack=2, dims=D(0, (1, 2))),
        1,
        3,
        6,
        20,
        lambda T: by_number(T[0].reshape(3, 6, 4, 5)),
    ),
    "heads of an output projection": Holding(
        Rule(NUMBER, stack=2, dims=D((0, 1), 2)),
        1,
        3,
        20,
        6,
        lambda T: by_number(T[0].reshape(3, 4, 5, 6)),
    ),
    "heads before the input": Holding(
        Rule(NUMBER, stack=2, mode=2, dims=D(1, (0, 2))),
        1,
        3,
        6,
        20,
        lambda T: by_number(T[0].reshape(3, 6, 4, 5).swapaxes(1, 2)),
    ),
    "heads of scanned layers": Holding(
        Rule("$", stack=2, layer_axis=0, dims=D(1, (2, 3))),
        1,
        3,
        6,
        20,
        lambda T: T[0].reshape(3, 6, 4, 5),
    ),
    "kernels (out, in)": Holding(
        Rule(NUMBER, stack=2, dims=D(1, 0)), 1, 3, 4, 10, lambda T: by_number(T[0].swapaxes(1, 2))
    ),
    "experts, each with itself in the next layer": Holding(
        Rule(NUMBER, stack=2, dims=D(1, 2)), 5, 3, 4, 10, lambda T: by_number(T.swapaxes(0, 1))
    ),
    "experts of scanned layers, last": Holding(
        Rule("$", stack=2, mode=3, layer_axis=0, dims=D(1, 2)),
        5,
        3,
        4,
        10,
        lambda T: T.transpose(1, 2, 3, 0),
    ),
    "equal parts of a fused projection": Holding(
        Rule(NUMBER, stack=2, split=3), 3, 3, 4, 10, lambda T: by_number(np.concatenate(T, axis=2))
    ),
    "fused heads": Holding(
        Rule(NUMBER, stack=2, dims=D(0, (1, 2, 3)), split=3),
        3,
        3,
        4,
        10,
        lambda T: by_number(T.transpose(1, 2, 0, 3).reshape(3, 4, 3, 2, 5)),
    ),
    "equal parts of scanned layers": Holding(
        Rule("$", stack=3, layer_axis=1, split=2),
        2,
        4,
        4,
        10,
        lambda T: np.concatenate(T, axis=2).swapaxes(0, 1),
    ),
}


@pytest.fixture(scope="module")
def of_all_holdings(method):
    tree, rules = {}, []
    for name, holding in HOLDINGS.items():
        tree[name] = jax.tree.map(jnp.asarray, holding.leaves(holding.kernels()))
        pattern = f"^{re.escape(name)}{holding.rule.pattern}"
        rules.append(dataclasses.replace(holding.rule, pattern=pattern))
    return updates_of(tree, rules, method)


@pytest.mark.parametrize("name", HOLDINGS)
def test_the_update_does_not_depend_on_how_leaves_hold_the_layers(name, method, of_all_holdings):
    holding = HOLDINGS[name]
    updates = [
        in_runs(list(kernels), holding.rule.stack, holding.rule.mode, method)
        for kernels in holding.kernels()
    ]
    expected = holding.leaves(np.array([layers for layers, _ in updates]))
    tolerance = max(tolerance for _, tolerance in updates)
    result = of_all_holdings[name]
    chex.assert_trees_all_equal_structs(result, expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=0), result, expected
    )


def two_kernels(fan_in, fan_out):
    return {f"block_{i}": jnp.asarray(M) for i, M in enumerate(gaussian(2, fan_in, fan_out))}


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (6, 4)], ids=str)
@pytest.mark.parametrize(("mode", "axis"), [(1, 0), (2, 1)])
def test_mode_1_joins_kernels_along_fan_in_and_mode_2_along_fan_out(mode, axis, shape):
    """The paper's W is (out, in): its mode 1 for kernels (in, out) joins along axis 0, not 1."""
    tree = two_kernels(*shape)

    def joined_along(axis):
        joint = np.concatenate(list(tree.values()), axis)
        return np.stack(np.split(oracles.reshaped_spectrum(joint), 2, axis))

    result = updates_of(tree, [Rule(NUMBER[1:], stack=2, mode=mode)], "svd")
    result = np.stack(list(result.values())) / np.sqrt(shape[1] / shape[0])
    s = singular_values(list(tree.values()), mode)
    tolerance = oracles.rounding(s, squared=False)
    np.testing.assert_allclose(result, joined_along(axis), atol=tolerance, rtol=0)
    # What tells the axes apart is far above what rounding does.
    assert np.abs(joined_along(0) - joined_along(1)).max() > 0.1 > 100 * tolerance


def test_the_oracle_s_mode_1_is_the_joint_matrix_of_the_paper_s_weights():
    """[W_1 | W_2] = [[K_1], [K_2]]^T, and Ortho multiplies by (sum K^T K)^(-1/2) on the right."""
    kernels = gaussian(2, 4, 6)
    np.testing.assert_array_equal(oracles.unfolding(kernels, 1), np.concatenate(kernels).T)
    values, vectors = np.linalg.eigh(sum(K.T.astype(np.float64) @ K for K in kernels))
    inverse_root = (vectors / np.sqrt(values)) @ vectors.T
    for K, layer in zip(kernels, oracles.joint(kernels, 1), strict=True):
        np.testing.assert_allclose(layer, K @ inverse_root, atol=1e-12)


class AlgebraTest(variants.TestCase):
    @variants.with_and_without_jit
    @parameterized.parameters(1, 2, 3)
    def test_order_of_layers_in_a_group_does_not_matter(self, mode):
        a, b, c = map(jnp.asarray, gaussian(3, 4, 6))
        rules = [Rule(r"block_(?P<layer>\d+)", stack=3, mode=mode)]
        one = updates_of({"block_0": a, "block_1": b, "block_2": c}, rules, "svd", self.variant)
        two = updates_of({"block_0": c, "block_1": a, "block_2": b}, rules, "svd", self.variant)
        tolerance = 10 * oracles.rounding(singular_values([a, b, c], mode), squared=False)
        for i, j in ((0, 1), (1, 2), (2, 0)):
            np.testing.assert_allclose(one[f"block_{i}"], two[f"block_{j}"], atol=tolerance)


def test_mode_2_is_mode_1_of_transposed_kernels():
    tree = two_kernels(4, 6)
    transposed = jax.tree.map(jnp.transpose, tree)
    one = updates_of(tree, [Rule(NUMBER[1:], stack=2, mode=2)], "svd")
    two = updates_of(transposed, [Rule(NUMBER[1:], stack=2, mode=1)], "svd")
    s = singular_values(list(tree.values()), 2)
    for name in tree:
        # The scale is one layer's sqrt(fan_out / fan_in): 3/2 against 2/3 under the root.
        turned = two[name].T * 1.5
        np.testing.assert_allclose(one[name], turned, atol=10 * oracles.rounding(s, False))


def test_leaves_that_no_rule_takes_are_the_same_objects():
    tree = {"w": jnp.ones((4, 6)), "bias": jnp.ones(6), "embed": jnp.ones((9, 4)), "none": None}
    transform: Any = orthogonalize([Rule("^w$"), Rule("bias")])
    updates, _ = transform.update(tree, transform.init(tree))
    assert updates["bias"] is tree["bias"] and updates["embed"] is tree["embed"]
    assert updates["none"] is None
    assert updates["w"] is not tree["w"]


def test_each_leaf_keeps_its_dtype_and_only_its_own_dtype_s_accuracy():
    kernels = gaussian(3, 4, 10)
    dtypes = ["float32", "bfloat16", "float16"]
    tree = {d: jnp.asarray(M, d) for d, M in zip(dtypes, kernels, strict=True)}
    result = updates_of(tree, [Rule("")], "svd")
    for dtype, leaf in tree.items():
        assert result[dtype].dtype == dtype
        exact = oracles.reshaped_spectrum(leaf) * np.sqrt(10 / 4)
        tolerance = float(jnp.finfo(dtype).eps) * np.abs(exact).max()
        tolerance += oracles.rounding(singular_values([leaf], 1), squared=False)
        np.testing.assert_allclose(result[dtype].astype("float32"), exact, atol=tolerance)


def test_a_tree_without_matrices_comes_back():
    tree = {"bias": jnp.ones(3)}
    assert updates_of(tree, [Rule("")], "polar_express", lambda function: function) == tree


def of_dtypes(dtypes, seed):
    """Four layers, each of its own dtype."""
    rng = np.random.default_rng(seed)
    return {
        f"block_{i}": jnp.asarray(rng.normal(size=(4, 6)), dtype) for i, dtype in enumerate(dtypes)
    }


F, B, H = "float32", "bfloat16", "float16"
COUPLED = {
    "orthogonalize": lambda rules: orthogonalize(rules, method="svd"),
    "scale_by_teon": lambda rules: scale_by_teon(rules, method="svd"),
    "scale_by_teon in float32": lambda rules: scale_by_teon(rules, method="svd", mu_dtype=F),
    "teon in bfloat16": lambda rules: optax.chain(
        teon(1.0, rules, method="svd", mu_dtype=B), optax.scale(-1.0)
    ),
}


@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("transform", COUPLED)
@pytest.mark.parametrize(
    ("dtypes", "of_gradients"),
    [((B, F, B, F), (F, F, F, F)), ((F, F, F, F), (B, H, F, B)), ((B, B, H, F), (F, F, B, B))],
    ids=str,
)
def test_layers_are_coupled_as_the_plan_of_params_shows(transform, dtypes, of_gradients):
    """Layers of unequal dtypes are series of their own, whatever gradients come in."""
    rules = [Rule(r"block_(?P<layer>\d+)", stack=2)]
    params, gradients = of_dtypes(dtypes, 0), of_dtypes(of_gradients, 1)
    optimizer = COUPLED[transform](rules)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for group in plan(params, rules).groups:
        expected = oracles.joint([gradients[name] for name in group.members], 1)
        for name, factor in zip(group.members, expected, strict=True):
            assert updates[name].dtype == gradients[name].dtype
            np.testing.assert_allclose(
                np.float64(updates[name]), math.sqrt(6 / 4) * factor, atol=2.0**-7
            )


@pytest.mark.promotes_dtypes
def test_momentum_without_params_is_coupled_by_its_own_dtypes():
    rules = [Rule(r"block_(?P<layer>\d+)", stack=2)]
    transform = scale_by_teon(rules, method="svd")
    params, gradients = of_dtypes((B, F, B, F), 0), of_dtypes((F, F, F, F), 1)
    state = transform.init(params)
    given, _ = transform.update(gradients, state, params)
    without, _ = transform.update(gradients, state)
    chex.assert_trees_all_equal(without, given)


def test_params_that_hold_more_than_is_updated_are_found_by_path():
    """A model of Equinox may be given as params, activation functions and all."""
    rules = [Rule(r"block_(?P<layer>\d+)", stack=2)]
    transform = orthogonalize(rules, method="svd")
    params, gradients = of_dtypes((B, F), 0), of_dtypes((F, F), 1)
    model: Any = params | {"act": jax.nn.relu}
    expected, _ = transform.update(gradients, optax.EmptyState(), params)
    updates, _ = transform.update(gradients, optax.EmptyState(), model)
    chex.assert_trees_all_equal(updates, expected)


@pytest.mark.parametrize("method", ["polar_express", "schatten"])
def test_the_gradient_at_zero_is_finite(method):
    transform: Any = orthogonalize([Rule("w")], method=method)

    def total(matrix):
        updates, _ = transform.update({"w": matrix}, optax.EmptyState())
        return jnp.sum(updates["w"])

    assert np.isfinite(jax.grad(total)(jnp.zeros((4, 8)))).all()
