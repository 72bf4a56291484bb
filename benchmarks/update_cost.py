r"""What one `update` costs: TEON, Muon and AdamW on the parameters of a whole model.

    python -m benchmarks.update_cost --model gpt-24x256
    python -m benchmarks.update_cost --model llama-1b --no-time        # abstract arrays only
    python -m benchmarks.update_cost --model gpt-24x64 --no-time --depths 6,12,24,48,96

README.md says what each figure means. Nothing here is specific to a device; on a GPU add
`--dtype bfloat16` for a bfloat16 tree.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import sys
import types
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from optax import contrib

from benchmarks import measuring, results
from benchmarks.measuring import BASE, Peer, Tree
from examples import model as gpts
from teon_optax import Plan, Rule, plan, teon
from tests.counting import ProductCount, count_products


def small_gpt(width: int, depth: int) -> gpts.ModelConfig:
    """Makes a GPT whose embeddings weigh as little as they do in a large one."""
    return dataclasses.replace(gpts.gpt(width, depth, 4, 128), vocab_size=1024)


MODELS = {
    "gpt-2x64": small_gpt(64, 2),
    "gpt-4x256": small_gpt(256, 4),
    "gpt-24x64": small_gpt(64, 24),
    "gpt-24x256": small_gpt(256, 24),
    "gpt-8x384": small_gpt(384, 8),
    **gpts.MODELS,
}
EXPERTS = "experts-256"
RULES = (
    Rule(r"block_(?P<layer>\d+)/attn/(query|key|value)/kernel", stack=2),
    Rule(r"block_\d+/(attn|mlp)/\w+/kernel"),
    Rule(r"block_\d+/experts/", dims=contrib.MuonDimensionNumbers(1, 2)),
)
METHODS = ("polar_express", "schatten", "fast")
LEARNING_RATE, WEIGHT_DECAY = 0.02, 0.1
ALONE, MATMUL = "teon K = 1", "matmul "
# Figure -> (heading, unit, digits). All but times are the same in every run.
FIGURES = {
    "wall_min": ("wall, min", "ms", 1e3),
    "wall_median": ("wall, median", "ms", 1e3),
    "flops": ("product FLOPs", "G", 1e-9),
    "tpu_passes": ("TPU passes", "G", 1e-9),
    "hlo_lines": ("HLO lines", "", 1),
    "temp_bytes": ("temp", "MB", 1e-6),
    "compile": ("compile", "s", 1),
    "trace": ("trace", "s", 1),
}
# The roofline multiplies square matrices, as many at a time as fit into this.
ROOFLINE_BYTES = 2**28
ROOFLINE_WIDTH = 1024  # at least: smaller products do not reach the device's rate


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for, and writes it."""
    options = parser().parse_args(argv)
    record = {"benchmark": "update_cost", "model": options.model, "dtype": options.dtype}
    record["environment"] = results.environment()
    shapes = parameter_shapes(options.model, options.dtype)
    record["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    record["optimizers"] = measure(shapes, options)
    record["depths"] = {
        depth: depth_figures(options.model, depth, options.dtype) for depth in options.depths
    }
    name = f"update_cost-{options.model}-{options.dtype}-{record['environment']['backend']}"
    results.publish(options, name, record, table(record), plot(record))


def parser() -> argparse.ArgumentParser:
    parser = results.parser("update_cost", __doc__)
    add = parser.add_argument
    add("--model", choices=[*MODELS, EXPERTS], default="gpt-24x256")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the whole tree")
    add("--no-time", action="store_true", help="compile for abstract arrays, and run nothing")
    add("--repetitions", type=int, default=10, help="of the timed update; default: 10")
    add("--compilations", type=int, default=2, help="timed for each optimizer; default: 2")
    depths = results.separated(int)
    add("--depths", type=depths, default=[], help="also HLO lines at these, as in 6,12,24")
    return parser


def parameter_shapes(model: str, dtype: str, depth: int | None = None) -> Tree:
    """Lists a model's parameters as shapes: nothing is allocated."""
    if model == EXPERTS:
        return expert_shapes(dtype, depth or 4)
    config = MODELS[model]
    config = dataclasses.replace(config, depth=depth or config.depth)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(gpts.GPT(config).init, jax.random.key(0), tokens)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def expert_shapes(dtype: str, depth: int) -> Tree:
    """Lists shapes of blocks of 256 experts, each with an MLP of its own."""
    width, hidden, experts = 512, 256, 256
    attention = {name: {"kernel": (width, width)} for name in ("query", "key", "value", "out")}
    mlps = {"up": (experts, width, hidden), "down": (experts, hidden, width)}
    tree = {f"block_{layer}": {"attn": attention, "experts": mlps} for layer in range(depth)}
    tree["embed"] = {"embedding": (1024, width)}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), tree, is_leaf=lambda x: type(x) is tuple
    )


def optimizers(planned: Plan) -> dict[str, optax.GradientTransformation]:
    """Makes the peers: Muon takes the leaves that TEON does, and both leave the rest to Adam."""
    ours: dict[str, dict[str, Any]] = {f"teon {name}": {"method": name} for name in METHODS}
    if jax.default_backend() == "gpu":  # whose default for float32 operands is TF32
        bf16 = {"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32}
        ours |= {f"{name}, bf16": bf16 | chosen for name, chosen in ours.items()}
    by_choice = {
        name: teon(LEARNING_RATE, RULES, weight_decay=WEIGHT_DECAY, **chosen)
        for name, chosen in ours.items()
    }
    # What `rules.muon` makes of a tree that the default rules read.
    each = [dataclasses.replace(rule, stack=min(rule.stack, 1)) for rule in RULES]
    alone = {ALONE: teon(LEARNING_RATE, each, weight_decay=WEIGHT_DECAY)}
    muon = measuring.muon(planned.fallback, RULES, LEARNING_RATE, WEIGHT_DECAY)
    return {BASE: muon, **by_choice, **alone, "optax adamw": optax.adamw(LEARNING_RATE)}


def measure(shapes: Tree, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measures every figure of every peer."""
    found = optimizers(plan(shapes, RULES))
    figures: dict[str, dict[str, float]] = {name: products(o, shapes) for name, o in found.items()}
    repetitions = max(1, options.compilations)
    compiled, programs = measuring.compile_updates(found, shapes, repetitions)
    for name, program in programs.items():
        figures[name].update(program)
    if options.no_time:
        return figures
    arrays = gaussian(shapes, 0), gaussian(shapes, 1)
    peers = {name: jax_update(found[name], compiled[name], *arrays) for name in found}
    kinds = sorted({kind_of(name, options.dtype) for name in found})
    multiplied = {MATMUL + kind: roofline(options, kind) for kind in kinds}
    peers |= {name: multiply for name, (multiply, _) in multiplied.items()}
    if importlib.util.find_spec("torch"):
        peers["torch muon"] = torch_step(importlib.import_module("torch"), shapes)
    seconds = measuring.time_in_turns(peers, options.repetitions)
    for name, times in seconds.items():
        extremes = {"wall_min": min(times), "wall_median": statistics.median(times)}
        figures.setdefault(name, {}).update(extremes)
        figures[name]["wall_ratio"] = measuring.median_ratio(times, seconds[BASE])
    for name, (_, work) in multiplied.items():
        figures[name]["flops"] = work
    return figures


def products(optimizer: optax.GradientTransformation, shapes: Tree) -> dict[str, float]:
    """Counts what the update multiplies, here and where the policy sees a TPU."""
    state = jax.eval_shape(optimizer.init, shapes)

    def count() -> ProductCount:
        jax.clear_caches()  # a trace for another backend is another one
        return count_products(optimizer.update, shapes, state, shapes)

    here = count()
    with mock.patch.object(jax, "default_backend", lambda: "tpu"):
        on_tpu = count()
    return {"flops": here.flops, "tpu_passes": on_tpu.passes}


def depth_figures(model: str, depth: int, dtype: str) -> dict[str, dict[str, float]]:
    """Measures the program at another depth of the model."""
    shapes = parameter_shapes(model, dtype, depth)
    found = optimizers(plan(shapes, RULES)).items()
    return {name: measuring.compile_update(optimizer, shapes)[1] for name, optimizer in found}


def jax_update(
    optimizer: optax.GradientTransformation,
    compiled: jax.stages.Compiled,
    gradients: Tree,
    params: Tree,
) -> Peer:
    """Makes a call of the compiled update, with the state after its first step."""
    _, state = compiled(gradients, optimizer.init(params), params)
    return lambda: jax.block_until_ready(compiled(gradients, state, params))


def gaussian(shapes: Tree, seed: int) -> Tree:
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(arrays)


def kind_of(name: str, dtype: str) -> str:
    """Names what a peer multiplies: the tree's dtype, but float32 always for TEON."""
    if not name.startswith("teon"):
        return dtype
    return "float32, bf16" if name.endswith("bf16") else "float32"


def roofline(options: argparse.Namespace, kind: str) -> tuple[Peer, int]:
    """Makes a batched matmul of a kind, and its FLOPs: the rate that products can have.

    An accelerator finishes one matmul in no more time than its launch takes, so there it is a
    hundred, one after another.
    """
    dtype, _, is_bf16 = kind.partition(", ")
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if is_bf16 else None
    times = 1 if jax.default_backend() == "cpu" else 100
    size = max(ROOFLINE_WIDTH, 0 if options.model == EXPERTS else MODELS[options.model].width)
    count = max(1, ROOFLINE_BYTES // (3 * 4 * size**2))
    left, right = (
        jax.random.normal(jax.random.key(seed), (count, size, size), dtype) for seed in range(2)
    )
    right = right / size**0.5  # so that products stay in range

    @jax.jit
    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        def once(_: int, left: jax.Array) -> jax.Array:
            return jnp.matmul(left, right, precision=precision)

        return jax.lax.fori_loop(0, times, once, left)

    return lambda: multiply(left, right).block_until_ready(), times * 2 * count * size**3


def torch_step(torch: types.ModuleType, shapes: Tree) -> Peer:
    """Makes a step of `torch.optim.Muon` (bfloat16 products) and AdamW, parameters included."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    taken = {path for group in plan(shapes, RULES).groups for path in group.members}
    matrices, others = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        dtype = getattr(torch, str(leaf.dtype))
        # `torch.optim.Muon` takes matrices alone: experts are split.
        shape = (1, *leaf.shape) if leaf.ndim == 2 else leaf.shape
        for one in range(shape[0]) if name in taken else [None]:
            array = torch.randn(leaf.shape if one is None else shape[1:], device=device).to(dtype)
            parameter = torch.nn.Parameter(array)
            parameter.grad = torch.randn_like(parameter)
            (others if one is None else matrices).append(parameter)
    both = (
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=LEARNING_RATE),
    )

    def step() -> None:
        for optimizer in both:
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def table(record: dict[str, Any]) -> str:
    """Shows a row per peer; in parentheses the ratio to `optax.contrib.muon`."""
    peers = {n: row for n, row in record["optimizers"].items() if not n.startswith(MATMUL)}
    shown = [figure for figure in FIGURES if any(figure in row for row in peers.values())]
    rows = [[name, *(cell(record, name, figure) for figure in shown)] for name in peers]
    header = [" ".join(filter(None, FIGURES[figure][:2])) for figure in shown]
    if len(peers) < len(record["optimizers"]):
        header.append("of roofline")
        for row in rows:
            row.append(share_of_roofline(record, row[0]))
    title = f"**{record['model']}**, {record['parameters'] / 1e6:,.1f} M parameters in "
    page = [
        title + f"{record['dtype']}; (ratio to optax muon)",
        results.markdown(["", *header], rows),
    ]
    if record["depths"]:
        names = list(next(iter(record["depths"].values())))
        rows = [
            [f"{depth} blocks", *(f"{found[name]['hlo_lines']:,}" for name in names)]
            for depth, found in record["depths"].items()
        ]
        page.append("Lines of optimized HLO by depth:")
        page.append(results.markdown(["", *names], rows))
    return "\n\n".join([*page, results.caption(record)])


def cell(record: dict[str, Any], name: str, figure: str) -> str:
    row, base = (record["optimizers"][peer] for peer in (name, BASE))
    if figure not in row:
        return "-"
    scaled = row[figure] * FIGURES[figure][2]
    text = f"{scaled:,.0f}" if scaled >= 100 or figure == "hlo_lines" else f"{scaled:.3g}"
    if figure not in base or not base[figure]:
        return text
    ratio = row["wall_ratio"] if figure == "wall_median" else row[figure] / base[figure]
    return f"{text} ({ratio:.3f})"


def share_of_roofline(record: dict[str, Any], name: str) -> str:
    """Divides the time that the products alone would take by that of the update."""
    row = record["optimizers"][name]
    if not row.get("flops"):
        return "-"
    matmul = record["optimizers"][MATMUL + kind_of(name, record["dtype"])]
    products = row["flops"] * matmul["wall_min"] / matmul["flops"]
    return f"{products / row['wall_min']:.0%}"


def plot(record: dict[str, Any]) -> Figure:
    """Draws ratios to Muon as bars, and HLO lines against depth where they were measured."""
    figure = Figure(figsize=(11 if record["depths"] else 7, 4), layout="constrained")
    axes = figure.subplots(1, 2 if record["depths"] else 1, squeeze=False)[0]
    optimizers = record["optimizers"]
    base = optimizers[BASE]
    shown = [name for name in FIGURES if base.get(name)]
    names = [n for n in optimizers if n != BASE and not n.startswith(MATMUL)]
    for place, name in enumerate(names):
        known = [index for index, figure in enumerate(shown) if figure in optimizers[name]]
        ratios = [optimizers[name][shown[index]] / base[shown[index]] for index in known]
        offset = (place - (len(names) - 1) / 2) * 0.8 / len(names)
        axes[0].bar([i + offset for i in known], ratios, 0.8 / len(names), label=name)
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set_xticks(range(len(shown)), [FIGURES[name][0] for name in shown], rotation=30)
    axes[0].set(ylabel="ratio to optax muon", title=f"{record['model']}, {record['dtype']}")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend()
    if record["depths"]:
        for name in next(iter(record["depths"].values())):
            lines = [found[name]["hlo_lines"] for found in record["depths"].values()]
            axes[1].plot(list(record["depths"]), lines, "o-", label=name)
        axes[1].set(xlabel="blocks", ylabel="lines of optimized HLO", xscale="log", yscale="log")
        axes[1].legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
