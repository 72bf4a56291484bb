"""The training loop of `train_gpt`, from a job to its last step or a stop."""

import contextlib
import math
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from examples import alignments, checkpoints, data, metrics, optimizers, program, run_folder
from examples.command_line import INTERRUPTED
from examples.errors import UserError
from examples.jobs import Job
from examples.options import Options
from examples.program import Program, TrainState

ROUNDING = 1e-4  # of a mean of losses in float32, relative


def run(job: Job, make: Callable[[Options, int], Program] = program.build) -> int:
    """Trains, and returns the exit code.

    Args:
        job: What and where; its folder is this process' own.
        make: From options and the size of the vocabulary to what is compiled.
    """
    with out_of_memory_explained(job.options):
        compiled = make(job.options, job.corpus.vocab_size)
        print(describe(job, compiled), flush=True)
        with stop_requests() as stop:
            if not job.resumed:
                run_folder.create(job.out, job.config, job.corpus.tokenizer)
            return train(job, compiled, stop)


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


def describe(job: Job, compiled: Program) -> str:
    """What is about to happen, in a few lines, and to which parameters."""
    options, corpus, params = job.options, job.corpus, compiled.shapes.params
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


def train(job: Job, compiled: Program, stop: threading.Event) -> int:
    """The loop: from the newest checkpoint, or the beginning, to the last step or a stop."""
    options, out = job.options, job.out
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints.opened(job.checkpoints))
        step, state = first_state(job, compiled, manager)
        # Before the configuration: its interval of checkpoints is that of the metrics that follow.
        file = stack.enter_context(metrics.opened(out, metrics.read_until(out, step)))
        run_folder.write_config(out, job.config)
        bar = stack.enter_context(progress_bar(options, step))
        if step < options.steps:
            bar.set_postfix_str("compiling the first step")
        validation_loss = None
        while step < options.steps and not requested(stop):
            batch = data.training_batch(
                job.corpus, options.context, options.batch_size, options.seed, step
            )
            state, loss = compiled.train_step(state, batch)
            step += 1
            record: dict[str, Any] = {"step": step, "loss": float(loss)}
            if step == options.steps or step % options.eval_every == 0:
                record["val_loss"] = validation_loss = evaluate(job, compiled, state.params)
            check_learning(record, options.steps, job.corpus.vocab_size)
            if options.alignment_every and step % options.alignment_every == 0:
                record["alignment"] = alignments.measure(state)
            metrics.write(file, record)
            bar.set_postfix_str(f"step {step}, loss {record['loss']:.3f}", refresh=False)
            bar.update(options.batch_size * options.context)
            if step == options.steps or step % options.checkpoint_every == 0:
                checkpoints.save(manager, step, state)
        if manager.latest_step() != step:
            checkpoints.save(manager, step, state)
    metrics.plot(out, f"{options.model}, {options.optimizer}")
    if options.alignment_every:
        alignments.plot(out, f"{options.model}, pairs of neighbouring blocks")
    if step < options.steps:
        command = f"python -m examples.train_gpt --resume --out {shlex.quote(str(out))}"
        print(f"stopped and saved at step {step} of {options.steps}; go on with: {command}")
        return INTERRUPTED
    if validation_loss is None:
        validation_loss = evaluate(job, compiled, state.params)
        check_learning({"step": step, "val_loss": validation_loss}, step, job.corpus.vocab_size)
    print(f"loss curves, metrics and checkpoints are in {out}")
    print(f"validation loss {validation_loss:.4f}, perplexity {math.exp(validation_loss):.3f}")
    return 0


def first_state(job: Job, compiled: Program, manager: CheckpointManager) -> tuple[int, TrainState]:
    """The newest checkpoint's step and state, or those of the beginning."""
    restored = checkpoints.restore(manager, compiled.shapes)
    if restored is None:
        if job.resumed:
            print("no checkpoint was saved yet: beginning at step 0")
        return 0, compiled.init(jax.random.key(job.options.seed))
    if restored[0] > job.options.steps:
        raise UserError(
            f"--steps {job.options.steps}: {job.out} has a checkpoint at step {restored[0]} already"
        )
    return restored


def evaluate(job: Job, compiled: Program, params: Any) -> float:
    """Mean loss over the validation sequences."""
    batches = data.validation_batches(job.corpus, job.options.context, job.options.batch_size)
    losses = [float(compiled.eval_step(params, batch)) for batch in batches]
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


def progress_bar(options: Options, step: int) -> tqdm:
    """A bar that counts tokens, so that its rate is in tokens per second."""
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
    """Whether any process was asked to stop: they all save after the same step."""
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
