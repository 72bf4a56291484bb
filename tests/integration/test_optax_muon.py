"""Rules of stack 1 are Muon: `optax.contrib.muon` and `scale_by_muon`, step for step."""

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, orthogonalize, teon

MUON: dict[str, Any] = {"method": "jordan", "scale": "muon"}
STEPS = 20
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, STEPS)


def relative_error(result, expected):
    return np.linalg.norm(result - expected) / np.linalg.norm(expected)


def params():
    rng = np.random.default_rng(0)
    shapes = {"up": (24, 40), "down": (40, 24), "square": (24, 24), "bias": (40,)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def loss(params, x, y):
    """Gradients depend on params, so that errors of a step reach all later ones."""
    hidden = jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]
    return jnp.mean((hidden @ params["square"] - y) ** 2)


def trajectory(optimizer):
    """The updates of every step."""
    rng = np.random.default_rng(1)
    tree = params()
    state = optimizer.init(tree)

    @jax.jit
    def step(tree, state, batch):
        updates, state = optimizer.update(jax.grad(loss)(tree, *batch), state, tree)
        return optax.apply_updates(tree, updates), state, updates

    all_updates = []
    for _ in range(STEPS):
        batch = rng.normal(size=(2, 8, 24)).astype(np.float32)
        tree, state, updates = step(tree, state, tuple(batch))
        all_updates.append(jax.tree.map(np.asarray, updates))
    return all_updates


@functools.cache
def trajectories(nesterov):
    muon = optax.contrib.muon(
        SCHEDULE,
        weight_decay=0.1,
        nesterov=nesterov,
        adam_b2=0.95,
        adam_weight_decay=0.1,
    )
    # `nesterov` of Optax's Muon is also its AdamW's.
    adamw = optax.adamw(SCHEDULE, 0.9, 0.95, weight_decay=0.1, nesterov=nesterov)
    ours = teon(
        SCHEDULE,
        [Rule("up|down|square")],
        weight_decay=0.1,
        nesterov=nesterov,
        fallback=adamw,
        **MUON,
    )
    return trajectory(ours), trajectory(muon)


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("name", ["up", "down", "square", "bias"])
def test_updates_agree_over_20_steps_with_weight_decay_and_a_schedule(name, nesterov):
    ours, muon = trajectories(nesterov)
    # The schedule starts at zero: so do the updates of both.
    assert not ours[0][name].any() and not muon[0][name].any()
    errors = [relative_error(a[name], b[name]) for a, b in zip(ours[1:], muon[1:], strict=True)]
    assert max(errors) < 1e-3


def test_with_and_without_nesterov_are_not_the_same_trajectory():
    """Else the test above would not see which of them ours is."""
    (one, _), (other, _) = trajectories(True), trajectories(False)
    assert relative_error(one[1]["up"], other[1]["up"]) > 1e-2


STACKED = {1: MuonDimensionNumbers((0, 1), 2), 2: MuonDimensionNumbers(1, (0, 2))}


def update_of(transform, gradient):
    return np.asarray(jax.jit(transform.update)(gradient, transform.init(gradient))[0])


@pytest.mark.parametrize("shape", [(3, 10, 6), (3, 6, 10)], ids=str)
def test_modes_1_and_2_are_muon_of_the_layers_stacked_along_fan_in_or_fan_out(shape):
    gradient = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    muon, ours = {}, {}
    for mode, dims in STACKED.items():
        transform = optax.contrib.scale_by_muon(
            beta=0.0, nesterov=False, weight_dimension_numbers=dims
        )
        muon[mode] = update_of(transform, gradient)
        rule = Rule("", stack=3, mode=mode, layer_axis=0)
        # Muon's scale is that of one layer.
        fan_in, fan_out = shape[1:]
        scale = np.sqrt(max(1, fan_out / fan_in))
        ours[mode] = update_of(orthogonalize([rule], **MUON), gradient) / scale
    assert relative_error(ours[1], muon[1]) < 1e-3
    assert relative_error(ours[2], muon[2]) < 1e-3
    # Joined along the other axis it would be another update.
    assert relative_error(ours[1], muon[2]) > 0.1
    assert relative_error(ours[2], muon[1]) > 0.1


def test_dims_and_batch_axes_are_those_of_muon():
    """Experts, each alone, with heads: the leaf (experts, in, heads, size)."""
    gradient = jnp.asarray(np.random.default_rng(3).normal(size=(3, 10, 2, 4)), jnp.float32)
    dims = MuonDimensionNumbers(1, (2, 3))
    muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=dims)
    ours = orthogonalize([Rule("", dims=dims)], **MUON)
    assert relative_error(update_of(ours, gradient), update_of(muon, gradient)) < 1e-3


PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"


def arguments():
    """The rows of the page's table: argument, of muon, of teon (empty where there is none)."""
    table = PAGE.read_text("utf-8").split("<!-- arguments -->")[1].split("<!-- end -->")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*?)\|(.*?)\|.*\|$", table, re.M)
    return [(name, muon.strip().strip("`"), ours.strip().strip("`")) for name, muon, ours in rows]


def adam(learning_rate=0.02, **changed):
    return optax.adamw(learning_rate, **{"weight_decay": 0.0, "nesterov": True} | changed)


def called(function, text, **defaults):
    names = {"adam": adam, "Rule": Rule, "MuonDimensionNumbers": MuonDimensionNumbers}
    return function(**{"learning_rate": 0.02} | defaults | eval(f"dict({text})", names))


def updates_of(optimizer, compiler=lambda update: update):
    """Of three steps; matrices have large gradients, so that muon's `eps` is AdamW's alone."""
    rng = np.random.default_rng(4)
    shapes = {"up": (6, 10), "down": (10, 6), "bias": (10,)}
    tree = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    state, updates, step = optimizer.init(tree), [], compiler(optimizer.update)
    for _ in range(3):
        gradient = {
            name: jnp.asarray(100 ** (len(shape) - 1) * rng.normal(size=shape), jnp.float32)
            for name, shape in shapes.items()
        }
        update, state = step(gradient, state, tree)
        tree = optax.apply_updates(tree, update)
        updates.append(update)
    return updates


def difference(some, others):
    pairs = zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


@functools.cache
def unchanged():
    return updates_of(optax.contrib.muon(0.02), jax.jit)


def test_the_page_maps_every_argument_of_muon():
    assert [name for name, _, _ in arguments()] == list(
        inspect.signature(optax.contrib.muon).parameters
    )


@pytest.mark.parametrize(
    ("muon", "ours"), [row[1:] for row in arguments() if row[2]], ids=lambda text: text[:30]
)
def test_each_argument_of_muon_does_what_the_page_says_it_becomes(muon, ours):
    # Muon compiles its loops at every eager call, ours once for all rows.
    theirs = updates_of(called(optax.contrib.muon, muon), jax.jit)
    base = {"rules": [Rule("")], "fallback": adam(), **MUON}
    # Rounded to bfloat16, the momentum differs where float32 was rounded in another order.
    tolerance = 1e-2 if "bfloat16" in muon else 1e-4
    assert difference(updates_of(called(teon, ours, **base)), theirs) < tolerance
    # Else the argument might do nothing here.
    assert difference(unchanged(), theirs) > 10 * tolerance or "bfloat16" in muon
