"""The benchmarks run end to end and write what they say; no figure of time is looked at."""

import argparse
import json
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import accuracy, compare, planning, results, update_cost
from teon_optax import plan, polar_express, teon
from tests.counting import count_products

pytestmark = [pytest.mark.promotes_dtypes, pytest.mark.promotes_ranks]
D = 8


@pytest.fixture
def small_model(monkeypatch):
    """Two query kernels and an embedding, under a model's name."""
    monkeypatch.setitem(update_cost.MODELS, "small", update_cost.small_gpt(D, 1))
    monkeypatch.setattr(
        update_cost, "parameter_shapes", lambda _, dtype, depth=2: tree(depth, dtype)
    )
    monkeypatch.setattr(update_cost, "ROOFLINE_BYTES", 2**12)
    monkeypatch.setattr(update_cost, "ROOFLINE_WIDTH", D)
    return "small"


def tree(depth=2, dtype="float32"):
    kernel = {"kernel": jax.ShapeDtypeStruct((D, D), dtype)}
    blocks = {f"block_{layer}": {"attn": {"query": kernel}} for layer in range(depth)}
    return blocks | {"embed": {"embedding": jax.ShapeDtypeStruct((2 * D, D), dtype)}}


def table_rows(page):
    return [line for line in page.splitlines() if line.startswith("| ")]


def test_update_cost_writes_json_table_and_plot(small_model, tmp_path, capsys):
    flags = ["--model", small_model, "--repetitions", "1", "--compilations", "1", "--depths", "3"]
    update_cost.main([*flags, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert {"commit", "device", "machine", "python", "versions"} <= set(record["environment"])
    assert {"jax", "optax"} <= set(record["environment"]["versions"])
    peers = record["optimizers"]
    ours = {
        "optax muon",
        "teon polar_express",
        "teon schatten",
        "teon fast",
        "teon K = 1",
        "optax adamw",
    }
    assert ours | {"matmul float32"} <= set(peers)
    for name in ours:
        assert {*update_cost.FIGURES, "wall_ratio"} <= set(peers[name])
    assert record["depths"]["3"]["optax muon"]["hlo_lines"] > peers["optax muon"]["hlo_lines"]
    page = path.with_suffix(".md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "teon schatten" in page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_no_time_allocates_and_runs_nothing(small_model, tmp_path, monkeypatch):
    found = update_cost.optimizers(plan(tree(), update_cost.RULES))
    monkeypatch.setattr(update_cost, "optimizers", lambda _: {"optax muon": found["optax adamw"]})
    monkeypatch.setattr(update_cost, "gaussian", None)
    flags = ["--model", small_model, "--no-time", "--compilations", "1", "--dtype", "bfloat16"]
    update_cost.main([*flags, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["dtype"] == "bfloat16"
    assert all("wall_min" not in row for row in record["optimizers"].values())


@pytest.mark.parametrize("model", [*update_cost.MODELS, update_cost.EXPERTS])
def test_rules_of_the_benchmark_take_all_matrices_of_the_blocks(model):
    if model in update_cost.MODELS:  # two blocks are as good as all
        shapes = update_cost.parameter_shapes(model, "float32", 2)
    else:
        shapes = update_cost.expert_shapes("float32", 2)
    planned = plan(shapes, update_cost.RULES)
    assert not planned.unused or len(planned.unused) == 1  # either an MLP or experts
    left = [leaf.path for leaf in planned.untouched if len(leaf.shape) >= 2]
    assert all(path.split("/")[0] in ("embed", "positions", "lm_head") for path in left)
    stacked = {
        path.split("/")[-2] for g in planned.groups if g.rule.stack == 2 for path in g.members
    }
    assert stacked == {"query", "key", "value"}


def test_product_flops_of_teon_are_those_of_the_formula():
    """4 S + k (2 r - 3) products of d x d, and one segment on CPU: k = 1, r = 2."""
    for method, steps in (("polar_express", 5), ("schatten", 4), (polar_express(3), 3)):
        optimizer = teon(0.1, update_cost.RULES, method=method)
        counted = update_cost.products(optimizer, tree())
        assert counted["flops"] == (4 * steps + 1) * 2 * D**3


def test_fast_saves_a_product_in_each_of_two_steps():
    """Two quintics of 4 products and two cubics of 3; on a TPU in two segments."""
    optimizer = teon(0.1, update_cost.RULES, method="fast")
    counted = update_cost.products(optimizer, tree())
    assert counted["flops"] == (2 * 4 + 2 * 3 + 1) * 2 * D**3
    assert counted["tpu_passes"] == (2 * 4 + 2 * 3 + 2) * 2 * D**3


def test_products_of_muon_are_three_a_step_and_those_of_adamw_none():
    found = update_cost.optimizers(plan(tree(), update_cost.RULES))
    muon = update_cost.products(found["optax muon"], tree())
    # X X^T, its square, and the polynomial times X, for two matrices in five steps.
    assert muon["flops"] == muon["tpu_passes"] == 2 * 5 * 3 * 2 * D**3
    assert update_cost.products(found["optax adamw"], tree())["flops"] == 0


def test_tpu_passes_are_those_of_the_cut_for_one_pass_products():
    """k = 3 segments on a TPU: 4 * 5 + 3 products of one pass each."""
    optimizer = teon(0.1, update_cost.RULES)
    passes = update_cost.products(optimizer, tree())["tpu_passes"]
    assert passes == (4 * 5 + 3) * 2 * D**3


def test_a_gpu_multiplies_in_bf16_as_well_and_at_the_matmuls_rate(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = update_cost.optimizers(plan(tree(), update_cost.RULES))
    for method, steps in (("polar_express", 5), ("schatten", 4)):
        counted = update_cost.products(found[f"teon {method}, bf16"], tree())
        # A pass each: 4 products a step, and 2 r - 3 = 1 for each of ceil(steps / 2) segments.
        assert counted["tpu_passes"] == counted["flops"]
        assert counted["flops"] == (4 * steps + math.ceil(steps / 2)) * 2 * D**3
    kinds = [update_cost.kind_of(name, "bfloat16") for name in found]
    ours = ["float32"] * 3 + ["float32, bf16"] * 3 + ["float32"]  # the last with K = 1
    assert kinds == ["bfloat16", *ours, "bfloat16"]
    # Launches weigh nothing in a hundred products one after another.
    options = argparse.Namespace(model=update_cost.EXPERTS)
    monkeypatch.setattr(update_cost, "ROOFLINE_WIDTH", D)
    monkeypatch.setattr(update_cost, "ROOFLINE_BYTES", 12 * D**2)
    for kind in kinds:
        multiply, flops = update_cost.roofline(options, kind)
        assert flops == 100 * 2 * D**3 and jnp.isfinite(multiply()).all()


def test_passes_of_a_precision_that_no_tpu_has_are_not_made_up():
    tf32 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32
    with pytest.raises(ValueError, match="passes of a product with precision .* are not known"):
        count_products(lambda M: jnp.matmul(M, M, precision=tf32), jnp.ones((D, D)))


def test_compare_prints_ratios(small_model, tmp_path, capsys):
    record = {
        "model": "small",
        "dtype": "float32",
        "environment": results.environment(),
        "optimizers": {"optax muon": {"flops": 4, "hlo_lines": 10}, "gone": {"flops": 1}},
    }
    (tmp_path / "a.json").write_text(json.dumps(record))
    record["optimizers"] = {"optax muon": {"flops": 2, "hlo_lines": 15}}
    (tmp_path / "b.json").write_text(json.dumps(record))
    compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert table_rows(capsys.readouterr().out)[2] == "| optax muon | 0.500 | 1.500 |"
    record["model"] = "another"
    (tmp_path / "b.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "differ in model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figures", "grew"),
    [
        ({}, []),
        ({"flops": 90, "hlo_lines": 102, "compile": 9}, []),
        ({"flops": 103}, ["product FLOPs"]),
        ({"tpu_passes": 1000, "hlo_lines": 103}, ["TPU passes", "HLO lines"]),
        (None, ["product FLOPs", "TPU passes", "HLO lines"]),
    ],
    ids=["same", "within", "flops", "others", "gone"],
)
def test_the_gate_fails_where_a_figure_of_the_program_grew(tmp_path, capsys, figures, grew):
    own = {"flops": 100, "tpu_passes": 100, "hlo_lines": 100, "compile": 1}
    record = {"model": "small", "dtype": "float32", "environment": results.environment()}
    before = record | {"optimizers": {"optax muon": own, "teon schatten": own}}
    larger = {"optax muon": {name: 10 * value for name, value in own.items()}}
    after = larger if figures is None else larger | {"teon schatten": own | figures}
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, content in zip(paths, (before, record | {"optimizers": after}), strict=True):
        pathlib.Path(path).write_text(json.dumps(content))
    assert compare.main([*paths, "--gate", "0.02"]) == (1 if grew else 0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].split(" 1")[0].split(" None")[0] for line in lines] == grew
    assert compare.main(paths) == 0


def test_accuracy_writes_json_table_and_plot(tmp_path):
    rng = np.random.default_rng(0)
    kernels: dict[str, Any] = {
        f"block_{i}/attn/query/kernel": rng.normal(size=(8, 8)).astype(np.float32) for i in range(2)
    }
    np.savez(tmp_path / "momentum.npz", **kernels)
    momentum = str(tmp_path / "momentum.npz")
    flags = ["--size", "8", "--methods", "schatten", "--products", "bf16"]
    accuracy.main([*flags, "--momentum", momentum, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "accuracy.json").read_text())
    assert record["spectra"]["momentum"]["matrices"] == [[1, 16, 8]]
    assert [row["restarts"] for row in record["rows"]] == ["default", "direct", "whole"]
    default = record["rows"][0]["gaussian"]
    assert 0.8 < default["kept"] < default["largest"] < 1.15
    assert "| schatten | bf16 | default |" in (tmp_path / "accuracy.md").read_text()
    assert (tmp_path / "accuracy.png").exists()


def test_accuracy_is_that_of_the_devices_own_products_where_asked(tmp_path, monkeypatch):
    where = results.environment() | {"backend": "gpu"}
    monkeypatch.setattr(results, "environment", lambda: where)
    flags = ["--size", "8", "--methods", "schatten", "--products", "device", "device bf16"]
    accuracy.main([*flags, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "accuracy-gpu.json").read_text())["rows"]
    assert {row["products"] for row in rows} == {"device", "device bf16"}
    assert all(0.8 < row["gaussian"]["kept"] < row["gaussian"]["largest"] < 1.15 for row in rows)


def test_momentum_of_a_checkpoint_is_that_of_the_orthogonalized_leaves(tmp_path):
    params = {
        "block_0": {"attn": {"query": {"kernel": jnp.ones((4, 4))}}},
        "embed": {"embedding": jnp.ones((6, 4))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), teon(0.1))
    _, state = optimizer.update(params, optimizer.init(params), params)
    with accuracy.checkpoints.opened(tmp_path / accuracy.run_folder.CHECKPOINTS) as manager:
        accuracy.checkpoints.save(manager, 1, {"params": params, "opt_state": state})
    momentum = accuracy.read_momentum(tmp_path)
    assert list(momentum) == ["block_0/attn/query/kernel"]
    assert momentum["block_0/attn/query/kernel"].shape == (4, 4)
    assert np.all(momentum["block_0/attn/query/kernel"] != 0)


def test_readme_takes_a_page_where_it_has_a_place_for_it(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- a -->\nold\n<!-- end -->\nafter <!-- b --><!-- end -->\n")
    results.update_readme("a", "new\\1", readme)
    assert readme.read_text() == (
        "before\n<!-- a -->\n\nnew\\1\n\n<!-- end -->\nafter <!-- b --><!-- end -->\n"
    )
    with pytest.raises(ValueError, match="no place"):
        results.update_readme("c", "new", readme)


def test_an_update_visits_each_of_25_leaves_once(capsys):
    planning.main(["--walk"])
    functions, calls = map(int, re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1]))
    assert functions <= 70 and calls <= 800


@pytest.mark.parametrize(
    "measured",
    [
        lambda depth, _, with_muon: {
            key: depth / 1000 for key in planning.FIGURES if with_muon or key != "eager_muon"
        },
        # Optax's Muon compiles at every eager update.
        pytest.param(planning.measured, marks=pytest.mark.slow),
    ],
    ids=["given", "measured"],
)
def test_planning_shows_another_version_beside(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(planning, "measured", measured)
    planning.main(["--depths", "1,2", "--repetitions", "1", "--out", str(tmp_path)])
    first = json.loads((tmp_path / "planning.json").read_text())
    assert {*first["depths"]} == {"1", "2"} and {*first["depths"]["1"]} == {*planning.FIGURES}
    before = ["--before", str(tmp_path / "planning.json"), "--out", str(tmp_path / "after")]
    planning.main(["--depths", "2", "--repetitions", "1", *before])
    rows = table_rows(capsys.readouterr().out)
    assert [row.split(" | ")[0] for row in rows[-2:]] == ["| 2 blocks, before", "| 2 blocks, after"]
    assert "eager_muon" not in first["depths"]["2"] and rows[-2].split(" | ")[8] == ""
