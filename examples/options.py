"""What can be chosen of a run: models, and options read by tyro from flags and from TOML.

Nothing here loads JAX, which takes seconds: what is wrong with a command shows at once.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import reprlib
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import tyro

from examples import data
from examples.errors import UserError

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


# What a value may be, wherever it was written: a function that raises ValueError.


def whole(low: int, high: int = 2**31 - 1) -> Callable[[Any], None]:
    """Makes a check for whole numbers from `low` to `high`."""

    def check(value: Any) -> None:
        # Not isinstance: True is an int, too.
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{_shown(value)} is not a whole number from {low} to {high}")

    return check


def real(positive: bool, below: float = math.inf) -> Callable[[Any], None]:
    """Makes a check for numbers from 0 on, or above it, and `below` a limit, as float32 too."""
    wanted = "a positive number" if positive else "zero or a positive number"
    wanted += "" if below == math.inf else f" below {below:g}"
    largest = float(np.finfo(np.float32).max)

    def check(value: Any) -> None:
        if type(value) in (int, float) and 0 <= value <= largest:
            single = np.float32(value)
            if single < below and (single > 0 or (value == 0 and not positive)):
                return
        raise ValueError(f"{_shown(value)} is not {wanted} in float32")

    return check


def writable_path(value: Any) -> None:
    """Checks a path that every library can write to: Orbax names files in UTF-8."""
    if type(value) is not str:
        raise ValueError(f"{_shown(value)} is not a string")
    if not value:
        raise ValueError("an empty path")
    if "\0" in value:
        raise ValueError(f"{value!r} has a NUL character, which no path can have")
    try:
        os.path.realpath(value).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{value!r} is not UTF-8, or lies in a folder whose name is not: rename it"
        ) from None


def texts(value: Any) -> None:
    """Checks a tuple of strings."""
    if type(value) is not tuple or not value or not all(type(text) is str for text in value):
        raise ValueError(f"{_shown(value)} is not a string or a list of strings")


def _shown(value: Any) -> str:
    return reprlib.repr(value)


Count = Annotated[int, whole(1)]
Index = Annotated[int, whole(0)]
Interval = Annotated[int, whole(1), tyro.conf.arg(metavar="STEPS")]
Rate = Annotated[float, real(positive=True)]
Momentum = Annotated[float, real(positive=False, below=1.0)]


PathText = Annotated[str, writable_path]
RuleTexts = Annotated[tuple[str, ...], texts]


def shown_as(metavar: str | None = None, default: str = "the model's") -> Any:
    """Tells tyro how --help shows a flag."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


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
    """The peak."""
    adam_learning_rate: Rate = 0.01
    """The peak of what TEON and Muon leave to AdamW."""
    adam_b1: Momentum = ADAM_B1
    """Of every AdamW."""
    adam_b2: Momentum = ADAM_B2
    """Of every AdamW."""
    weight_decay: Annotated[float, real(positive=False)] = 0.1
    """Of the blocks' matrices."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Linear: constant, then linear decay over the last 40 %; cosine: warm-up over 10 %, then half
    a cosine."""
    steps: Count = 200
    """Length of the run."""
    batch_size: Count = 16
    """Sequences per step."""
    microbatches: Count = 1
    """Parts of a batch, one after another."""
    context: Annotated[Count, shown_as()] = MODELS["tiny"].context
    """Tokens per sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations."""
    seed: Index = 0
    """Of parameters and batches."""
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


def check_fields(flags: Any) -> None:
    """Raises UserError unless every field of a dataclass is what its annotation allows."""
    for name, hint in typing.get_type_hints(type(flags), include_extras=True).items():
        _check(name, getattr(flags, name), hint)


def _check(name: str, value: Any, hint: Any) -> None:
    """Raises UserError unless the annotation of a field allows the value."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    try:
        if kind is Annotated:
            for check in filter(callable, hint.__metadata__):
                check(value)
            _check(name, value, arguments[0])
        elif kind in (types.UnionType, typing.Union) and value is not None:
            _check(name, value, arguments[0])
        elif kind is Literal and value not in arguments:
            raise ValueError(f"{_shown(value)} is not one of {', '.join(arguments)}")
    except ValueError as error:
        raise UserError(f"{_flag(name)}: {error}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# Reading.

Kind = TypeVar("Kind")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NUMBERS = tyro.constructors.ConstructorRegistry()


@_NUMBERS.primitive_rule
def _number_or_text(
    of: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Reads numbers, and leaves what is none to the check of its field, which says so better."""
    if of.type not in (int, float):
        return None

    def read(words: list[str]) -> Any:
        with contextlib.suppress(ValueError):
            return of.type(words[0])
        return words[0]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=of.type.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, of.type),
        str_from_instance=lambda value: [str(value)],
    )


def read_flags(
    kind: type[Kind], argv: Sequence[str] | None, program: str, description: str | None
) -> Kind:
    """Has tyro make a dataclass of flags; its complaint becomes a UserError of one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                prog=f"python -m {program}",
                description=description,
                args=argv,
                registry=_NUMBERS,
            )
    except SystemExit as end:
        if not end.code:  # after --help
            raise
    # tyro has drawn a box: a title, a paragraph that says what is wrong, then what might help.
    lines = [line.strip("│ ") for line in _COLOURS.sub("", complaint.getvalue()).splitlines()[1:]]
    below_title = itertools.dropwhile(_is_rule, lines)
    raise UserError(" ".join(itertools.takewhile(lambda line: not _is_rule(line), below_title)))


def _is_rule(line: str) -> bool:
    return not line.strip("─-╰╯")


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
    _check("out", out, PathText)
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
                    raise UserError(f"{name} and {_flag(name)[2:]} are one setting: write it once")
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
    _check(name, value, typing.get_type_hints(Options, include_extras=True)[name])
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
                f"--resume cannot change {_flag(name)} from {' to '.join(map(str, shown))}: the "
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
            raise UserError(f"{_flag(name)} means nothing to --optimizer {options.optimizer}")
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
