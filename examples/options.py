"""What can be chosen of a run: models, and options read by tyro from flags and from TOML.

Nothing here loads JAX, which takes seconds: what is wrong with a command shows at once.
"""

import dataclasses
import os
import re
import sys
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from examples import data
from examples.command_line import (
    Count,
    Index,
    Interval,
    Momentum,
    PathText,
    Rate,
    RuleTexts,
    UserError,
    check,
    check_fields,
    flag,
    read_flags,
    real,
    shown_as,
    whole,
)

ModelName = Literal[
    "tiny",
    "gpt-small",
    "gpt-base",
    "gpt-large",
    "llama-60m",
    "llama-130m",
    "llama-350m",
    "llama-1b",
]
OptimizerName = Literal["teon", "muon", "adamw"]
# The best of a sweep over the default run in steps of two, each optimizer for itself.
LEARNING_RATES: dict[OptimizerName, float] = {"teon": 0.02, "muon": 0.02, "adamw": 0.0015}
ADAM_B1, ADAM_B2 = 0.9, 0.95
VOCAB_SIZES = {"byte": 256, "bpe": 4096, "shards": data.SHARDS_VOCAB_SIZE}
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
# Every block is traced and compiled by itself: more of them would take hours.
MOST_BLOCKS = 1024


# Models.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model.

    Attributes:
        width: Size of the residual stream.
        depth: Number of blocks.
        heads: Number of attention heads; divides the width.
        hidden: Size of the MLP's hidden layer.
        vocab_size: Number of tokens.
        context: Longest sequence; the learned positions have this many rows.
        positions: `learned` adds an embedding, `rotary` turns queries and keys.
        norm: `layer` (with mean and without bias) or `rms`.
        activation: `gelu` has matrices up and down, `swiglu` also a gate.
        tied: Whether the embedding is also the output head.
        dtype: What the blocks compute in; parameters and logits are float32.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    vocab_size: int
    context: int
    positions: Literal["learned", "rotary"]
    norm: Literal["layer", "rms"]
    activation: Literal["gelu", "swiglu"]
    tied: bool
    dtype: Literal["float32", "bfloat16"] = "float32"


def gpt(width: int, depth: int, heads: int, context: int) -> ModelConfig:
    """Makes a GPT-2: learned positions, LayerNorm, GELU, tied head, no biases."""
    return ModelConfig(
        width, depth, heads, 4 * width, 50257, context, "learned", "layer", "gelu", tied=True
    )


def llama(width: int, hidden: int, depth: int, heads: int) -> ModelConfig:
    """Makes a LLaMA: rotary positions, RMSNorm, SwiGLU, a head of its own."""
    return ModelConfig(
        width, depth, heads, hidden, 32000, 1024, "rotary", "rms", "swiglu", tied=False
    )


# The LLaMA sizes are those of the GaLore paper (arXiv 2403.03507), whose names are rounded:
# 58, 134, 368 and 1339 million parameters.
MODELS: dict[str, ModelConfig] = {
    "tiny": dataclasses.replace(llama(128, 352, 4, 2), vocab_size=256, context=128, tied=True),
    "gpt-small": gpt(768, 12, 12, 2048),
    "gpt-base": gpt(1024, 24, 16, 4096),
    "gpt-large": gpt(1280, 36, 20, 1024),
    "llama-60m": llama(512, 1376, 8, 8),
    "llama-130m": llama(768, 2048, 12, 12),
    "llama-350m": llama(1024, 2736, 24, 16),
    "llama-1b": llama(2048, 5461, 24, 32),
}


# Options.


@dataclasses.dataclass(frozen=True)
class Options:
    """All that a run's result depends on; each field is the flag of its name."""

    model: ModelName = "tiny"
    """Which of the models to train."""
    depth: Annotated[int, whole(1, MOST_BLOCKS), shown_as()] = MODELS["tiny"].depth
    """Number of blocks."""
    hidden: Annotated[Count, shown_as()] = MODELS["tiny"].hidden
    """Size of the MLP's hidden layer."""
    optimizer: OptimizerName = "teon"
    """What trains the blocks' matrices."""
    data: Annotated[PathText | None, shown_as("PATH", "Python's standard library")] = None
    """A text file, a folder of text files, a FineWeb .bin shard, or a folder of shards."""
    tokenizer: Annotated[
        Literal["byte", "bpe", "shards"], shown_as(default="byte, and for shards shards")
    ] = "byte"
    """How text becomes tokens."""
    vocab_size: Annotated[
        int, whole(256, 65536), shown_as(default="byte 256, bpe 4096, shards 50257")
    ] = 256
    """Number of tokens."""
    rules: Annotated[RuleTexts | None, shown_as("RULE [RULE ...]", "the library's")] = None
    r"""REGEX:stack=K[,mode=M][,split=N]; the first rule whose REGEX is found in a parameter's path
    takes it. stack=0 is AdamW, stack=1 Muon, more is TEON over K layers in the order of the number
    (?P<layer>\d+); what no rule takes gets AdamW. The paper's:
    'block_(?P<layer>\d+)/attn/(query|key|value):stack=2' 'block_:stack=1'."""
    method: Literal["polar_express", "schatten", "fast", "jordan", "dion", "you", "svd"] = (
        "polar_express"
    )
    """How TEON orthogonalizes."""
    learning_rate: Annotated[
        Rate, shown_as(default=", ".join(f"{name} {r}" for name, r in LEARNING_RATES.items()))
    ] = LEARNING_RATES["teon"]
    """The schedule's peak."""
    adam_learning_rate: Rate = 0.01
    """The peak for what TEON and Muon leave to AdamW."""
    adam_b1: Momentum = ADAM_B1
    """How much of its first moment AdamW keeps in a step."""
    adam_b2: Momentum = ADAM_B2
    """How much of its second moment AdamW keeps in a step."""
    weight_decay: Annotated[float, real(positive=False)] = 0.1
    """How much the blocks' matrices decay, times the learning rate."""
    schedule: Literal["linear", "cosine"] = "linear"
    """linear: constant, then linear decay over the last 40 %; cosine: warm-up over 10 %, then half
    a cosine."""
    steps: Count = 200
    """Optimizer steps of the whole run."""
    batch_size: Count = 16
    """Sequences per step."""
    microbatches: Count = 1
    """Parts of a batch, one after another."""
    context: Annotated[Count, shown_as()] = MODELS["tiny"].context
    """Tokens per sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the activations are computed in."""
    seed: Index = 0
    """What first parameters and batches are drawn from."""
    eval_every: Interval = 50
    """Steps between two validation losses."""
    checkpoint_every: Interval = 50
    """Steps between two checkpoints."""
    alignment_every: Annotated[Count | None, shown_as("STEPS", "never")] = None
    """Measure how alike the momenta of neighbouring blocks are, into metrics.jsonl and
    alignment.png."""

    def __post_init__(self) -> None:
        """Raises UserError for a value that its field cannot have."""
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Flags(Options):
    """The flags of `train_gpt`: options, and where the run is."""

    out: Annotated[PathText | None, shown_as("DIR", "runs/MODEL-OPTIMIZER")] = None
    """The run's folder."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with the run in --out, as it was started."""
    config: Annotated[PathText | None, shown_as("FILE", "none")] = None
    """TOML with any of the options, such as examples/configs/llama-60m.toml; flags of the command
    line come before its own."""


class Command(NamedTuple):
    """What the user wrote: where, whether to go on, and the options given."""

    out: Path
    resume: bool
    given: dict[str, Any]


# Reading.


def parse(argv: Sequence[str] | None) -> Command:
    """Reads the command line of `train_gpt`; raises UserError for a flag that makes no sense."""
    argv = sys.argv[1:] if argv is None else argv
    flags = read_flags(Flags, argv, "examples.train_gpt", "Trains a GPT with TEON, Muon or AdamW.")
    return command(flags, argv)


def command(flags: Flags, argv: Sequence[str]) -> Command:
    """Keeps of the flags those that were given, and adds those of `--config`."""
    names = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word[:2] == "--"]
    if names.count("rules") > 1:
        raise UserError("--rules: write all rules behind one --rules")
    given = {
        field.name: getattr(flags, field.name)
        for field in dataclasses.fields(Options)
        if field.name in names
    }
    if flags.config is not None:
        given = _with_config(flags.config, given)
    if given.get("data") is not None:
        given["data"] = os.path.realpath(given["data"])
    run = f"{given.get('model', 'tiny')}-{given.get('optimizer', 'teon')}"
    out = flags.out or f"runs/{run}"
    check("out", out, PathText)
    return Command(Path(out), flags.resume, given)


def _with_config(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """Adds the options of a TOML file where the command line does not say otherwise.

    Left out is what the given flags make meaningless: a tokenizer for files that hold tokens, a
    setting of another optimizer.
    """
    settings: dict[str, Any] = {}
    try:
        with open(path, "rb") as file:
            for key, value in tomllib.load(file).items():
                name = key.replace("-", "_")
                if name in settings:
                    raise UserError(f"{name} and {flag(name)[2:]} are one setting: write it once")
                settings[name] = _from_file(key, value)
    except (UserError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: {error}") from error
    given = {**settings, **given}
    if data.is_shards(_path(given.get("data"))) and "tokenizer" in settings:
        del given["tokenizer"]
    optimizer = given.get("optimizer", "teon")
    foreign = {name for name, optimizers in ONLY_FOR.items() if optimizer not in optimizers}
    return {name: given[name] for name in given if name not in foreign & set(settings)}


def _from_file(key: str, value: Any) -> Any:
    """Turns what TOML or JSON has of an option into what `Options` hold; raises UserError."""
    name = key.replace("-", "_")
    if name not in {field.name for field in dataclasses.fields(Options)}:
        raise UserError(f"{key}: no such setting")
    if name == "rules":
        value = (value,) if isinstance(value, str) else value
        value = tuple(value) if isinstance(value, list) and value else value
    check(name, value, typing.get_type_hints(Options, include_extras=True)[name])
    return float(value) if type(getattr(Options, name)) is float else value


def resolve(given: dict[str, Any]) -> Options:
    """Fills in the defaults, some of which depend on model, optimizer and corpus."""
    model = MODELS[given.get("model", "tiny")]
    holds_tokens = data.is_shards(_path(given.get("data")))
    tokenizer = given.get("tokenizer", "shards" if holds_tokens else "byte")
    if "vocab_size" in given and tokenizer == "byte":
        raise UserError("--vocab-size means nothing to --tokenizer byte: there are 256 bytes")
    defaults = {
        "depth": model.depth,
        "hidden": model.hidden,
        "context": model.context,
        "tokenizer": tokenizer,
        "vocab_size": VOCAB_SIZES[tokenizer],
        "learning_rate": LEARNING_RATES[given.get("optimizer", "teon")],
    }
    options = Options(**{**defaults, **given})
    _check_given(options, given)
    _check_together(options)
    return options


def resolve_resumed(stored: object, given: dict[str, Any]) -> Options:
    """Takes the stored options with the few that may change.

    Args:
        stored: What `config.json` holds of the options.
        given: The options of this command.

    Raises:
        UserError: If the two conflict, or the stored ones are none.
    """
    try:
        names = {field.name for field in dataclasses.fields(Options)}
        if not isinstance(stored, dict) or set(stored) != names:
            raise UserError("its options are not those of train_gpt")
        options = Options(**{name: _from_file(name, stored[name]) for name in stored})
        _check_together(options)
    except UserError as error:
        raise UserError(f"config.json is damaged: {error}") from error
    for name, value in given.items():
        before = getattr(options, name)
        if name not in CHANGEABLE and value != before:
            shown = ("its default" if option is None else option for option in (before, value))
            raise UserError(
                f"--resume cannot change {flag(name)} from {' to '.join(map(str, shown))}: the "
                "checkpoint is of another run; choose another --out"
            )
    _check_given(options, given)
    options = dataclasses.replace(options, **given)
    _check_together(options)
    return options


def _check_given(options: Options, given: dict[str, Any]) -> None:
    """Raises UserError for a flag that means nothing, and for a corpus that does not fit."""
    for name, optimizers in ONLY_FOR.items():
        if name in given and options.optimizer not in optimizers:
            raise UserError(f"{flag(name)} means nothing to --optimizer {options.optimizer}")
    path = _path(options.data)
    if path is not None and not (path.is_file() or path.is_dir()):
        raise UserError(f"--data: no file or folder: {path}")
    if data.is_shards(path) != (options.tokenizer == "shards"):
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
        read_rule(text)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


class RuleText(NamedTuple):
    """What `teon_optax.Rule` is to be called with."""

    pattern: str
    stack: int
    mode: int = 1
    split: int = 1


def read_rule(text: str) -> RuleText:
    """Reads a rule of `--rules`, and raises UserError for what is wrong with it by itself.

    `teon_optax.Rule` would refuse it too, but needs JAX.
    """
    pattern, _, settings = text.rpartition(":")
    # Up to 6 digits: no model has as many layers or parts.
    if not re.fullmatch("stack=[0-9]{1,6}(,(mode|split)=[0-9]{1,6})*", settings) or not pattern:
        raise UserError(f"--rules {text!r} is not REGEX:stack=K[,mode=M][,split=N]")
    pairs = re.findall(r"(\w+)=(\d+)", settings)
    numbers = {name: int(value) for name, value in pairs}
    if len(numbers) < len(pairs):
        raise UserError(f"--rules {text!r} says {settings}: write each of stack, mode, split once")
    try:
        groups = re.compile(pattern).groupindex
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--rules {text!r}: no regular expression: {error}") from error
    rule = RuleText(pattern, **numbers)
    if rule.stack >= 2 and "layer" not in groups:
        raise UserError(
            rf"--rules {text!r} cannot tell which layer a parameter belongs to: put (?P<layer>\d+) "
            r"where its path has the number, as in 'block_(?P<layer>\d+)/attn/query:stack=2'"
        )
    if rule.mode not in (1, 2, 3):
        raise UserError(f"--rules {text!r}: mode is 1, 2 or 3")
    if rule.split < 1:
        raise UserError(f"--rules {text!r}: split is a number of parts, from 1")
    return rule
