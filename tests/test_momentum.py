"""`orthogonalize` and `scale_by_teon`: momentum, state, and what may be masked or absent."""

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import variants
from absl.testing import parameterized
from spectra import function_of

from teon_optax import Rule, TeonState, orthogonalize, polar_express, scale_by_teon, teon
from teon_optax._paths import leaf_paths

RULES = (Rule(r"block_(?P<layer>\d+)/query", stack=2), Rule("^up$"))
# One step compiles fast; what methods do is said elsewhere.
QUICK = polar_express(1)


def params(dtype="float32"):
    """Three queries, a matrix for Muon, and two leaves that no rule takes."""
    rng = np.random.default_rng(0)
    shapes = {f"block_{i}": {"query": (10, 4)} for i in range(3)}
    shapes |= {"up": (4, 6), "bias": (6,), "embed": (9, 4)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradients(step, like):
    rng = np.random.default_rng(step + 1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def test_orthogonalize_is_stateless():
    transform = orthogonalize(RULES, method=QUICK)
    assert transform.init(params()) == optax.EmptyState()
    assert transform.update(params(), optax.EmptyState())[1] == optax.EmptyState()


def test_state_is_a_count_and_a_momentum_in_the_tree_of_params():
    state = scale_by_teon(RULES).init(params())
    assert isinstance(state, TeonState) and state._fields == ("count", "mu")
    chex.assert_trees_all_equal(state.count, jnp.int32(0), strict=True)
    chex.assert_trees_all_equal(state.mu, jax.tree.map(jnp.zeros_like, params()), strict=True)


def test_count_counts_updates():
    transform: Any = scale_by_teon(RULES, method=QUICK)
    state = transform.init(params())
    for count in (1, 2, 3):
        _, state = transform.update(params(), state)
        assert state.count == count


class MomentumTest(variants.TestCase):
    @variants.with_and_without_jit
    @parameterized.product(nesterov=[True, False], beta=[0.95, 0.5])
    def test_leaves_that_no_rule_takes_get_the_bias_corrected_momentum(self, nesterov, beta):
        """The average m of gradients g over 1 - beta^t, or that after g once more."""
        transform = scale_by_teon([], beta=beta, nesterov=nesterov)
        like = {"bias": params()["bias"]}
        state, m = transform.init(like), 0.0
        for t in (1, 2, 3):
            g = gradients(t, like)
            updates, state = self.variant(transform.update)(g, state)
            g = np.float64(g["bias"])
            m = beta * m + (1 - beta) * g
            expected = m / (1 - beta**t)
            if nesterov:
                ahead = beta * m / (1 - beta ** (t + 1))
                expected = ahead + (1 - beta) * g / (1 - beta**t)
            # 1 - beta^t loses digits where beta is near 1.
            tolerance = 8 * oracles.EPS / (1 - beta) * np.abs(g).max()
            np.testing.assert_allclose(updates["bias"], expected, atol=tolerance, rtol=0)
            np.testing.assert_allclose(state.mu["bias"], m, atol=tolerance, rtol=0)


@pytest.mark.parametrize("nesterov", [True, False])
def test_leaves_that_a_rule_takes_get_the_orthogonalized_momentum(nesterov):
    momentum = scale_by_teon([], nesterov=nesterov)
    transform = scale_by_teon(RULES, nesterov=nesterov, method=QUICK)
    alone = orthogonalize(RULES, method=QUICK)
    one, two = momentum.init(params()), transform.init(params())
    for step in range(2):
        g = gradients(step, params())
        averaged, one = momentum.update(g, one)
        updates, two = transform.update(g, two)
    expected, _ = alone.update(averaged, alone.init(params()))
    chex.assert_trees_all_close(updates, expected, atol=8 * oracles.EPS)
    chex.assert_trees_all_close(two, one)


class TypesTest(chex.TestCase):
    def assert_types_stay(self, update, dtype, mu_dtype):
        transform = scale_by_teon(RULES, mu_dtype=mu_dtype, method=QUICK)
        before = transform.init(params(dtype))
        updates, after = update(transform)(params(dtype), before)
        assert types(after) == types(before)
        assert types(updates) == types(params(dtype))
        kept = mu_dtype or ("float32" if dtype == "float16" else dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(after.mu)} == {jnp.dtype(kept)}

    @parameterized.product(
        dtype=["float32", "bfloat16", "float16"], mu_dtype=[None, "bfloat16", "float32"]
    )
    def test_types_do_not_change_under_jit(self, dtype, mu_dtype):
        self.assert_types_stay(lambda t: jax.jit(t.update).eval_shape, dtype, mu_dtype)

    @parameterized.parameters(("float32", "bfloat16"), ("bfloat16", None), ("float16", "float32"))
    def test_types_do_not_change_without_jit(self, dtype, mu_dtype):
        self.assert_types_stay(lambda t: t.update, dtype, mu_dtype)


def test_momentum_is_averaged_and_orthogonalized_in_float32_whatever_it_is_kept_in():
    """In float16 the first gradients would leave the range when their bias is corrected."""
    like = {"up": jnp.full((4, 6), 60_000, "float16")}
    transform: Any = scale_by_teon(RULES, method="svd")
    updates, state = transform.update(like, transform.init(like))
    np.testing.assert_allclose(np.float64(state.mu["up"]), 3_000, rtol=2.0**-11)
    # Of rank one: U V^T has equal entries too, and spectral norm sqrt(fan_out / fan_in).
    np.testing.assert_allclose(np.float64(updates["up"]), np.sqrt(6 / 4 / 24), rtol=2.0**-11)


@pytest.mark.parametrize("mu_dtype", [None, "float16"])
def test_gradients_beyond_float16_keep_the_momentum_of_float16_params_finite(mu_dtype):
    rng = np.random.default_rng(0)
    half = {"up": jnp.asarray(rng.normal(size=(4, 6)), "float16")}
    gradients = {"up": jnp.asarray(2e6 * rng.normal(size=(4, 6)), "float32")}
    transform: Any = scale_by_teon(RULES, mu_dtype=mu_dtype, method="svd")
    state = transform.init(half)
    for _ in range(3):
        updates, state = transform.update(gradients, state, half)
        assert all(np.isfinite(np.float64(leaf)).all() for leaf in (state.mu["up"], updates["up"]))
    if mu_dtype is None:
        (expected,) = oracles.joint([gradients["up"]], 1)
        np.testing.assert_allclose(
            np.float64(updates["up"]), np.sqrt(6 / 4) * expected, atol=8 * oracles.EPS
        )


def test_a_gradient_that_is_not_finite_stays_so_in_a_momentum_of_float16():
    transform: Any = scale_by_teon(RULES, mu_dtype="float16", method="svd")
    half = {"bias": jnp.ones(3, "float16")}
    _, state = transform.update({"bias": jnp.full(3, jnp.inf)}, transform.init(half), half)
    assert np.isinf(np.float64(state.mu["bias"])).all()


@pytest.mark.parametrize("mu_dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), np.float16])
def test_mu_dtype_is_a_name_a_class_or_a_dtype(mu_dtype):
    state: Any = scale_by_teon(RULES, mu_dtype=mu_dtype).init(params())
    assert {leaf.dtype for leaf in jax.tree.leaves(state.mu)} == {jnp.dtype(mu_dtype)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "nope"}, "`method='nope'` is unknown: write one of 'polar_express'"),
        ({"scale": "nope"}, "`scale='nope'` should be 'spectral'"),
        ({"rules": "query"}, "`rules='query'` should be a tuple of `Rule`"),
        ({"precision": "nope"}, "nope"),
    ],
    ids=str,
)
@pytest.mark.parametrize("transform", [orthogonalize, scale_by_teon])
def test_a_wrong_argument_is_refused_before_any_tree_is_seen(transform, arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        transform(**arguments)


def test_a_schedule_of_beta_is_told_who_calls_it():
    schedule: Any = optax.linear_schedule(0.8, 0.95, 100)
    with pytest.raises(ValueError, match=r"perhaps a schedule: `optax.inject_hyperparams\(teon\)"):
        scale_by_teon(beta=schedule)


def test_beta_that_float32_rounds_to_one_is_refused():
    with pytest.raises(ValueError, match="also in float32, where it is 1.0"):
        scale_by_teon(beta=0.99999999)


def test_beta_that_is_rounded_to_one_on_injection_is_refused():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    transform = optax.inject_hyperparams(scale_by_teon)([Rule("w")], beta=0.999)
    with pytest.raises(ValueError, match="unless it gets `hyperparam_dtype=jnp.float32`"):
        transform.init(params)


@pytest.mark.parametrize("beta", [1, 1.0, -0.1, 1.5, np.float64(2), float("nan"), None, "x", True])
def test_beta_that_is_no_number_or_out_of_range_is_refused(beta):
    message = f"`beta={beta!r}` should be a number, at least 0 and less than 1."
    with pytest.raises(ValueError, match=re.escape(message)):
        scale_by_teon(beta=beta)


@pytest.mark.parametrize("beta", [0, 0.5, np.float32(0.5), np.float64(0.5), np.array(0.5)])
def test_beta_may_be_any_number(beta):
    scale_by_teon(beta=beta)


@pytest.mark.parametrize(
    ("mu_dtype", "words"),
    [
        (jnp.bfloat16(0), "is an array: under `optax.inject_hyperparams`"),
        (np.zeros(2), "is an array: under `optax.inject_hyperparams`"),
        ("nope", "`mu_dtype='nope'` is no dtype: write 'bfloat16' or 'float32'."),
        (5, "`mu_dtype=5` is no dtype"),
        ("int32", "`mu_dtype='int32'` should be a real floating dtype of 16 bits or more, such as"),
        ("float8_e4m3fn", "real floating dtype of 16 bits or more"),
        ("complex64", "`mu_dtype='complex64'` should be a real floating dtype"),
        (bool, "`mu_dtype=<class 'bool'>` should be a real floating dtype"),
    ],
    ids=str,
)
def test_what_is_no_dtype_for_a_momentum_is_refused(mu_dtype, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        scale_by_teon(mu_dtype=mu_dtype)


@pytest.mark.parametrize("transform", [orthogonalize, scale_by_teon])
def test_rules_that_do_not_fit_are_refused_in_init(transform):
    with pytest.raises(
        ValueError, match="Rules do not fit the leaves that they take:\n  'up', sha"
    ):
        transform([Rule("up", split=4)]).init(params())


@pytest.mark.parametrize(
    ("precision", "name"),
    [("highest", "HIGHEST"), (jax.lax.Precision.HIGH, "HIGH"), ("default", "DEFAULT")],
    ids=str,
)
def test_precision_of_every_product_can_be_chosen(precision, name):
    transform = orthogonalize(RULES, precision=precision)
    program = str(jax.make_jaxpr(transform.update)(params(), optax.EmptyState()))
    assert set(re.findall(r"Precision\.(\w+)", program)) == {name}
    assert "precision=None" not in program


def test_another_stack_or_method_goes_on_from_the_same_state():
    g = gradients(0, params())
    first = scale_by_teon(RULES, method=QUICK)
    _, state = first.update(g, first.init(params()))
    for rules in ([], [Rule("query"), Rule("up", mode=3)], [Rule(RULES[0].pattern, stack=3)]):
        other = scale_by_teon(rules, method="svd")
        chex.assert_trees_all_equal_shapes_and_dtypes(other.init(params()), state)
        _, after = other.update(g, state)
        _, expected = first.update(g, state)
        chex.assert_trees_all_equal(after, expected)


def test_the_second_update_compiles_nothing():
    transform: Any = scale_by_teon(RULES, method=QUICK)
    update = jax.jit(chex.assert_max_traces(transform.update, n=1))
    state = transform.init(params())
    for step in range(3):
        _, state = update(gradients(step, params()), state)
    chex.clear_trace_counter()


def test_state_can_be_made_from_shapes_alone():
    transform = scale_by_teon(RULES)
    shapes = jax.eval_shape(params)
    state = jax.eval_shape(transform.init, shapes)
    assert types(state) == types(transform.init(params()))
    orthogonalize(RULES).init(shapes)


def test_absent_leaves_stay_absent():
    transform: Any = scale_by_teon(RULES, method=QUICK)
    tree = params() | {"absent": None, "block_2": {"query": None}}
    state = transform.init(tree)
    updates, after = transform.update(tree, state)
    chex.assert_trees_all_equal_structs(updates, tree, state.mu, after.mu)


def test_numbers_of_python_are_leaves_too():
    transform: Any = scale_by_teon(RULES, method=QUICK)
    like = {"up": params()["up"], "temperature": 2.0}
    updates, state = transform.update(like, transform.init(like))
    np.testing.assert_allclose(state.mu["temperature"], 0.05 * 2, rtol=1e-6)
    assert updates["temperature"].dtype == jnp.float32


@pytest.mark.parametrize("beta", [0.9999999, jnp.float32(0.9999999)], ids=str)
def test_the_bias_of_a_slow_momentum_is_corrected_to_the_last_digits(beta):
    """1 - beta^t loses these in float32; a constant gradient is its own average."""
    transform: Any = scale_by_teon([], beta=beta, nesterov=False)
    updates, _ = transform.update(ones := {"bias": jnp.ones(6)}, transform.init(ones))
    np.testing.assert_allclose(updates["bias"], 1, rtol=4 * oracles.EPS)


def test_a_traced_beta_that_was_rounded_to_one_averages_all_gradients():
    """In bfloat16 .999 is 1, which a compiled update cannot refuse."""
    like = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    rounded = optax.inject_hyperparams(scale_by_teon)([], beta=0.999, nesterov=False)
    updates, _ = jax.jit(lambda tree: rounded.update(tree, rounded.init(tree)))(like)
    np.testing.assert_allclose(np.float64(updates["w"]), 1, rtol=2.0**-7)


def test_leaves_that_masked_takes_out_are_neither_grouped_nor_changed():
    mask = jax.tree.map(lambda _: True, params()) | {"block_1": {"query": False}}
    transform: Any = optax.masked(scale_by_teon(RULES, method=QUICK), mask)
    g = gradients(0, params())
    updates, _ = transform.update(g, transform.init(params()))
    assert updates["block_1"]["query"] is g["block_1"]["query"]
    # Blocks 0 and 2 are now neighbours.
    pair = {name: g[name] for name in ("block_0", "block_2")}
    alone: Any = scale_by_teon(RULES, method=QUICK)
    expected, _ = alone.update(pair, alone.init(pair))
    for name in pair:
        np.testing.assert_allclose(
            updates[name]["query"], expected[name]["query"], atol=8 * oracles.EPS
        )


def test_map_params_reaches_the_momentum_and_nothing_else():
    transform = scale_by_teon(RULES)
    state: Any = transform.init(params())
    mapped: Any = optax.tree.map_params(transform, lambda leaf: leaf + 1, state)
    chex.assert_trees_all_equal(mapped.mu, jax.tree.map(jnp.ones_like, params()))
    assert mapped.count == state.count


def flat(tree):
    return {path: np.float64(leaf) for path, leaf in leaf_paths(tree)}


class RecipeTest(variants.TestCase):
    @variants.with_and_without_jit
    @parameterized.product(nesterov=[True, False])
    def test_a_chain_of_optax_s_parts_is_the_paper_s_algorithm(self, nesterov):
        """M <- beta M + G; W <- W - eta (sqrt(m / n) Ortho(M) + lambda W), in NumPy and float64."""
        beta, decay, rate = 0.95, 0.1, 0.01
        optimizer = optax.chain(
            optax.trace(beta, nesterov=nesterov),
            orthogonalize(RULES),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(rate),
        )
        trained, state = params(), optimizer.init(params())
        start = W = flat(trained)
        M = {path: np.zeros_like(w) for path, w in W.items()}
        polynomial = function_of("polar_express")
        # Rounding of the parameters themselves, in five sums, and of each update.
        tolerance = 5 * oracles.EPS * max(np.abs(w).max() for w in W.values())
        for step in range(5):
            gradient = gradients(step, trained)
            updates, state = self.variant(optimizer.update)(gradient, state, trained)
            trained = optax.apply_updates(trained, updates)
            G = flat(gradient)
            M = {path: beta * M[path] + G[path] for path in M}
            U = {path: beta * M[path] + G[path] if nesterov else M[path] for path in M}
            for group in (["block_0/query", "block_1/query"], ["block_2/query"], ["up"]):
                kernels = [U[path] for path in group]
                s = np.linalg.svd(oracles.unfolding(kernels, 1), compute_uv=False)
                fan_in, fan_out = kernels[0].shape
                scale = np.sqrt(fan_out / fan_in)
                tolerance += rate * scale * oracles.rounding(s)
                for path, layer in zip(group, oracles.joint(kernels, 1, polynomial), strict=True):
                    U[path] = scale * layer
            W = {path: w - rate * (U[path] + decay * w) for path, w in W.items()}
        for path, w in flat(trained).items():
            np.testing.assert_allclose(w, W[path], atol=tolerance, rtol=0)
            assert np.abs(w - start[path]).max() > 100 * tolerance


def lengths(tree):
    return np.array([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.promotes_dtypes
def test_the_update_of_a_dead_leaf_fades_as_optax_muon_s_does():
    tree = {"up": params()["up"]}
    zero = jax.tree.map(jnp.zeros_like, tree)

    def sizes(transform: Any) -> tuple[Any, Any]:
        """Of the first update, and of one 500 steps after gradients have stopped."""
        step = jax.jit(transform.update)
        first, state = step(tree, transform.init(tree), tree)
        last = first
        for _ in range(500):
            last, state = step(zero, state, tree)
        return lengths(first), lengths(last)

    first, last = sizes(scale_by_teon([Rule("up")], method="jordan", scale="muon"))
    first_of_muon, last_of_muon = sizes(optax.contrib.muon(1.0))
    np.testing.assert_allclose(first, first_of_muon, rtol=1e-5)
    assert last < 0.1 * first and last_of_muon < 0.1 * first_of_muon
    for_ever = scale_by_teon([Rule("up")], method="jordan", scale="muon", eps=0.0)
    assert sizes(for_ever)[1] > 0.9 * first


def test_an_update_is_damped_by_its_norm_and_eps():
    """n / (n + eps) by hand: n = |M|_F of the joint matrix, for a method of that norm."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    for size in (1e-9, 1e-8, 1e-6, 1.0):
        tree = {"up": size * matrix / jnp.linalg.norm(matrix)}
        updates: Any = [
            orthogonalize([Rule("up")], eps=eps).update(tree, optax.EmptyState())[0]
            for eps in (1e-8, 0.0)
        ]
        damped, plain = updates
        expected = size / (size + 1e-8) * plain["up"]
        np.testing.assert_allclose(damped["up"], expected, rtol=1e-5)


def test_eps_changes_updates_of_ordinary_size_by_less_than_a_millionth():
    damped, plain = (
        scale_by_teon(RULES, method=QUICK, eps=eps).update(
            params(), scale_by_teon(RULES).init(params())
        )[0]
        for eps in (1e-8, 0.0)
    )
    chex.assert_trees_all_close(damped, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 1e30])
def test_without_eps_every_magnitude_is_alike(size):
    transform = orthogonalize(RULES, method=QUICK)
    tree = {"up": params()["up"]}
    updates, _ = transform.update({"up": size * tree["up"]}, optax.EmptyState())
    expected, _ = transform.update(tree, optax.EmptyState())
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


def test_a_dead_layer_fades_in_a_group_that_lives():
    """A group has one norm, so eps does nothing here: the layer has its share of the joint M."""
    rng = np.random.default_rng(0)
    alive, dead = (jnp.asarray(rng.normal(size=(10, 4)), jnp.float32) for _ in range(2))
    tree = {"block_0": {"query": alive}, "block_1": {"query": 1e-9 * dead}}
    updates, _ = orthogonalize(RULES, method="svd", eps=1e-8).update(tree, optax.EmptyState())
    size = lengths(updates)
    assert size[0] > 0.9 * np.sqrt(4 * 4 / 10) and size[1] < 1e-7 * size[0]


@pytest.mark.parametrize("eps", [-1e-8, float("nan"), "small"])
def test_an_eps_that_is_no_number_from_zero_on_is_refused(eps):
    for function in (orthogonalize, scale_by_teon):
        with pytest.raises(ValueError, match="`eps=.*should be a number, at least 0"):
            function(RULES, eps=eps)


def test_the_dtypes_of_params_choose_the_precision_of_products(monkeypatch):
    """Although the momentum is in float32: on some devices bf16 leaves have other products."""
    asked = []

    def precision(backend, dtype, of_leaf):
        asked.append((jnp.dtype(dtype).name, jnp.dtype(of_leaf).name))
        is_narrow = of_leaf == jnp.bfloat16
        return jax.lax.Precision.DEFAULT if is_narrow else jax.lax.Precision.HIGHEST

    monkeypatch.setattr("teon_optax._polar.numerics.default_precision", precision)
    tree = {"up": params()["up"], "down": params("bfloat16")["up"]}
    transform = scale_by_teon([Rule("up|down")], method=QUICK)
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    state = transform.init(tree)
    traced = str(jax.make_jaxpr(transform.update)(gradients, state, tree))
    assert {*asked} == {("float32", "float32"), ("float32", "bfloat16")}
    assert "Precision.HIGHEST" in traced and "Precision.DEFAULT" in traced


@pytest.mark.parametrize("lost", [dict, list], ids=["a dict", "a list"])
def test_a_state_that_lost_its_types_is_refused_with_the_way_out(lost):
    transform = scale_by_teon(RULES)
    state: Any = transform.init(params())
    bare = state._asdict() if lost is dict else [*state]
    with pytest.raises(ValueError, match=f"is a {lost.__name__}, without 'count' and 'mu'.*Restor"):
        transform.update(params(), bare)
    optimizer: Any = teon(0.1, RULES)
    with pytest.raises(ValueError, match="is a dict, without 'inner_states'"):
        optimizer.update(params(), optimizer.init(params())._asdict(), params())
