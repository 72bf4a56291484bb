"""One training run: from first parameters to a line of JSON.

`workers` starts it as `python -m benchmarks.reproduce.training JOB RUNS --core 0`.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import results
from benchmarks.reproduce.configurations import CONFIGURATIONS, QKV, Configuration, build
from benchmarks.reproduce.records import Job, Setup, append, rate_of
from examples import data
from examples.model import GPT, MODELS, ModelConfig, llama
from teon_optax import Rule, alignment

CACHE = Path(__file__).parents[2] / "runs" / "cache"
# 1.02 and 10.30 million parameters with 256 tokens; two heads each, as `PER_HEAD` has them.
SMALL = dataclasses.replace(llama(width=128, hidden=256, depth=6, heads=2), tied=True)
MEDIUM = dataclasses.replace(llama(width=256, hidden=768, depth=12, heads=2), tied=True)
SIZES = {"small": SMALL, "medium": MEDIUM, **MODELS}
AVERAGED = 0.05  # share of the run that the averaged weights remember
TRAINING_POINTS = 64  # of the loss curve: means over as many parts of the run
VALIDATION_POINTS = 16
CURVE_TOKENS = 16_384  # held out, for each point of the validation curve
ALIGNMENTS = 4  # measured as often in the course of a run
NUDGE = 1e-7  # near the spacing of float32


class State(NamedTuple):
    """Holds what a step changes; `average` is that of the parameters."""

    params: Any
    opt_state: Any
    average: Any


class Program(NamedTuple):
    """Holds what is compiled for a configuration and a length; learning rates are arguments."""

    init: Callable[[jax.Array], State]
    train_step: Callable[..., tuple[State, jax.Array]]
    eval_step: Callable[[Any, Any], jax.Array]


def main() -> int:
    """Makes the run that the command line names, and appends its record when it has ended."""
    parser = argparse.ArgumentParser("benchmarks.reproduce.training")
    parser.add_argument("job")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--core", type=int)
    options = parser.parse_args()
    if options.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
    asked = json.loads(options.job)
    keep(options.runs, train(Job(*asked["job"]), Setup(**asked["setup"])))
    return 0


def keep(runs: Path, record: dict[str, Any]) -> None:
    """Appends a record, and says so."""
    append(runs, record)
    shown = "configuration", "rate", "rest_rate", "seed", "steps", "nudge", "val_loss", "wall"
    print(time.strftime("%H:%M:%S"), {key: record[key] for key in shown}, flush=True)


def train(job: Job, setup: Setup) -> dict[str, Any]:
    """Makes the run, and gives its record."""
    begin, corpus = time.monotonic(), corpus_of(setup)
    program = compiled(CONFIGURATIONS[job.configuration], job.steps, setup, corpus.vocab_size)
    state, rates = program.init(jax.random.key(job.seed)), (rate_of(job.k), rate_of(job.rest_k))
    if job.nudge:
        params = nudged(state.params, job.nudge)
        state = State(params, state.opt_state, jax.tree.map(jnp.copy, params))
    tokens = setup.batch_size * setup.context
    losses, walls, cpus, curve, ratios = [], [], [], [], []
    for step in range(job.steps):
        batch = data.training_batch(corpus, setup.context, setup.batch_size, job.seed, step)
        wall, cpu = time.perf_counter(), time.process_time()
        state, loss = program.train_step(state, batch, step, *map(np.float32, rates))
        losses.append(float(loss))  # waits for it
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        if is_point(step, job.steps, VALIDATION_POINTS):
            held_out = validation(program, state.average, corpus, setup, CURVE_TOKENS)
            curve.append([(step + 1) * tokens, finite(held_out)])
        if is_point(step, job.steps, ALIGNMENTS):
            ratios.append([(step + 1) * tokens, *alignments(job, state.opt_state)])
    return {
        **job._asdict(),
        "rate": float(f"{rates[0]:.4g}"),
        "rest_rate": float(f"{rates[1]:.4g}"),
        "tokens": job.steps * tokens,
        "val_loss": finite(validation(program, state.average, corpus, setup, setup.eval_tokens)),
        "val_loss_last": finite(
            validation(program, state.params, corpus, setup, setup.eval_tokens)
        ),
        # Medians: a run may have been stopped for a while, and others were at work.
        "wall_per_step": round(float(np.median(walls)), 4),
        "cpu_per_step": round(float(np.median(cpus)), 4),
        "wall": round(time.monotonic() - begin, 1),
        "training": thinned(losses),
        "validation": curve,
        "alignment": [point for point in ratios if len(point) > 1],
        "environment": results.environment("teon_optax"),
    }


def is_point(step: int, steps: int, count: int) -> bool:
    """Tells whether one of `count` equal parts of the run ends with this step."""
    return (step + 1) * count // steps > step * count // steps


def finite(loss: float) -> float | None:
    """Rounds a loss; a run that diverged has none, since JSON has no infinity."""
    return round(loss, 5) if math.isfinite(loss) else None


def thinned(losses: list[float]) -> list[float | None]:
    """Averages losses over equal parts of the run."""
    parts = np.array_split(losses, min(TRAINING_POINTS, len(losses)))
    return [finite(float(np.mean(part))) for part in parts]


def nudged(params: Any, number: int) -> Any:
    """Changes parameters by rounding only."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(number), len(leaves))
    noise = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.map(lambda x, n: x * (1 + NUDGE * n), params, jax.tree.unflatten(tree, noise))


def alignments(job: Job, opt_state: Any) -> list[float]:
    """Measures r of modes 1 and 2 of our momenta, mean over pairs of neighbouring Q, K and V."""
    if CONFIGURATIONS[job.configuration].of_matrices != "teon_optax":
        return []
    momentum = optax.tree.get(opt_state[1].inner_states["matrices"], "mu")
    groups = alignment(momentum, (Rule(QKV, 2), Rule("", stack=0)))
    return [round(float(mean), 4) for mean in np.mean([g.ratios for g in groups], axis=0)]


def validation(
    program: Program, params: Any, corpus: data.Corpus, setup: Setup, tokens: int
) -> float:
    """Averages losses over sequences spread evenly over the held-out files, always the same."""
    count = data.window_count(corpus.validation, setup.context)
    batches = max(1, tokens // (setup.batch_size * setup.context))
    indices = np.linspace(0, count - 1, batches * setup.batch_size).astype(np.int64)
    each = [
        program.eval_step(params, data.windows(corpus.validation, setup.context, part))
        for part in np.split(indices, batches)
    ]
    return float(np.mean(each))


@functools.cache
def corpus_of(setup: Setup) -> data.Corpus:
    """Loads the corpus, from the cache where it has been tokenized before."""
    if setup.data is not None and data.is_shards(Path(setup.data)):
        return data.load(Path(setup.data), "shards", data.SHARDS_VOCAB_SIZE)
    source = None if setup.data is None else Path(setup.data)
    key = "stdlib" if source is None else source.resolve().as_posix().strip("/").replace("/", "-")
    path = CACHE / f"{key}-{setup.tokenizer}-{setup.vocab_size}.npz"
    if not path.exists():
        corpus = data.load(source, setup.tokenizer, setup.vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            training=corpus.training[0],
            validation=corpus.validation[0],
            vocab_size=corpus.vocab_size,
            description=corpus.description,
        )
    with np.load(path) as file:
        return data.Corpus(
            [file["training"]],
            [file["validation"]],
            int(file["vocab_size"]),
            str(file["description"]),
        )


def model_of(setup: Setup, vocab_size: int) -> ModelConfig:
    """Gives the model the set-up's tokens, context and precision."""
    base = SIZES[setup.model]
    dtype: Any = setup.dtype
    return dataclasses.replace(base, vocab_size=vocab_size, context=setup.context, dtype=dtype)


def accumulated(
    value_and_grad: Callable[[Any, jax.Array], Any], params: Any, batch: jax.Array, microbatch: int
) -> tuple[jax.Array, Any]:
    """Computes the mean loss of a batch and its gradients, a few sequences at a time.

    What two sequences need for their gradients stays in a core's cache: a step of `small` on one
    core takes 0.5 s so, and 0.65 to 0.95 s with all 32 sequences at once.
    """
    parts = batch.reshape(-1, microbatch, batch.shape[-1])

    def add(total: Any, part: jax.Array) -> tuple[Any, None]:
        return optax.tree.add(total, value_and_grad(params, part)), None

    zeros = jnp.zeros(()), optax.tree.zeros_like(params)
    total, _ = jax.lax.scan(add, zeros, parts)
    return optax.tree.scale(1 / len(parts), total)


@functools.cache
def compiled(configuration: Configuration, steps: int, setup: Setup, vocab_size: int) -> Program:
    """Compiles one program for all learning rates and seeds of a configuration."""
    model = GPT(model_of(setup, vocab_size))
    oldest, microbatch = max(1.0, AVERAGED * steps), setup.microbatch

    def init(key: jax.Array) -> State:
        params = model.init(key, jnp.zeros((1, setup.context), jnp.int32))["params"]
        opt_state = build(configuration, steps, 1.0, 1.0).init(params)
        return State(params, opt_state, jax.tree.map(jnp.copy, params))

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def train_step(
        state: State, batch: jax.Array, step: jax.Array, rate: jax.Array, rest_rate: jax.Array
    ) -> tuple[State, jax.Array]:
        value, gradients = accumulated(jax.value_and_grad(loss), state.params, batch, microbatch)
        optimizer = build(configuration, steps, rate, rest_rate)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        weight = jnp.maximum(1 / (step + 1), 1 / oldest)  # a plain mean at the beginning
        average = optax.incremental_update(params, state.average, weight)
        return State(params, opt_state, average), value

    return Program(jax.jit(init), jax.jit(train_step, donate_argnums=0), jax.jit(loss))


if __name__ == "__main__":
    sys.exit(main())
