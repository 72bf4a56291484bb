r"""What an update on many devices sends and multiplies: TEON and Muon, by layout and device count.

    python -m benchmarks.communication --model gpt-4x256
    python -m benchmarks.communication --model llama-1b --devices 8,64 --layouts fan-in,2-D

Three peers: TEON, this library's Muon (`rules.muon`, K = 1), and `optax.contrib.muon`. Both of ours
run on meshes of type Auto and of type Explicit; whether optax's does is a row of the second table.

Programs are compiled for abstract arrays on simulated devices and nothing is run, so any machine
will do. Each count of devices has a process of its own. Whatever the JSON file of the model has
already is not measured again (unless `--again`), so an interrupted command may be repeated.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from optax import contrib

from benchmarks import results, update_cost
from teon_optax import plan, rules, teon
from tests.compiled import COLLECTIVES, Program
from tests.counting import count_products

TEON, ALONE, MUON = "teon", "rules.muon", "optax muon"


class Layout(NamedTuple):
    """How kernels lie on the mesh.

    Attributes:
      axes: Of the mesh; one that has no size here takes all devices that are left.
      spec: Along which of them fan_in and fan_out are cut.
      turned: Whether matrices that write to the residual stream are cut the other way round.
      types: Of the mesh's axes. On Explicit ones `shardings=` is not passed.
    """

    axes: dict[str, int | None]
    spec: tuple[str | None, str | None]
    turned: bool = False
    types: AxisType = AxisType.Auto


LAYOUTS = {
    "fan-in": Layout({"data": None}, ("data", None)),
    "fan-out": Layout({"data": None}, (None, "data")),
    "2-D": Layout({"data": None, "model": 2}, ("data", "model"), turned=True),
    "HSDP": Layout({"replica": 2, "data": None}, ("data", None)),
    "replicated": Layout({"data": None}, (None, None)),
}
# FSDP, FSDP x TP and data parallelism once more, on meshes of type Explicit.
EXPLICIT = {
    f"{name} Explicit": LAYOUTS[name]._replace(types=AxisType.Explicit)
    for name in ("fan-in", "2-D", "replicated")
}
COUNTS = (2, 4, 8, 16, 32, 64)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is missing, in one process for each count of devices, and writes all."""
    options = parser().parse_args(argv)
    if options.child:
        return print_figures(options)
    name = f"communication-{options.model}"
    path = options.out / f"{name}.json"
    record = start(options.model) if options.again or not path.exists() else read(path)
    for count in options.devices:
        for layout, peer, found in measured(options, count, record["rows"].get(str(count), {})):
            known = record["rows"].setdefault(str(count), {}).setdefault(layout, {})
            known[peer] = found
            record["environment"] = results.environment()
            options.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
    results.publish(options, name, record, table(record), plot(record))
    return None


def parser() -> argparse.ArgumentParser:
    parser = results.parser("communication", __doc__)
    add = parser.add_argument
    add("--model", choices=update_cost.MODELS, default="gpt-4x256")
    add("--devices", type=results.separated(int), default=COUNTS, help="default: 2,4,8,16,32,64")
    add("--layouts", type=results.separated(), default=[*LAYOUTS, *EXPLICIT], help="default: all")
    add("--peers", type=results.separated(), default=[TEON, ALONE, MUON], help="default: all")
    add("--again", action="store_true", help="also what was measured before")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def start(model: str) -> dict[str, Any]:
    """Begins the record, before anything is compiled: kernels, and one device's products."""
    shapes = kernels(model)
    single = {}
    for name, optimizer in optimizers(shapes, None).items():
        state = jax.eval_shape(optimizer.init, shapes)
        single[name] = count_products(optimizer.update, shapes, state, shapes).flops
    groups = plan(shapes, update_cost.RULES).groups
    return {
        "benchmark": "communication",
        "model": model,
        "environment": results.environment(),
        "kernel_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values()),
        "groups": len(groups),
        "single_flops": single,
        "rows": {},
    }


def measured(
    options: argparse.Namespace, count: int, known: dict[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (layout, peer, figures) of what is missing, from a process with so many devices."""
    asked = [(layout, peer) for layout in options.layouts for peer in options.peers]
    wanted = [(layout, peer) for layout, peer in asked if peer not in known.get(layout, {})]
    if not wanted:
        return
    command = [sys.executable, "-m", "benchmarks.communication", "--child"]
    command += ["--model", options.model, "--devices", str(count)]
    for flag, chosen in zip(("--layouts", "--peers"), zip(*wanted, strict=True), strict=True):
        command += [flag, ",".join(chosen)]
    # What is sent is decided before kernels are compiled, on whose quality nothing here depends.
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line, (layout, peer) in zip(process.stdout, wanted, strict=False):
            print(f"{count} devices, {layout}, {peer}: {line.strip()}", file=sys.stderr)
            yield layout, peer, json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the process for {count} devices ended with {process.returncode}")


def print_figures(options: argparse.Namespace) -> None:
    """Prints a line of JSON for each pair of a layout and a peer."""
    (count,), shapes = options.devices, kernels(options.model)
    for layout, peer in zip(options.layouts, options.peers, strict=True):
        chosen = (LAYOUTS | EXPLICIT)[layout]
        shardings = placed(shapes, chosen, count)
        told = shardings if chosen.types is AxisType.Auto else None
        try:
            found: dict[str, Any] = figures(optimizers(shapes, told)[peer], shapes, shardings)
        except Exception as error:  # a peer that does not compile is a result too
            found = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
        print(json.dumps(found), flush=True)
        jax.clear_caches()


def kernels(model: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Lists by path what TEON and Muon take of a model: nothing is allocated."""
    shapes = update_cost.parameter_shapes(model, "float32")
    taken = {path for group in plan(shapes, update_cost.RULES).groups for path in group.members}
    by_path = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    return {path: leaf for path, leaf in by_path.items() if path in taken}


def path_of(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def optimizers(
    shapes: dict[str, jax.ShapeDtypeStruct], shardings: Any
) -> dict[str, optax.GradientTransformation]:
    """Makes the peers, each of which takes all kernels."""
    rate = update_cost.LEARNING_RATE
    return {
        TEON: teon(rate, update_cost.RULES, shardings=shardings),
        ALONE: teon(rate, rules.muon(shapes), shardings=shardings),
        MUON: contrib.muon(rate),
    }


def placed(
    shapes: dict[str, jax.ShapeDtypeStruct], layout: Layout, count: int
) -> dict[str, NamedSharding]:
    """Places kernels; an axis of the mesh that does not divide its axis goes along the other."""
    free = count // math.prod(size for size in layout.axes.values() if size)
    sizes = {name: size or free for name, size in layout.axes.items()}
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(layout.types,) * len(sizes)
    )

    def of_kernel(path: str, lengths: Sequence[int]) -> NamedSharding:
        turned = layout.turned and path.split("/")[-2] in ("out", "down")
        cut: list[tuple[str, ...]] = [(), ()]
        for axis, name in enumerate(layout.spec[::-1] if turned else layout.spec):
            if name is None:
                continue
            for place in (axis, 1 - axis):
                pieces = math.prod(sizes[along] for along in (*cut[place], name))
                if lengths[place] % pieces == 0:
                    cut[place] += (name,)
                    break
        return NamedSharding(mesh, PartitionSpec(*(along or None for along in cut)))

    return {path: of_kernel(path, leaf.shape) for path, leaf in shapes.items()}


def figures(
    optimizer: optax.GradientTransformation,
    shapes: dict[str, jax.ShapeDtypeStruct],
    shardings: dict[str, NamedSharding],
) -> dict[str, float]:
    """Measures the compiled update of one device; moments lie as their parameters do."""
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in shapes.items()
    }
    state = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: params.get(path_of(keys[-1:]), leaf),
        jax.eval_shape(optimizer.init, params),
    )
    compiled = jax.jit(optimizer.update).lower(params, state, params).compile()
    devices = next(iter(shardings.values())).mesh.size
    program = Program(compiled.as_text() or "", devices)
    memory = compiled.memory_analysis()
    assert memory is not None
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "bytes": program.bytes_out(),
        "wire": program.wire_bytes(),
        "flops": program.flops(),
        "largest_gather": program.largest_gather(),
        "peak": arrays + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
        **{kind: program.count(kind) for kind in COLLECTIVES if program.count(kind)},
    }


def table(record: dict[str, Any]) -> str:
    """Shows a row for each layout and count of devices; in parentheses the ratio to Muon."""
    rows = []
    for layout in LAYOUTS:
        for count, found in sorted(record["rows"].items(), key=lambda item: int(item[0])):
            if layout in found:
                rows.append([layout, count, *cells(record, found[layout], int(count))])
    header = ["layout", "devices", "MB out", "muon", "ratio", "wire MB", "muon", "ratio"]
    header += ["FLOPs/device G", "of 1/n", "muon, of 1/n"]
    single = {peer: f"{flops / 1e9:,.4g} G" for peer, flops in record["single_flops"].items()}
    head = (
        f"**{record['model']}**, {record['kernel_bytes'] / 1e6:,.1f} MB of kernels in float32, "
        f"{record['groups']} groups; one device alone multiplies {single[TEON]}, with Muon "
        f"{single[MUON]}"
    )
    parts = [head, results.markdown(header, rows)]
    if alone := alone_rows(record):
        text = "Each matrix alone, `rules.muon` (first of each pair) and `optax.contrib.muon`:"
        header = ["layout", "axes", "devices", "MB out", "ratio", "collectives, `rules.muon`"]
        header += ["collectives, optax", "peak MB", "FLOPs/device G"]
        parts += [text, results.markdown(header, alone)]
    return "\n\n".join([*parts, results.caption(record)])


def alone_rows(record: dict[str, Any]) -> list[list[str]]:
    """Makes a row for each layout, type of axes and count of devices from 8 on, with K = 1."""
    rows = []
    for name in EXPLICIT:
        base = name.removesuffix(" Explicit")
        for layout, axes in ((base, "Auto"), (name, "Explicit")):
            for count, found in sorted(record["rows"].items(), key=lambda item: int(item[0])):
                if int(count) >= 8 and ALONE in found.get(layout, {}):
                    ours, muon = found[layout][ALONE], found[layout].get(MUON, {})
                    rows.append([base, axes, count, *alone_cells(ours, muon)])
    return rows


def alone_cells(ours: dict[str, Any], muon: dict[str, Any]) -> list[str]:
    def both(figure: str, unit: float) -> str:
        values = (peer.get(figure) for peer in (ours, muon))
        return " / ".join("-" if value is None else shown(value, unit) for value in values)

    ratio = f"{ours['bytes'] / muon['bytes']:.3f}" if muon.get("bytes") else "-"
    sent = [collectives(ours), collectives(muon)]
    return [both("bytes", 1e-6), ratio, *sent, both("peak", 1e-6), both("flops", 1e-9)]


def collectives(found: dict[str, Any]) -> str:
    """Tells how many of each kind run, or the error that there was instead."""
    if "error" in found:
        return found["error"].partition(":")[0]
    counts = [f"{found[kind]:g} {kind}" for kind in COLLECTIVES if kind in found]
    return ", ".join(counts) or ("none" if found else "-")


def cells(record: dict[str, Any], found: dict[str, Any], count: int) -> list[str]:
    ours, theirs = found.get(TEON, {}), found.get(MUON, {})
    row = []
    for figure in ("bytes", "wire"):
        both = ours.get(figure), theirs.get(figure)
        row += [shown(value, 1e-6) if value is not None else "-" for value in both]
        row.append(f"{both[0] / both[1]:.3f}" if both[0] is not None and both[1] else "-")
    row.append(shown(ours["flops"], 1e-9) if "flops" in ours else "-")
    for peer, figures in ((TEON, ours), (MUON, theirs)):
        share = count * figures.get("flops", math.nan) / record["single_flops"][peer]
        row.append("-" if math.isnan(share) else f"{share:.2f}")
    return row


def shown(value: float, unit: float) -> str:
    scaled = value * unit
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.3g}"


def plot(record: dict[str, Any]) -> Figure:
    """Draws bytes and FLOPs of a device against the number of devices."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    counts = sorted(map(int, record["rows"]))
    titles = {
        "bytes": "MB out of collectives",
        "wire": "MB on the wire",
        "flops": "product FLOPs, G",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for number, layout in enumerate(LAYOUTS):
            for peer, style in ((TEON, "o-"), (MUON, "x:")):
                values = {
                    int(count): found[layout][peer][name] * (1e-9 if name == "flops" else 1e-6)
                    for count, found in record["rows"].items()
                    # A logarithmic axis has no place for zero.
                    if found.get(layout, {}).get(peer, {}).get(name)
                }
                at = sorted(values)
                label = f"{peer}, {layout}"
                axes.plot(at, [*map(values.get, at)], style, color=f"C{number}", label=label)
        axes.set(xlabel="devices", title=title, xscale="log", yscale="log")
        axes.set_xticks(counts, labels=map(str, counts))
        axes.set_xticks([], minor=True)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LAYOUTS))
    figure.suptitle(record["model"])
    return figure


if __name__ == "__main__":
    main()
