"""AdamW, Muon and TEON, each at its own best learning rate: the paper's comparison and ablations.

    python -m benchmarks.reproduce                         # on two cores: two hours
    python -m benchmarks.reproduce --only muon teon-1      # some configurations
    python -m benchmarks.reproduce --aggregate             # table and plots of what is there
    python -m benchmarks.reproduce --model llama-60m --data fineweb10B --batch-size 512 \
        --steps 2100 --dtype bfloat16 --workers 1          # the paper's scale, on an accelerator

Every run leaves one JSON line in the folder `--out`, one file per configuration. What is there is
not run again, so that the command may be stopped and repeated. A configuration is swept on seed 0:
its learning rates are 0.01 * 2^(k / 2), and the sweep goes on until both neighbours of the best are
known. Other seeds run at that best. Runs of one seed share first parameters, batches and held-out
sequences, and differ in nothing but the optimizer.
"""

import argparse
import dataclasses
import fcntl
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import results
from benchmarks.configurations import CONFIGURATIONS, FEW_SEEDS, Configuration, build
from examples import data, shards
from examples.model import GPT, MODELS, ModelConfig, llama

FOLDER = results.FOLDER / "reproduce"
CACHE = Path(__file__).parent.parent / "runs" / "cache"
SMALL = dataclasses.replace(llama(160, 432, 8, 4), tied=True)
SWEEP_SEED = 0
MOST_RATES = 10
PAUSE = 5.0  # seconds until a worker without work looks again


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs of a folder have in common."""

    model: str
    data: str | None
    vocab_size: int
    context: int
    batch_size: int
    steps: int
    eval_tokens: int
    dtype: str


class Run(NamedTuple):
    """One training run, at the learning rate `rate_of(k)`."""

    k: int
    seed: int


class Program(NamedTuple):
    """What is compiled for a configuration; rates and decay are arguments."""

    init: Callable[[jax.Array], Any]
    train_step: Callable[..., Any]
    eval_step: Callable[..., jax.Array]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, and says what there is."""
    options = parser().parse_args(argv)
    if not options.aggregate:
        setup = Setup(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Setup)})
        keep_setup(options.out, setup)
        if options.core is not None:
            return work(options, setup)
        corpus_of(setup)  # once, before the workers ask for it
        run_workers(options.workers, sys.argv[1:] if argv is None else argv)
    from benchmarks import reproduce_report

    reproduce_report.report(options.out, options.update_readme)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=FOLDER, help="default: benchmarks/results/reproduce")
    add("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    add("--aggregate", action="store_true", help="run nothing")
    add("--update-readme", action="store_true", help="put the tables into the pages, too")
    add("--workers", type=int, default=os.cpu_count() or 1, help="default: one for each core")
    add("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    add("--core", type=int, help=argparse.SUPPRESS)  # what makes a worker of this process
    add("--model", choices=["small", *MODELS], default="small")
    add("--data", help="as for examples.train_gpt; default: the standard library's source")
    add("--vocab-size", type=int, default=4096, help="default: 4096")
    add("--context", type=int, default=64, help="default: 64")
    add("--batch-size", type=int, default=8, help="sequences per step; default: 8")
    add("--steps", type=int, default=80, help="default: 80")
    add("--eval-tokens", type=int, default=16384, help="held out; default: 16384")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def keep_setup(out: Path, setup: Setup) -> None:
    """Runs of one folder are comparable: refuses to add others."""
    out.mkdir(parents=True, exist_ok=True)
    path, wanted = out / "setup.json", dataclasses.asdict(setup)
    if not path.exists():
        path.write_text(
            json.dumps(wanted | {"environment": results.environment()}, indent=1) + "\n"
        )
    found = json.loads(path.read_text())
    if any(found.get(key) != value for key, value in wanted.items()):
        raise SystemExit(f"{path} is of another set-up: choose another --out, or its flags")


def run_workers(workers: int, argv: Sequence[str]) -> None:
    """Starts this command once per core: small matrices gain little from a second core each."""
    command = [sys.executable, "-m", "benchmarks.reproduce", *argv]
    cores = [core % (os.cpu_count() or 1) for core in range(workers)] if workers > 1 else [-1]
    processes = [subprocess.Popen([*command, "--core", str(core)]) for core in cores]
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:
        codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a worker has failed; what it finished is kept")


def work(options: argparse.Namespace, setup: Setup) -> int:
    """One worker: takes configurations that no other has, in order, until nothing is missing."""
    if options.core >= 0 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
    end = time.monotonic() + 60 * options.minutes
    corpus, waiting = corpus_of(setup), queue(options.only)
    while waiting and time.monotonic() < end:
        for configuration in list(waiting):
            finished = finish(configuration, options.out, setup, corpus, end)
            if finished:
                waiting.remove(configuration)
            if finished is not None:
                break  # begin again with the first that is missing
        else:
            time.sleep(PAUSE)
    return 0


def queue(names: Sequence[str]) -> list[Configuration]:
    """First a few seeds of the headline, then all of them, then the ablations.

    Wherever time runs out, what is there can be compared.
    """
    headline = [CONFIGURATIONS[name] for name in names if CONFIGURATIONS[name].headline]
    few = [dataclasses.replace(each, seeds=FEW_SEEDS) for each in headline]
    return few + headline + [CONFIGURATIONS[n] for n in names if not CONFIGURATIONS[n].headline]


def finish(
    configuration: Configuration, out: Path, setup: Setup, corpus: data.Corpus, end: float
) -> bool | None:
    """Runs what is missing of a configuration; None where it must wait or another has it."""
    with open(out / f"{configuration.name}.jsonl", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        program = None
        while (run := next_run(configuration, out)) is not None:
            if run == WAIT:
                return None
            if time.monotonic() > end:
                return False
            program = program or compiled(
                dataclasses.replace(configuration, seeds=()), setup, corpus.vocab_size
            )
            record = train(configuration, program, run, setup, corpus)
            file.write(json.dumps(record) + "\n")
            file.flush()
            shown = {key: record[key] for key in ("rate", "seed", "val_loss", "wall", "cpu")}
            print(time.strftime("%H:%M:%S"), configuration.name, shown, flush=True)
    return True


WAIT = Run(0, -1)


def next_run(configuration: Configuration, out: Path) -> Run | None:
    """The first run that is missing; WAIT for one that hangs on another configuration."""
    done = read(out, configuration.name)
    if configuration.base is not None:
        base = CONFIGURATIONS[configuration.base]
        losses = sweep_losses(read(out, base.name))
        if next_rate(base, losses) is not None:
            return WAIT
        best = min(losses, key=losses.__getitem__)
    else:
        losses = sweep_losses(done)
        if (k := next_rate(configuration, losses)) is not None:
            return Run(k, SWEEP_SEED)
        best = min(losses, key=losses.__getitem__)
    known = {(record["k"], record["seed"]) for record in done}
    missing = [seed for seed in configuration.seeds if (best, seed) not in known]
    return Run(best, missing[0]) if missing else None


def rate_of(k: float) -> float:
    """The learning rate number k of every sweep."""
    return 0.01 * 2 ** (k / 2)


def next_rate(configuration: Configuration, losses: dict[int, float]) -> int | None:
    """The sweep: first the rates it starts from, then the neighbours of the best."""
    for k in configuration.start:
        if k not in losses:
            return k
    best = min(losses, key=losses.__getitem__)
    for k in (best - configuration.spacing, best + configuration.spacing):
        if k not in losses and len(losses) < MOST_RATES:
            return k
    return None


def read(out: Path, name: str) -> list[dict[str, Any]]:
    """The records of a configuration; a line that was cut off is not one."""
    path = out / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return list(_records(lines))


def _records(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def sweep_losses(records: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Validation loss by k, infinite for runs that diverged."""
    return {
        record["k"]: math.inf if record["val_loss"] is None else record["val_loss"]
        for record in records
        if record["seed"] == SWEEP_SEED
    }


def corpus_of(setup: Setup) -> data.Corpus:
    """The corpus, read from the cache where it has been tokenized before."""
    if setup.data is not None and shards.is_shards(Path(setup.data)):
        return data.load(Path(setup.data), "shards", shards.VOCAB_SIZE)
    source = None if setup.data is None else Path(setup.data)
    key = "stdlib" if source is None else source.resolve().as_posix().strip("/").replace("/", "-")
    path = CACHE / f"{key}-{setup.vocab_size}.npz"
    if not path.exists():
        corpus = data.load(source, "bpe", setup.vocab_size)
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
    base = SMALL if setup.model == "small" else MODELS[setup.model]
    return dataclasses.replace(
        base, vocab_size=vocab_size, context=setup.context, dtype=setup.dtype
    )


@functools.cache
def compiled(configuration: Configuration, setup: Setup, vocab_size: int) -> Program:
    """One program for all rates, decays and seeds of a configuration."""
    model = GPT(model_of(setup, vocab_size))

    def init(key: jax.Array) -> Any:
        params = model.init(key, jnp.zeros((1, setup.context), jnp.int32))["params"]
        return params, build(configuration, setup.steps, 1.0, 1.0, 1.0).init(params)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def train_step(state: Any, batch: jax.Array, rates: tuple[jax.Array, ...]) -> Any:
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        optimizer = build(configuration, setup.steps, *rates)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return Program(jax.jit(init), jax.jit(train_step, donate_argnums=0), jax.jit(loss))


def train(
    configuration: Configuration, program: Program, run: Run, setup: Setup, corpus: data.Corpus
) -> dict[str, Any]:
    """One run from its first step to its evaluation."""
    wall, cpu = time.monotonic(), time.process_time()
    rate = rate_of(run.k)
    rest = rate if configuration.rest_rate is None else configuration.rest_rate
    rates = tuple(jnp.float32(x) for x in (rate, rest, configuration.weight_decay))
    state, losses = program.init(jax.random.key(run.seed)), []
    for step in range(setup.steps):
        batch = data.training_batch(corpus, setup.context, setup.batch_size, run.seed, step)
        state, loss = program.train_step(state, batch, rates)
        losses.append(loss)
    batches = list(data.validation_batches(corpus, setup.context, setup.batch_size))
    every = max(1, len(batches) * setup.batch_size * setup.context // setup.eval_tokens)
    held_out = float(np.mean([program.eval_step(state[0], batch) for batch in batches[::every]]))
    return {
        "configuration": configuration.name,
        "k": run.k,
        "rate": float(f"{rate:.4g}"),
        "rest_rate": float(f"{rest:.4g}"),
        "weight_decay": configuration.weight_decay,
        "seed": run.seed,
        "steps": setup.steps,
        "tokens": setup.steps * setup.batch_size * setup.context,
        "val_loss": round(held_out, 5) if math.isfinite(held_out) else None,
        "wall": round(time.monotonic() - wall, 1),
        "cpu": round(time.process_time() - cpu, 1),
        "losses": [round(float(loss), 3) for loss in losses],
    }


if __name__ == "__main__":
    sys.exit(main())
