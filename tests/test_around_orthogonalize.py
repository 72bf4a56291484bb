"""Every chain of docs/around_orthogonalize.md against its formula in float64."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from teon_optax import Rule

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "around_orthogonalize.md"
STEPS = 6


def chains():
    """(heading, program) of each block of the page that defines a chain."""
    for section in re.split(r"^#+ ", PAGE.read_text("utf-8"), flags=re.M)[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
        for count, code in enumerate(code for code in blocks if "def chain(rules)" in code):
            heading = section.splitlines()[0]
            yield f"{heading}, {count}" if count else heading, code


CHAINS = dict(chains())


def momentum(gradient, memory):
    """Nesterov's, as `optax.trace(0.95, nesterov=True)` has it."""
    memory["trace"] = gradient + 0.95 * memory.get("trace", 0)
    return gradient + 0.95 * memory["trace"]


def factor(M):
    """The polar factor of a kernel (fan_in, fan_out), as long as "spectral" makes it."""
    return np.sqrt(M.shape[1] / M.shape[0]) * oracles.reshaped_spectrum(M)


def normalized(M, axis):
    return M / np.linalg.norm(M, axis=axis, keepdims=True)


def muon(count, gradient, W, memory, names):
    return W - 0.01 * (factor(momentum(gradient, memory)) + 0.1 * W)


def lion(count, gradient, W, memory, names):
    mean = memory.get("mean", 0)
    memory["mean"] = 0.99 * mean + 0.01 * gradient
    return W - 0.01 * factor(0.9 * mean + 0.1 * gradient)


def muon_eq(count, gradient, W, memory, names):
    # A row of (fan_out, fan_in) is a column of a kernel.
    return W - 0.01 * factor(normalized(momentum(gradient, memory), 0))


def in_8_bits(count, gradient, W, memory, names):
    update = momentum(gradient, memory)
    kept = names["state"][0].trace[memory["key"]]
    assert kept.qvalue.dtype == "int8" and kept.qvalue.shape == W.shape
    # 255 steps from -128 to 127 for what each row needs.
    step = np.abs(memory["trace"]).max(1, keepdims=True) / 127.5
    whole = np.float64(names["qwix"].dequantize(kept))
    assert np.all(np.abs(whole - memory["trace"]) <= step / 2 + 1e-6)
    memory["trace"] = whole
    return W - 0.01 * factor(update)


def muon_plus(count, gradient, W, memory, names):
    polar = normalized(normalized(oracles.reshaped_spectrum(momentum(gradient, memory)), 1), 0)
    return W - 0.01 * np.sqrt(W.shape[1] / W.shape[0]) * polar


def normuon(count, gradient, W, memory, names):
    polar = factor(momentum(gradient, memory))
    square = np.mean(polar**2, axis=0, keepdims=True)
    memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * square
    N = polar / np.sqrt(memory["v"])
    return W - 0.01 * 0.2 * np.sqrt(N.size) * N / np.linalg.norm(N)


def ema_nesterov(count, gradient, W, memory, names):
    x, mean = memory.get("x", W), memory.get("mean", 0)
    new = W - names["rate"](count) * factor(momentum(gradient, memory))
    memory["x"], memory["mean"] = new, 0.99 * mean + 0.01 * (new - x)
    return new + names["ahead"](count + 1) * memory["mean"]


def hyperball(count, gradient, W, memory, names):
    R, polar = np.linalg.norm(W), factor(momentum(gradient, memory))
    moved = W - 0.01 * R * polar / np.linalg.norm(polar)
    return R * moved / np.linalg.norm(moved)


def decay_by_the_square_of_the_rate(count, gradient, W, memory, names):
    rate = float(names["rate"](count))
    return W - rate * factor(momentum(gradient, memory)) - 0.1 * rate**2 / 0.01 * W


def decay_without_the_rate(count, gradient, W, memory, names):
    return W - 0.01 * factor(momentum(gradient, memory)) - 0.001 * W


def cautious(count, gradient, W, memory, names):
    polar = factor(momentum(gradient, memory))
    return W - 0.01 * (polar + 0.1 * (polar * W >= 0) * W)


FORMULAS = {
    "Around `orthogonalize`": muon,
    "Before: Lion's momentum": lion,
    "Before: equal rows (MuonEq)": muon_eq,
    "Before: momentum in 8 bits": in_8_bits,
    "Behind: equal columns and rows (Muon+)": muon_plus,
    "Behind: a second moment for each neuron (NorMuon)": normuon,
    "Behind: lookahead (EMA-Nesterov)": ema_nesterov,
    "Behind: norms that stay (Hyperball)": hyperball,
    "Decay: tied to the rate, and not": decay_by_the_square_of_the_rate,
    "Decay: tied to the rate, and not, 1": decay_without_the_rate,
    "Decay: tied to the rate, and not, 2": cautious,
}


def test_every_chain_of_the_page_has_a_formula():
    assert [*CHAINS] == [*FORMULAS]


@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("name", CHAINS)
def test_six_steps_of_a_chain_are_those_of_its_formula(name):
    code = CHAINS[name]
    if "qwix" in code:
        pytest.importorskip("qwix")
    # Exact factors, and schedules that change within these steps.
    code = code.replace("orthogonalize(rules)", 'orthogonalize(rules, method="svd")')
    code = (
        code.replace("=100,", "=1,")
        .replace("=1000", "=12")
        .replace("(count >= 100)", "(count >= 2)")
    )
    code = code.replace("(count < 900)", "(count < 5)")
    names: dict = {}
    exec(compile(code, PAGE, "exec"), names)
    rng = np.random.default_rng(0)
    kernels = {"up": rng.normal(size=(4, 7)), "down": rng.normal(size=(7, 4))}
    gradients = [
        {key: rng.normal(size=W.shape) for key, W in kernels.items()} for _ in range(STEPS)
    ]
    optimizer = names["chain"]([Rule("up|down")])
    params: Any = jax.tree.map(jnp.float32, kernels)
    state = optimizer.init(params)
    memories: dict = {key: {"key": key} for key in kernels}
    for count, of_step in enumerate(gradients):
        updates, state = optimizer.update(jax.tree.map(jnp.float32, of_step), state, params)
        params = optax.apply_updates(params, updates)
        names["state"] = state
        kernels = {
            key: FORMULAS[name](count, of_step[key], W, memories[key], names)
            for key, W in kernels.items()
        }
        for key, W in kernels.items():
            np.testing.assert_allclose(params[key], W, atol=2e-5)
