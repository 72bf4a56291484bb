"""The optimizers that are compared."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from examples.optimizers import CLIP, schedule
from examples.options import ADAM_B1, ADAM_B2
from teon_optax import Rule, orthogonalize, polar_express, scale_by_teon
from teon_optax.contrib import (
    add_cautious_weight_decay,
    add_lookahead,
    normalize_matrices,
    project_to_sphere,
    scale_by_normuon,
    scale_to_param_norm,
)

QKV = r"block_(?P<layer>\d+)/attn/(query|key|value)/"
BLOCKS = r"block_(?P<layer>\d+)/"
STACK_1 = (Rule(BLOCKS),)
TEON_1 = (Rule(QKV, 2), *STACK_1)
TEON_2 = (Rule(QKV, 2, mode=2), *STACK_1)
PER_HEAD = (Rule(QKV, split=2), *STACK_1)  # of the models `small` and `medium`
WEIGHT_DECAY = 0.1
BETA = 0.95

OfRules = Callable[[tuple[Rule, ...]], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Describes one optimizer of the blocks' matrices, without its learning rate.

    Attributes:
        name: What its records say.
        title: What tables and figures say.
        of_matrices: The library: `optax.contrib.muon`, `optax.adamw`, or ours.
        rules: Ours: which matrices are orthogonalized jointly.
        method: Ours: what approximates the polar factor.
        scale: Ours: how long an update is.
        qkv_factor: Ours: multiplies the updates of query, key and value projections.
        before: Ours: from the rules to what stands between momentum and `orthogonalize`.
        behind: Ours: from the rules to what stands behind `orthogonalize`.
        decay: Ours: from the coefficient to weight decay.
        last: Ours: from rules and number of steps to what stands behind the learning rate.
        first_rates: The sweep's first k, where the learning rate is 0.01 * 2^(k / 2).
        base: A configuration whose best learning rate is taken over, instead of a sweep.
    """

    name: str
    title: str
    of_matrices: Literal["muon", "adamw", "teon_optax"] = "teon_optax"
    rules: tuple[Rule, ...] = STACK_1
    method: Any = "polar_express"
    scale: Literal["spectral", "muon"] = "spectral"
    qkv_factor: float = 1.0
    before: OfRules | None = None
    behind: OfRules | None = None
    decay: Callable[[float], optax.GradientTransformation] = optax.add_decayed_weights
    last: Callable[[tuple[Rule, ...], int], optax.GradientTransformation] | None = None
    first_rates: tuple[int, ...] = (2, 0, 4)
    base: str | None = None


MUON_SCALE = "-muon-scale"
MUON = Configuration("muon", "Muon (optax.contrib.muon)", "muon")
ADAMW = Configuration("adamw", "AdamW", "adamw", first_rates=(-3, -5, -1))
# What the headline has beside these two.
STACKED = [
    Configuration("stack-1", "Muon (teon_optax, stack 1)", rules=STACK_1),
    Configuration("teon-1", "TEON mode 1", rules=TEON_1),
    Configuration("teon-2", "TEON mode 2", rules=TEON_2),
]


def _part(name: str, title: str, base: str, **settings: Any) -> Configuration:
    """Changes one thing of a base, and takes over its learning rate."""
    own = next(each for each in STACKED if each.name == base)
    return dataclasses.replace(own, name=name, title=title, base=base, **settings)


PARTS = [
    _part("stack-1-schatten", "stack 1, schatten", "stack-1", method="schatten"),
    _part("teon-1-schatten", "mode 1, schatten", "teon-1", method="schatten"),
    _part("stack-1-short", "stack 1, Q K V / sqrt 2", "stack-1", qkv_factor=math.sqrt(0.5)),
    _part("teon-1-long", "mode 1, Q K V x sqrt 2", "teon-1", qkv_factor=math.sqrt(2)),
    _part("teon-1-reach", "mode 1, 7 steps", "teon-1", method=polar_express(7, 1e-4)),
    _part("teon-1-svd", "mode 1, exact", "teon-1", method="svd"),
    _part("teon-1-k4", "mode 1, K = 4", "teon-1", rules=(Rule(QKV, 4), *STACK_1)),
    _part("teon-1-all", "mode 1, all matrices", "teon-1", rules=(Rule(BLOCKS, 2),)),
]


def _ahead(_: tuple[Rule, ...], steps: int) -> optax.GradientTransformation:
    """Looks ahead by .6 times the rate over its maximum, not in the first and last fifth."""
    shape, fifth = schedule(1.0, steps), steps // 5

    def step_size(count: Any) -> Any:
        inside = (count >= fifth) & (count < steps - fifth)
        return jnp.where(inside, 0.6 * shape(count), 0.0)

    return add_lookahead(step_size)


# What is asked of our Muon (stack 1) where differences of a few thousandths can be told.
QUESTIONS = [
    _part("stack-1-fast", "`fast`", "stack-1", method="fast"),
    _part("stack-1-jordan", "`jordan`", "stack-1", method="jordan"),
    _part("stack-1-lookahead", "`add_lookahead` behind", "stack-1", last=_ahead),
    _part("stack-1-normuon", "`scale_by_normuon` behind", "stack-1", behind=scale_by_normuon),
    # MuonEq (arXiv 2603.28254), which normalizes output neurons.
    _part(
        "stack-1-equilibrated",
        "`normalize_matrices` before",
        "stack-1",
        before=lambda rules: normalize_matrices(rules, normalize="row"),
    ),
    # Hyperball takes the place of weight decay.
    _part(
        "stack-1-hyperball",
        "Hyperball",
        "stack-1",
        behind=scale_to_param_norm,
        decay=lambda _: optax.identity(),
        last=lambda rules, _: project_to_sphere(rules),
    ),
    _part("stack-1-cautious", "cautious decay", "stack-1", decay=add_cautious_weight_decay),
    _part("stack-1-per-head", "each head alone", "stack-1", rules=PER_HEAD),
]


def _in_muons_scale(configuration: Configuration) -> Configuration:
    """Puts it into the scale of `optax.contrib.muon`, which is longer for narrowing matrices."""
    return dataclasses.replace(
        configuration,
        name=configuration.name + MUON_SCALE,
        title=f"{configuration.title}, Muon's scale",
        scale="muon",
        base=configuration.base and configuration.base + MUON_SCALE,
    )


_SCALED = [*STACKED, *PARTS, *QUESTIONS]
CONFIGURATIONS = {
    each.name: each for each in [MUON, *_SCALED, *map(_in_muons_scale, _SCALED), ADAMW]
}

# The questions' names, in groups; those of the first group are answered first.
ASKED = tuple(
    tuple(name if name == "muon" else name + MUON_SCALE for name in group)
    for group in (
        ("stack-1-fast",),
        ("stack-1-schatten",),
        ("teon-1", "stack-1-jordan", "muon"),
        tuple(f"stack-1-{name}" for name in ("lookahead", "normuon", "equilibrated", "hyperball")),
        tuple(f"stack-1-{name}" for name in ("cautious", "per-head")),
    )
)


def build(
    configuration: Configuration,
    steps: int,
    rate: jax.Array | float,
    rest_rate: jax.Array | float,
) -> optax.GradientTransformation:
    """Builds the optimizer; both peak learning rates may be traced.

    Args:
        configuration: Which.
        steps: Length of the schedule.
        rate: Peak learning rate of the blocks' matrices.
        rest_rate: Peak learning rate of embedding and norms, which AdamW keeps.

    Returns:
        Clipping, then two optimizers for the two parts of the tree.
    """
    rest = optax.adamw(_schedule(rest_rate, steps), ADAM_B1, ADAM_B2, weight_decay=0.0)
    matrices = _of_matrices(configuration, _schedule(rate, steps), steps)
    parts = optax.partition({"matrices": matrices, "rest": rest}, _parts)
    return optax.chain(optax.clip_by_global_norm(CLIP), parts)


def _of_matrices(
    configuration: Configuration, rate: Any, steps: int
) -> optax.GradientTransformation:
    if configuration.of_matrices == "muon":
        return contrib.muon(rate, beta=BETA, weight_decay=WEIGHT_DECAY)
    if configuration.of_matrices == "adamw":
        return optax.adamw(rate, ADAM_B1, ADAM_B2, weight_decay=WEIGHT_DECAY)
    rules = configuration.rules
    settings: Any = {"method": configuration.method, "scale": configuration.scale}
    if configuration.before is None:
        chained = [scale_by_teon(rules, beta=BETA, **settings)]
    else:
        # Without rules it is the momentum alone.
        momentum = scale_by_teon((), beta=BETA)
        chained = [momentum, configuration.before(rules), orthogonalize(rules, **settings)]
    if configuration.behind is not None:
        chained.append(configuration.behind(rules))
    chained += [
        optax.masked(optax.scale(configuration.qkv_factor), _qkv),
        configuration.decay(WEIGHT_DECAY),
        optax.scale_by_learning_rate(rate),
    ]
    if configuration.last is not None:
        chained.append(configuration.last(rules, steps))
    return optax.chain(*chained)


def _schedule(peak: Any, steps: int) -> Any:
    return schedule(peak, steps)


def _parts(params: Any) -> Any:
    def part(path: Any, leaf: jax.Array) -> str:
        inside = _path(path).startswith("block_") and leaf.ndim == 2
        return "matrices" if inside else "rest"

    return jax.tree_util.tree_map_with_path(part, params)


def _qkv(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _path(path).split("/")[-2] in ("query", "key", "value"), params
    )


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
