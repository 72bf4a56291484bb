"""What a run depends on: from flags, TOML and JSON to options that fit together."""

import dataclasses
import os
import reprlib
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples import rule_texts, shards
from examples.errors import UserError
from examples.flags import (
    ADAM_B1,
    ADAM_B2,
    ADAM_LEARNING_RATE,
    BATCH_SIZE,
    LEARNING_RATES,
    METHODS,
    SCHEDULES,
    VOCAB_SIZES,
    parser,
)
from examples.model_sizes import MODELS

ONLY_FOR = {
    "rules": ("teon",),
    "method": ("teon",),
    "alignment_every": ("teon",),
    "adam_learning_rate": ("teon", "muon"),
}
# What --resume may change: anything else would make it another run.
CHANGEABLE = ("steps", "eval_every", "checkpoint_every", "alignment_every")
# What XLA can count in an int32.
MOST_TOKENS = 2**31 - 1
WORDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    tuple[str, ...]: "a string or a list of strings",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """All that a run's result depends on; each field is the flag of its name."""

    model: str
    optimizer: str
    data: str | None
    tokenizer: str
    vocab_size: int
    depth: int
    hidden: int
    rules: tuple[str, ...] | None
    method: str
    learning_rate: float
    adam_learning_rate: float
    adam_b1: float
    adam_b2: float
    weight_decay: float
    schedule: str
    steps: int
    batch_size: int
    microbatches: int
    context: int
    dtype: str
    seed: int
    eval_every: int
    checkpoint_every: int
    alignment_every: int | None


@dataclasses.dataclass(frozen=True)
class Command:
    """What the user wrote: where, whether to go on, and the flags given."""

    out: Path
    resume: bool
    given: dict[str, Any]


def parse(argv: Sequence[str] | None) -> Command:
    """Reads the command line; raises UserError for a flag that makes no sense."""
    given = vars(parser().parse_args(argv))
    resume = given.pop("resume", False)
    if (config := given.pop("config", None)) is not None:
        given = _with_config(config, given)
    if (out := given.pop("out", None)) is None:
        run = f"{given.get('model', 'tiny')}-{given.get('optimizer', 'teon')}"
        out = parser().parse_args(["--out", f"runs/{run}"]).out
    return Command(out, resume, _normalized(given))


def resolve(given: dict[str, Any]) -> Options:
    """Fills in the defaults, some of which depend on model, optimizer and corpus."""
    model, optimizer = given.get("model", "tiny"), given.get("optimizer", "teon")
    holds_tokens = "data" in given and shards.is_shards(Path(given["data"]))
    tokenizer = given.get("tokenizer", "shards" if holds_tokens else "byte")
    if "vocab_size" in given and tokenizer == "byte":
        raise UserError("--vocab-size means nothing to --tokenizer byte: there are 256 bytes")
    defaults = {
        "model": model,
        "optimizer": optimizer,
        "data": None,
        "tokenizer": tokenizer,
        "vocab_size": VOCAB_SIZES[tokenizer],
        "depth": MODELS[model].depth,
        "hidden": MODELS[model].hidden,
        "rules": None,
        "method": METHODS[0],
        "learning_rate": LEARNING_RATES[optimizer],
        "adam_learning_rate": ADAM_LEARNING_RATE,
        "adam_b1": ADAM_B1,
        "adam_b2": ADAM_B2,
        "weight_decay": 0.1,
        "schedule": SCHEDULES[0],
        "steps": 200,
        "batch_size": BATCH_SIZE,
        "microbatches": 1,
        "context": MODELS[model].context,
        "dtype": "float32",
        "seed": 0,
        "eval_every": 50,
        "checkpoint_every": 50,
        "alignment_every": None,
    }
    options = Options(**{**defaults, **given})
    _check_given(options, given)
    _check_together(options)
    return options


def resolve_resumed(stored: object, given: dict[str, Any]) -> Options:
    """The stored options with the few that may change; raises UserError where they conflict.

    Args:
        stored: What `config.json` holds of the options.
        given: The flags of this command.
    """
    options = _from_json(stored)
    for name, value in given.items():
        if name not in CHANGEABLE and value != getattr(options, name):
            raise UserError(
                f"--resume cannot change {_flag(name)} from {_shown(getattr(options, name))} to "
                f"{_shown(value)}: the checkpoint is of another run; choose another --out"
            )
    _check_given(options, given)
    changed = {name: given[name] for name in CHANGEABLE if name in given}
    options = dataclasses.replace(options, **changed)
    _check_together(options)
    return options


def _check_given(options: Options, given: dict[str, Any]) -> None:
    """Raises UserError for a flag that means nothing, and for a corpus that does not fit."""
    for name, optimizers in ONLY_FOR.items():
        if name in given and options.optimizer not in optimizers:
            raise UserError(f"{_flag(name)} means nothing to --optimizer {options.optimizer}")
    data = None if options.data is None else Path(options.data)
    if data is not None and not (data.is_file() or data.is_dir()):
        raise UserError(f"--data: no file or folder: {data}")
    if shards.is_shards(data) != (options.tokenizer == "shards"):
        raise UserError(
            f"--tokenizer {options.tokenizer} does not fit --data: only shards hold tokens"
        )


def _check_together(options: Options) -> None:
    """Raises UserError where options, each of which makes sense, contradict each other."""
    batch, parts, context = options.batch_size, options.microbatches, options.context
    if batch % parts:
        raise UserError(f"--microbatches {parts} does not divide --batch-size {batch}")
    if batch * (context + 1) > MOST_TOKENS:
        raise UserError(
            f"--batch-size {batch} and --context {context} make a batch of more than "
            f"{MOST_TOKENS:,} tokens"
        )
    if options.alignment_every is not None and options.depth == 1:
        raise UserError("--alignment-every compares neighbouring blocks: --depth 1 has none")
    for text in options.rules or ():
        rule_texts.read(text)


def _with_config(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The flags of a TOML file, where the command line does not say otherwise.

    Left out is what the given flags make meaningless: a tokenizer for files that hold tokens, a
    setting of another optimizer.
    """
    try:
        with open(path, "rb") as file:
            settings = _settings(_with_one_spelling(tomllib.load(file)))
    except (UserError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: {error}") from error
    given = {**settings, **given}
    if "data" in given and shards.is_shards(given["data"]) and "tokenizer" in settings:
        del given["tokenizer"]
    optimizer = given.get("optimizer", "teon")
    foreign = {name for name, optimizers in ONLY_FOR.items() if optimizer not in optimizers}
    return {name: given[name] for name in given if name not in foreign & set(settings)}


def _with_one_spelling(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of a TOML file by the names of options, which it may write with hyphens."""
    names = {field.name for field in dataclasses.fields(Options)}
    settings: dict[str, Any] = {}
    for key, value in stored.items():
        name = key.replace("-", "_")
        if name not in names:
            raise UserError(f"{key}: no such setting")
        if name in settings:
            raise UserError(f"{name} and {name.replace('_', '-')} are one setting: write it once")
        settings[name] = value
    return settings


def _settings(stored: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file, held to the limits of the flags of their names."""
    types = typing.get_type_hints(Options)
    flags = [f"{_flag(name)}={item}" for name in stored for item in _items(name, stored, types)]
    return vars(parser().parse_args(flags))


def _items(name: str, stored: dict[str, Any], types: dict[str, Any]) -> list[Any]:
    """What is to follow the flag: the value, or its items; none for the null of JSON."""
    value, accepted = stored[name], typing.get_args(types[name]) or (types[name],)
    if value is None and type(None) in accepted:
        return []
    for wanted in accepted:
        if wanted == tuple[str, ...]:
            items = [value] if isinstance(value, str) else value
            if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
                return items
        # Not isinstance: True is an int, too.
        elif type(value) is wanted or (wanted is float and type(value) is int):
            return [value]
    raise UserError(f"{_flag(name)}: {reprlib.repr(value)} is not {WORDS[accepted[0]]}")


def _from_json(stored: object) -> Options:
    """Options from JSON, held to the same limits as the flags."""
    names = [field.name for field in dataclasses.fields(Options)]
    if not isinstance(stored, dict) or sorted(stored) != sorted(names):
        raise UserError("config.json is damaged: its options are not those of train_gpt")
    try:
        given = _normalized(_settings(stored))
        options = Options(**{"data": None, "rules": None, "alignment_every": None, **given})
        _check_together(options)
    except (UserError, ValueError) as error:
        raise UserError(f"config.json is damaged: {error}") from error
    return options


def _normalized(given: dict[str, Any]) -> dict[str, Any]:
    """Equal flags become equal values: absolute paths, tuples."""
    if "data" in given:
        given["data"] = os.path.realpath(given["data"])
    if "rules" in given:
        given["rules"] = tuple(given["rules"])
    return given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: object) -> str:
    return "its default" if value is None else str(value)
