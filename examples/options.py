"""The flags of `train_gpt`: their meaning, limits and defaults."""

import argparse
import dataclasses
import math
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from examples import shards
from examples.errors import UserError
from examples.model import MODELS

METHODS = ("polar_express", "schatten", "jordan", "you", "svd")
# The best of a sweep over the default run in steps of two, each optimizer for itself.
LEARNING_RATES = {"teon": 0.02, "muon": 0.02, "adamw": 0.0015}
ADAM_LEARNING_RATE = 0.01
ADAM_B1, ADAM_B2 = 0.9, 0.95
BATCH_SIZE = 16
SCHEDULES = ("linear", "cosine")
VOCAB_SIZES = {"byte": 256, "bpe": 4096, "shards": shards.VOCAB_SIZE}
ONLY_FOR = {
    "rules": ("teon",),
    "method": ("teon",),
    "alignment_every": ("teon",),
    "adam_learning_rate": ("teon", "muon"),
}
# What --resume may change: anything else would make it another run.
CHANGEABLE = ("steps", "eval_every", "checkpoint_every", "alignment_every")


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
    given = vars(_parser().parse_args(argv))
    resume = given.pop("resume", False)
    if (config := given.pop("config", None)) is not None:
        given = _with_config(config, given)
    run = f"{given.get('model', 'tiny')}-{given.get('optimizer', 'teon')}"
    out = given.pop("out", Path("runs") / run)
    return Command(out, resume, _normalized(given))


def resolve(given: dict[str, Any]) -> Options:
    """Fills in the defaults, some of which depend on model, optimizer and corpus."""
    model, optimizer = given.get("model", "tiny"), given.get("optimizer", "teon")
    for name, optimizers in ONLY_FOR.items():
        if name in given and optimizer not in optimizers:
            raise UserError(f"{_flag(name)} means nothing to --optimizer {optimizer}")
    holds_tokens = "data" in given and shards.is_shards(Path(given["data"]))
    tokenizer = given.get("tokenizer", "shards" if holds_tokens else "byte")
    if holds_tokens != (tokenizer == "shards"):
        raise UserError(f"--tokenizer {tokenizer} does not fit --data: only shards hold tokens")
    if "vocab_size" in given and tokenizer == "byte":
        raise UserError("--vocab-size means nothing to --tokenizer byte: there are 256 bytes")
    if given.get("batch_size", BATCH_SIZE) % given.get("microbatches", 1):
        raise UserError("--microbatches does not divide --batch-size")
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
    return Options(**{**defaults, **given})


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
    return dataclasses.replace(
        options, **{name: given[name] for name in CHANGEABLE if name in given}
    )


def _with_config(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The flags of a TOML file, where the command line does not say otherwise.

    Left out is what the given flags make meaningless: a tokenizer for files that hold tokens, a
    setting of another optimizer.
    """
    try:
        stored = tomllib.loads(path.read_text())
        names = {field.name for field in dataclasses.fields(Options)}
        if unknown := [name for name in stored if name.replace("-", "_") not in names]:
            raise UserError(f"{', '.join(unknown)}: no such setting")
        settings = vars(_parser().parse_args(_as_flags(stored)))
    except (UserError, OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from error
    given = {**settings, **given}
    if "data" in given and shards.is_shards(given["data"]) and "tokenizer" in settings:
        del given["tokenizer"]
    optimizer = given.get("optimizer", "teon")
    foreign = {name for name, optimizers in ONLY_FOR.items() if optimizer not in optimizers}
    return {name: given[name] for name in given if name not in foreign & set(settings)}


def _as_flags(stored: dict[str, Any]) -> list[str]:
    return [
        f"{_flag(name)}={item}"
        for name, value in stored.items()
        if value is not None
        for item in (value if isinstance(value, list) else [value])
    ]


def _from_json(stored: object) -> Options:
    """Options from JSON, held to the same limits as the flags."""
    names = [field.name for field in dataclasses.fields(Options)]
    if not isinstance(stored, dict) or sorted(stored) != sorted(names):
        raise UserError("config.json is damaged: its options are not those of train_gpt")
    try:
        given = _normalized(vars(_parser().parse_args(_as_flags(stored))))
        return Options(**{"data": None, "rules": None, "alignment_every": None, **given})
    except (UserError, TypeError) as error:
        raise UserError(f"config.json is damaged: {error}") from error


def _normalized(given: dict[str, Any]) -> dict[str, Any]:
    """Equal flags become equal values: absolute paths, tuples."""
    if "data" in given:
        given["data"] = str(given["data"].resolve())
    if "rules" in given:
        given["rules"] = tuple(given["rules"])
    return given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: object) -> str:
    return "its default" if value is None else str(value)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    """All flags; one that is not given is absent from the namespace."""
    parser = _OneLineParser(
        prog="python -m examples.train_gpt",
        description="Train a GPT with TEON, Muon or AdamW.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=_path, metavar="DIR", help="the run's folder; default: runs/MODEL-OPTIMIZER")
    add("--resume", action="store_true", help="go on with the run in --out, as it was started")
    add(
        "--config",
        type=_path,
        metavar="FILE",
        help="TOML with any of the flags below, such as examples/configs/llama-60m.toml; flags of "
        "the command line come before its own",
    )
    add("--model", choices=MODELS, help="default: tiny")
    add("--depth", type=_whole(1), help="number of blocks; default: the model's")
    add("--hidden", type=_whole(1), help="size of the MLP's hidden layer; default: the model's")
    add("--optimizer", choices=LEARNING_RATES, help="default: teon")
    add(
        "--data",
        type=_path,
        metavar="PATH",
        help="a text file, a folder of text files, a FineWeb .bin shard, or a folder of shards; "
        "default: the source of Python's standard library",
    )
    add("--tokenizer", choices=VOCAB_SIZES, help="default: byte, and for shards shards")
    add("--vocab-size", type=_whole(256, 65536), help="default: bpe 4096, shards 50257")
    add(
        "--rules",
        nargs="+",
        action="extend",
        metavar="RULE",
        help="REGEX:stack=K[,mode=M][,split=N]; the first rule whose REGEX is found in a "
        "parameter's path takes it. stack=0 is AdamW, stack=1 Muon, more is TEON over K layers "
        r"in the order of the number (?P<layer>\d+); what no rule takes gets AdamW. The paper's: "
        r"'block_(?P<layer>\d+)/attn/(query|key|value):stack=2' 'block_:stack=1'",
    )
    add("--method", choices=METHODS, help="of TEON; default: polar_express")
    rates = ", ".join(f"{name} {rate}" for name, rate in LEARNING_RATES.items())
    add("--learning-rate", type=_real(positive=True), help=f"the peak; default: {rates}")
    add(
        "--adam-learning-rate",
        type=_real(positive=True),
        help=f"of what TEON and Muon leave to AdamW; default: {ADAM_LEARNING_RATE}",
    )
    add("--adam-b1", type=_real(positive=False, below=1.0), help=f"default: {ADAM_B1}")
    add("--adam-b2", type=_real(positive=False, below=1.0), help=f"default: {ADAM_B2}")
    add("--weight-decay", type=_real(positive=False), help="of the blocks' matrices; default: 0.1")
    add(
        "--schedule",
        choices=SCHEDULES,
        help="linear: constant, then linear decay over the last 40 %%; cosine: warm-up over 10 %%, "
        "then half a cosine; default: linear",
    )
    add("--steps", type=_whole(1), help="default: 200")
    add("--batch-size", type=_whole(1), help=f"sequences per step; default: {BATCH_SIZE}")
    add("--microbatches", type=_whole(1), help="parts of a batch, one after another; default: 1")
    add("--context", type=_whole(1), help="tokens per sequence; default: the model's")
    add("--dtype", choices=("float32", "bfloat16"), help="of the activations; default: float32")
    add("--seed", type=_whole(0), help="of parameters and batches; default: 0")
    add("--eval-every", type=_whole(1), metavar="STEPS", help="default: 50")
    add("--checkpoint-every", type=_whole(1), metavar="STEPS", help="default: 50")
    add(
        "--alignment-every",
        type=_whole(1),
        metavar="STEPS",
        help="measure how alike the momenta of neighbouring blocks are, into metrics.jsonl and "
        "alignment.png; default: never",
    )
    return parser


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text.isascii() and text.isdecimal() and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} to {high}")

    return parse


def _real(positive: bool, below: float = math.inf) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if value < below and (value > 0 or (value == 0 and not positive)):
            return value
        wanted = "a positive number" if positive else "zero or a positive number"
        wanted += "" if below == math.inf else f" below {below:g}"
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")

    return parse
