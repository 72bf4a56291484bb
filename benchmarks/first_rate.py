"""Which learning rate should a first example show? Two small models, each at two lengths.

    python -m benchmarks.first_rate            # half an hour of one core; it resumes

The models are those of `examples.train_gpt` (its schedule and clipping) and of the page "Getting
started" (a constant rate), trained for as many steps as documented and for half of them. Every
optimizer is written as a first example would write it, without settings that need a sweep:

- `teon(rate)`: what TEON leaves to AdamW has the same rate;
- `teon(rate, fallback=optax.adamw(other))` with two other rates;
- `optax.contrib.muon(rate)` and `optax.adamw(rate)`, as they come.

Losses are held out. All rates are run from seed 0; the best one of `teon(rate)`, Muon and AdamW is
run from two more seeds (other first parameters and batches) where that is cheap.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from optax import contrib

from benchmarks import results
from examples import data
from examples.model import GPT, MODELS
from examples.optimizers import CLIP, schedule
from teon_optax import teon

NAME = "first_rate"
RATES = (0.005, 0.01, 0.02, 0.04)
ADAM_RATES = (0.001, 0.002, 0.004, 0.008)
OTHER_RATES = (0.0003, 0.003)  # of the fallback, at these rates of the matrices:
RATES_OF_OTHERS = (0.01, 0.02)
# Of the larger model, around the best of the sweeps behind `examples.train_gpt`.
LARGER = {
    "teon(rate)": (0.01, 0.02),
    "optax.contrib.muon(rate)": (0.01, 0.02),
    "optax.adamw(rate)": (0.002,),
}
SEED, MORE_SEEDS = 0, (1, 2)
HELD_OUT = 256  # sequences

Tree = Any


class Task(NamedTuple):
    """Holds a model and how a page trains it.

    Attributes:
        init: Makes the first parameters from a seed.
        loss: Takes parameters and a batch of (sequences, context + 1) tokens to the mean loss.
        context: Tokens a sequence.
        steps: As documented.
        rate: Takes a peak rate and a number of steps to what an optimizer gets as its rate.
        clip: Wraps an optimizer.
    """

    init: Callable[[int], Tree]
    loss: Callable[[Tree, jax.Array], jax.Array]
    context: int
    steps: int
    rate: Callable[[Any, int], Any]
    clip: Callable[[optax.GradientTransformation], optax.GradientTransformation]


class Run(NamedTuple):
    """Names a training run: its task and length, its optimizer and rate, its seed."""

    task: str
    steps: int
    optimizer: str
    rate: float
    seed: int


class Block(nnx.Module):
    """Adds attention and an MLP to a residual, as in the page "Getting started"."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128):
        self.attn_norm, self.mlp_norm = (nnx.RMSNorm(width, rngs=rngs) for _ in range(2))
        self.attn = nnx.MultiHeadAttention(4, width, use_bias=False, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same."""
        x = x + self.attn(self.attn_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class BytesGPT(nnx.Module):
    """Models bytes, as in the page "Getting started"."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128):
        self.embed, self.head = nnx.Embed(256, width, rngs=rngs), nnx.Linear(width, 256, rngs=rngs)
        self.blocks = nnx.Sequential(*[Block(rngs) for _ in range(4)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps (batch, time) to logits of (batch, time, 256)."""
        return self.head(self.blocks(self.embed(tokens)))


def of_train_gpt() -> Task:
    """Builds the default model and schedule of `examples.train_gpt`."""
    model = GPT(MODELS["tiny"])

    def init(seed: int) -> Tree:
        tokens = jnp.zeros((1, model.config.context), jnp.int32)
        return model.init(jax.random.key(seed), tokens)["params"]

    def loss(params: Tree, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def clip(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(CLIP), optimizer)

    return Task(init, loss, model.config.context, 200, schedule, clip)


def of_getting_started() -> Task:
    """Builds the model of the page "Getting started", which trains it at a constant rate."""
    graph, _, others = nnx.split(BytesGPT(nnx.Rngs(0)), nnx.Param, ...)

    def init(seed: int) -> Tree:
        return nnx.to_pure_dict(nnx.state(BytesGPT(nnx.Rngs(seed)), nnx.Param))

    def loss(params: Tree, batch: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, nnx.State(params), others)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    return Task(init, loss, 64, 100, lambda rate, _: rate, lambda optimizer: optimizer)


CHEAP = "getting started"
TASKS = {CHEAP: of_getting_started, "train_gpt": of_train_gpt}
BATCH_SIZE = 16  # of both
SAME = "teon(rate)"
MUON, ADAMW = "optax.contrib.muon(rate)", "optax.adamw(rate)"


def _with_fallback(other: float) -> str:
    return f"teon(rate, fallback=optax.adamw({other:g}))"


# Each gets its rate and a function that makes a schedule of any other rate.
OPTIMIZERS: dict[str, Callable[[Any, Callable[[float], Any]], optax.GradientTransformation]] = {
    SAME: lambda rate, _: teon(rate),
    **{
        _with_fallback(other): lambda rate, of, other=other: teon(
            rate, fallback=optax.adamw(of(other))
        )
        for other in OTHER_RATES
    },
    MUON: lambda rate, _: contrib.muon(rate),
    ADAMW: lambda rate, _: optax.adamw(rate),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, then writes the table and the figure."""
    parser = argparse.ArgumentParser("benchmarks.first_rate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    parser.add_argument("--model", choices=TASKS, help="run this one alone")
    parser.add_argument("--aggregate", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    losses = read(options.out)
    names = [options.model] if options.model else list(TASKS)
    while not options.aggregate:
        runs = [run for run in wanted(losses) if run not in losses and run.task in names]
        if not runs:
            break
        losses[runs[0]] = train(runs[0])
        print(*runs[0], round(losses[runs[0]], 4), file=sys.stderr, flush=True)
        save(options.out, losses)
    record = json.loads((options.out / f"{NAME}.json").read_text())
    results.write(options.out, NAME, record, page(losses, record), plot(losses))


def wanted(losses: dict[Run, float]) -> Iterator[Run]:
    """Lists all runs, the cheaper model first: rates from one seed, then the best from two more."""
    for name, make in TASKS.items():
        lengths = [make().steps // part for part in (1, 2)]
        for optimizer in OPTIMIZERS:
            for rate in rates_of(name, optimizer):
                yield from (Run(name, steps, optimizer, rate, SEED) for steps in lengths)
        for seed in MORE_SEEDS if name == CHEAP else ():
            for optimizer in (SAME, MUON, ADAMW):
                for steps in lengths:
                    if (rate := best(losses, name, steps, optimizer)) is not None:
                        yield Run(name, steps, optimizer, rate, seed)


def rates_of(task: str, optimizer: str) -> Sequence[float]:
    """Says which rates of an optimizer are run on a task."""
    if task != CHEAP:
        return LARGER.get(optimizer, ())
    if optimizer == ADAMW:
        return ADAM_RATES
    return RATES if optimizer in (SAME, MUON) else RATES_OF_OTHERS


def best(losses: dict[Run, float], task: str, steps: int, optimizer: str) -> float | None:
    """Finds the rate with the lowest loss on the first seed; None before any run."""
    found = {
        run.rate: loss
        for run, loss in losses.items()
        if run[:3] == (task, steps, optimizer) and run.seed == SEED
    }
    return min(found, key=found.__getitem__) if found else None


@functools.cache
def corpus() -> data.Corpus:
    """Reads the source of the standard library, byte by byte."""
    return data.load(None, "byte", 256)


@functools.cache
def compiled(name: str, steps: int, optimizer: str) -> tuple[Task, Callable[..., Any], Any]:
    """Compiles one program for all rates and seeds: the task, its step, its loss."""
    task = TASKS[name]()

    def build(rate: Any) -> optax.GradientTransformation:
        make = OPTIMIZERS[optimizer]
        return task.clip(make(task.rate(rate, steps), lambda other: task.rate(other, steps)))

    def step(params: Tree, state: Any, batch: jax.Array, rate: jax.Array) -> tuple[Tree, Any]:
        gradients = jax.grad(task.loss)(params, batch)
        updates, state = build(rate).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def init(params: Tree) -> Any:
        return build(1.0).init(params)

    return task, jax.jit(step), (jax.jit(init), jax.jit(task.loss))


def train(run: Run) -> float:
    """Trains, and gives the mean loss on the held-out sequences."""
    task, step, (init, loss) = compiled(run.task, run.steps, run.optimizer)
    params = task.init(run.seed)
    state = init(params)
    for number in range(run.steps):
        batch = data.training_batch(corpus(), task.context, BATCH_SIZE, run.seed, number)
        params, state = step(params, state, batch, np.float32(run.rate))
    count = data.window_count(corpus().validation, task.context)
    indices = np.linspace(0, count - 1, HELD_OUT).astype(np.int64)
    parts = [
        float(loss(params, data.windows(corpus().validation, task.context, part)))
        for part in np.split(indices, HELD_OUT // BATCH_SIZE)
    ]
    return float(np.mean(parts))


def read(out: Path) -> dict[Run, float]:
    """Reads the losses that a folder has, by run."""
    path = out / f"{NAME}.json"
    if not path.exists():
        return {}
    return {Run(*run): loss for *run, loss in json.loads(path.read_text())["runs"]}


def save(out: Path, losses: dict[Run, float]) -> None:
    """Writes the losses so far, one list a run."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [[*run, round(loss, 4)] for run, loss in losses.items()]
    record = {"benchmark": NAME, "runs": runs, "environment": results.environment()}
    (out / f"{NAME}.json").write_text(json.dumps(record) + "\n")


def page(losses: dict[Run, float], record: dict[str, Any]) -> str:
    """Writes one table for each task and length, and what was run."""
    parts = []
    for name, steps in dict.fromkeys((run.task, run.steps) for run in losses):
        rates = sorted({r.rate for r in losses if (r.task, r.steps) == (name, steps)})
        rows = [
            [f"`{optimizer}`", *_cells(losses, name, steps, optimizer, rates)]
            for optimizer in OPTIMIZERS
            if any(run[:3] == (name, steps, optimizer) for run in losses)
        ]
        header = [f"{name}, {steps} steps", *(f"{rate:g}" for rate in rates), "mean of three seeds"]
        if not any(row[-1] for row in rows):
            header, rows = header[:-1], [row[:-1] for row in rows]
        parts.append(results.markdown(header, rows))
    return "\n\n".join([*parts, results.caption(record)])


def _cells(
    losses: dict[Run, float], name: str, steps: int, optimizer: str, rates: Sequence[float]
) -> list[str]:
    lowest = best(losses, name, steps, optimizer)
    cells = []
    for rate in rates:
        loss = losses.get(Run(name, steps, optimizer, rate, SEED))
        text = "" if loss is None else f"{loss:.3f}"
        cells.append(f"**{text}**" if rate == lowest else text)
    seeds = [Run(name, steps, optimizer, lowest or 0.0, seed) for seed in (SEED, *MORE_SEEDS)]
    known = [losses[run] for run in seeds if run in losses]
    return [*cells, f"{np.mean(known):.3f}" if len(known) == len(seeds) else ""]


def plot(losses: dict[Run, float]) -> Figure:
    """Draws held-out loss by rate, a panel for each task and length."""
    panels = list(dict.fromkeys((run.task, run.steps) for run in losses))
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (name, steps) in zip(figure.subplots(2, 2).flat, panels, strict=False):
        for optimizer in OPTIMIZERS:
            points = sorted(
                (run.rate, loss)
                for run, loss in losses.items()
                if run[:3] == (name, steps, optimizer) and run.seed == SEED
            )
            axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", label=optimizer)
        axes.set(title=f"{name}, {steps} steps", xscale="log")
        axes.set(xlabel="learning rate", ylabel="held-out loss")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


if __name__ == "__main__":
    main()
