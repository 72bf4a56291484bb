"""Which rules a tree gets: Flax models, what is refused, and what a refusal says."""

import re
import warnings
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from listings import array, nested, parsed, readings, rules_in, trees
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, default_rules, explain, plan, teon
from teon_optax._paths import leaf_paths

# No two sizes agree, so that a wrong reading cannot look right: width, heads, their size, both
# together, key-value heads, hidden, vocabulary, scanned layers, experts, positions.
D, H, K, A, G, F, V, L, E, N = 6, 4, 5, 20, 2, 14, 19, 3, 8, 7
BLOCK = """
# A block
attn/query/kernel: 6x20 T io
attn/key/kernel: 6x10 T io
attn/value/kernel: 6x10 T io
attn/out/kernel: 20x6 M io
up/kernel: 6x14 M io
up/bias: 14
down/kernel: 14x6 M io
ln/scale: 6
"""
UNREADABLE = trees("kinds/unreadable")


def refusal(params):
    with pytest.raises(ValueError, match="cannot tell how to read some leaves") as error:
        default_rules(params)
    return str(error.value)


def test_depth_does_not_change_the_rules():
    def model(depth):
        (block,) = parsed(BLOCK)
        blocks = {f"block_{layer}": block.params for layer in range(depth)}
        return {"params": {"embed": {"embedding": array(V, D)}}} | blocks

    assert default_rules(model(2)) == default_rules(model(96)) == default_rules(model(1))
    assert [str(rule) for rule in default_rules(model(2))] == [
        r'Rule(r"^block_(?P<layer>\d+)/attn/(key|query|value)/kernel$", stack=2)',
        r'Rule(r"^block_(?P<layer>\d+)/attn/out/kernel$")',
        r'Rule(r"^block_(?P<layer>\d+)/(down|up)/kernel$")',
        r'Rule(r"^params/embed/embedding$", stack=0)',
    ]


def test_self_and_cross_attention_never_share_a_group():
    members = [set(group.members) for group in plan(trees()["families: flax wmt"].params).groups]
    path = "encoderdecoderblock_{}/MultiHeadDotProductAttention_{}/query/kernel"
    assert {path.format(0, 0), path.format(1, 0)} in members
    assert {path.format(0, 1), path.format(1, 1)} in members


def test_a_first_module_without_a_number_may_have_a_rule_of_its_own():
    """As Keras names attentions; only the first has an output projection to show its heads."""
    first, second = "multi_head_attention", "multi_head_attention_1"
    params = arrays(
        {
            f"{name}/{part}/kernel": (32, 4, 8)
            for name in (first, second)
            for part in ("key", "query")
        }
        | {f"{name}/{part}/bias": (4, 8) for name in (first, second) for part in ("key", "query")}
        | {f"{name}/value/kernel": (32, 4, 8) for name in (first, second)}
        | {f"{first}/attention_output/kernel": (4, 8, 32), "layer_normalization/beta": (32,)}
        | {"dense/kernel": (32, 128), "dense_1/kernel": (128, 32)}
        | {"dense_2/kernel": (32, 128), "dense_3/kernel": (128, 32)}
        | {"token_embedding/embeddings": (64, 32)}
    )
    assert f"{second}/value/kernel" in refusal(params)
    rules = default_rules(params, first=[Rule(f"^{second}/value/kernel$", 0)])
    members = {group.members for group in plan(params, rules).groups}
    assert (f"{first}/value/kernel",) in members


def test_haikus_first_block_has_no_number_and_is_layer_0():
    module = {"w": array(D, D)}
    params = {
        f"gpt/block{n}/attention/query": module for n in ("", *(f"_{i}" for i in range(1, 12)))
    }
    groups = plan(params).groups
    assert [group.layers for group in groups] == [(i, i + 1) for i in range(0, 12, 2)]
    assert groups[0].members == ("gpt/block/attention/query/w", "gpt/block_1/attention/query/w")


def test_a_leaf_that_differs_from_others_of_its_name_is_numbered_in_the_rules():
    layers = [array(D, 3, 3, F), array(F, D), array(F, F), array(D)]
    params = {"embed": array(F, D), "layers": [{"kernel": layer} for layer in layers]}
    with pytest.warns(UserWarning, match="No name and no size tells"):
        rules = default_rules(params)
    assert set(rules) == {
        Rule(r"^embed$", stack=0),
        Rule(r"^layers/(?P<layer>2)/kernel$"),
        Rule(r"^layers/0/kernel$", stack=0),
        Rule(r"^layers/1/kernel$", stack=0),
    }


def test_a_name_without_number_is_no_layer_where_another_is_0():
    module = {"query": {"w": array(D, D)}}
    made = plan({"block": module, "block_0": module, "block_1": module})
    assert {group.members for group in made.groups} == {
        ("block_0/query/w", "block_1/query/w"),
        ("block/query/w",),
    }


def test_names_are_escaped():
    params = {"a.b (c)": {"layers": [{"kernel": array(D, F)}]}}
    (rule,) = default_rules(params)
    assert plan(params, [rule]).groups
    assert not rule.search("axb (c)/layers/0/kernel")


class PenzaiArray(NamedTuple):
    """Has the key of penzai's named arrays."""

    data_array: Any


class Variable(NamedTuple):
    """Has the key of Flax's variables."""

    value: Any


def arrays(leaves):
    return nested({path: array(*shape) for path, shape in leaves.items()})


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_can_be_read_in_two_ways_is_refused(name):
    lines = UNREADABLE[name].lines_by_path
    unread = {path: line for path, line in lines.items() if not line.answer.readings}
    message = refusal(UNREADABLE[name].params)
    assert set(re.findall(r'(?<![r\w])"([^"(^]+)"(?=,)', message)) == unread.keys()
    assert all(str(line.shape) in message for line in unread.values())


@pytest.mark.parametrize("name", UNREADABLE)
def test_any_offered_rule_put_first_is_an_answer(name):
    params, answers = UNREADABLE[name].params, UNREADABLE[name].answers
    unread = [path for path, answer in answers.items() if not answer.readings]
    offered = rules_in(refusal(params))
    offers = {path: [rule for rule in offered if rule.search(path)] for path in unread}
    for choice in range(max(map(len, offers.values()))):
        first = [rules[min(choice, len(rules) - 1)] for rules in offers.values()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            rules = default_rules(params, first)
        assert rules[: len(first)] == tuple(first)
        assert readings(params, rules).keys() == answers.keys()


def test_a_refusal_shows_the_rules_and_what_their_axes_are():
    message = refusal(nested({"layers/attn/query/kernel": array(L, D, A)}))
    assert message.splitlines()[1:] == [
        '"layers/attn/query/kernel", shape (3, 6, 20): by name; kernels of projections '
        "end with fan_out; which axes are heads, layers, fan_in? Write one of",
        "    # (layer, in, out)",
        r'    Rule(r"^layers/attn/query/kernel$", stack=2, layer_axis=0)',
        "    # (in, layer, out)",
        r'    Rule(r"^layers/attn/query/kernel$", stack=2, layer_axis=1)',
        "    # (in, out, out)",
        r'    Rule(r"^layers/attn/query/kernel$", dims=MuonDimensionNumbers(reduction_axis=0, '
        "output_axis=(1, 2)))",
        "    # (out, in, out)",
        r'    Rule(r"^layers/attn/query/kernel$", dims=MuonDimensionNumbers(reduction_axis=1, '
        "output_axis=(0, 2)))",
        "    # fallback",
        r'    Rule(r"^layers/attn/query/kernel$", stack=0)',
    ]


def test_all_that_cannot_be_read_is_refused_at_once_and_not_layer_by_layer():
    paths = [f"blocks/{i}/attn/{name}/kernel" for i in range(12) for name in ("query", "key")]
    message = refusal(nested({path: array(D, H, K) for path in paths}))
    for name in ("query", "key"):
        assert f'"blocks/0/attn/{name}/kernel" (and 11 more with other numbers)' in message
    assert message.count("blocks/0") == 2 and message.count("Write one of") == 1
    few = [path for path in paths if path[7] in "012" and path[8] == "/"]
    message = refusal(nested({path: array(D, H, K) for path in few}))
    assert all(f'"{path}"' in message for path in few)


def test_a_fused_projection_is_offered_as_the_output_projection_shows_it():
    leaves = {"blocks/0/attn/Wqkv/kernel": (32, 48), "blocks/0/attn/out_proj/kernel": (32, 32)}
    _, entry = refusal(arrays(leaves)).split(" Write one of\n")
    axes, likely, *_ = entry.splitlines()
    path = r"^blocks/(?P<layer>\d+)/attn/Wqkv/kernel$"
    assert axes == "    # (in, out)"
    assert likely == f'    Rule(r"{path}", stack=2, split=(32, 8, 8))'
    assert "`split` is for parts one after another" in refusal(arrays(leaves))
    assert "in turns, by heads or groups, they need a `view`" in refusal(arrays(leaves))


@pytest.mark.parametrize(
    ("leaves", "likely"),
    [
        (
            {"b/0/attn/in_proj_qkvz/kernel": (64, 224), "b/0/attn/out_proj/kernel": (96, 64)},
            "output_axis=(2, 1, 3)), split=(1, 1, 6, 6), view=(64, 2, 14, 8))",
        ),
        (
            {"blocks/0/mlp/proj_1/kernel": (64, 128), "blocks/0/mlp/proj_2/kernel": (64, 64)}
            | {"blocks/0/mix/kernel": (64, 64)},
            'mlp/proj_1/kernel$", split=2)',
        ),
        (
            {"b/0/moe/router": (8, 64), "b/0/moe/w1": (512, 64), "b/0/moe/w2": (512, 64)},
            'moe/w\\d+$", dims=MuonDimensionNumbers(reduction_axis=1, output_axis=0), split=8)',
        ),
    ],
    ids=["Q, K, V and a gate, by heads in Qwen3-Next", "gate and up", "experts"],
)
def test_the_likely_parts_of_a_matrix_are_offered_first(leaves, likely):
    _, entry = refusal(arrays(leaves)).split(" Write one of\n")
    assert entry.splitlines()[1].endswith(likely)


def test_arrays_of_a_list_are_offered_by_number_and_the_ends_as_the_fallbacks():
    params = [array(99, 64), array(64, 64), array(64), array(64, 64), array(64, 99)]
    _, ends, inside = refusal(params).split('\n"')
    assert ends.startswith('0", "4", shape (99, 64) or (64, 99)')
    assert ends.splitlines()[1:3] == ["    # fallback", '    Rule(r"^(0|4)$", stack=0)']
    assert inside.splitlines()[1:3] == ["    # (in, out)", '    Rule(r"^(?P<layer>1|3)$")']


def test_a_vmapped_ensemble_is_offered_as_a_batch():
    leaves = {"VmapMLP_0/Dense_0/kernel": (5, 17, 64), "VmapMLP_0/Dense_0/bias": (5, 64)}
    with pytest.warns(UserWarning, match=r"# \(batch, in, out\)"):
        default_rules(arrays(leaves))


def test_packed_experts_are_offered_as_parts():
    leaves = {"blocks/0/ffn/router/layer/kernel": (D, E), "blocks/0/ffn/experts/w1": (E * F, D)}
    message = refusal(arrays(leaves))
    assert (
        'ffn/experts/w1$", dims=MuonDimensionNumbers(reduction_axis=1, output_axis=0), split=8'
        in (message)
    )


def test_a_rule_beside_a_warning_can_be_pasted():
    params = arrays(
        {"blocks/0/up/kernel": (D, F), "blocks/0/down/kernel": (F, D), "zorp": (5, 2, 3)}
    )
    with pytest.warns(UserWarning, match="tells what these leaves are") as caught:
        rules = default_rules(params)
    assert Rule("^zorp$", stack=0) in rules
    rule = next(rule for rule in rules_in(str(caught[0].message)) if rule.stack)
    assert "zorp" in {g.members[0] for g in plan(params, default_rules(params, [rule])).groups}


@pytest.mark.parametrize(
    "leaves",
    [
        {"blocks/0/q/lora_a": (D, 2), "blocks/0/q/lora_b": (2, D)},
        {"blocks/0/q/a": (D, 2), "blocks/0/q/b": (2, D)},
        {"embed/embedding": (V, D)},
    ],
)
def test_a_tree_of_which_nothing_is_orthogonalized_is_warned_of_once(leaves):
    with pytest.warns(UserWarning, match="No leaf is orthogonalized") as caught:
        rules = default_rules(arrays(leaves))
    assert len(caught) == 1 and not any(rule.stack for rule in rules)


def test_rules_put_first_leave_the_rest_to_the_defaults():
    params = nested({"layers/attn/query/kernel": array(L, D, A), "up/kernel": array(D, F)})
    first = Rule("query", stack=2, layer_axis=0)
    assert default_rules(params, [first]) == (first, Rule("^up/kernel$"))


def test_two_leaves_of_one_path_that_need_two_rules_are_refused():
    embed = {"embed": {"embed/w": array(V, D)}, "embed/embed": {"w": array(V, D, 1)}}
    assert len(default_rules(embed | {"up": {"kernel": array(D, F)}})) == 2
    params = {"a": {"b/kernel": array(D, F)}, "a/b": {"kernel": array(3, D, F)}}
    with pytest.raises(ValueError, match='"a/b/kernel", shape .* is the path of another leaf too'):
        default_rules(params)


@pytest.mark.parametrize(
    "leaves",
    [
        {"blocks/0/q_proj/weight": (H, K, D)},
        {"blocks/0/q_proj/weight": (D, H, K), "blocks/0/o_proj/weight": (H, K, D)},
        {"blocks/0/c_attn/weight": (D, 3, H, K)},
        {"stacked/q_proj/weight": (L, H, K, D), "stacked/ln/weight": (L, D)},
        {"moe/experts/weight": (E, D, F)},
        {"blocks/0/o_proj/weight": (D, H, K)},
        {"blocks/0/up/weight": (F, D)},
        {"blocks/0/attn/q_proj/weight": (A, D)},
    ],
)
def test_haliax_weights_are_refused_because_fan_out_may_be_first_or_last(leaves):
    message = refusal(nested({f"{path}/<0>": array(*shape) for path, shape in leaves.items()}))
    assert all(f'"{path}"' in message for path in leaves if "/ln/" not in path)


def test_haliax_weights_are_read_where_the_bias_tells_or_all_is_square():
    leaves = {"layers/0/up/weight": (F, D), "layers/0/up/bias": (F,), "layers/0/mix/weight": (D, D)}
    leaves |= {"layers/0/down/weight": (F, D), "layers/0/down/bias": (D,)}
    leaves |= {"embed/weight": (V, D)}
    found = readings(nested({f"{path}/<0>": array(*shape) for path, shape in leaves.items()}))
    assert {path: str(reading) for path, reading in found.items()} == {
        "layers/0/up/weight": "M oi",
        "layers/0/down/weight": "M io",
        "layers/0/mix/weight": "M oi",
        **dict.fromkeys(["layers/0/up/bias", "layers/0/down/bias", "embed/weight"], "F"),
    }


def test_penzai_is_refused_because_its_paths_hold_no_names():
    shapes = [(V, D), (D,), (D, G, H, K)]
    params = tuple(Variable(PenzaiArray(array(*shape))) for shape in shapes)
    message = refusal(params)
    assert '"0", shape (19, 6)' in message and '"2", shape (6, 2, 4, 5)' in message
    assert '"1"' not in message


def test_penzai_offers_a_rule_for_every_shape_and_rank():
    shapes = [(D, G, H, K), (D, G, K), (G, H, K, D), (D, G, K)]
    message = refusal(tuple(Variable(PenzaiArray(array(*shape))) for shape in shapes))
    assert '"0", shape (6, 2, 4, 5)' in message and "# (in, out, out, out)" in message
    assert '"2", shape (2, 4, 5, 6)' in message and "# (in, in, in, out)" in message
    assert '"1", "3", shape (6, 2, 5)' in message and "# (in, out, out)" in message


def test_wrapped_and_bare_leaves_get_the_same_rules():
    """`nnx.Optimizer` shows variables to `init` and arrays to `update`."""
    bare = trees()["families: nnx"].params
    assert default_rules(jax.tree.map(Variable, bare)) == default_rules(bare)


def test_heads_are_read_only_beside_an_output_projection_of_their_sizes():
    query, out = array(D, H, K), array(H, K, D)
    attention = {"query": {"kernel": query}, "out": {"kernel": out}}
    assert str(readings({"blocks": [attention]})["blocks/0/query/kernel"]) == "T ioo"
    attention["out"] = {"kernel": array(K, H, D)}
    assert '"blocks/0/query/kernel"' in refusal({"blocks": [attention]})


def test_heads_as_many_as_large_are_read_where_a_norm_shows_that_nothing_is_scanned():
    attention = {"query": {"kernel": array(D, H, H)}, "out": {"kernel": array(H, H, D)}}
    assert '"blocks/0/attn/query/kernel"' in refusal({"blocks": [{"attn": attention}]})
    assert '"attn/query/kernel"' in refusal({"attn": attention, "ln": {"scale": array(D)}})
    params = {"blocks": [{"attn": attention, "ln": {"scale": array(D)}}]}
    assert str(readings(params)["blocks/0/attn/query/kernel"]) == "T ioo"
    params = {"Block_0": {"MultiHeadDotProductAttention_0": attention}}
    path = "Block_0/MultiHeadDotProductAttention_0/query/kernel"
    assert str(readings(params)[path]) == "T ioo"


def test_scanned_norms_that_disagree_with_the_matrices_prove_no_layer_axis():
    leaves = {"layers/attn/query/kernel": (L, D, A), "layers/ln/scale": (N, D)}
    assert "layer_axis=0" in refusal(arrays(leaves))


def test_other_leaves_above_2d_go_to_the_fallback_with_one_warning():
    params = nested(
        {"mix/kernel": array(2, 4, 5), "odd": array(2, 2, 5, 2), "up/kernel": array(4, 5)}
    )
    with pytest.warns(UserWarning) as caught:
        rules = default_rules(params)
    (warning,) = caught
    message = str(warning.message)
    assert "No name and no size tells what these leaves are" in message
    assert '"mix/kernel", shape (2, 4, 5): 40.0%' in message
    assert '"odd", shape (2, 2, 5, 2): 40.0%' in message
    assert "up/kernel" not in message
    assert Rule("^odd$", stack=0) in rules
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(plan(params, rules).fallback) == {"mix/kernel", "odd"}


def test_shared_experts_with_a_third_axis_are_no_experts():
    with pytest.warns(UserWarning, match='"moe_block/shared_experts/kernel", shape .*: 100.0%'):
        (rule,) = default_rules({"moe_block": {"shared_experts": {"kernel": array(L, D, F)}}})
    assert rule.stack == 0


@pytest.mark.parametrize(
    "params", [(), {}, None, {"a": None}, 1.5, True, np.ones(3), jnp.ones(()), optax.MaskedNode()]
)
def test_trees_without_matrices_have_no_rules(params):
    assert default_rules(params) == ()


def test_an_array_alone_is_a_matrix():
    assert default_rules(np.ones((2, 3), np.float32)) == (Rule("^$"),)


def test_what_is_no_array_of_floats_goes_to_the_fallback():
    params = {
        "layers": [{"weight": jnp.ones((F, D)), "dropout": {"p": 0.1, "inference": False}}],
        "activation": jax.nn.gelu,
        "filtered": None,
        "masked": optax.MaskedNode(),
        "key": jax.random.key(0),
        "keys": jax.random.key_data(jax.random.split(jax.random.key(0), 3)),
        "step": jnp.zeros((), jnp.int32),
        "table": np.zeros((V, D), np.int8),
        "phase": np.zeros((D, D), np.complex64),
        "empty": np.zeros((0, D), np.float32),
    }
    rules = default_rules(params)
    assert rules[0] == Rule(r"^layers/(?P<layer>\d+)/weight$", dims=MuonDimensionNumbers(1, 0))
    assert str(readings(params, rules)["layers/0/weight"]) == "M oi"
    assert len(plan(params, rules).groups) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_numpy_jax_and_abstract_arrays_get_the_same_rules(dtype):
    kernel = jax.ShapeDtypeStruct((D, A), jnp.dtype(dtype))
    params = {f"block_{i}": {"query": {"kernel": kernel}} for i in range(2)}
    concrete = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    assert default_rules(params) == default_rules(concrete)
    assert default_rules(params)[0].stack == 2


def test_leaves_that_a_mask_took_out_change_no_other_leaf():
    tree = trees()["families: linen"]
    params = tree.params
    params["Block_1"]["attn"]["query"]["kernel"] = optax.MaskedNode()
    assert default_rules(params) == default_rules(tree.params)


def test_the_v_of_a_gated_feed_forward_is_no_v_projection():
    names = ("query", "key", "value", "out")
    attention = {name: {"kernel": array(16, 16)} for name in names}
    mlp = {"u_proj": array(16, 40), "v_proj": array(16, 40), "o_proj": array(40, 16)}
    block = {"attn": attention, "mlp": {name: {"kernel": leaf} for name, leaf in mlp.items()}}
    groups = plan({"block_0": block, "block_1": block}).groups
    assert {len(group.members) for group in groups if "/mlp/" in group.members[0]} == {1}


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=10)(nn.LayerNorm()(x))
        hidden = nn.Dense(14)(nn.LayerNorm()(x))
        return x + nn.Dense(6)(nn.gelu(hidden))


class LinenModel(nn.Module):
    scan_axis: int | None = None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(19, 6)(tokens)
        if self.scan_axis is None:
            for _ in range(3):
                x = nn.remat(LinenBlock)()(x)
        else:
            x, _ = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": self.scan_axis},
                split_rngs={"params": True},
                length=3,
            )(LinenBlock(name="layers"), x, None)
        return nn.Dense(19)(x)


@pytest.mark.promotes_dtypes
@pytest.mark.parametrize("scan_axis", [None, 0, 1])
def test_linen_model(scan_axis):
    tokens = jnp.zeros((1, 7), jnp.int32)
    params = jax.eval_shape(LinenModel(scan_axis).init, jax.random.key(0), tokens)
    made = plan(params)
    layer = "" if scan_axis is None else "l"
    kinds = {"query|key|value": "T ioo", "/out/": "M iio", "/.*/Dense_": "M io"}
    found = {path: str(reading) for path, reading in readings(params).items()}
    for path in found:
        for pattern, reading in kinds.items():
            if re.search(pattern, path) and path.endswith("/kernel"):
                kind, axes = reading.split()
                place = scan_axis or 0
                assert found[path] == f"{kind} {axes[:place]}{layer}{axes[place:]}"
    rest = {path for path, reading in found.items() if reading == "F"}
    assert rest == {path for path in found if not path.endswith("/kernel")} | {
        "params/Dense_0/kernel"
    }
    assert [group.layers for group in made.groups if group.rule.stack == 2] == [(0, 1), (2,)] * 3


@pytest.mark.promotes_dtypes
def test_linen_partitioned_boxes_change_nothing():
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    boxed = jax.eval_shape(
        nn.Dense(8, kernel_init=kernel).init, jax.random.key(0), jnp.ones((1, 4))
    )
    assert default_rules(boxed) == default_rules(nn.unbox(boxed)) == (Rule("^params/kernel$"),)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 6, 10, decode=False, rngs=rngs)
        self.ln = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 14, rngs=rngs)
        self.down = nnx.Linear(14, 6, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.emb = nnx.Embed(19, 6, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(3)])
        self.head = nnx.Linear(6, 19, rngs=rngs)


@pytest.mark.promotes_dtypes
def test_nnx_model():
    model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    rules = default_rules(state)
    assert rules == default_rules(nnx.to_pure_dict(state)) == default_rules(nnx.as_pure(state))
    assert [(rule.pattern, rule.stack) for rule in rules] == [
        (r"^blocks/(?P<layer>\d+)/attn/(key|query|value)/kernel$", 2),
        (r"^blocks/(?P<layer>\d+)/attn/out/kernel$", 1),
        (r"^blocks/(?P<layer>\d+)/(down|up)/kernel$", 1),
        (r"^blocks/\d+/attn/(key|query|value)/bias$", 0),
        (r"^emb/embedding$", 0),
        (r"^head/kernel$", 0),
    ]
    found = readings(state, rules)
    assert str(found["blocks/0/attn/query/kernel"]) == "T ioo"
    assert str(found["blocks/2/attn/out/kernel"]) == "M iio"


@pytest.mark.promotes_dtypes
def test_nnx_vmapped_layers_are_read_along_their_axis():
    make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
    layers = nnx.eval_shape(lambda: make(nnx.Rngs(0).split(3)))
    found = readings({"layers": nnx.state(layers, nnx.Param)})
    assert str(found["layers/attn/query/kernel"]) == "T lioo"
    assert str(found["layers/up/kernel"]) == "M lio"


KEYS = st.sampled_from(
    ["layers", "blocks", "block", "block_1", "block_2", "0", "1", "10", "attn", "query", "key"]
    + ["value", "out", "qkv", "kv_proj", "c_attn", "c_proj", "c_fc", "q_einsum", "experts", "moe"]
    + ["gate", "embed", "head", "conv_0", "ln", "kernel", "w", "weight", "bias", "scale", "lora_a"]
    + ["attn_vec_einsum", "gating_einsum", "linear", "linear_1", "a.b", "(", "x y", "\u0663"]
)
LEAVES = st.one_of(
    st.builds(
        jax.ShapeDtypeStruct,
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 12]), max_size=5).map(tuple),
        st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32]),
    ),
    st.sampled_from([None, 1.0, True, optax.MaskedNode()]),
)
TREES = st.recursive(
    LEAVES,
    lambda inside: st.dictionaries(KEYS, inside) | st.lists(inside, max_size=3),
    max_leaves=40,
)


@given(TREES)
def test_any_tree_is_planned_or_refused(params):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            rules = default_rules(params)
    except ValueError as error:
        assert "cannot tell how to read" in str(error)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        readings(params, rules)
    for path, leaf in leaf_paths(params):
        fits = [rule for rule in rules if rule.search(path)]
        assert len(fits) <= 1
        if fits and len(np.shape(leaf)) > 1:
            assert fits[0].stack == 0 or jnp.issubdtype(leaf.dtype, jnp.floating)


def test_a_scanned_query_beside_a_scanned_mlp_is_asked_about():
    shapes = {"query": (6, 64, 64), "up": (6, 64, 256)}
    layers = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="layers/query/kernel"):
        default_rules({"embed": {"embedding": jnp.zeros((1000, 64))}, "layers": layers})


def test_projections_that_nothing_stacks_are_warned_of():
    attention = {f"attn/{name}/kernel": (64, 64) for name in ("query", "key", "value", "out")}
    with pytest.warns(UserWarning, match="Q, K and V are recognized, but none of them is stacked"):
        default_rules(arrays(attention))
    default_rules(
        arrays({f"block_{i}/{path}": s for i in range(2) for path, s in attention.items()})
    )


def test_the_plan_says_what_a_leaf_was_taken_for():
    params = arrays(
        {f"block_{i}/up/kernel": (64, 256) for i in range(2)}
        | {f"block_{i}/down/kernel": (256, 64) for i in range(2)}
        | {
            "block_0/moe/router": (64, 8),
            "block_0/moe/up": (8, 64, 99),
            "block_0/moe/down": (8, 99, 64),
        }
        | {"wte": (999, 64), "mix/kernel": (64, 50)}
    )
    why = {leaf.path: leaf.reason for leaf in plan(params).untouched}
    assert why == {
        "block_0/moe/router": "router of 8 experts",
        "wte": "table, by name",
        "mix/kernel": "head: nothing reads 50",
    }


def test_reasons_make_no_difference():
    params = arrays(
        {"block_0/up/kernel": (64, 256), "block_0/down/kernel": (256, 64), "wte": (9, 64)}
    )
    rules = default_rules(params)
    assert rules.reasons == {"wte": "table, by name"}
    assert rules == tuple(rules) and plan(params, tuple(rules)) == plan(params)


def test_explain_says_what_each_leaf_is_and_why():
    paths = {f"block_{i}/{n}/kernel": (64, 64) for i in range(2) for n in ("q", "k", "v", "o")}
    lines = explain(arrays(paths | {"wte": (999, 64), "block_0/attn/key/kernel": (64, 3, 5)}))
    assert [line.split("  ")[0] for line in lines.splitlines()][-1] == "wte"
    assert re.search(r"block_\*/q/kernel +64 x 64 +query +by name", lines)
    assert re.search(r"block_\*/attn/key/kernel +64 x 3 x 5 +asked: key", lines)
    assert re.search(r"wte +999 x 64 +table +table, by name", lines)


def test_a_model_with_functions_says_what_leaves_them_out():
    model = {"up": {"kernel": jnp.ones((4, 8))}, "activation": jax.nn.gelu}
    assert {u.path: u.reason for u in plan(model).untouched}["activation"] == (
        "no array: eqx.filter it out"
    )
    with pytest.raises(ValueError, match="'activation' are functions.*eqx.filter"):
        teon(0.1).init(model)
