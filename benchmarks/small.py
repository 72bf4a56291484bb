r"""Small networks and trees of many shapes: training steps a second, and what is compiled.

    python -m benchmarks.small
    python -m benchmarks.small --no-time                  # only what compilers and tracers do

Where matrices are tiny, launches and dispatch cost more than products, and where each matrix has a
shape of its own, so does compiling. README.md says what each figure means.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

from benchmarks import measuring, results
from benchmarks.measuring import BASE, Tree
from benchmarks.update_cost import small_gpt
from examples import model as gpts
from teon_optax import Rule, default_rules, plan, teon

NAME = "small"
RATE = 0.02
FEWEST_TURNS = 5
STEPS = 20  # of one timed call, each dispatched by itself, as a training loop does
ONE_BY_ONE = (Rule("kernel"),)

Loss = Callable[[Tree], jax.Array]


class Network(NamedTuple):
    """Something to train.

    Attributes:
        params: Its parameters, of which `kernel` are matrices.
        loss: Of the parameters, on data of its own.
        rules: TEON's. Muon takes the same leaves.
    """

    params: Tree
    loss: Loss
    rules: tuple[Rule, ...]


def mlp(*widths: int) -> Network:
    """Makes layers of these widths, on 64 Gaussian inputs."""
    keys = jax.random.split(jax.random.key(0), len(widths) + 1)
    params = {
        f"layer_{i}": {
            "kernel": jax.random.normal(keys[i], (fan_in, fan_out)) / math.sqrt(fan_in),
            "bias": jnp.zeros(fan_out),
        }
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False))
    }
    inputs = jax.random.normal(keys[-2], (64, widths[0]))
    targets = jax.random.normal(keys[-1], (64, widths[-1]))

    def loss(params: Tree) -> jax.Array:
        x = inputs
        for i in range(len(widths) - 1):
            x = x if i == 0 else jax.nn.gelu(x)
            x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        return jnp.mean(jnp.square(x - targets))

    return Network(params, loss, ONE_BY_ONE)


def gpt(width: int, depth: int) -> Network:
    """Makes a GPT of 1,024 tokens, on 2 sequences of 32; Q, K and V are in pairs of layers."""
    model = gpts.GPT(small_gpt(width, depth))
    tokens = jax.random.randint(jax.random.key(0), (2, 33), 0, 1024)
    params = model.init(jax.random.key(1), tokens[:, :-1])["params"]

    def loss(params: Tree) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return Network(params, loss, tuple(default_rules(params)))


NETWORKS: dict[str, Callable[[], Network]] = {
    "MLP 8-32-32-4": lambda: mlp(8, 32, 32, 4),
    "MLP 17-64-64-64-6": lambda: mlp(17, 64, 64, 64, 6),
    "MLP 64-256-256-256-10": lambda: mlp(64, 256, 256, 256, 10),
    "GPT 2 x 32": lambda: gpt(32, 2),
    "GPT 4 x 64": lambda: gpt(64, 4),
    "GPT 5 x 128 (1 M)": lambda: gpt(128, 5),
}
SHAPES: dict[str, list[tuple[int, int]]] = {
    "20 shapes, 20 d": [(32 + 8 * i, 48 + 16 * i) for i in range(20)],
    "20 shapes, 4 d": [(64 * (1 + i % 4), 64 * (1 + i % 4) + 32 * (i // 4)) for i in range(20)],
    "20 shapes, 1 d": [(64, 64 + 16 * i) for i in range(20)],
}
COMPILED = {"compile": "compile, CPU s", "trace": "trace, CPU s", "hlo_lines": "HLO lines"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the table."""
    parser = results.parser(NAME, __doc__)
    add = parser.add_argument
    add("--no-time", action="store_true", help="only trace and compile")
    add("--networks", type=results.separated(), default=list(NETWORKS))
    add("--seconds", type=float, default=20, help="of turns, for each network; default: 20")
    add("--compilations", type=int, default=3, help="timed for each; default: 3")
    options = parser.parse_args(argv)
    record: dict[str, Any] = {"benchmark": NAME, "environment": results.environment()}
    trees = {name: (shapes_of(shapes), ONE_BY_ONE) for name, shapes in SHAPES.items()}
    networks = {name: NETWORKS[name]() for name in options.networks}
    trees |= {name: (shapes_like(net.params), net.rules) for name, net in networks.items()}
    record["compiled"], record["steps"] = {}, {}
    for name, tree in trees.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        _, figures = measuring.compile_updates(
            optimizers(*tree), tree[0], options.compilations, time.process_time
        )
        record["compiled"][name] = figures
        if name in networks and not options.no_time:
            record["steps"][name] = steps_a_second(networks[name], options.seconds)
    record["parameters"] = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, (tree, _) in trees.items()
    }
    results.publish(options, NAME, record, table(record), plot(record))


def shapes_of(shapes: Sequence[tuple[int, int]]) -> Tree:
    """Makes a tree with a kernel of each shape."""
    return {
        f"layer_{i}": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for i, shape in enumerate(shapes)
    }


def shapes_like(params: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def optimizers(shapes: Tree, rules: Sequence[Rule]) -> dict[str, optax.GradientTransformation]:
    """Makes the peers; what TEON leaves to AdamW, so does Muon."""
    return {
        BASE: measuring.muon(plan(shapes, rules).fallback, rules, RATE),
        "teon": teon(RATE, rules),
        "optax adamw": optax.adamw(RATE),
    }


def steps_a_second(network: Network, seconds: float) -> dict[str, dict[str, float]]:
    """Times whole training steps (gradient, update, new parameters), in turns, for seconds."""
    found = optimizers(shapes_like(network.params), network.rules)
    peers = {name: training(network, optimizer) for name, optimizer in found.items()}
    taken = measuring.time_in_turns(peers, FEWEST_TURNS, seconds)
    figures = {}
    for name, times in taken.items():
        figures[name] = {
            "steps": STEPS / min(times),
            "time_ratio": min(times) / min(taken[BASE]),
            "time_ratio_median": measuring.median_ratio(times, taken[BASE]),
        }
    return figures


def training(network: Network, optimizer: optax.GradientTransformation) -> Callable[[], Any]:
    """Makes a function each call of which trains some steps further."""

    @jax.jit
    def step(params: Tree, state: Any) -> tuple[Tree, Any]:
        gradients = jax.grad(network.loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    carry = step(network.params, optimizer.init(network.params))  # compiles

    def some_steps() -> Any:
        nonlocal carry
        for _ in range(STEPS):
            carry = step(*carry)
        return jax.block_until_ready(carry)

    return some_steps


def table(record: dict[str, Any]) -> str:
    """Shows two tables, a row for each network or tree; in parentheses ratios to Muon."""
    pages = []
    if record["steps"]:
        names = list(next(iter(record["steps"].values())))
        rows = [
            [
                name,
                f"{record['parameters'][name]:,}",
                *(
                    f"{row[peer]['steps']:,.0f} ({row[peer]['time_ratio']:.2f}, "
                    f"{row[peer]['time_ratio_median']:.2f})"
                    for peer in names
                ),
            ]
            for name, row in record["steps"].items()
        ]
        pages += [
            "Training steps a second (time of a step over Muon's: of the fastest, and the median "
            "of turns):",
            results.markdown(["", "parameters", *names], rows),
        ]
    rows = []
    for name, row in record["compiled"].items():
        for peer, figures in row.items():
            cells = []
            for figure in COMPILED:
                value, base = figures[figure], row[BASE][figure]
                text = f"{value:,.0f}" if figure == "hlo_lines" else f"{value:.3g}"
                cells.append(f"{text} ({value / base:.2f})")
            rows.append([name, peer, *cells])
    pages += [
        "Tracing and compiling the update (ratio to Muon):",
        results.markdown(["", "", *COMPILED.values()], rows),
        results.caption(record),
    ]
    return "\n\n".join(pages)


def plot(record: dict[str, Any]) -> Figure:
    """Draws ratios to Muon: compile and trace together, and the time of a whole step."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    both = figure.subplots(1, 2)
    panels = (
        (both[0], "trace and compile", record["compiled"], _to_compile),
        (both[1], "training step", record["steps"], lambda row: row.get("time_ratio", math.nan)),
    )
    for axes, title, found, value in panels:
        for place, peer in enumerate(next(iter(found.values()), {})):
            heights = [value(row[peer]) / value(row[BASE]) for row in found.values()]
            axes.bar([i + 0.2 * (place - 1.5) for i in range(len(found))], heights, 0.2, label=peer)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(found)), list(found), rotation=40, ha="right")
        axes.set(title=title, ylabel="ratio to optax muon")
    both[0].legend()
    return figure


def _to_compile(row: dict[str, float]) -> float:
    return row["compile"] + row["trace"]


if __name__ == "__main__":
    sys.exit(main())
