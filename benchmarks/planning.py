"""What plans cost in Python: the first and the second trace of an update, and an eager one.

    python -m benchmarks.planning
    python -m benchmarks.planning --before OTHER.json   # beside another version's figures

A GPT of each depth with six matrices and two norms a block, of width 16, so that time goes into
Python and not into products. The library is called as users call it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import optax

import teon_optax
from benchmarks import results

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

WIDTH = 16
FIGURES = {
    "rules_first": "default rules, first",
    "rules_again": "again",
    "plan_first": "plan, first",
    "plan_again": "again",
    "trace_first": "trace of update, first",
    "trace_again": "again",
    "eager": "eager update",
    "eager_muon": "optax muon's",
    "many_rules": "plan by a rule a leaf",
}


def parameters(depth: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A GPT of so many blocks."""
    square, up = jnp.ones((WIDTH, WIDTH), dtype), jnp.ones((WIDTH, 4 * WIDTH), dtype)

    def block() -> dict[str, Any]:
        names = ("query", "key", "value", "out")
        return {
            "attn": {name: {"kernel": square} for name in names},
            "mlp": {"up": {"kernel": up}, "down": {"kernel": up.T}},
            "norm_1": {"scale": jnp.ones(WIDTH, dtype)},
            "norm_2": {"scale": jnp.ones(WIDTH, dtype)},
        }

    blocks = {f"block_{i}": block() for i in range(depth)}
    return blocks | {"embed": {"embedding": jnp.ones((256, WIDTH), dtype)}}


def seconds(function: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def measured(depth: int, repetitions: int) -> dict[str, float]:
    """Seconds by figure. Every figure that says "again" is a median."""
    params = parameters(depth)
    optimizer = teon_optax.teon(0.02)
    muon = optax.contrib.muon(0.02)
    state, muon_state = optimizer.init(parameters(depth, jnp.bfloat16)), muon.init(params)
    rule_per_leaf = [
        teon_optax.Rule(f"^block_{i}/attn/{name}/kernel$")
        for i in range(depth)
        for name in ("query", "key", "value", "out")
    ]

    def trace() -> Any:
        # A new function, so that jax has not traced it before.
        return jax.make_jaxpr(lambda *arguments: optimizer.update(*arguments))(
            params, optimizer.init(params), params
        )

    def again(function: Callable[[], Any]) -> float:
        return statistics.median(seconds(function) for _ in range(repetitions))

    found = {
        "rules_first": seconds(lambda: teon_optax.default_rules(params)),
        "rules_again": again(lambda: teon_optax.default_rules(params)),
        "plan_first": seconds(lambda: teon_optax.plan(params)),
        "plan_again": again(lambda: teon_optax.plan(params)),
        "trace_first": seconds(trace),
        "trace_again": again(trace),
        "many_rules": seconds(lambda: teon_optax.plan(params, rule_per_leaf)),
    }
    state = optimizer.init(params)
    optimizer.update(params, state, params)
    muon.update(params, muon_state, params)
    return found | {
        "eager": again(lambda: optimizer.update(params, state, params)),
        "eager_muon": again(lambda: muon.update(params, muon_state, params)),
    }


def table(record: dict[str, Any], before: dict[str, Any] | None) -> str:
    """A row for each depth and version: milliseconds."""
    versions = {"after": record} if before is None else {"before": before, "after": record}
    rows = []
    for depth in record["depths"]:
        for name, version in versions.items():
            figures = version["depths"].get(depth)
            if figures:
                label = f"{depth} blocks" + (f", {name}" if before else "")
                rows.append([label, *(f"{1e3 * figures[key]:,.1f}" for key in FIGURES)])
    header = ["milliseconds", *FIGURES.values()]
    captions = "\n\n".join(
        (f"{name}: " if before else "") + results.caption(version)
        for name, version in versions.items()
    )
    return f"{results.markdown(header, rows)}\n\n{captions}"


def plot(record: dict[str, Any], before: dict[str, Any] | None) -> Any:
    """Time of the second trace and of an eager update by depth."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for version, style in ((before, ":"), (record, "-")):
        for key, color in (("trace_again", "C0"), ("eager", "C1"), ("eager_muon", "C2")):
            if version is not None:
                depths = [int(depth) for depth in version["depths"]]
                values = [figures[key] for figures in version["depths"].values()]
                name = {"trace_again": "second trace", "eager": "eager update"}.get(key, "muon's")
                label = f"{name}{', before' if style == ':' else ''}"
                axes.plot(depths, values, style, color=color, marker="o", label=label)
    axes.set(xlabel="blocks", ylabel="seconds", xscale="log", yscale="log")
    axes.legend()
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Measures, and writes JSON, table and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--depths", default="12,24,48,96")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--before", type=Path, help="the JSON file of another version")
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    parser.add_argument("--update-readme", action="store_true")
    options = parser.parse_args(arguments)
    before = json.loads(options.before.read_text()) if options.before else None
    # Compiles what eager operations share, which is no part of planning.
    measured(2, 1)
    depths = {
        depth: measured(int(depth), options.repetitions) for depth in options.depths.split(",")
    }
    record = {"environment": results.environment(), "depths": depths}
    page = table(record, before)
    results.write(options.out, "planning", record, page, plot(record, before))
    if options.update_readme:
        results.update_readme("planning", page)


if __name__ == "__main__":
    main()
