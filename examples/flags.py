"""The flags of `train_gpt`: their names, limits and help."""

import argparse

from examples import rule_texts, shards
from examples.command_line import Parser, path, real, whole
from examples.model_sizes import MODELS

METHODS = ("polar_express", "schatten", "fast", "jordan", "dion", "you", "svd")
# The best of a sweep over the default run in steps of two, each optimizer for itself.
LEARNING_RATES = {"teon": 0.02, "muon": 0.02, "adamw": 0.0015}
ADAM_LEARNING_RATE = 0.01
ADAM_B1, ADAM_B2 = 0.9, 0.95
BATCH_SIZE = 16
SCHEDULES = ("linear", "cosine")
VOCAB_SIZES = {"byte": 256, "bpe": 4096, "shards": shards.VOCAB_SIZE}
# Every block is traced and compiled by itself: more of them would take hours.
MOST_BLOCKS = 1024


def parser() -> Parser:
    """All flags; one that is not given is absent from the namespace."""
    parser = Parser(
        prog="python -m examples.train_gpt",
        description="Train a GPT with TEON, Muon or AdamW.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=path, metavar="DIR", help="the run's folder; default: runs/MODEL-OPTIMIZER")
    add("--resume", action="store_true", help="go on with the run in --out, as it was started")
    add(
        "--config",
        type=path,
        metavar="FILE",
        help="TOML with any of the flags below, such as examples/configs/llama-60m.toml; flags of "
        "the command line come before its own",
    )
    add("--model", choices=MODELS, help="default: tiny")
    add("--depth", type=whole(1, MOST_BLOCKS), help="number of blocks; default: the model's")
    add("--hidden", type=whole(1), help="size of the MLP's hidden layer; default: the model's")
    add("--optimizer", choices=LEARNING_RATES, help="default: teon")
    add(
        "--data",
        type=path,
        metavar="PATH",
        help="a text file, a folder of text files, a FineWeb .bin shard, or a folder of shards; "
        "default: the source of Python's standard library",
    )
    add("--tokenizer", choices=VOCAB_SIZES, help="default: byte, and for shards shards")
    add("--vocab-size", type=whole(256, 65536), help="default: bpe 4096, shards 50257")
    add(
        "--rules",
        nargs="+",
        action="extend",
        metavar="RULE",
        help=f"{rule_texts.FORM}; the first rule whose REGEX is found in a "
        "parameter's path takes it. stack=0 is AdamW, stack=1 Muon, more is TEON over K layers "
        r"in the order of the number (?P<layer>\d+); what no rule takes gets AdamW. The paper's: "
        r"'block_(?P<layer>\d+)/attn/(query|key|value):stack=2' 'block_:stack=1'",
    )
    add("--method", choices=METHODS, help="of TEON; default: polar_express")
    rates = ", ".join(f"{name} {rate}" for name, rate in LEARNING_RATES.items())
    add("--learning-rate", type=real(positive=True), help=f"the peak; default: {rates}")
    add(
        "--adam-learning-rate",
        type=real(positive=True),
        help=f"of what TEON and Muon leave to AdamW; default: {ADAM_LEARNING_RATE}",
    )
    add("--adam-b1", type=real(positive=False, below=1.0), help=f"default: {ADAM_B1}")
    add("--adam-b2", type=real(positive=False, below=1.0), help=f"default: {ADAM_B2}")
    add("--weight-decay", type=real(positive=False), help="of the blocks' matrices; default: 0.1")
    add(
        "--schedule",
        choices=SCHEDULES,
        help="linear: constant, then linear decay over the last 40 %%; cosine: warm-up over 10 %%, "
        "then half a cosine; default: linear",
    )
    add("--steps", type=whole(1), help="default: 200")
    add("--batch-size", type=whole(1), help=f"sequences per step; default: {BATCH_SIZE}")
    add("--microbatches", type=whole(1), help="parts of a batch, one after another; default: 1")
    add("--context", type=whole(1), help="tokens per sequence; default: the model's")
    add("--dtype", choices=("float32", "bfloat16"), help="of the activations; default: float32")
    add("--seed", type=whole(0), help="of parameters and batches; default: 0")
    add("--eval-every", type=whole(1), metavar="STEPS", help="default: 50")
    add("--checkpoint-every", type=whole(1), metavar="STEPS", help="default: 50")
    add(
        "--alignment-every",
        type=whole(1),
        metavar="STEPS",
        help="measure how alike the momenta of neighbouring blocks are, into metrics.jsonl and "
        "alignment.png; default: never",
    )
    return parser
