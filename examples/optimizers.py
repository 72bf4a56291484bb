"""The three optimizers of `train_gpt`, set up so that their results can be compared.

TEON and Muon take the blocks' matrices and leave embeddings, norms and the head to the same AdamW.
All share the clipping, the schedule's shape, and weight decay on the blocks' matrices alone.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from optax import contrib

import teon_optax
from examples.command_line import UserError
from examples.options import Options, read_rule

CLIP = 1.0
LONGEST_WARMUP = 20
DECAY_SHARE = 0.4


def build(options: Options, shardings: Any = None) -> optax.GradientTransformation:
    """Makes the optimizer that the options name; `shardings`: how parameters lie on a mesh."""
    rate = SCHEDULES[options.schedule](options.learning_rate, options.steps)
    adam_rate = SCHEDULES[options.schedule](options.adam_learning_rate, options.steps)
    b1, b2 = options.adam_b1, options.adam_b2
    decay = options.weight_decay
    rest = optax.adamw(adam_rate, b1=b1, b2=b2, weight_decay=0.0)
    if options.optimizer == "teon":
        rules = parse_rules(options.rules)
        optimizer = teon_optax.teon(
            rate,
            rules,
            method=options.method,
            weight_decay=decay,
            fallback=rest,
            shardings=shardings,
        )
    elif options.optimizer == "muon":
        # Muon's own Adam is Nesterov's; a partition gives the rest the same AdamW as TEON does.
        muon = contrib.muon(rate, weight_decay=decay)
        optimizer = optax.partition({"muon": muon, "rest": rest}, _muon_or_rest)
    else:
        optimizer = optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay, mask=_block_matrices)
    return optax.chain(optax.clip_by_global_norm(CLIP), optimizer)


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Joins a short linear warm-up, the peak, and a linear decay over the last 40 %."""
    warmup = max(1, min(LONGEST_WARMUP, steps // 10))
    decay = round(DECAY_SHARE * steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / warmup, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ],
        [warmup, steps - decay],
    )


def cosine_schedule(peak: float, steps: int) -> optax.Schedule:
    """Joins a linear warm-up over a tenth of the steps and half a cosine to zero."""
    warmup = max(1, steps // 10)
    decay_steps = max(steps, warmup + 1)  # optax refuses a decay of no steps
    return optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup, decay_steps)


SCHEDULES = {"linear": schedule, "cosine": cosine_schedule}


def describe_new_length(options: Options, steps_before: int, step: int) -> str:
    """Says what another `--steps` makes of the learning rate of a run that goes on.

    Args:
        options: Of the run from here on.
        steps_before: The length that it had so far.
        step: Steps that are done.
    """
    make = SCHEDULES[options.schedule]
    before, after = (
        np.asarray(make(options.learning_rate, steps)(np.arange(step + 1)))
        for steps in (steps_before, options.steps)
    )
    if np.array_equal(before[:step], after[:step]):
        return f"goes on at step {step}, as a run of {options.steps} steps from the start would"
    return (
        f"goes on at step {step} on the schedule of {options.steps} steps, at a learning rate of "
        f"{after[step]:.3g}: on that of {steps_before} it had come to {before[step]:.3g}. This is "
        f"no run of {options.steps} steps from the start: for that, write --steps {options.steps} "
        "with another --out and without --resume"
    )


def parse_rules(texts: Sequence[str] | None) -> list[teon_optax.Rule] | None:
    """Reads `--rules`; None stands for the library's own."""
    return None if texts is None else [parse_rule(text) for text in texts]


def parse_rule(text: str) -> teon_optax.Rule:
    """Reads a rule `REGEX:stack=K[,mode=M][,split=N]`; raises UserError for anything else."""
    pattern, stack, mode, split = read_rule(text)
    try:
        return teon_optax.Rule(pattern, stack, mode, split=split)
    except ValueError as error:
        raise UserError(f"--rules {text!r}: {error}") from error


def check_rules(texts: Sequence[str] | None, params: Any) -> None:
    """Raises UserError where rules do not fit the parameters, or some take none of them."""
    try:
        plan = teon_optax.plan(params, parse_rules(texts))
    except ValueError as error:
        raise UserError(f"--rules: {error}") from error
    if unused := [text for text in texts or () if parse_rule(text) in plan.unused]:
        matrices = [_collapsed(path) for path, leaf in _with_paths(params) if leaf.ndim > 1]
        raise UserError(
            f"--rules {' '.join(map(repr, unused))}: no matrix is left for that; write a REGEX "
            f"found in one of {', '.join(dict.fromkeys(matrices))}, and a rule that "
            "takes few matrices before one that takes many"
        )
    if not plan.groups:
        raise UserError("--rules leave every parameter to AdamW: that is --optimizer adamw")


def describe(options: Options, params: Any) -> str:
    """Tells in a table what the optimizer does to each parameter: for TEON, the plan.

    Args:
        options: Of the run.
        params: The parameters, or their shapes.
    """
    if options.optimizer == "teon":
        return str(teon_optax.plan(params, parse_rules(options.rules)))
    rate, decay = f"at {options.learning_rate:g}", f"weight decay {options.weight_decay:g}"
    if options.optimizer == "muon":
        treatment = {
            True: f"Muon {rate}, {decay}",
            False: f"AdamW at {options.adam_learning_rate:g}",
        }
    else:
        treatment = {True: f"AdamW {rate}, {decay}", False: f"AdamW {rate}"}
    rows = Counter(
        (_collapsed(path), " x ".join(map(str, leaf.shape)), treatment[in_block])
        for (path, leaf), in_block in zip(
            _with_paths(params), jax.tree.leaves(_block_matrices(params)), strict=True
        )
    )
    table = [("parameter", "shape", "leaves", "optimizer")]
    table += [(path, shape, str(count), words) for (path, shape, words), count in rows.items()]
    path_width, shape_width = (max(len(row[column]) for row in table) for column in (0, 1))
    return "\n".join(
        f"{path:{path_width}}  {shape:>{shape_width}}  {count:>6}  {words}"
        for path, shape, count, words in table
    )


def _with_paths(params: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in leaves]


def _collapsed(path: str) -> str:
    """Puts a star in place of the numbers of a path, as the plan does."""
    return re.sub(r"\d+", "*", path)


def _block_matrices(params: Any) -> Any:
    """Marks by True what Muon takes and weight decay shrinks, in the tree of the parameters."""

    def inside_block(path: Any, leaf: jax.Array) -> bool:
        return leaf.ndim == 2 and jax.tree_util.keystr(path, simple=True).startswith("block_")

    return jax.tree_util.tree_map_with_path(inside_block, params)


def _muon_or_rest(params: Any) -> Any:
    return jax.tree.map(lambda matrix: "muon" if matrix else "rest", _block_matrices(params))
