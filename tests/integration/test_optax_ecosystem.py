"""`teon` inside Optax's wrappers, JAX's transformations, Flax and Orbax, as direct computations.

Optimizers run eagerly where the other side of a comparison does too: both are then bit for bit the
same. Where one side is compiled, rounding may differ.
"""

import functools
import logging
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint as ocp
import pytest
from by_hand import trained
from flax import nnx
from flax.training.train_state import TrainState

from teon_optax import Rule, alignment, default_rules, orthogonalize, scale_by_teon, teon

LR = 0.125
RULES = (
    Rule(r"^blocks?[_/](?P<layer>\d+)/query/kernel$", stack=2),
    Rule(r"^blocks?[_/]\d+/up/kernel$"),
)
QUERY, UP, NORM = (6, 4), (4, 6), (6,)
SHAPES = {
    f"block_{i}": {"query": {"kernel": QUERY}, "up": {"kernel": UP}, "norm": {"scale": NORM}}
    for i in range(2)
}
# Of an update, computed in two ways whose roundings differ: no joint matrix below has a condition
# above 20 (the largest is 13).
ROUNDING = LR * oracles.rounding(np.geomspace(1, 20, 6))


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape).astype(dtype)),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PARAMS = tree(0)
GRADIENTS = [tree(seed) for seed in (1, 2, 3)]
# A tree of booleans, true at the leaves that RULES take.
TAKEN = jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path[-1]), PARAMS)


def run(optimizer, params=PARAMS, gradients=GRADIENTS, state: Any = None, **extra_args) -> Any:
    """The update of each step, params following, and the last state."""
    state = optimizer.init(params) if state is None else state
    updates = []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params, **extra_args)
        params = optax.apply_updates(params, update)
        updates.append(update)
    return updates, state


def total(updates):
    return functools.reduce(optax.tree.add, updates)


def chosen(mask, trees):
    """Their leaves where the mask is true."""
    return [jax.tree.map(lambda use, leaf: leaf if use else None, mask, one) for one in trees]


def dtypes(tree):
    """Their names."""
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def at(stacked, i):
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def opposite(mask):
    return jax.tree.map(lambda use: not use, mask)


def assert_differ(a, b):
    """So that equality with the other one means something."""
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(a, b)


# Optax: transformations around and beside.


def test_a_chain_of_optax_parts_around_orthogonalize_is_the_papers_recipe():
    mu, decay = 0.95, 0.1
    recipe = optax.chain(
        optax.trace(mu, nesterov=True),
        orthogonalize(RULES, method="svd"),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(LR),
    )
    updates, _ = run(recipe)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PARAMS)
    trace = jax.tree.map(np.zeros_like, params)
    for gradient, update in zip(GRADIENTS, updates, strict=True):
        trace = jax.tree.map(lambda m, g: mu * m + np.asarray(g, np.float64), trace, gradient)
        momentum = jax.tree.map(lambda m, g: mu * m + np.asarray(g, np.float64), trace, gradient)
        kernels = [momentum[block]["query"]["kernel"] for block in SHAPES]
        for block, Q in zip(SHAPES, oracles.joint(kernels, mode=1), strict=True):
            fan_in, fan_out = QUERY
            momentum[block]["query"]["kernel"] = np.sqrt(fan_out / fan_in) * Q
            fan_in, fan_out = UP
            alone = oracles.reshaped_spectrum(momentum[block]["up"]["kernel"])
            momentum[block]["up"]["kernel"] = np.sqrt(fan_out / fan_in) * alone
        expected = jax.tree.map(lambda q, p: -LR * (q + decay * p), momentum, params)
        chex.assert_trees_all_close(update, expected, atol=ROUNDING)
        params = jax.tree.map(np.add, params, expected)


def test_in_a_chain_gradients_arrive_clipped():
    clip = optax.clip_by_global_norm(1.0)
    clipped = [clip.update(gradient, clip.init(PARAMS))[0] for gradient in GRADIENTS[:1]]
    gradients = clipped + [optax.tree.scale(0.01, gradient) for gradient in GRADIENTS[1:]]
    direct, _ = run(teon(LR, RULES), gradients=gradients)
    chained, _ = run(optax.chain(clip, teon(LR, RULES)), gradients=[GRADIENTS[0], *gradients[1:]])
    chex.assert_trees_all_equal(chained, direct)
    assert_differ(run(teon(LR, RULES), gradients=[GRADIENTS[0], *gradients[1:]])[0], direct)


def test_partition_gives_each_leaf_its_own_transformation():
    labels = jax.tree.map(lambda taken: "hidden" if taken else "rest", TAKEN)
    optimizer = optax.partition({"hidden": scale_by_teon(RULES), "rest": optax.sgd(LR)}, labels)
    updates, _ = run(optimizer)
    chex.assert_trees_all_equal(chosen(TAKEN, updates), chosen(TAKEN, run(scale_by_teon(RULES))[0]))
    rest = opposite(TAKEN)
    chex.assert_trees_all_equal(chosen(rest, updates), chosen(rest, run(optax.sgd(LR))[0]))


def test_teon_is_the_partition_that_one_would_write():
    labels = jax.tree.map(lambda taken: "hidden" if taken else "rest", TAKEN)
    hidden = optax.chain(
        scale_by_teon(RULES), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(LR)
    )
    rest = optax.adamw(LR, 0.9, 0.95, weight_decay=0.1)
    by_hand, _ = run(optax.partition({"hidden": hidden, "rest": rest}, labels))
    chex.assert_trees_all_equal(run(teon(LR, RULES, weight_decay=0.1))[0], by_hand)


def test_masked_leaves_pass_through_and_leave_their_group():
    mask = jax.tree.map(lambda _: True, PARAMS)
    mask["block_1"]["query"]["kernel"] = False
    gradient = GRADIENTS[0]
    (update,), _ = run(optax.masked(orthogonalize(RULES), mask), gradients=[gradient])
    chex.assert_trees_all_equal(update["block_1"]["query"], gradient["block_1"]["query"])
    alone = {"block_0": {"query": gradient["block_0"]["query"]}}
    (expected,), _ = run(orthogonalize(RULES), alone, [alone])
    chex.assert_trees_all_equal(update["block_0"]["query"], expected["block_0"]["query"])


def test_multi_steps_updates_by_the_mean_gradient():
    optimizer = optax.MultiSteps(teon(LR, RULES), every_k_schedule=2)
    state, updates = optimizer.init(PARAMS), []
    for gradient in GRADIENTS[:2]:
        update, state = optimizer.update(gradient, state, PARAMS)
        updates.append(update)
    mean = optax.tree.scale(0.5, optax.tree.add(*GRADIENTS[:2]))
    (direct,), _ = run(teon(LR, RULES), gradients=[mean])
    chex.assert_trees_all_equal(updates[0], optax.tree.zeros_like(PARAMS))
    chex.assert_trees_all_close(updates[1], direct, atol=ROUNDING)


def injected(*args, **kwargs):
    """Compiled, so that hyperparameters are traced."""
    optimizer = optax.inject_hyperparams(teon)(*args, **kwargs)
    return optax.GradientTransformationExtraArgs(optimizer.init, jax.jit(optimizer.update))


HYPERPARAMETERS: dict[str, Any] = {
    "beta": 0.5,
    "eps": 1e-6,
    "scale": 0.25,
    "weight_decay": 0.25,
}


def test_every_number_can_be_injected_without_static_args():
    updates, state = run(injected(LR, RULES, method="schatten", **HYPERPARAMETERS))
    assert set(state.hyperparams) == {"learning_rate", *HYPERPARAMETERS}
    direct, _ = run(teon(LR, RULES, method="schatten", **HYPERPARAMETERS))
    chex.assert_trees_all_close(updates, direct, atol=ROUNDING)


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", LR / 4), *((name, 0.75) for name in HYPERPARAMETERS)]
)
def test_an_injected_number_can_be_changed_between_steps(name, value):
    optimizer = injected(LR, RULES, **HYPERPARAMETERS)
    _, state = run(optimizer, gradients=GRADIENTS[:1])
    before: dict[str, Any] = {"learning_rate": LR} | HYPERPARAMETERS
    direct, after = teon(rules=RULES, **before), teon(rules=RULES, **before | {name: value})
    _, direct_state = run(direct, gradients=GRADIENTS[:1])
    changed = state._replace(hyperparams=state.hyperparams | {name: jnp.float32(value)})
    (update,), _ = run(optimizer, gradients=GRADIENTS[1:2], state=changed)
    (expected,), _ = run(after, gradients=GRADIENTS[1:2], state=direct_state)
    (unchanged,), _ = run(direct, gradients=GRADIENTS[1:2], state=direct_state)
    chex.assert_trees_all_close(update, expected, atol=ROUNDING)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(update, unchanged, atol=ROUNDING)


def test_an_injected_schedule_is_the_schedule():
    schedule = optax.linear_schedule(LR, 0.0, 4)
    updates, state = run(injected(schedule, RULES))
    chex.assert_trees_all_close(updates, run(teon(schedule, RULES))[0], atol=ROUNDING)
    assert state.hyperparams["learning_rate"] == schedule(2)


def test_injected_mu_dtype_is_a_name():
    state = injected(LR, RULES, mu_dtype="bfloat16").init(PARAMS)
    momenta = optax.tree.get_all_with_path(state, "mu")
    assert dtypes([mu for _, mu in momenta]) == {"bfloat16"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mu_dtype", jnp.bfloat16),
        ("weight_decay_mask", lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    ],
)
def test_an_injected_callable_that_is_no_schedule_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*inject_hyperparams.*name it in `static_args`"):
        optax.inject_hyperparams(teon)(LR, RULES, **{name: value}).init(PARAMS)
    optax.inject_hyperparams(teon, static_args=name)(LR, RULES, **{name: value}).init(PARAMS)


def test_apply_if_finite_leaves_out_the_step_of_a_nan():
    optimizer = optax.apply_if_finite(teon(LR, RULES), max_consecutive_errors=2)
    broken = jax.tree.map(jnp.copy, GRADIENTS[0])
    broken["block_0"]["norm"]["scale"] = broken["block_0"]["norm"]["scale"].at[0].set(jnp.nan)
    (first, none, second), state = run(optimizer, gradients=[GRADIENTS[0], broken, GRADIENTS[1]])
    direct, direct_state = run(teon(LR, RULES), gradients=GRADIENTS[:2])
    chex.assert_trees_all_close([first, second], direct, atol=ROUNDING)
    chex.assert_trees_all_equal(none, optax.tree.zeros_like(PARAMS))
    chex.assert_trees_all_close(state.inner_state, direct_state, atol=ROUNDING)


def test_lookahead_moves_the_slow_params_towards_the_fast_ones():
    optimizer = teon(LR, RULES, weight_decay=0.5)
    lookahead = optax.lookahead(optimizer, sync_period=2, slow_step_size=0.25)
    params: Any = optax.LookaheadParams.init_synced(PARAMS)
    state = lookahead.init(params)
    for gradient in GRADIENTS:
        updates, state = lookahead.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    two, direct_state = run(optimizer, gradients=GRADIENTS[:2])
    slow = optax.tree.add_scale(PARAMS, 0.25, total(two))
    (third,), _ = run(optimizer, slow, GRADIENTS[2:], direct_state)
    chex.assert_trees_all_close(params.slow, slow, atol=ROUNDING)
    chex.assert_trees_all_close(params.fast, optax.tree.add(slow, third), atol=ROUNDING)


def test_schedule_free_evaluates_at_the_mean_of_the_iterates():
    optimizer = optax.contrib.schedule_free(teon(LR, RULES, beta=0.0), LR, b1=0.5)
    updates, state = run(optimizer)
    direct, _ = run(teon(LR, RULES, beta=0.0))
    iterates = [optax.tree.add(PARAMS, total(direct[: i + 1])) for i in range(len(direct))]
    mean = optax.tree.scale(1 / len(iterates), total(iterates))
    params = optax.tree.add(PARAMS, total(updates))
    evaluated = optax.contrib.schedule_free_eval_params(state, params)
    chex.assert_trees_all_close(evaluated, mean, atol=10 * ROUNDING)


def test_mechanize_scales_the_sum_of_the_updates():
    updates, state = run(optax.contrib.mechanize(teon(LR, RULES), weight_decay=0.0))
    direct, _ = run(teon(LR, RULES))
    expected = optax.tree.scale(jnp.sum(state.s), total(direct))
    tolerance = ROUNDING * float(jnp.sum(state.s)) + 3 * np.finfo(np.float32).eps * 4
    chex.assert_trees_all_close(total(updates), expected, atol=tolerance)


def test_reduce_on_plateau_scales_updates_once_the_loss_stops_falling():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    updates, _ = run(optax.chain(teon(LR, RULES), plateau), value=jnp.asarray(1.0))
    direct, _ = run(teon(LR, RULES))
    expected = [*direct[:2], optax.tree.scale(0.5, direct[2])]
    chex.assert_trees_all_equal(updates, expected)


def test_selective_transform_freezes_a_layer_and_its_partner_goes_on_alone():
    mask = {block: block == "block_1" for block in PARAMS}
    updates, _ = run(optax.transforms.selective_transform(teon(LR, RULES), freeze_mask=mask))

    def first(trees):
        return [{"block_0": one["block_0"]} for one in trees]

    alone, _ = run(teon(LR, RULES), first([PARAMS])[0], first(GRADIENTS))
    chex.assert_trees_all_equal(first(updates), alone)
    for update in updates:
        chex.assert_trees_all_equal(update["block_1"], optax.tree.zeros_like(PARAMS["block_1"]))


# Optax: looking into the state.


def test_tree_get_finds_the_momentum():
    _, state = run(scale_by_teon(RULES, beta=0.75), gradients=GRADIENTS[:1])
    expected = optax.tree.scale(0.25, GRADIENTS[0])
    chex.assert_trees_all_equal(optax.tree.get(state, "mu"), expected)
    _, state = run(teon(LR, RULES, beta=0.75), gradients=GRADIENTS[:1])
    momentum = optax.tree.get(state.inner_states["teon"], "mu")
    for block in SHAPES:
        for name in ("query", "up"):
            chex.assert_trees_all_equal(momentum[block][name], expected[block][name])


def test_tree_set_replaces_the_momentum():
    optimizer = scale_by_teon(RULES)
    _, state = run(optimizer, gradients=GRADIENTS[:1])
    state = optax.tree.set(state, mu=GRADIENTS[2], count=jnp.asarray(7, jnp.int32))
    _, state = run(optimizer, gradients=GRADIENTS[:1], state=state)
    expected = optax.tree.add(
        optax.tree.scale(0.95, GRADIENTS[2]), optax.tree.scale(0.05, GRADIENTS[0])
    )
    assert state.count == 8
    chex.assert_trees_all_close(state.mu, expected, atol=10 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("rules", [RULES, None], ids=["rules", "default_rules"])
def test_map_params_maps_what_has_the_shape_of_params_and_nothing_else(rules):
    optimizer = teon(LR, rules)
    _, state = run(optimizer, gradients=GRADIENTS[:1])
    doubled = optax.tree.map_params(
        optimizer, lambda leaf: 2 * leaf, state, transform_non_params=lambda leaf: leaf + 5
    )
    expected = jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim else leaf + 5, state)
    chex.assert_trees_all_equal(doubled, expected)


def test_the_momentum_in_the_state_can_be_measured():
    _, state = run(teon(LR), gradients=GRADIENTS[:1])
    rules = default_rules(PARAMS)
    momentum = optax.tree.get(state.inner_states["teon"], "mu")
    assert alignment(momentum, rules) == alignment(optax.tree.scale(0.05, GRADIENTS[0]), rules)


# Optax: extra arguments.


def test_extra_arguments_are_ignored():
    direct, _ = run(teon(LR, RULES))
    chex.assert_trees_all_equal(run(teon(LR, RULES), value=1.0, unheard_of=object())[0], direct)


def test_extra_arguments_reach_the_fallback():
    fallback = optax.chain(optax.sgd(LR), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    updates, _ = run(teon(LR, RULES, fallback=fallback), value=jnp.asarray(1.0))
    direct, _ = run(teon(LR, RULES, fallback=optax.sgd(LR)))
    scaled = [optax.tree.scale(0.5**i, update) for i, update in enumerate(direct)]
    chex.assert_trees_all_equal(chosen(TAKEN, updates), chosen(TAKEN, direct))
    chex.assert_trees_all_equal(chosen(opposite(TAKEN), updates), chosen(opposite(TAKEN), scaled))


# JAX.


def test_vmap_over_seeds_is_a_loop_over_seeds():
    optimizer = teon(LR, RULES, weight_decay=0.1)

    def train(params, gradients):
        updates, state = run(optimizer, params, gradients)
        return updates, state

    seeds = [(tree(seed), [tree(seed + 10), tree(seed + 20)]) for seed in range(3)]
    together = jax.jit(jax.vmap(train))(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds))
    for i, seed in enumerate(seeds):
        chex.assert_trees_all_close(at(together, i), train(*seed), atol=2 * ROUNDING)


def test_scan_over_steps_is_a_loop_over_steps():
    optimizer = teon(LR, RULES, weight_decay=0.1)

    def step(carry, gradient):
        params, state = carry
        update, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, update), state), update

    gradients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADIENTS)
    (_, state), updates = jax.lax.scan(step, (PARAMS, optimizer.init(PARAMS)), gradients)
    direct, direct_state = run(optimizer)
    for i, update in enumerate(direct):
        chex.assert_trees_all_close(at(updates, i), update, atol=2 * ROUNDING)
    chex.assert_trees_all_close(state, direct_state, atol=ROUNDING)


@pytest.mark.parametrize("rules", [RULES, None], ids=["rules", "default_rules"])
def test_shapes_are_enough_for_init(rules):
    optimizer = teon(LR, rules)
    shapes = jax.eval_shape(lambda: PARAMS)
    types = jax.tree.map(jax.typeof, optimizer.init(PARAMS))
    assert jax.tree.map(jax.typeof, optimizer.init(shapes)) == types
    abstract = jax.eval_shape(optimizer.init, shapes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), types
    )


def test_an_exported_update_is_the_update():
    optimizer = teon(LR, RULES, weight_decay=0.1)
    _, state = run(optimizer, gradients=GRADIENTS[:1])
    arguments = GRADIENTS[1], state, PARAMS
    leaves, structure = jax.tree.flatten(arguments)

    def update(leaves):
        return jax.tree.leaves(optimizer.update(*structure.unflatten(leaves)))

    stored = jax.export.export(jax.jit(update))(leaves).serialize()
    restored = jax.export.deserialize(stored).call(leaves)
    direct = jax.tree.leaves(optimizer.update(*arguments))
    chex.assert_trees_all_close(restored, direct, atol=ROUNDING)


@pytest.mark.parametrize("compile_step", [jax.jit, lambda step: step], ids=["jitted", "eager"])
def test_a_second_update_compiles_nothing(compile_step, caplog):
    optimizer = teon(LR, RULES, weight_decay=0.1)
    update = compile_step(optimizer.update)

    def compilations(gradient, state):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
            _, state = update(gradient, state, PARAMS)
        return sum("compilation" in message for message in caplog.messages), state

    first, state = compilations(GRADIENTS[0], optimizer.init(PARAMS))
    second, _ = compilations(GRADIENTS[1], state)
    assert first > 0 or compile_step is not jax.jit  # eager operations may be known already
    assert second == 0


# Dtypes.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_updates_have_the_dtype_of_params_and_are_accurate_in_it(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        # Near the largest float16: Nesterov's first momentum is half as large again.
        params, gradient = tree(0, dtype), optax.tree.scale(2.0**14, tree(1, dtype))
        optimizer = teon(LR, RULES, method="svd")
        (update,), state = run(optimizer, params, [gradient])
        kernels = [gradient[block]["query"]["kernel"] for block in SHAPES]
        assert dtypes(update) == {jnp.dtype(dtype).name}
        eps = float(jnp.finfo(dtype).eps)
        tolerance = LR * (eps + oracles.rounding(np.geomspace(1, 20, 6), eps=min(eps, 1.2e-7)))
        for block, Q in zip(SHAPES, oracles.joint(kernels, mode=1), strict=True):
            expected = -LR * np.sqrt(QUERY[1] / QUERY[0]) * Q
            chex.assert_trees_all_close(
                np.asarray(update[block]["query"]["kernel"], np.float64), expected, atol=tolerance
            )
        types = jax.tree.map(jax.typeof, optimizer.init(params))
        assert jax.tree.map(jax.typeof, state) == types
        compiled = jax.eval_shape(optimizer.update, gradient, state, params)[1]
        assert jax.tree.map(lambda leaf: leaf.dtype, compiled) == jax.tree.map(
            lambda leaf: leaf.dtype, types
        )


@pytest.mark.parametrize("mu_dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_the_momentum_is_kept_in_mu_dtype_and_updates_are_not(mu_dtype):
    optimizer = scale_by_teon(RULES, mu_dtype=mu_dtype)
    (_, update), state = run(optimizer, gradients=GRADIENTS[:2])
    assert dtypes(state.mu) == {"bfloat16"}
    assert dtypes(update) == {"float32"}
    _, first = run(optimizer, gradients=GRADIENTS[:1])
    # What the next step starts from is the rounded momentum, and no other.
    rounded = optax.tree.cast(optax.tree.cast(first.mu, jnp.bfloat16), jnp.float32)
    chex.assert_trees_all_equal(
        first.mu, optax.tree.cast(optax.tree.scale(0.05, GRADIENTS[0]), jnp.bfloat16)
    )
    wide = scale_by_teon(RULES)
    (expected,), _ = run(wide, gradients=GRADIENTS[1:2], state=first._replace(mu=rounded))
    chex.assert_trees_all_equal(update, expected)


# Flax and Orbax.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm", use_bias=False)(x)
        x = nn.Dense(QUERY[1], use_bias=False, name="query")(x)
        return nn.Dense(UP[1], use_bias=False, name="up")(x)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + Block(name=f"block_{i}")(x)
        return x


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(QUERY[0], use_bias=False, rngs=rngs)
        self.query = nnx.Linear(*QUERY, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(*UP, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.up(self.query(self.norm(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


X = jnp.asarray(np.random.default_rng(20).normal(size=(5, QUERY[0])).astype(np.float32))


def loss(output):
    return jnp.mean((output - jnp.flip(X, 1)) ** 2)


def test_a_linen_train_state_does_the_steps_of_optax():
    model, optimizer = Linen(), teon(LR, weight_decay=0.1)
    params: Any = jax.jit(model.init)(jax.random.key(0), X)["params"]

    def gradient(params):
        return jax.grad(lambda params: loss(model.apply({"params": params}, X)))(params)

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    step = jax.jit(lambda state: state.apply_gradients(grads=gradient(state.params)))
    for _ in range(3):
        state = step(state)
    assert state.step == 3
    direct: Any = trained(optimizer, params, gradient, 3)
    chex.assert_trees_all_close(state.params, direct, atol=10 * ROUNDING)
    assert loss(model.apply({"params": direct}, X)) < loss(model.apply({"params": params}, X))


@pytest.mark.parametrize("rules", [RULES, None], ids=["rules", "default_rules"])
def test_an_nnx_optimizer_which_shows_other_paths_to_init_and_update_does_the_steps_of_optax(rules):
    optimizer = teon(LR, rules, weight_decay=0.1)
    model = Nnx(nnx.Rngs(0))
    graph, variables = nnx.split(model)
    params = nnx.to_pure_dict(variables)

    def gradient(params):
        def value(params):
            state = nnx.State(jax.tree.map(lambda leaf: leaf, variables))
            nnx.replace_by_pure_dict(state, params)
            return loss(nnx.merge(graph, state)(X))

        return jax.grad(value)(params)

    wrapped = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model, wrapped):
        wrapped.update(model, nnx.grad(lambda model: loss(model(X)))(model))

    for _ in range(3):
        step(model, wrapped)
    direct = trained(optimizer, params, gradient, 3)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), direct, atol=10 * ROUNDING
    )
    momentum = optax.tree.get(wrapped.opt_state.inner_states["teon"], "mu")
    assert len(jax.tree.leaves(momentum)) == 4


@pytest.mark.parametrize(
    "others",
    [
        {"rules": (Rule("kernel"),)},
        {"rules": (Rule(r"(?P<layer>\d+)/(query|up)", stack=2, mode=2),)},
        {"rules": RULES, "method": "jordan"},
    ],
    ids=["stack_1", "mode_2", "method"],
)
def test_a_checkpoint_is_restored_under_other_rules(others, tmp_path):
    _, state = run(teon(LR, RULES), gradients=GRADIENTS[:2])
    other = teon(LR, **others)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(other.init, PARAMS)
        restored = checkpointer.restore(tmp_path / "state", target)
    chex.assert_trees_all_equal(restored, state)
    (update,), _ = run(other, gradients=GRADIENTS[2:], state=restored)
    (expected,), _ = run(other, gradients=GRADIENTS[2:], state=state)
    chex.assert_trees_all_equal(update, expected)
    (unchanged,), _ = run(teon(LR, RULES), gradients=GRADIENTS[2:], state=state)
    assert_differ(update, unchanged)
