"""What plans cost in Python: the first and the second trace of an update, and an eager one.

    python -m benchmarks.planning
    python -m benchmarks.planning --before OTHER.json   # beside another version's figures
    python -m benchmarks.planning --walk                # functions and calls of a second trace

A GPT of each depth with six matrices and two norms a block, of width 16, so that time goes into
Python and not into products. The library is called as users call it. Times are those of the
processor, which other work on the machine changes little. `optax.contrib.muon` is called at the
first depth alone: its eager update compiles the loop of each leaf anew, at every call.
"""

import collections
import functools
import json
import re
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import teon_optax
from benchmarks import measuring, results

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
    """Makes the parameters of a GPT of so many blocks."""
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


def measured(depth: int, repetitions: int, with_muon: bool) -> dict[str, float]:
    """Measures seconds by figure; each that says "again", and the eager one, is a minimum."""
    params = parameters(depth)
    optimizer = teon_optax.teon(0.02)
    rule_per_leaf = [
        teon_optax.Rule(f"^{path}$", stack=int(leaf.ndim > 1))
        for path, leaf in (
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        )
    ]

    seconds = functools.partial(measuring.seconds, clock=time.process_time)

    def trace() -> Any:
        # A new function, so that jax has not traced it before.
        return jax.make_jaxpr(lambda *arguments: optimizer.update(*arguments))(
            params, optimizer.init(params), params
        )

    def again(function: Callable[[], Any]) -> float:
        return min(seconds(function) for _ in range(repetitions))

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
    found["eager"] = again(lambda: optimizer.update(params, state, params))
    if with_muon:
        muon = optax.contrib.muon(0.02)
        muon_state = muon.init(params)
        muon.update(params, muon_state, params)
        found["eager_muon"] = seconds(lambda: muon.update(params, muon_state, params))
    return found


def walk(depth: int = 3) -> dict[str, int]:
    """Counts the calls of each of the library's functions in a second trace of `teon`'s update.

    A comprehension is a call of the function that it stands in, before Python 3.12.
    """
    params, library = parameters(depth), str(Path(teon_optax.__file__).parent)
    optimizer = teon_optax.teon(0.02)
    arguments = params, optimizer.init(params), params
    calls: collections.Counter[str] = collections.Counter()

    def trace() -> None:
        # A new function, so that jax has not traced it before.
        jax.make_jaxpr(lambda *given: optimizer.update(*given))(*arguments)

    def count(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(library):
            name = re.sub(
                r"(\.<locals>)?\.<(listcomp|dictcomp|setcomp|genexpr)>", "", code.co_qualname
            )
            calls[f"{Path(code.co_filename).relative_to(library)}: {name}"] += 1

    trace()
    sys.setprofile(count)
    try:
        trace()
    finally:
        sys.setprofile(None)
    return dict(calls)


def table(record: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Shows milliseconds, a row for each depth and version."""
    versions = {"after": record} if before is None else {"before": before, "after": record}
    rows = []
    for depth in record["depths"]:
        for name, version in versions.items():
            figures = version["depths"].get(depth)
            if figures:
                label = f"{depth} blocks" + (f", {name}" if before else "")
                rows.append([label, *(_milliseconds(figures.get(key)) for key in FIGURES)])
    header = ["milliseconds", *FIGURES.values()]
    captions = "\n\n".join(
        (f"{name}: " if before else "") + results.caption(version)
        for name, version in versions.items()
    )
    return f"{results.markdown(header, rows)}\n\n{captions}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.1f}"


def plot(record: dict[str, Any], before: dict[str, Any] | None) -> Figure:
    """Draws the time of the second trace and of an eager update by depth."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for version, style, when in ((before, ":", ", before"), (record, "-", "")):
        for key, color, title in (
            ("trace_again", "C0", "second trace"),
            ("eager", "C1", "eager update"),
        ):
            if version is not None:
                depths = [int(depth) for depth in version["depths"]]
                values = [figures[key] for figures in version["depths"].values()]
                axes.plot(depths, values, style, color=color, marker="o", label=title + when)
    axes.set(xlabel="blocks", ylabel="seconds of the processor", xscale="log", yscale="log")
    axes.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes JSON, table and plot."""
    parser = results.parser("planning", __doc__)
    parser.add_argument("--depths", type=results.separated(int), default=[12, 24, 48, 96])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--before", type=Path, help="the JSON file of another version")
    parser.add_argument("--walk", action="store_true", help="count calls of a second trace alone")
    options = parser.parse_args(argv)
    if options.walk:
        calls = walk()
        for name, number in sorted(calls.items(), key=lambda item: -item[1]):
            print(f"{number:5} {name}")
        print(f"{len(calls)} functions, {sum(calls.values())} calls")
        return
    before = json.loads(options.before.read_text()) if options.before else None
    # Compiles what eager operations share, which is no part of planning.
    measured(2, 1, with_muon=False)
    depths = {
        str(depth): measured(depth, options.repetitions, with_muon=not number)
        for number, depth in enumerate(options.depths)
    }
    record = {"environment": results.environment(), "depths": depths}
    results.publish(options, "planning", record, table(record, before), plot(record, before))


if __name__ == "__main__":
    main()
