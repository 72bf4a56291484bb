"""How leaves may hold the matrices that a rule couples: queries, keys and values of some layers."""

import itertools
import math

import numpy as np
from optax.contrib import MuonDimensionNumbers as D

from teon_optax import Rule

NAMES = ("query", "key", "value")
LAYERS, HEADS, FAN_IN, HEAD = 3, 2, 12, 8
FAN_OUT = HEADS * HEAD


def gaussian(seed=0, layers=LAYERS):
    """[layer, name, head, fan_in, head's fan_out]."""
    shape = layers, len(NAMES), HEADS, FAN_IN, HEAD
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole(T):
    """Heads side by side: [..., fan_in, fan_out] of [..., head, fan_in, head's fan_out]."""
    return np.moveaxis(T, -3, -2).reshape(*T.shape[:-3], FAN_IN, -1)


def named(T, function):
    return {
        f"block_{9 + i}": {name: function(T[i, n]) for n, name in enumerate(NAMES)}
        for i in range(len(T))
    }


def kernels(T):
    return named(T, whole)


def multi_head(T):
    return named(T, lambda heads: np.moveaxis(heads, 0, 1))


def scanned(T):
    return {name: whole(T[:, n]) for n, name in enumerate(NAMES)}


def fused(T):
    return {f"block_{9 + i}": np.concatenate(list(whole(T[i])), axis=1) for i in range(len(T))}


def fused_heads(T):
    return {f"block_{9 + i}": T[i].transpose(2, 0, 1, 3) for i in range(len(T))}


def scanned_fused(T):
    return {"w": np.stack(list(fused(T).values()), axis=1)}


LAYER, SLICE = r"block_(?P<layer>\d+)", "(?P<slice>query|key|value)"
PER_HEAD, BY_HEADS = D(0, 2), D(0, (1, 3))
# How leaves hold the matrices, the rule, and axes of [layer, name, head, ..] that it couples, the
# first by twos; "." are heads that are alone.
HOLDINGS = {
    "layers": (kernels, Rule(rf"{LAYER}/", 2), ""),
    "siblings": (kernels, Rule(f"{LAYER}/{SLICE}"), "n"),
    "siblings of layers": (kernels, Rule(f"{LAYER}/{SLICE}", 2), "n"),
    "scanned siblings": (scanned, Rule(f"{SLICE}$", 2, layer_axis=0), "n"),
    "parts": (fused, Rule(LAYER, split=3, join="parts"), "n"),
    "scanned parts": (scanned_fused, Rule("w", 2, layer_axis=1, split=3, join="parts"), "n"),
    "heads": (multi_head, Rule(rf"{LAYER}/", dims=PER_HEAD, join="heads"), "h"),
    "heads as parts": (kernels, Rule(f"{LAYER}/", 2, split=HEADS, join="parts"), "h"),
    "heads of siblings": (multi_head, Rule(f"{LAYER}/{SLICE}", 2, 1, PER_HEAD, join="heads"), "nh"),
    "heads of parts": (
        fused_heads,
        Rule(LAYER, 2, dims=BY_HEADS, split=3, join=("parts", "heads")),
        "nh",
    ),
    "parts of heads": (fused_heads, Rule(LAYER, 2, dims=BY_HEADS, split=3, join="parts"), "n."),
    "each head": (multi_head, Rule(f"{LAYER}/", dims=PER_HEAD), "."),
}


def updated(holding, T, function):
    """What leaves hold where a function, in place of each group [K, fan_in, fan_out], is scaled."""
    hold, rule, axes = HOLDINGS[holding]
    matrices = T if set("h.") & set(axes) else whole(T)[:, :, None]
    fan_in, fan_out = matrices.shape[-2:]
    result = np.empty(matrices.shape)
    names = [slice(None)] if "n" in axes else [slice(n, n + 1) for n in range(len(NAMES))]
    heads = [slice(h, h + 1) for h in range(HEADS)] if "." in axes else [slice(None)]
    runs = [slice(start, start + rule.stack) for start in range(0, len(T), rule.stack)]
    for index in itertools.product(runs, names, heads):
        done = function(matrices[index].reshape(-1, fan_in, fan_out))
        result[index] = math.sqrt(fan_out / fan_in) * np.reshape(done, matrices[index].shape)
    if matrices is not T:
        result = np.moveaxis(result[:, :, 0].reshape(*T.shape[:2], FAN_IN, HEADS, HEAD), 3, 2)
    return hold(result)
