"""What benchmarks of updates measure alike: programs when they are made, calls in turns."""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax
from optax import contrib

from teon_optax import Rule

BASE = "optax muon"
SLOW = 20.0  # seconds of a call

Tree = Any
Peer = Callable[[], Any]
Clock = Callable[[], float]


def muon(
    left: Iterable[str], rules: Sequence[Rule], rate: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Makes Optax's Muon of the leaves that rules take, each read along the same axes as by TEON.

    A leaf that holds several matrices side by side (a fused projection) is one matrix to it.

    Args:
        left: Paths of the other leaves, which get its Adam.
        rules: Those of TEON.
        rate: The learning rate.
        weight_decay: Of the matrices.
    """
    left = set(left)

    def of_leaf(path: Any, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in left:
            return None
        rule = next(rule for rule in rules if re.search(rule.pattern, name))
        matrix = (axis for axis in range(len(leaf.shape)) if axis != rule.layer_axis)
        return rule.dims or contrib.MuonDimensionNumbers(*matrix)

    def dimensions(params: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(of_leaf, params)

    return contrib.muon(rate, weight_decay=weight_decay, muon_weight_dimension_numbers=dimensions)


def compile_update(
    optimizer: optax.GradientTransformation, shapes: Tree, clock: Clock = time.perf_counter
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """Traces and compiles an update of a tree of shapes, from nothing.

    Returns:
        The program, and its figures: lines, temporary bytes, seconds of tracing and compiling.
    """
    jax.clear_caches()
    state = jax.eval_shape(optimizer.init, shapes)
    start = clock()
    lowered = jax.jit(optimizer.update).lower(shapes, state, shapes)
    traced = clock()
    compiled = lowered.compile()
    done = clock()
    memory = compiled.memory_analysis()
    return compiled, {
        "hlo_lines": _lines(compiled.as_text() or ""),
        "temp_bytes": memory.temp_size_in_bytes if memory else math.nan,
        "compile": done - traced,
        "trace": traced - start,
    }


def _lines(text: str) -> int:
    """Counts lines of the computations, without the tables of source locations before them."""
    lines = text.splitlines()
    starts = (n for n, line in enumerate(lines) if line.startswith(("%", "ENTRY")))
    return len(lines) - next(starts, 0)


def compile_updates(
    optimizers: Mapping[str, optax.GradientTransformation],
    shapes: Tree,
    repetitions: int,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, jax.stages.Compiled], dict[str, dict[str, float]]]:
    """Compiles every optimizer's update in turns; of its figures the least counts."""
    compiled: dict[str, jax.stages.Compiled] = {}
    figures: dict[str, dict[str, float]] = {name: {} for name in optimizers}
    for _ in range(repetitions):
        for name, optimizer in optimizers.items():
            compiled[name], found = compile_update(optimizer, shapes, clock)
            for figure, value in found.items():
                figures[name][figure] = min(figures[name].get(figure, math.inf), value)
    return compiled, figures


def time_in_turns(
    peers: Mapping[str, Peer], turns: int, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Times every call, all peers in turn, so that a busy machine is busy for all of them.

    The first turn warms caches up and does not count, except for a peer that is too slow to be
    called again: `torch.optim.Muon` on a CPU without bfloat16 products.

    Args:
        peers: What to call.
        turns: Calls of each that count, or more of them, until
        at_least: so many seconds have passed.
    """
    first = {name: seconds(peer) for name, peer in peers.items()}
    taken = {name: [own] if own > SLOW else [] for name, own in first.items()}
    end = time.perf_counter() + at_least
    done = 0
    while done < turns or time.perf_counter() < end:
        for name, peer in peers.items():
            if first[name] <= SLOW:
                taken[name].append(seconds(peer))
        done += 1
    return taken


def seconds(peer: Peer, clock: Clock = time.perf_counter) -> float:
    """Times one call, to the end of what it has started on the device."""
    start = clock()
    jax.block_until_ready(peer())
    return clock() - start


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Compares two peers turn by turn; a slow one has one time, compared with one of the base."""
    return statistics.median(own / other for own, other in zip(times, base, strict=False))
