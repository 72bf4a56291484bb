"""The benchmark of published models: their trees, and what it counts of a small one."""

import json
import math
import warnings

import jax
import pytest

from benchmarks import architectures, models, results
from benchmarks.architectures import ARCHITECTURES, Architecture
from teon_optax import Rule, default_rules, plan

pytestmark = [pytest.mark.promotes_dtypes, pytest.mark.promotes_ranks]
D = 8
# What model cards and papers say; DeepSeek-V3 without the module that predicts another token.
PARAMETERS = {
    "GPT-2 small": 124_439_808,
    "GPT-2 medium": 354_823_168,
    "GPT-2 large": 774_030_080,
    "GPT-2 XL": 1_557_611_200,
    "Llama-3-8B": 8_030_261_248,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-27B": 27.0e9,
    "Mixtral-8x7B": 46_702_792_704,
    "DeepSeek-V3": 671.0e9,
    "gpt-oss-20b": 20_914_757_184,
    "ViT-L/16": 304_326_632,
    "Whisper-large-v3": 1_543_490_560,
    "DiT-XL/2": 675_129_632,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_has_as_many_parameters_as_published(name):
    found = sum(leaf.size for leaf in jax.tree.leaves(ARCHITECTURES[name].shapes()))
    published = PARAMETERS[name]
    assert found == published if isinstance(published, int) else abs(found / published - 1) < 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rules_take_all_matrices_of_a_models_blocks_and_query_key_and_value_in_pairs(name):
    shapes = ARCHITECTURES[name].shapes()
    with warnings.catch_warnings():
        # Where the default rules warn, the benchmark has rules of its own.
        warnings.simplefilter("error")
        rules = default_rules(shapes, first=models.WRITTEN_RULES.get(name, ()))
    planned = plan(shapes, rules)
    largest = max((leaf for leaf in planned.untouched), key=lambda leaf: math.prod(leaf.shape))
    ends = ("embed", "wte", "wpe", "head", "logits", "LabelEmbedder", "conv")
    assert any(word in largest.path for word in ends)
    taken = [size for kind, size in planned.as_dict()["parameters"].items() if kind != "fallback"]
    inside = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if not any(word in jax.tree_util.keystr(path) for word in ends)
    )
    assert sum(taken) > 0.99 * inside
    assert any(group.rule.stack == 2 for group in planned.groups) or name == "DeepSeek-V3"


@pytest.fixture
def toy(monkeypatch):
    """Two blocks with a fused projection, a scanned leaf and a matrix of its own."""
    leaves = architectures.repeated("h/{}", 2, {"c_attn/kernel": (3 * D, D), "up/kernel": (D, D)})
    leaves |= {"layers/wide/kernel": (D, 2, 2 * D), "embed/embedding": (5, D)}
    rules = (
        Rule(r"c_attn", dims=models.contrib.MuonDimensionNumbers(1, 0), split=3),
        Rule(r"h/(?P<layer>\d+)/up", stack=2),
        Rule(r"layers/wide", stack=2, layer_axis=1),
        Rule("embed", stack=0),
    )
    shapes = architectures.tree_of(leaves)
    monkeypatch.setitem(ARCHITECTURES, "toy", Architecture("here", "none", lambda: shapes))
    monkeypatch.setitem(models.WRITTEN_RULES, "toy", rules)
    return "toy"


def test_products_are_those_counted_by_hand(toy):
    """In products of d x d by d x d, of which Muon takes 5 (2 r + 1), and one segment 17 + 2 r."""
    found, unit = models.figures(toy), 2 * D**3
    fused, pair, wide_joint, wide_turned = 2 * 3 * 15, 21, 15 * 8, 17 + 8
    assert found["optimizers"]["optax muon"]["flops"] == (2 * 35 + 2 * 15 + 2 * 25) * unit
    assert found["plan"]["muon"] == (fused + 2 * 15 + 2 * 25) * unit
    ours, turned = (found["optimizers"][f"teon {n}"] for n in ("polar_express", "mode 2"))
    assert ours["flops"] == found["plan"]["plan"] == (fused + pair + wide_joint) * unit
    assert turned["flops"] == (fused + pair + wide_turned) * unit
    ratios = models.ratios(found)
    assert ratios["products"] == (fused + pair + wide_joint) / 150
    assert ratios["each matrix alone"] == (fused + pair + wide_joint) / 170


def test_models_writes_json_table_and_plot_and_names_the_best_and_the_worst(toy, tmp_path):
    models.main(["--models", f"{toy},GPT-2 small", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "models.json").read_text())
    assert set(record["models"]) == {toy, "GPT-2 small"}
    page = (tmp_path / "models.md").read_text()
    assert f"Fewest products of Muon's: GPT-2 small, 0.689; most: {toy}, 1.5" in page
    assert "| GPT-2 small | 0.124 | 68% |" in page
    assert results.caption(record) in page
    assert (tmp_path / "models.png").exists()


def test_a_model_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        models.main(["--models", "GPT-5"])
    assert "no model ['GPT-5']" in capsys.readouterr().err
