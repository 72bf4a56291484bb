"""The optimizers that `reproduce` compares, in the order in which they are run."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import optax

from examples.optimizers import CLIP, schedule
from examples.options import ADAM_B1, ADAM_B2
from teon_optax import Rule, contrib, scale_by_teon

QKV = r"block_(?P<layer>\d+)/attn/(query|key|value)/"
SIBLINGS = r"block_(?P<layer>\d+)/attn/(?P<slice>query|key|value)/"
BLOCKS = r"block_(?P<layer>\d+)/"
HEADS = 4  # of the default model
ALL_LAYERS = 10**6
HEADLINE_SEEDS = (1, 2, 3, 4, 5)
FEW_SEEDS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One optimizer, without its learning rate.

    Attributes:
        name: Also of its file of results.
        coupling: The rule of query, key and value projections, or of all matrices of the blocks;
            what it does not take is Muon's. None is AdamW for everything.
        method: What approximates the polar factor.
        after: What follows it: "normalize", "normuon" or "cautious" weight decay.
        transform: Along the stack of the matrices that `coupling` couples, instead of mode 1.
        qkv_factor: Multiplies the updates of Q, K and V.
        rest_rate: Learning rate of what AdamW keeps: embedding and norms. None: that of the rest.
        weight_decay: Of the blocks' matrices.
        start: First values of k in the sweep over learning rates 0.01 * 2^(k / 2).
        spacing: How near to the best, in k, its neighbours must be.
        seeds: What runs at the best rate.
        base: A configuration whose best rate is taken over, instead of a sweep.
    """

    name: str
    coupling: Rule | None
    method: str = "polar_express"
    after: str | None = None
    transform: str | None = None
    qkv_factor: float = 1.0
    rest_rate: float | None = 0.01
    weight_decay: float = 0.1
    start: tuple[int, ...] = (-1, 0, 1, 2)
    spacing: int = 1
    seeds: tuple[int, ...] = HEADLINE_SEEDS
    base: str | None = None

    @property
    def headline(self) -> bool:
        """Whether it gets all seeds."""
        return len(self.seeds) > len(FEW_SEEDS)


def _ablation(name: str, coupling: Rule) -> Configuration:
    return Configuration(name, coupling, start=(-1, 1), spacing=2, seeds=FEW_SEEDS)


def _coupling(
    name: str, coupling: Rule, length: float = 1.0, transform: str | None = None
) -> Configuration:
    """With updates of Q, K and V as long as Muon's: `length` is what these are longer by."""
    return Configuration(name, coupling, transform=transform, qkv_factor=length, start=(-1,))


def _variation(name: str, base: Configuration, **settings: Any) -> Configuration:
    """The base at its best learning rate with one setting changed."""
    return dataclasses.replace(base, name=name, base=base.name, seeds=FEW_SEEDS, **settings)


MUON = Configuration("muon", Rule(QKV))
TEON = Configuration("teon-1", Rule(QKV, 2))
_ALL: Iterable[Configuration] = (
    MUON,
    TEON,
    Configuration("teon-2", Rule(QKV, 2, mode=2)),
    Configuration("muon-schatten", Rule(QKV), method="schatten"),
    Configuration("teon-1-schatten", Rule(QKV, 2), method="schatten"),
    Configuration("teon-2-schatten", Rule(QKV, 2, mode=2), method="schatten"),
    # As long as TEON's, were both exact: a joint factor of K layers is sqrt(K) times shorter.
    Configuration("muon-short-qkv", Rule(QKV), qkv_factor=1 / math.sqrt(2)),
    Configuration("adamw", None, start=(-5, -3)),
    _ablation("teon-1-k4", Rule(QKV, 4)),
    _ablation("teon-1-all-layers", Rule(QKV, ALL_LAYERS)),
    _ablation("teon-3", Rule(QKV, 2, mode=3)),
    _ablation("teon-1-everything", Rule(BLOCKS, 2)),
    _variation("muon-jordan", MUON, method="jordan"),
    _variation("teon-1-jordan", TEON, method="jordan"),
    _variation("muon-you", MUON, method="you"),
    _variation("teon-1-you", TEON, method="you"),
    _variation("muon-no-decay", MUON, weight_decay=0.0),
    _variation("muon-rest-high", MUON, rest_rate=0.02),
    _variation("muon-rest-low", MUON, rest_rate=0.005),
    _variation("teon-1-svd", TEON, method="svd"),
    _variation("muon-svd", MUON, method="svd"),
    _variation("teon-1-no-decay", TEON, weight_decay=0.0),
    # What AdamW is without a rate of its own for embedding and norms.
    Configuration("adamw-one-rate", None, rest_rate=None, start=(-5, -3), seeds=FEW_SEEDS),
    _coupling("siblings-1", Rule(SIBLINGS), math.sqrt(3)),
    _coupling("layers-dct", Rule(QKV, 2), transform="dct"),
    _coupling("heads-alone", Rule(QKV, split=HEADS), math.sqrt(HEADS)),
    dataclasses.replace(MUON, name="muon-normalize", after="normalize", start=(-1,)),
    dataclasses.replace(MUON, name="muon-normuon", after="normuon", start=(-1,)),
    dataclasses.replace(MUON, name="muon-cautious", after="cautious", start=(-1,)),
    _coupling("layers-1", Rule(QKV, 2), math.sqrt(2)),
    _coupling("siblings-dct", Rule(SIBLINGS), transform="dct"),
    _coupling("heads-1", Rule(QKV, split=HEADS, join="parts"), HEADS),
    _coupling("heads-dct", Rule(QKV, split=HEADS, join="parts"), math.sqrt(HEADS), "dct"),
    _coupling("layers-siblings-1", Rule(SIBLINGS, 2), math.sqrt(6)),
    _coupling("siblings-heads-1", Rule(SIBLINGS, split=HEADS, join="parts"), HEADS * math.sqrt(3)),
    _coupling("layers-dct-4", Rule(QKV, 4), transform="dct"),
    _coupling("layers-dft-4", Rule(QKV, 4), transform="dft"),
    _coupling("layers-haar-4", Rule(QKV, 4), transform="haar"),
    _coupling("siblings-2", Rule(SIBLINGS, mode=2), math.sqrt(3)),
    dataclasses.replace(TEON, name="teon-1-normalize", after="normalize", start=(-1,)),
    dataclasses.replace(TEON, name="teon-1-normuon", after="normuon", start=(-1,)),
    dataclasses.replace(TEON, name="teon-1-cautious", after="cautious", start=(-1,)),
)
CONFIGURATIONS = {configuration.name: configuration for configuration in _ALL}


def build(
    configuration: Configuration,
    steps: int,
    rate: jax.Array | float,
    rest_rate: jax.Array | float,
    weight_decay: jax.Array | float,
) -> optax.GradientTransformation:
    """The optimizer; the three numbers may be traced.

    Args:
        configuration: Which.
        steps: Length of the schedule.
        rate: Peak learning rate of the blocks' matrices.
        rest_rate: Peak learning rate of embedding and norms.
        weight_decay: Of the blocks' matrices.

    Returns:
        Clipping, then two optimizers for the two parts of the tree.
    """
    of_matrices: Any = schedule(rate, steps)  # pyright: ignore[reportArgumentType]
    of_rest: Any = schedule(rest_rate, steps)  # pyright: ignore[reportArgumentType]
    cautious = configuration.after == "cautious"
    decay = contrib.add_cautious_weight_decay if cautious else optax.add_decayed_weights
    matrices = optax.chain(
        _direction(configuration),
        decay(weight_decay),
        optax.scale_by_learning_rate(of_matrices),
    )
    rest = optax.adamw(of_rest, ADAM_B1, ADAM_B2, weight_decay=0.0)
    parts = optax.partition({"matrices": matrices, "rest": rest}, _parts)
    return optax.chain(optax.clip_by_global_norm(CLIP), parts)


def _direction(configuration: Configuration) -> optax.GradientTransformation:
    if configuration.coupling is None:
        return optax.scale_by_adam(ADAM_B1, ADAM_B2)
    rules = configuration.coupling, Rule(BLOCKS)
    method, transform = configuration.method, configuration.transform
    if transform is None:
        steps = [scale_by_teon(rules, method=method)]
    else:  # The same momentum, since rules that take nothing orthogonalize nothing.
        steps = [scale_by_teon(()), contrib.orthogonalize_slices(rules, transform, method=method)]
    if configuration.qkv_factor != 1.0:
        steps.append(optax.masked(optax.scale(configuration.qkv_factor), _qkv))
    if configuration.after == "normalize":
        steps.append(contrib.normalize_matrices(rules))
    if configuration.after == "normuon":
        steps.append(contrib.scale_by_normuon(rules))
    return optax.chain(*steps)


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
