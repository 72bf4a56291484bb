r"""What an update of published models multiplies, against `optax.contrib.muon`: no array is made.

    python -m benchmarks.models
    python -m benchmarks.models --models "Qwen3-0.6B,Gemma-3-1B" --out /tmp/models

README.md says what each figure means; `architectures.py` has the models.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure
from optax import contrib

from benchmarks import measuring, results
from benchmarks.architectures import ARCHITECTURES
from benchmarks.measuring import BASE
from benchmarks.update_cost import products
from teon_optax import Rule, default_rules, plan, teon

# Where the default rules ask: they cannot know that layers count along the scanned axis, among
# those with a sliding window (layers_0) and among those without (layers_1).
WRITTEN_RULES = {
    "gpt-oss-20b": (
        Rule(
            r"GptOssAttention/(query|key|value)/kernel",
            stack=2,
            dims=contrib.MuonDimensionNumbers(0, (2, 3)),
            layer_axis=1,
        ),
    )
}
# Column -> of which optimizer which figure.
RATIOS = {
    "products": ("teon polar_express", "flops"),
    "products, schatten": ("teon schatten", "flops"),
    "products, fast": ("teon fast", "flops"),
    "products, mode 2": ("teon mode 2", "flops"),
    "TPU passes": ("teon polar_express", "tpu_passes"),
    "TPU passes, schatten": ("teon schatten", "tpu_passes"),
    "TPU passes, fast": ("teon fast", "tpu_passes"),
}
NAME = "models"


def main(argv: Sequence[str] | None = None) -> None:
    """Counts what the command line asks for, and writes it."""
    parser = results.parser(NAME, __doc__)
    parser.add_argument("--models", type=_names, default=list(ARCHITECTURES), help="default: all")
    options = parser.parse_args(argv)
    record: dict[str, Any] = {"benchmark": NAME, "environment": results.environment()}
    record["models"] = {}
    for name in options.models:
        print(f"{name} ...", file=sys.stderr)
        record["models"][name] = figures(name)
    results.publish(options, NAME, record, table(record), plot(record))


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise argparse.ArgumentTypeError(f"no model {unknown}; there are {list(ARCHITECTURES)}")
    return names


def figures(name: str) -> dict[str, Any]:
    """Measures one model: where it is from, and what each optimizer multiplies."""
    architecture = ARCHITECTURES[name]
    shapes = architecture.shapes()
    rules = default_rules(shapes, first=WRITTEN_RULES.get(name, ()))
    planned = plan(shapes, rules)
    muon = measuring.muon(planned.fallback, rules, 0.1)
    peers = {BASE: muon, "teon mode 2": teon(0.1, in_mode_2(rules))}
    for method in ("polar_express", "schatten", "fast"):
        peers[f"teon {method}"] = teon(0.1, rules, method=method)
    return {
        "source": architecture.source,
        "library": architecture.library,
        "rules": "written in part" if name in WRITTEN_RULES else "default",
        "parameters": planned.as_dict()["parameters"],
        "plan": planned.as_dict()["flops"],
        "optimizers": {peer: products(optimizer, shapes) for peer, optimizer in peers.items()},
    }


def in_mode_2(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Rewrites rules so that layers are joined over fan_in."""
    return tuple(dataclasses.replace(r, mode=2) if r.stack > 1 else r for r in rules)


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Divides a model's figures of TEON by those of `optax.contrib.muon`."""
    base = row["optimizers"][BASE]
    found = {
        column: row["optimizers"][peer][figure] / base[figure]
        for column, (peer, figure) in RATIOS.items()
    }
    return found | {"each matrix alone": row["plan"]["plan"] / row["plan"]["muon"]}


def table(record: dict[str, Any]) -> str:
    """Shows a row for each model, and the two that gain most and least."""
    rows, of_models = [], {name: ratios(row) for name, row in record["models"].items()}
    for name, row in record["models"].items():
        sizes = row["parameters"]
        total = sum(sizes.values())
        share = f"{1 - sizes['fallback'] / total:.0%}"
        flops = row["optimizers"][BASE]["flops"] / 1e12
        own = (f"{ratio:.3f}" for ratio in of_models[name].values())
        rows.append([name, f"{total / 1e9:,.3f}", share, f"{flops:,.4g}", *own])
    columns = next(iter(of_models.values()))
    header = ["", "parameters G", "orthogonalized", "Muon's products TFLOP", *columns]
    of_products = {name: row["products"] for name, row in of_models.items()}
    best, worst = (pick(of_products, key=lambda name: of_products[name]) for pick in (min, max))
    sources = [
        f"| {name} | {row['source']} | {row['library']} | {row['rules']} |"
        for name, row in record["models"].items()
    ]
    columns_of_text = ["| | sizes from | names and axes of | rules |", "|---|---|---|---|"]
    return "\n\n".join(
        [
            results.markdown(header, rows),
            f"Fewest products of Muon's: {best}, {of_products[best]:.3f}; most: {worst}, "
            f"{of_products[worst]:.3f}.",
            "\n".join([*columns_of_text, *sources]),
            results.caption(record),
        ]
    )


def plot(record: dict[str, Any]) -> Figure:
    """Products and TPU passes of each model, ratios to Muon."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = list(record["models"])
    shown = ("products", "products, schatten", "TPU passes", "TPU passes, schatten")
    for place, column in enumerate(shown):
        heights = [ratios(record["models"][name])[column] for name in names]
        offset = (place - (len(shown) - 1) / 2) * 0.8 / len(shown)
        axes.bar([i + offset for i in range(len(names))], heights, 0.8 / len(shown), label=column)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set(ylabel="ratio to optax.contrib.muon", title="products of an update, published models")
    axes.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
