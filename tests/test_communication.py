"""What devices send and multiply: counted in compiled programs, and by the formulas of the docs."""

import json
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import communication, cost_model, results
from benchmarks.communication import LAYOUTS, TEON
from teon_optax import Rule, teon
from tests.compiled import COLLECTIVES, Program

pytestmark = [pytest.mark.promotes_dtypes, pytest.mark.promotes_ranks]


TEXT = """
%body (p: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %p = (s32[], f32[4,6]{1,0}) parameter(0)
  %m = f32[4,6]{1,0} get-tuple-element(%p), index=1
  %g = f32[4,4]{1,0} dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %s = f32[4,4]{1,0} all-reduce(%g), replica_groups={{0,1},{2,3}}
}
%cheap (q: f32[4,6]) -> f32[4,6] {
  ROOT %q = f32[4,6]{1,0} parameter(0)
}
%dear (r: f32[4,6]) -> f32[4,6] {
  %r = f32[4,6]{1,0} parameter(0)
  ROOT %d = bf16[4,6]{1,0} dot(%r, %r), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}
ENTRY %main (a: f32[4,6]) -> f32[4,6] {
  %a = f32[4,6]{1,0} parameter(0)
  %t = (s32[], f32[4,6]{1,0}) while(%a), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %x = (f32[1,6]{1,0}, bf16[3,6]{1,0}) all-to-all(%a), replica_groups=[1,4]<=[4]
  %h = f32[8,6]{1,0} all-gather(%a), dimensions={0}
  ROOT %b = f32[4,6]{1,0} conditional(%i, %a, %a), branch_computations={%cheap, %dear}
}
"""


def test_loops_are_multiplied_and_of_branches_the_dearest_counts():
    program = Program(TEXT, devices=4)
    assert program.flops() == 3 * 2 * 4 * 4 * 6 + 2 * 4 * 6 * 4
    assert program.bytes_out("all-reduce") == 3 * 64
    assert program.bytes_out() == 3 * 64 + (24 + 36) + 192
    # In a ring of 2 the sum is sent once; rings of 4 send three quarters of what comes out.
    assert program.wire_bytes() == 3 * 64 + 0.75 * (60 + 192)
    assert program.count("all-reduce") == 3 and program.largest_gather() == 192
    with pytest.raises(ValueError, match="unknown length"):
        Program(re.sub("known_trip_count", "", TEXT), devices=4).flops()


def assert_close(found, model):
    for figure in ("bytes", "wire", "flops"):
        assert getattr(model, figure) == pytest.approx(found[figure], rel=0.1), figure


REPLICAS = {"HSDP": lambda n: 2, "replicated": lambda n: n}


@pytest.mark.parametrize("layout", ["2-D", "HSDP"])
def test_formulas_are_within_a_tenth_of_a_compiled_program(layout):
    shapes = communication.kernels("gpt-2x64")
    shardings = communication.placed(shapes, LAYOUTS[layout], 8)
    optimizer = communication.optimizers(shapes, shardings)[TEON]
    found = communication.figures(optimizer, shapes, shardings)
    groups = cost_model.transformer(64, 256, 2, gated=False)
    assert_close(found, cost_model.cost(groups, 8, replicas=REPLICAS.get(layout, lambda _: 1)(8)))


MEASURED = {
    "communication-tiny": (128, 352, 4),
    "communication-gpt-4x256": (256, 1024, 4),
}


@pytest.mark.parametrize("name", MEASURED)
def test_formulas_are_within_a_tenth_of_the_tables(name):
    record = json.loads((results.FOLDER / f"{name}.json").read_text())
    groups = cost_model.transformer(*MEASURED[name], gated="gpt" not in name)
    for n, rows in record["rows"].items():
        # On more devices their blocks are thinner than shares of a group, and are padded.
        for layout, found in rows.items() if 8 * int(n) <= MEASURED[name][0] else ():
            replicas = REPLICAS.get(layout.removesuffix(" Explicit"), lambda _: 1)(int(n))
            assert_close(found[TEON], cost_model.cost(groups, int(n), replicas=replicas))


def test_more_devices_than_groups_have_less_to_multiply_each():
    record = json.loads((results.FOLDER / "communication-gpt-4x256.json").read_text())
    for layout in LAYOUTS:
        flops = [record["rows"][str(n)][layout][TEON]["flops"] for n in communication.COUNTS]
        assert record["groups"] < communication.COUNTS[-2]
        assert flops == sorted(set(flops), reverse=True)


def test_communication_writes_json_table_and_plot_and_measures_nothing_twice(
    tmp_path, monkeypatch, capsys
):
    flags = ["--model", "gpt-2x64", "--devices", "2", "--layouts", "fan-in", "--peers", TEON]
    communication.main([*flags, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["rows"]["2"]["fan-in"][TEON]["all-to-all"] == 2
    assert 0.5 < record["rows"]["2"]["fan-in"][TEON]["flops"] / record["single_flops"][TEON] < 0.6
    assert "| fan-in | 2 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(subprocess, "Popen", None)
    communication.main([*flags, "--out", str(tmp_path)])
    assert json.loads(path.read_text())["rows"] == record["rows"]


def test_compiled_init_of_the_page_puts_moments_where_parameters_lie():
    page = (pathlib.Path(__file__).parents[1] / "docs/at_scale.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    kernel = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, PartitionSpec("data", "model")))
    params = {"block_0": {"query": {"kernel": kernel}, "norm": {"scale": kernel[0]}}}
    names = {}
    exec(code, names)
    init = teon(0.1, [Rule("query")]).init
    where = names["shardings_of"](jax.eval_shape(init, params), params, mesh)
    state = jax.jit(init, out_shardings=where)(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (8, 8)]
    assert [leaf.sharding for leaf in moments] == [kernel.sharding]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fan-in", "fan-out", "2-D"])
def test_an_update_costs_two_all_to_alls_and_an_eighth_of_the_products(layout):
    """Of 4 blocks, d = 256, on 8 devices, against Muon of the same kernels."""
    shapes = communication.kernels("gpt-4x256")
    shardings = communication.placed(shapes, communication.LAYOUTS[layout], 8)
    optimizers = communication.optimizers(shapes, shardings)
    ours, muon = (
        communication.figures(optimizers[peer], shapes, shardings)
        for peer in (communication.TEON, communication.MUON)
    )
    assert ours["all-to-all"] == 2
    assert {kind for kind in COLLECTIVES if kind in ours} == {"all-to-all", "all-reduce"}
    assert ours["bytes"] <= 0.06 * muon["bytes"]
    assert ours["wire"] <= 0.07 * muon["wire"]
    assert ours["flops"] <= 1.10 / 8 * communication.start("gpt-4x256")["single_flops"]["teon"]
