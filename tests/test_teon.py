"""`teon`: matched leaves, the fallback, weight decay, and life among Optax's and Flax's tools."""

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
from flax import nnx

from teon_optax import Rule, default_rules, orthogonalize, plan, polar_express, scale_by_teon, teon

# Momentum, AdamW and hyperparameters are Optax's.
pytestmark = pytest.mark.promotes_dtypes

RULES = (Rule(r"block_(?P<layer>\d+)/query", stack=2), Rule("^up$"))
# One step compiles fast; what methods do is said elsewhere.
QUICK = polar_express(1)
TAKEN = ("block_0", "block_1", "block_2", "up")
LEFT = ("bias", "embed")


def params(dtype="float32"):
    """Three queries, a matrix for Muon, and two leaves that no rule takes."""
    rng = np.random.default_rng(0)
    tree = {f"block_{i}": {"query": rng.normal(size=(10, 4))} for i in range(3)}
    tree |= {"up": rng.normal(size=(4, 6)), "bias": rng.normal(size=6)}
    tree |= {"embed": rng.normal(size=(9, 4))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def some(tree, names):
    return {name: tree[name] for name in names}


def gradients(step, like):
    rng = np.random.default_rng(step + 1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)


def run(optimizer, tree, steps=2, **extra_args) -> tuple[Any, Any]:
    """Updates of the last step and the state after it."""
    state, updates = optimizer.init(tree), None
    for step in range(steps):
        updates, state = optimizer.update(gradients(step, tree), state, tree, **extra_args)
        tree = optax.apply_updates(tree, updates)
    return updates, state


def assert_close(tree, expected):
    chex.assert_trees_all_close(tree, expected, rtol=32 * oracles.EPS, atol=32 * oracles.EPS)


SCHEDULE = optax.linear_schedule(0.1, 0.01, 3)


@pytest.mark.parametrize("rate", [0.02, SCHEDULE], ids=["number", "schedule"])
def test_matched_leaves_get_scale_by_teon_weight_decay_and_the_learning_rate(rate):
    arguments = {"beta": 0.9, "nesterov": False, "method": QUICK, "scale": 0.2}
    by_hand = optax.chain(
        scale_by_teon(RULES, **arguments),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(rate),
    )
    updates, _ = run(teon(rate, RULES, weight_decay=0.1, **arguments), params())
    expected, _ = run(by_hand, params())
    assert_close(some(updates, TAKEN), some(expected, TAKEN))


@pytest.mark.parametrize("rate", [0.02, SCHEDULE], ids=["number", "schedule"])
def test_all_other_leaves_get_adamw_with_betas_of_9_and_95_and_the_same_weight_decay(rate):
    updates, _ = run(teon(rate, RULES, weight_decay=0.1, method=QUICK), params(), steps=3)
    expected, _ = run(optax.adamw(rate, 0.9, 0.95, weight_decay=0.1), params(), steps=3)
    assert_close(some(updates, LEFT), some(expected, LEFT))


@pytest.mark.parametrize("rate", [0.003, SCHEDULE], ids=["number", "schedule"])
def test_the_default_fallback_may_have_a_rate_of_its_own(rate):
    optimizer = teon(0.02, RULES, weight_decay=0.1, adam_learning_rate=rate, method=QUICK)
    updates, _ = run(optimizer, params(), steps=3)
    expected, _ = run(optax.adamw(rate, 0.9, 0.95, weight_decay=0.1), params(), steps=3)
    assert_close(some(updates, LEFT), some(expected, LEFT))
    one_rate, _ = run(teon(0.02, RULES, weight_decay=0.1, method=QUICK), params())
    first, _ = run(optimizer, params())
    assert_close(some(first, TAKEN), some(one_rate, TAKEN))


def test_there_is_no_weight_decay_unless_asked_for():
    zero = jax.tree.map(jnp.zeros_like, params())
    optimizer = teon(0.02, RULES, method=QUICK)
    updates, _ = optimizer.update(zero, optimizer.init(params()), params())
    chex.assert_trees_all_equal(updates, zero)


MASKS = {
    "a tree": jax.tree.map(lambda leaf: leaf.ndim > 1, params()) | {"up": False},
    "its prefix": dict.fromkeys(("block_0", "block_1", "block_2", "embed"), True)
    | dict.fromkeys(("up", "bias"), False),
    "a function": lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, leaf: path[0].key not in ("up", "bias"), tree
    ),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_weight_decay_is_where_the_mask_says(mask):
    zero = jax.tree.map(jnp.zeros_like, params())
    optimizer: Any = teon(0.5, RULES, weight_decay=0.1, weight_decay_mask=mask, method=QUICK)
    updates, _ = optimizer.update(zero, optimizer.init(params()), params())
    for name, leaf in params().items():
        decay = 0 if name in ("up", "bias") else 0.5 * 0.1
        assert_close(updates[name], jax.tree.map(lambda w, d=decay: -d * w, leaf))


def test_a_fallback_of_the_user_has_its_own_learning_rate_and_weight_decay():
    optimizer = teon(0.02, RULES, weight_decay=0.1, fallback=optax.sgd(0.5), method=QUICK)
    updates, _ = run(optimizer, params())
    expected = gradients(1, params())
    assert_close(some(updates, LEFT), jax.tree.map(lambda g: -0.5 * g, some(expected, LEFT)))


def test_extra_arguments_reach_the_fallback():
    def update(updates, state, params=None, *, factor=1.0, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: factor * g, updates), state

    fallback = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    updates, _ = run(teon(0.02, RULES, fallback=fallback, method=QUICK), params(), factor=3.0)
    expected = jax.tree.map(lambda g: 3 * g, some(gradients(1, params()), LEFT))
    assert_close(some(updates, LEFT), expected)


def test_without_rules_they_are_the_default_rules_of_the_whole_tree():
    """Which axis counts layers is known by the bias, which the partition takes out."""
    kernel = jnp.float32(np.random.default_rng(0).normal(size=(3, 4, 6)))
    tree = {"layers": {"query": {"kernel": kernel, "bias": jnp.ones((3, 6))}}}
    (rule,) = (rule for rule in default_rules(tree) if rule.stack > 0)
    assert (rule.stack, rule.layer_axis) == (2, 0)
    with pytest.raises(ValueError, match="cannot tell how to read"):
        default_rules({"layers": {"query": {"kernel": kernel}}})
    updates, _ = run(teon(0.02, method=QUICK), tree)
    expected, _ = run(teon(0.02, [rule], method=QUICK), tree)
    assert_close(updates, expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weight_decay_mask": True}, "`weight_decay_mask=True` should be a tree of booleans or a"),
        ({"weight_decay_mask": jnp.array(True)}, "or a function of params; under `optax.inject_hy"),
        ({"weight_decay_mask": "kernel"}, "`weight_decay_mask='kernel'` should be a tree of boo"),
        ({"weight_decay_mask": {"query": "no"}}, "should be a tree of booleans"),
        ({"nesterov": "no"}, "`nesterov='no'` should be True or False."),
        ({"nesterov": 0.0}, "`nesterov=0.0` should be True or False."),
        ({"fallback": "adamw"}, "`fallback='adamw'` should be an optimizer, such as `optax.adamw("),
        ({"fallback": optax.adamw}, "should be an optimizer, such as `optax.adamw(3e-4)`."),
        (
            {"adam_learning_rate": 3e-4, "fallback": optax.adamw(1e-3)},
            "`adam_learning_rate=0.0003` is the rate of the default fallback, and `fallback=` repl",
        ),
        ({"adam_learning_rate": "fast"}, "`adam_learning_rate='fast'` should be a number"),
        ({"method": "nope"}, "`method='nope'` is unknown"),
        ({"scale": -1.0}, "`scale=-1.0` should be 'spectral'"),
        ({"beta": 1.0}, "`beta=1.0` should be a number, at least 0 and less than 1."),
        ({"mu_dtype": "int8"}, "`mu_dtype='int8'` should be a real floating dtype"),
        ({"rules": Rule("w")}, '`rules=Rule(r"w")` should be a tuple of `Rule`'),
        ({"precision": "nope"}, "nope"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_wrong_argument_is_refused_when_the_optimizer_is_built(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        teon(0.02, **arguments)


def test_a_learning_rate_that_is_no_number_is_told_of_schedules():
    with pytest.raises(ValueError, match="`learning_rate=None` should be a number, at least 0, or"):
        teon(None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "function",
    [lambda **named: teon(0.02, **named), scale_by_teon, orthogonalize],
    ids=["teon", "scale_by_teon", "orthogonalize"],
)
def test_an_argument_of_a_rule_is_told_where_it_belongs(function):
    with pytest.raises(
        TypeError, match=r"own mode, so write `rules=\[Rule\(pattern, mode=2\)\]`, or"
    ):
        function(mode=2)
    with pytest.raises(
        TypeError, match=r"own dims, so write `rules=\[Rule\(pattern, dims=None\)\]`.$"
    ):
        function(dims=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ns_steps'"):
        function(ns_steps=5)


def test_rules_that_do_not_fit_are_refused_in_init():
    with pytest.raises(
        ValueError, match="Rules do not fit the leaves that they take:\n  'up', sha"
    ):
        teon(0.02, [Rule("up", split=4)]).init(params())


@pytest.mark.promotes_dtypes
def test_update_needs_params_for_weight_decay_alone():
    decaying = teon(0.02, RULES, method=QUICK, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        decaying.update(params(), decaying.init(params()))
    optimizer = teon(0.02, RULES, method=QUICK)
    state = optimizer.init(params())
    assert jax.tree.structure(state) == jax.tree.structure(decaying.init(params()))
    without, _ = optimizer.update(params(), state)
    given, _ = optimizer.update(params(), state, params())
    chex.assert_trees_all_equal(without, given)


class TypesTest(chex.TestCase):
    def assert_types_stay(self, update, dtype, mu_dtype):
        optimizer = teon(0.02, RULES, weight_decay=0.1, mu_dtype=mu_dtype, method=QUICK)
        before = optimizer.init(params(dtype))
        updates, after = update(optimizer)(params(dtype), before, params(dtype))
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)
        # AdamW's updates may be wider than the gradients.
        assert {leaf.dtype for leaf in jax.tree.leaves(some(updates, TAKEN))} == {jnp.dtype(dtype)}

    @parameterized.product(dtype=["float32", "bfloat16", "float16"], mu_dtype=[None, "bfloat16"])
    def test_types_do_not_change_under_jit(self, dtype, mu_dtype):
        self.assert_types_stay(lambda o: jax.jit(o.update).eval_shape, dtype, mu_dtype)

    @parameterized.product(dtype=["float32", "bfloat16", "float16"])
    def test_types_do_not_change_without_jit(self, dtype):
        self.assert_types_stay(lambda o: o.update, dtype, None)


def test_the_second_update_compiles_nothing():
    optimizer = teon(SCHEDULE, RULES, weight_decay=0.1, method=QUICK)
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    updates, _ = run(optimizer._replace(update=update), params(), steps=3)
    # What is compiled is what is not.
    assert_close(updates, run(optimizer, params(), steps=3)[0])


def test_state_can_be_made_from_shapes_alone():
    optimizer = teon(0.02, RULES)
    state = jax.eval_shape(optimizer.init, jax.eval_shape(params))
    expected = optimizer.init(params())
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, expected)


def test_absent_leaves_stay_absent():
    tree = params() | {"absent": None}
    updates, _ = run(teon(0.02, RULES, method=QUICK), tree)
    expected, _ = run(teon(0.02, RULES, method=QUICK), params())
    chex.assert_trees_all_equal(updates, expected | {"absent": None})


def test_another_stack_goes_on_from_the_same_state():
    one, two = (teon(0.02, (Rule(RULES[0].pattern, K), RULES[1]), method=QUICK) for K in (2, 3))
    _, state = run(one, params())
    chex.assert_trees_all_equal_shapes_and_dtypes(two.init(params()), state)
    both: Any = (
        optimizer.update(gradients(5, params()), state, params()) for optimizer in (two, one)
    )
    (updates, after), (other, expected) = both
    chex.assert_trees_all_equal(after, expected)
    chex.assert_trees_all_equal(updates["up"], other["up"])
    assert np.abs(updates["block_0"]["query"] - other["block_0"]["query"]).max() > 1e-3


def test_it_is_a_part_of_chains_partitions_and_masks():
    """Leaves that others take out are MaskedNodes for it."""
    plain = teon(0.02, RULES, method=QUICK)
    names = {name: "teon" if name in TAKEN else "frozen" for name in params()}
    expected, _ = run(plain, params())
    chained = optax.chain(optax.identity(), plain)
    masked = optax.masked(plain, {name: label == "teon" for name, label in names.items()})
    parts = optax.partition({"teon": plain, "frozen": optax.set_to_zero()}, names)
    assert_close(run(chained, params())[0], expected)
    assert_close(some(run(masked, params())[0], TAKEN), some(expected, TAKEN))
    updates, _ = run(parts, params())
    assert_close(some(updates, TAKEN), some(expected, TAKEN))
    chex.assert_trees_all_equal(updates["bias"], jnp.zeros(6))


def test_map_params_reaches_all_that_mirrors_params():
    optimizer = teon(0.02, RULES, mu_dtype="float32")
    state = optimizer.init(params())
    mapped: Any = optax.tree.map_params(
        optimizer, lambda _: "mirrors", state, transform_non_params=lambda _: "does not"
    )
    momentum = mapped.inner_states["teon"].inner_state[0]
    assert momentum.mu["block_0"]["query"] == "mirrors" and momentum.count == "does not"
    adam = mapped.inner_states["fallback"].inner_state[0]
    assert adam.mu["bias"] == adam.nu["bias"] == "mirrors" and adam.count == "does not"


class InjectedTest(variants.TestCase):
    arguments: Any = {"learning_rate": 0.02, "beta": 0.9, "scale": 0.2, "weight_decay": 0.1}

    def injected(self, static_args=(), **kwargs):
        factory = optax.inject_hyperparams(teon, static_args=static_args)
        return factory(**{**self.arguments, "rules": RULES, "method": QUICK, **kwargs})

    @variants.with_and_without_jit
    def test_hyperparameters_are_traced_without_static_args(self):
        optimizer, tree = self.injected(mu_dtype="bfloat16"), params()
        state = optimizer.init(tree)
        updates, _ = self.variant(optimizer.update)(gradients(0, tree), state, tree)
        plain = teon(**self.arguments, rules=RULES, method=QUICK, mu_dtype="bfloat16")
        expected, _ = plain.update(gradients(0, tree), plain.init(tree), tree)
        assert_close(updates, expected)

    def test_a_changed_hyperparameter_takes_effect_in_the_compiled_update(self):
        optimizer, tree = self.injected(), params()
        state: Any = optimizer.init(tree)
        assert set(self.arguments) <= set(state.hyperparams)
        update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
        _, state = update(gradients(0, tree), state, tree)
        changed = {"learning_rate": 3.0, "beta": 0.5, "scale": 1.0, "weight_decay": 0.0}
        for name, value in changed.items():
            hyperparams = state.hyperparams | {name: jnp.float32(value)}
            updates, _ = update(gradients(1, tree), state._replace(hyperparams=hyperparams), tree)
            arguments: Any = self.arguments | {name: value}
            plain = teon(**arguments, rules=RULES, method=QUICK)
            expected, _ = plain.update(gradients(1, tree), state.inner_state, tree)
            assert_close(updates, expected)

    def test_the_fallback_s_rate_is_a_hyperparameter(self):
        arguments: Any = self.arguments | {"adam_learning_rate": SCHEDULE}
        updates, state = run(self.injected(adam_learning_rate=SCHEDULE), params())
        expected, _ = run(teon(**arguments, rules=RULES, method=QUICK), params())
        assert_close(updates, expected)
        rate = state.hyperparams["adam_learning_rate"]
        np.testing.assert_allclose(rate, SCHEDULE(1), rtol=1e-6)

    def test_a_schedule_is_a_hyperparameter(self):
        arguments: Any = self.arguments | {"learning_rate": SCHEDULE}
        updates, state = run(self.injected(learning_rate=SCHEDULE), params())
        expected, _ = run(teon(**arguments, rules=RULES, method=QUICK), params())
        assert_close(updates, expected)
        np.testing.assert_allclose(state.hyperparams["learning_rate"], SCHEDULE(1), rtol=1e-6)

    @parameterized.parameters(
        ("mu_dtype", jnp.bfloat16), ("weight_decay_mask", lambda tree: tree is not None)
    )
    def test_what_arrives_already_called_is_refused_until_static_args_name_it(self, name, value):
        words = f"`{name}=.*under `optax.inject_hyperparams`.* in `static_args`"
        with pytest.raises(ValueError, match=words):
            self.injected(**{name: value}).init(params())
        self.injected(static_args=name, **{name: value}).init(params())


def test_nnx_optimizer_shows_one_path_to_init_and_another_to_update():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.query_0 = nnx.Linear(10, 4, rngs=rngs)
            self.query_1 = nnx.Linear(10, 4, rngs=rngs)

    rules = (Rule(r"^query_(?P<layer>\d+)/kernel$", stack=2),)
    model = Model(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, teon(0.02, rules, method=QUICK), wrt=nnx.Param)
    g = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, g)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    plain = teon(0.02, rules, method=QUICK)
    updates, _ = plain.update(nnx.to_pure_dict(g), plain.init(before), before)
    assert len(plan(before, rules).groups) == 1
    assert_close(after, optax.apply_updates(before, updates))
