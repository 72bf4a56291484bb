"""Trains a GPT with TEON, Muon or AdamW.

    python -m examples.train_gpt

takes about two minutes on two CPU cores and needs no download: it learns the source of Python's
standard library, byte by byte. `--help` lists models, corpora and optimizers. Ctrl-C saves, and
`--resume` goes on bit for bit as if nothing had happened, after a kill -9 too (on GPUs with
`XLA_FLAGS=--xla_gpu_deterministic_ops=true`).
"""

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

import teon_optax
from examples import alignments, checkpoints, data, optimizers, run_folder
from examples.errors import UserError
from examples.options import Command, Options, parse, resolve, resolve_resumed
from examples.program import Program, TrainState, build

INTERRUPTED = 130


class Run(NamedTuple):
    """One training run: what it is made of, and where it lies with which `config.json`.

    Processes of one run have folders of their own but for the checkpoints.
    """

    options: Options
    corpus: data.Corpus
    program: Program
    out: Path
    config: dict[str, Any]
    checkpoints: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""

    def run() -> int:
        command = parse(argv)
        return resume(command) if command.resume else start(command)

    return exit_code("train_gpt", run)


def exit_code(program: str, run: Callable[[], int]) -> int:
    """That of `run`; what the user can put right becomes a line on stderr and 2."""
    try:
        return run()
    except (UserError, OSError) as error:
        print(f"{program}: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted before training began", file=sys.stderr)
        return INTERRUPTED


def start(
    command: Command, make: Callable[..., Program] = build, saved_in: Path | None = None
) -> int:
    """A new run; whatever is wrong shows before anything is written.

    Args:
        command: What the user wrote.
        make: From options and the size of the vocabulary to what is compiled.
        saved_in: Where checkpoints are, if not in the run's own folder.
    """
    run_folder.refuse_occupied(command.out)
    run = prepare(resolve(command.given), command.out, None, make, saved_in)
    print(describe(run), flush=True)
    with stop_requests() as stop:
        run_folder.create(run.out, run.config, run.corpus.tokenizer)
        return train(run, stop)


def resume(
    command: Command, make: Callable[..., Program] = build, saved_in: Path | None = None
) -> int:
    """Goes on with the run of a folder; whatever is wrong shows before anything is changed."""
    config = run_folder.read_config(command.out)
    options = resolve_resumed(config["options"], command.given)
    bpe = options.tokenizer == "bpe"
    tokenizer = run_folder.read_tokenizer(command.out) if bpe else None
    run = prepare(options, command.out, tokenizer, make, saved_in)
    if run.config["corpus"] != config["corpus"]:
        raise UserError(f"not the corpus that this run began with: {run.corpus.description}")
    print(describe(run), flush=True)
    with stop_requests() as stop:
        return train(run, stop)


def prepare(
    options: Options,
    out: Path,
    saved_tokenizer: str | None,
    make: Callable[..., Program],
    saved_in: Path | None,
) -> Run:
    """Reads the corpus and builds what trains on it."""
    path = None if options.data is None else Path(options.data)
    corpus = data.load(path, options.tokenizer, options.vocab_size, saved_tokenizer)
    data.check_length(corpus, options.context)
    config = {"options": dataclasses.asdict(options), "corpus": data.fingerprint(corpus)}
    program = make(options, corpus.vocab_size)
    where = saved_in or out / run_folder.CHECKPOINTS
    return Run(options, corpus, program, out, config, where)


def describe(run: Run) -> str:
    """What is about to happen, in a few lines; for TEON with the plan of its groups."""
    options, corpus, params = run.options, run.corpus, run.program.shapes.params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    training, validation = (sum(map(len, part)) for part in (corpus.training, corpus.validation))
    lines = [
        corpus.description,
        f"{training:,} training and {validation:,} validation tokens, {corpus.vocab_size} kinds",
        f"{options.model} with {count:,} parameters, {options.optimizer}, {options.steps} steps "
        f"of {options.batch_size} x {options.context} tokens",
    ]
    if options.optimizer == "teon":
        lines.append(str(teon_optax.plan(params, optimizers.parse_rules(options.rules))))
    return "\n".join(lines)


def train(run: Run, stop: threading.Event) -> int:
    """The loop: from the newest checkpoint, or the beginning, to the last step or a stop."""
    options, program, out = run.options, run.program, run.out
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints.opened(run.checkpoints))
        step, state = first_state(run, manager)
        run_folder.write_config(out, run.config)
        metrics = stack.enter_context(run_folder.open_metrics(out, step))
        bar = stack.enter_context(progress_bar(options, step))
        validation_loss = None
        while step < options.steps and not requested(stop):
            batch = data.training_batch(
                run.corpus, options.context, options.batch_size, options.seed, step
            )
            state, loss = program.train_step(state, batch)
            step += 1
            record: dict[str, Any] = {"step": step, "loss": float(loss)}
            if step == options.steps or step % options.eval_every == 0:
                record["val_loss"] = validation_loss = evaluate(run, state.params)
            check_finite(record)
            if options.alignment_every and step % options.alignment_every == 0:
                record["alignment"] = alignments.measure(state)
            run_folder.write_metrics(metrics, record)
            bar.set_postfix_str(f"step {step}, loss {record['loss']:.3f}", refresh=False)
            bar.update(options.batch_size * options.context)
            if step == options.steps or step % options.checkpoint_every == 0:
                checkpoints.save(manager, step, state)
        if manager.latest_step() != step:
            checkpoints.save(manager, step, state)
    run_folder.plot(out, f"{options.model}, {options.optimizer}")
    if options.alignment_every:
        alignments.plot(out, f"{options.model}, pairs of neighbouring blocks")
    if step < options.steps:
        command = f"python -m examples.train_gpt --resume --out {shlex.quote(str(out))}"
        print(f"stopped and saved at step {step} of {options.steps}; go on with: {command}")
        return INTERRUPTED
    if validation_loss is None:
        validation_loss = evaluate(run, state.params)
    print(f"loss curves, metrics and checkpoints are in {out}")
    print(f"validation loss {validation_loss:.4f}, perplexity {math.exp(validation_loss):.3f}")
    return 0


def first_state(run: Run, manager: CheckpointManager) -> tuple[int, TrainState]:
    """The newest checkpoint's step and state, or those of the beginning."""
    restored = checkpoints.restore(manager, run.program.shapes)
    if restored is None:
        return 0, run.program.init(jax.random.key(run.options.seed))
    if restored[0] > run.options.steps:
        raise UserError(
            f"--steps {run.options.steps}: {run.out} has a checkpoint at step {restored[0]} already"
        )
    return restored


def evaluate(run: Run, params: Any) -> float:
    """Mean loss over the validation sequences."""
    batches = data.validation_batches(run.corpus, run.options.context, run.options.batch_size)
    losses = [float(run.program.eval_step(params, batch)) for batch in batches]
    return sum(losses) / len(losses)


def check_finite(record: dict[str, float]) -> None:
    """Ends a run that has diverged before its state is saved."""
    if not all(map(math.isfinite, record.values())):
        raise UserError(f"the training has diverged ({record}): try a lower --learning-rate")


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


if __name__ == "__main__":
    sys.exit(main())
