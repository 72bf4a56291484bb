r"""What a lent accelerator should answer, in one command, the most wanted first.

    python -m benchmarks.device --out measured
    python -m benchmarks.device --out measured --tiny      # the same on a CPU, in a minute or two

Each part is a process of its own and writes its results when it ends, so that a command that is
killed keeps what it had, and goes on with the rest when it is given again:

1. `update_cost` of LLaMA-1B and GPT-Small, bfloat16 and float32, each program compiled alone;
2. `accuracy` with the device's own products;
3. the optimizer's share in a training step of GPT-Small, 65,536 tokens, for each optimizer;
4. `jax.lax.linalg.symmetric_product` of 2,048 columns beside the plain product.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import measuring, results, update_cost
from examples import model as gpts
from teon_optax import plan

SIZES = {
    "full": {"models": ("llama-1b", "gpt-small"), "tokens": 65_536, "context": 1024, "d": 2048},
    "tiny": {"models": ("gpt-2x64",), "tokens": 256, "context": 32, "d": 64},
}
TURNS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what has no results yet in `--out`, in order; or, in a process of its own, one part."""
    options = parser().parse_args(argv)
    if options.part:
        PARTS[options.part](options)
        return 0
    size = SIZES["tiny" if options.tiny else "full"]
    failed = 0
    for name, command in commands(options, size):
        done = options.out / f"{name}.done"
        if not done.exists():
            print(f"== {name}", flush=True)
            code = subprocess.run([sys.executable, "-m", *command]).returncode
            failed += code != 0
            if not code:
                done.touch()
    return int(failed > 0)


def parser() -> argparse.ArgumentParser:
    parser = results.parser("device", __doc__)
    add = parser.add_argument
    add("--tiny", action="store_true", help="sizes for a CPU")
    add("--part", choices=PARTS, help="only this one, in this process")
    return parser


def commands(options: argparse.Namespace, size: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Names every part, and its command after `python -m`, in the order of their worth."""
    out = ["--out", str(options.out)]
    found = [
        (
            f"update_cost-{model}-{dtype}",
            ["benchmarks.update_cost", "--model", model, "--dtype", dtype, *out]
            + (["--repetitions", "2", "--compilations", "1"] if options.tiny else []),
        )
        for model in size["models"]
        for dtype in ("bfloat16", "float32")
    ]
    accuracy = ["benchmarks.accuracy", "--products", "device", "device bf16", *out]
    found.append(("accuracy", accuracy + (["--size", "32"] if options.tiny else [])))
    tiny = ["--tiny"] if options.tiny else []
    return found + [(part, ["benchmarks.device", "--part", part, *tiny, *out]) for part in PARTS]


def share(options: argparse.Namespace) -> None:
    """Times training steps with each optimizer, and with none, in turns."""
    size = SIZES["tiny" if options.tiny else "full"]
    model = dataclasses.replace(update_cost.MODELS[size["models"][-1]], dtype=jnp.bfloat16)
    shape = size["tokens"] // size["context"], size["context"]
    tokens = jax.random.randint(jax.random.key(0), shape, 0, model.vocab_size)
    network = gpts.GPT(model)
    params = jax.jit(network.init)(jax.random.key(1), tokens[:1])["params"]

    def loss(params: Any) -> jax.Array:
        logits: Any = network.apply({"params": params}, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.mean(losses)

    def step_with(optimizer: optax.GradientTransformation) -> Callable[[], Any]:
        def step(params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        start = optimizer.init(params)
        compiled = jax.jit(step).lower(params, start).compile()
        return lambda: compiled(params, start)

    found = {"no optimizer": optax.identity()}
    found |= update_cost.optimizers(plan(params, update_cost.RULES))
    seconds = in_turns({name: step_with(optimizer) for name, optimizer in found.items()})
    alone = seconds["no optimizer"]
    rows = [
        [name, f"{1e3 * taken:.3g}", f"{(taken - alone) / taken:.1%}"]
        for name, taken in seconds.items()
    ]
    title = f"A training step of {size['tokens']:,} tokens, {size['models'][-1]}, bfloat16 products"
    table = results.markdown(["", "step, median ms", "of it the optimizer"], rows)
    keep(options.out, "device-share", {"seconds": seconds, **size}, f"{title}:\n\n{table}")


def symmetric(options: argparse.Namespace) -> None:
    """Times C = A A^T by the kernel for symmetric products and by the plain product, in turns."""
    d = SIZES["tiny" if options.tiny else "full"]["d"]
    products: dict[str, Callable[[jax.Array], jax.Array]] = {
        "A A^T, plain": lambda A: jnp.matmul(A, A.T, preferred_element_type=jnp.float32),
        "A A^T, symmetric_product": lambda A: jax.lax.linalg.symmetric_product(
            A, jnp.zeros((d, d), A.dtype), symmetrize_output=True
        ),
    }
    seconds, skipped = {}, []
    for dtype in ("bfloat16", "float32"):
        A = jax.random.normal(jax.random.key(0), (d, d), dtype)
        peers = {}
        for name, product in products.items():
            try:
                compiled = jax.jit(product).lower(A).compile()
            except Exception as error:  # The kernel is not on every device, nor for every dtype.
                skipped.append(f"{name}, {dtype}: {type(error).__name__}")
                continue
            peers[f"{name}, {dtype}"] = lambda run=compiled, A=A: run(A)
        seconds |= in_turns(peers)
    rows = [
        [name, f"{1e6 * taken:.4g}", f"{2e-12 * d**3 / taken:.3g}"]
        for name, taken in seconds.items()
    ]
    table = results.markdown(["", "median us", "TFLOP/s of 2 d^3"], rows)
    page = "\n\n".join([f"d = {d}:", table, *(f"Not compiled: {each}." for each in skipped)])
    keep(options.out, "device-symmetric", {"d": d, "seconds": seconds, "skipped": skipped}, page)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "share": share,
    "symmetric": symmetric,
}


def in_turns(peers: dict[str, measuring.Peer]) -> dict[str, float]:
    """Takes the median seconds of each call."""
    times = measuring.time_in_turns(peers, TURNS)
    return {name: statistics.median(each) for name, each in times.items()}


def keep(out: Path, name: str, record: dict[str, Any], page: str) -> None:
    """Writes `name`.json and .md into the folder, and prints the page."""
    record |= {"benchmark": name, "environment": results.environment()}
    results.write(out, name, record, f"{page}\n\n{results.caption(record)}")


if __name__ == "__main__":
    sys.exit(main())
