"""Training: what is compiled for a run, and its loop from a job to the last step or a stop."""

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

import teon_optax
from examples import checkpoints, data, optimizers, plots, run_folder
from examples.command_line import INTERRUPTED, UserError
from examples.model import GPT
from examples.options import MODELS, Options
from examples.run_folder import Job

ROUNDING = 1e-4  # of a mean of losses in float32, relative


# What is compiled.


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Any
    opt_state: Any


class Program(NamedTuple):
    """What is compiled for a run.

    Attributes:
        init: From a random key to the first state.
        train_step: From a state, which it consumes, and a batch to the next state and the loss.
        eval_step: From parameters and a batch to the loss.
        shapes: The state's shapes and dtypes, and on a mesh its shardings.
    """

    init: Callable[[jax.Array], TrainState]
    train_step: Callable[[TrainState, np.ndarray], tuple[TrainState, jax.Array]]
    eval_step: Callable[[Any, np.ndarray], jax.Array]
    shapes: TrainState


def build(options: Options, vocab_size: int, place: Callable[[Any], Any] | None = None) -> Program:
    """Makes model, optimizer, and the functions of them that are compiled.

    Args:
        options: Of the run.
        vocab_size: Of the corpus.
        place: From a tree of shapes, with the paths of parameters, to their shardings; None is one
            device.
    """
    model = GPT(
        dataclasses.replace(
            MODELS[options.model],
            depth=options.depth,
            hidden=options.hidden,
            vocab_size=vocab_size,
            context=options.context,
            dtype=options.dtype,
        )
    )

    def init_params(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, options.context), jnp.int32))["params"]

    params = jax.eval_shape(init_params, jax.random.key(0))
    if options.optimizer == "teon":
        optimizers.check_rules(options.rules, params)
    optimizer = optimizers.build(options, place and place(params))

    def init(key: jax.Array) -> TrainState:
        params = init_params(key)
        return TrainState(params, optimizer.init(params))

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def eval_step(params: Any, batch: jax.Array) -> jax.Array:
        return _mean_of_parts(loss, options.microbatches, params, batch)

    def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
        with_gradients = jax.value_and_grad(loss)
        value, gradients = _mean_of_parts(with_gradients, options.microbatches, state.params, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

    shapes = jax.eval_shape(init, jax.random.key(0))
    if place is None:
        return Program(
            jax.jit(init), jax.jit(train_step, donate_argnums=0), jax.jit(eval_step), shapes
        )
    # A compiled `init` cannot see where moments should lie, and a step should not move the state.
    state = place(shapes)
    shapes = jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), shapes, state
    )
    return Program(
        jax.jit(init, out_shardings=state),
        jax.jit(train_step, donate_argnums=0, out_shardings=(state, None)),
        jax.jit(eval_step),
        shapes,
    )


def _mean_of_parts(
    function: Callable[[Any, jax.Array], Any], count: int, params: Any, batch: jax.Array
) -> Any:
    """Averages what a function makes of the parts of a batch, one after another."""
    if count == 1:
        return function(params, batch)
    parts = batch.reshape(count, -1, batch.shape[1])
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, params, parts[0])
    )
    sums, _ = jax.lax.scan(
        lambda sums, part: (jax.tree.map(jnp.add, sums, function(params, part)), None), zeros, parts
    )
    return jax.tree.map(lambda total: total / count, sums)


# The run.


def run(job: Job, make: Callable[[Options, int], Program] = build) -> int:
    """Trains, and returns the exit code.

    Args:
        job: What and where; its folder is this process' own.
        make: From options and the size of the vocabulary to what is compiled.
    """
    with out_of_memory_explained(job.options):
        program = make(job.options, job.corpus.vocab_size)
        print(describe(job, program), flush=True)
        with stop_requests() as stop:
            if not job.resumed:
                run_folder.create(job.out, job.config, job.corpus.tokenizer)
            return train(job, program, stop)


@contextlib.contextmanager
def out_of_memory_explained(options: Options) -> Iterator[None]:
    """Says which flags make a step smaller."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error)
        # On CPU, what a thread has met comes as INTERNAL.
        words = ("RESOURCE_EXHAUSTED", "Out of memory")
        if not isinstance(error, MemoryError) and not any(word in reason for word in words):
            raise
        raise UserError(
            f"out of memory with --batch-size {options.batch_size}, --microbatches "
            f"{options.microbatches} and --context {options.context}: write more --microbatches, a "
            f"shorter --context or a smaller --model, and another --out ({reason[:200]})"
        ) from error


def describe(job: Job, program: Program) -> str:
    """Tells in a few lines what is about to happen, and to which parameters."""
    options, corpus, params = job.options, job.corpus, program.shapes.params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    training, validation = (sum(map(len, part)) for part in (corpus.training, corpus.validation))
    return "\n".join(
        [
            corpus.description,
            f"{training:,} training and {validation:,} validation tokens, "
            f"a vocabulary of {corpus.vocab_size:,}",
            f"{options.model} with {count:,} parameters, {options.optimizer}, {options.steps} "
            f"steps of {options.batch_size} x {options.context} tokens",
            optimizers.describe(options, params),
        ]
    )


def train(job: Job, program: Program, stop: threading.Event) -> int:
    """Runs from the newest checkpoint, or the beginning, to the last step or a stop."""
    options, out = job.options, job.out
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints.opened(job.checkpoints))
        step, state = first_state(job, program, manager)
        # Before the configuration: its interval of checkpoints is that of the metrics that follow.
        records = run_folder.read_metrics_until(out, step)
        file = stack.enter_context(run_folder.open_metrics(out, records))
        run_folder.write_config(out, job.config)
        bar = stack.enter_context(progress_bar(options, step))
        if step < options.steps:
            bar.set_postfix_str("compiling the first step")
        validation_loss = None
        while step < options.steps and not requested(stop):
            batch = data.training_batch(
                job.corpus, options.context, options.batch_size, options.seed, step
            )
            state, loss = program.train_step(state, batch)
            step += 1
            record: dict[str, Any] = {"step": step, "loss": float(loss)}
            if step == options.steps or step % options.eval_every == 0:
                record["val_loss"] = validation_loss = evaluate(job, program, state.params)
            check_learning(record, options.steps, job.corpus.vocab_size)
            if options.alignment_every and step % options.alignment_every == 0:
                record["alignment"] = measure_alignment(state)
            run_folder.write_metrics(file, record)
            bar.set_postfix_str(f"step {step}, loss {record['loss']:.3f}", refresh=False)
            bar.update(options.batch_size * options.context)
            if step == options.steps or step % options.checkpoint_every == 0:
                checkpoints.save(manager, step, state)
        if manager.latest_step() != step:
            checkpoints.save(manager, step, state)
    records = run_folder.read_metrics(out)
    curve = plots.Curve(options.optimizer, records)
    plots.losses([curve], out / run_folder.PLOT, f"{options.model}, {options.optimizer}")
    plots.alignment(records, out / run_folder.ALIGNMENT, f"{options.model}, neighbouring blocks")
    if step < options.steps:
        command = f"python -m examples.train_gpt --resume --out {shlex.quote(str(out))}"
        print(f"stopped and saved at step {step} of {options.steps}; go on with: {command}")
        return INTERRUPTED
    if validation_loss is None:
        validation_loss = evaluate(job, program, state.params)
        check_learning({"step": step, "val_loss": validation_loss}, step, job.corpus.vocab_size)
    print(f"loss curves, metrics and checkpoints are in {out}")
    print(f"validation loss {validation_loss:.4f}, perplexity {math.exp(validation_loss):.3f}")
    return 0


def first_state(job: Job, program: Program, manager: CheckpointManager) -> tuple[int, TrainState]:
    """Restores the newest checkpoint's step and state, or makes those of the beginning."""
    restored = checkpoints.restore(manager, program.shapes)
    if restored is None:
        if job.resumed:
            print("no checkpoint was saved yet: beginning at step 0")
        return 0, program.init(jax.random.key(job.options.seed))
    step, steps = restored[0], job.options.steps
    if step > steps:
        raise UserError(f"--steps {steps}: {job.out} has a checkpoint at step {step} already")
    if job.steps_before != steps:
        print(optimizers.describe_new_length(job.options, job.steps_before, step), flush=True)
    return restored


def evaluate(job: Job, program: Program, params: Any) -> float:
    """Averages the loss over the validation sequences."""
    batches = data.validation_batches(job.corpus, job.options.context, job.options.batch_size)
    losses = [float(program.eval_step(params, batch)) for batch in batches]
    return sum(losses) / len(losses)


def check_learning(record: dict[str, float], steps: int, vocab_size: int) -> None:
    """Ends a run that has diverged before its state is saved.

    Args:
        record: Of a step.
        steps: Of the whole run.
        vocab_size: Number of tokens.

    Raises:
        UserError: If a loss is not finite, or if the validation loss, once the warm-up is over or
            the run is, is no better than that of a guess among all tokens.
    """
    step, validation_loss = record["step"], record.get("val_loss", 0.0)
    advice = "try a lower --learning-rate, and another --out"
    if not all(map(math.isfinite, record.values())):
        raise UserError(f"the training has diverged ({record}): {advice}")
    guess = math.log(vocab_size)
    judged = step == steps or step > max(optimizers.LONGEST_WARMUP, steps // 10)
    if judged and validation_loss > guess * (1 - ROUNDING):
        raise UserError(
            f"the training has diverged: the validation loss is {validation_loss:.4f} after step "
            f"{step}, and {guess:.4f} for a guess among {vocab_size} tokens: {advice}"
        )


def measure_alignment(state: TrainState) -> dict[str, list[float]]:
    """Measures how alike the momenta of every pair of neighbouring blocks are.

    Candidates are all matrices of the blocks, whatever the run's own rules stack.

    Returns:
        By the path of the first matrix of a pair: overlaps of left and right leading vectors, r of
        modes 1 and 2.
    """
    _, of_teon = state.opt_state
    momentum = optax.tree.get(of_teon.inner_states["teon"], "mu")
    pairs = teon_optax.rules.all_hidden(state.params)
    return {
        group.members[0]: [round(float(figure), 5) for figure in (*group.overlaps, *group.ratios)]
        for group in teon_optax.alignment(momentum, pairs)
    }


def progress_bar(options: Options, step: int) -> tqdm:
    """Makes a bar that counts tokens, so that its rate is in tokens per second."""
    tokens = options.batch_size * options.context
    return tqdm(
        total=options.steps * tokens,
        initial=step * tokens,
        unit=" tokens",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=jax.process_index() > 0,
        desc=options.optimizer,
    )


def requested(stop: threading.Event) -> bool:
    """Asks whether any process was told to stop: they all save after the same step."""
    if jax.process_count() == 1:
        return stop.is_set()
    return bool(multihost_utils.process_allgather(stop.is_set()).any())


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turns Ctrl-C and SIGTERM into an event for the loop to see; a second one kills."""
    stop = threading.Event()

    def request(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\ntrain_gpt: saving after this step; once more to quit without\n")

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
