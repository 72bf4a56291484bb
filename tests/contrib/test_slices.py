"""`orthogonalize_slices` against the t-SVD's polar factor in float64."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import variants
from holdings import FAN_IN, HEADS, HOLDINGS, LAYER, SLICE, gaussian, kernels, updated
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from spectra import function_of
from test_transforms import basis

from teon_optax import Rule, contrib, orthogonalize, plan, polar_express
from tests.counting import count_products

METHODS = {"svd": "svd", "polynomial": polar_express(2, 0.1), "schatten": "schatten"}
# Of K = 1, 2, 3, 4, 6 and 12, of which a shorter last group has fewer.
SOME = ["layers", "siblings of layers", "heads as parts", "heads of parts", "each head"]
TABLE = [("haar", holding) for holding in HOLDINGS]
TABLE += [(transform, holding) for transform in ("dct", "dft") for holding in SOME]


def t_svd(kernels, transform, function=np.ones_like):
    """The t-SVD's polar factor, of every slice on its own; singular values of the worst slice."""
    F = basis(transform, len(kernels))
    slices = np.tensordot(F, np.asarray(kernels, np.float64), 1)
    U, values, Vh = np.linalg.svd(slices, full_matrices=False)
    reshaped = np.array([function(own) for own in values])
    back = np.tensordot(F.conj().T, (U * reshaped[:, None]) @ Vh, 1)
    assert np.abs(back.imag).max() < 1e-12
    return list(back.real), max(values, key=lambda own: own[0] / own[-1])


def expected_of(transform, holding, T, function=np.ones_like):
    """The update as leaves hold it, and how far rounding may move it."""
    tolerances = []

    def of_group(group):
        done, values = t_svd(group, transform, function)
        tolerances.append(2 * oracles.rounding(values, function is not np.ones_like))
        return done

    return updated(holding, T, of_group), max(tolerances)


def rule_of(holding):
    rule = HOLDINGS[holding][1]
    return dataclasses.replace(rule, pattern=f"^{holding}/x/.*{rule.pattern}")


def tree_of(holdings, seed=0):
    T = gaussian(seed)
    hold = {holding: HOLDINGS[holding][0] for holding in holdings}
    return {name: {"x": jax.tree.map(jnp.asarray, hold[name](T))} for name in holdings}


def compiled(holdings, transform, **arguments):
    """The update of their trees."""
    rules = [rule_of(holding) for holding in holdings]
    update = contrib.orthogonalize_slices(rules, transform, **arguments).update
    return jax.jit(lambda tree: update(tree, optax.EmptyState())[0])


@pytest.fixture(
    scope="module",
    params=["svd", "polynomial", pytest.param("schatten", marks=pytest.mark.slow)],
)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def updates(method):
    """Of all cases, in one compilation for each transform."""
    result = {}
    for transform in ("haar", "dct", "dft"):
        holdings = [holding for of_table, holding in TABLE if of_table == transform]
        update = compiled(holdings, transform, method=METHODS[method])
        result[transform] = update(tree_of(holdings))
    return result


@pytest.mark.parametrize("case", TABLE, ids=", ".join)
def test_the_update_is_that_of_the_definition_however_leaves_hold_the_matrices(
    case, method, updates
):
    transform, holding = case
    function = function_of(METHODS[method])
    expected, tolerance = expected_of(transform, holding, gaussian(), function)
    result = updates[transform][holding]["x"]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=0), result, expected
    )


class VariantTest(variants.TestCase):
    @variants.with_and_without_jit
    def test_four_layers_and_a_last_group_of_three_two_or_one(self):
        rules = [Rule(r"/(?P<layer>\d)$", 4, dims=optax.contrib.MuonDimensionNumbers(1, 0))]
        kernels = {
            count: np.random.default_rng(count).normal(size=(count, 3, 4)).astype(np.float32)
            for count in (5, 6, 7)
        }
        tree = {
            f"{n} layers": {str(i): jnp.asarray(M[i]) for i in range(n)} for n, M in kernels.items()
        }
        for transform in ("dct", "dft", "haar"):
            update = contrib.orthogonalize_slices(rules, transform, method="svd").update
            result, _ = self.variant(update)(tree, optax.EmptyState())
            for count, M in kernels.items():
                expected = t_svd(M[:4], transform)[0] + t_svd(M[4:], transform)[0]
                for i in range(count):  # W is (fan_out, fan_in) = (3, 4)
                    ours = result[f"{count} layers"][str(i)]
                    np.testing.assert_allclose(
                        ours, np.sqrt(3 / 4) * expected[i], atol=2e-6, rtol=0
                    )


# Every kind of joining, unequal runs, and an axis of layers.
FEW = ["siblings of layers", "heads of parts", "heads of siblings", "scanned siblings"]


@pytest.fixture(scope="module")
def update_few():
    """The update of their trees, compiled for float32."""
    update = compiled(FEW, "dft")
    update(tree_of(FEW))
    return update


def assert_near(result, expected, tolerance):
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.float64(ours.astype("float32")), np.float64(theirs.astype("float32"))
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_zero_gives_zero_and_scale_does_not_matter(scale, update_few):
    tree = tree_of(FEW)
    result = update_few(jax.tree.map(lambda leaf: leaf * np.float32(scale), tree))
    expected = update_few(tree)
    expected = expected if scale else jax.tree.map(jnp.zeros_like, expected)
    assert_near(result, expected, 1e-3)


def test_what_is_not_finite_shows_in_its_group_and_in_no_other(update_few):
    tree = tree_of(FEW)
    spoilt = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaf.at[(0,) * leaf.ndim].set(np.nan) if "9" in str(keys) else leaf, tree
    )
    result, expected = update_few(spoilt), update_few(tree)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(result):
        if "9" in str(keys) or "block_10" in str(keys):
            assert not np.isfinite(leaf).any()
    for name in FEW[:3]:
        jax.tree.map(
            np.testing.assert_array_equal,
            result[name]["x"]["block_11"],
            expected[name]["x"]["block_11"],
        )


def test_each_leaf_keeps_its_dtype(update_few):
    tree = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), tree_of(FEW))
    result = update_few(tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("bfloat16")}
    wide = update_few(jax.tree.map(lambda leaf: leaf.astype("float32"), tree))
    assert_near(result, wide, 1e-2)


def test_updates_of_one_group_may_have_unlike_dtypes():
    params = {str(i): jnp.asarray(M[0, 0]) for i, M in enumerate(gaussian())}
    updates = params | {"1": params["1"].astype("bfloat16")}
    rules = [Rule(r"(?P<layer>\d)", 3)]
    transform: Any = contrib.orthogonalize_slices(rules, "dct", method=METHODS["polynomial"])
    result, _ = transform.update(updates, transform.init(params), params)
    assert {name: leaf.dtype.name for name, leaf in result.items()} == {
        "0": "float32",
        "1": "bfloat16",
        "2": "float32",
    }
    wide = jax.tree.map(lambda leaf: leaf.astype("float32"), updates)
    assert_near(result, transform.update(wide, optax.EmptyState())[0], 1e-2)


def test_a_number_for_scale_is_the_root_mean_square_of_every_group():
    holdings = ["siblings of layers", "heads of parts"]
    result = compiled(holdings, "dft", method="svd", scale=0.2)(tree_of(holdings))
    for of_holding in result.values():
        for block in [["block_9", "block_10"], ["block_11"]]:
            leaves = jax.tree.leaves([of_holding["x"][name] for name in block])
            rms = np.sqrt(np.mean(np.concatenate([np.ravel(leaf) for leaf in leaves]) ** 2))
            assert rms == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_group_of_one_is_that_of_orthogonalize_and_other_leaves_pass(dtype):
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), kernels(gaussian()))
    tree |= {"bias": jnp.ones(3), "frozen": None}
    rules = [Rule("query|key")]
    transform: Any = contrib.orthogonalize_slices(rules, "dft")
    result, _ = transform.update(tree, optax.EmptyState())
    expected, _ = orthogonalize(rules).update(tree, optax.EmptyState())
    assert result["bias"] is tree["bias"] and result["frozen"] is None
    assert result["block_9"]["value"] is tree["block_9"]["value"]
    # The scale is multiplied to another operand, which rounds two products differently.
    assert_near(result, expected, 4 * float(jnp.finfo(dtype).eps))


def test_without_rules_it_takes_those_that_default_rules_finds():
    M = np.random.default_rng(5).normal(size=(2, 8, 8)).astype(np.float32)
    tree = {f"block_{i}": {"attn": {"query": {"kernel": jnp.asarray(M[i])}}} for i in range(2)}
    transform = contrib.orthogonalize_slices(None, "haar", method="svd")
    result, _ = transform.update(tree, optax.EmptyState())
    assert [len(group.members) for group in plan(tree).groups] == [2]
    expected, values = t_svd(M, "haar")
    tolerance = 2 * oracles.rounding(values, squared=False)
    for ours, theirs in zip(jax.tree.leaves(result), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


def assert_same_on_a_mesh(update_with, tree, specs, axis_type):
    """Updates, with leaves where they were; returns the program."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    put = jax.tree.map(lambda M, spec: jax.device_put(M, NamedSharding(mesh, spec)), tree, specs)
    given = specs if axis_type == AxisType.Auto else None
    program = update_with(shardings=given).lower(put).compile()
    result = program(put)
    assert_near(result, update_with()(tree), 1e-4)
    for leaf, before in zip(jax.tree.leaves(result), jax.tree.leaves(put), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
    return program.as_text() or ""


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_updates_are_those_of_one_device(axis_type):
    # Heads, which only whole groups have, are cut as well.
    names = {FAN_IN: "data", HEADS: "model"}
    tree = tree_of(FEW)
    specs = jax.tree.map(lambda M: P(*map(names.get, M.shape)), tree)
    update_with = functools.partial(compiled, FEW, "dft")
    assert " all-to-all(" in assert_same_on_a_mesh(update_with, tree, specs, axis_type)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_may_cut_layers_and_through_parts_and_leaves_of_a_series_unlike(axis_type):
    rng = np.random.default_rng(6)
    shapes = {"layers": (8, 4, 16), "parts": (8, 4, 16)} | {f"part_{i}": (8, 16) for i in range(3)}
    tree = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    rules = [
        Rule("layers", 2, layer_axis=1),
        Rule("parts", 2, layer_axis=1, split=4, join="parts"),
        Rule(r"part_(?P<layer>\d)", 3, split=(12, 4)),
    ]
    both = ("data", "model")
    specs = {
        "layers": P("model", "data"),
        "parts": P(None, None, both),
        "part_0": P(None, both),
        "part_1": P("data", None),
        "part_2": P("model", "data"),
    }

    def update_with(**arguments):
        update = contrib.orthogonalize_slices(rules, "dft", **arguments).update
        return jax.jit(lambda tree: update(tree, optax.EmptyState())[0])

    assert_same_on_a_mesh(update_with, tree, specs, axis_type)


@pytest.mark.parametrize("transform", ["dct", "haar", "dft"])
def test_the_products_are_those_of_k_polar_factors_and_two_mixtures(transform):
    tree = jax.tree.map(jnp.asarray, kernels(gaussian(layers=1)))

    def counted(update, tree):
        return count_products(lambda tree: update(tree, None), tree).flops

    alone = counted(orthogonalize([Rule("query")]).update, tree)
    rules = [Rule(f"{LAYER}/{SLICE}")]
    traced = counted(contrib.orthogonalize_slices(rules, transform).update, tree)
    size, K = tree["block_9"]["query"].size, 3
    # Of the DFT's slices one is real; the complex one is a matrix of two by two tiles.
    factors, rows = (1 + 8, 1 + 4) if transform == "dft" else (K, K)
    assert traced == factors * alone + 2 * 2 * rows * K * size


@pytest.mark.parametrize("transform", ["fft", None, "DCT"])
def test_an_unknown_transform_is_refused_at_once(transform):
    with pytest.raises(ValueError, match=r"`transform=.*` should be one of \('dct', 'dft', 'haar'"):
        contrib.orthogonalize_slices((), transform)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(rf"{LAYER}/", 2, mode=2),
        Rule(f"{LAYER}/{SLICE}", mode=3),
        Rule("w", mode=2, split=2, join="parts"),
    ],
    ids=str,
)
def test_a_mode_of_what_is_coupled_is_refused_at_once(rule):
    with pytest.raises(ValueError, match=re.escape(f"leave out the mode of {rule}.")):
        contrib.orthogonalize_slices([Rule("bias", stack=0, mode=2), rule], "dct")


def test_arguments_are_checked_before_any_tree_is_seen():
    rules: Any = "w"
    with pytest.raises(ValueError, match="`rules='w'` should be a tuple of `Rule`"):
        contrib.orthogonalize_slices(rules, "dct")
    with pytest.raises(ValueError, match="`scale=-1` should be"):
        contrib.orthogonalize_slices([], "dct", scale=-1)
    with pytest.raises(ValueError, match="`method='none'`"):
        contrib.orthogonalize_slices([], "dct", method="none")
    with pytest.raises(ValueError, match="`shardings` has 'data'"):
        contrib.orthogonalize_slices([], "dct", shardings="data")


def test_rules_and_shardings_that_do_not_fit_are_refused_in_init():
    tree = {"w": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match="Rules do not fit the leaves"):
        contrib.orthogonalize_slices([Rule("w", split=4)], "dct").init(tree)
    with pytest.raises(ValueError, match="`shardings` does not fit the leaves"):
        given = {"w": P(None, None, "data")}
        contrib.orthogonalize_slices([Rule("w")], "dct", shardings=given).init(tree)
