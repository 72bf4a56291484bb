"""What structure tells of a leaf, whatever it is called: the smallest tree of every kind.

A table has the shape of each path and its verdict: `T 64x16`, stacked over layers, of fan_in 64 and
fan_out 16; `M`, orthogonalized alone; `F`, the fallback; `?`, an error or a warning names it. `*`
stands for the layers 0, 1 and 2. Rows without a verdict are there for what they show of others.
"""

import re
import warnings

import pytest
from test_default_rules import array, leaf_of, nested

from teon_optax import Rule, default_rules, plan


def expanded(rows):
    """Every path, three for a `*`, with its shape and verdict."""
    found = {}
    for path, row in rows.items():
        shape, _, verdict = row.partition(" ")
        sizes = tuple(map(int, shape.split("x")))
        for number in "012" if "*" in path else "0":
            found[path.replace("*", number)] = sizes, verdict
    return found


def tree_of(rows):
    return nested({path: array(*shape) for path, (shape, _) in expanded(rows).items()})


def verdicts(params):
    """Path -> verdict; what an error names is answered by the fallback, and asked again."""
    first, told = [], ""
    while True:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                rules = default_rules(params, first)
                break
            except ValueError as error:
                paths = re.findall(r'(?<!r)"([^"^]+)"', str(error))
                assert paths, error
                told += str(error)
                first += [Rule(f"^{re.escape(path)}$", stack=0) for path in paths]
    told += "".join(str(warning.message) for warning in caught)
    made = plan(params, rules)
    found = dict.fromkeys(made.fallback, "F")
    for group in made.groups:
        letter = "T" if group.rule.stack > 1 else "M"
        for member in group.members:
            found[leaf_of(member)] = f"{letter} {group.fan_in}x{group.fan_out}"
    return {path: "?" if f'"{path}"' in told else verdict for path, verdict in found.items()}


def under(prefix, rows):
    return {f"{prefix}{path}": row for path, row in rows.items()}


ATTENTION = {
    "q_proj/kernel": "64x64 T 64x64",
    "k_proj/kernel": "64x32 T 64x32",
    "v_proj/kernel": "64x32 T 64x32",
    "o_proj/kernel": "64x64 M 64x64",
}
HEADS = {
    "query/kernel": "64x4x16 T 64x64",
    "key/kernel": "64x2x16 T 64x32",
    "value/kernel": "64x2x16 T 64x32",
}
ALONE = {
    "query/kernel": "64x4x16 M 64x64",
    "key/kernel": "64x4x16 M 64x64",
    "value/kernel": "64x4x16 M 64x64",
    "out/kernel": "4x16x64 M 64x64",
}
MLP = {"up/kernel": "64x256 M 64x256", "down/kernel": "256x64 M 256x64"}
BLOCK = under("attn/", ATTENTION) | under("mlp/", MLP) | {"ln/scale": "64 F"}
BLOCKS = under("blocks/*/", BLOCK)
UNNAMED = {"fee/kernel": "64x256 M 64x256", "fum/kernel": "256x64 M 256x64"}

TABLES = {
    "a table of another name": {"token_embedding_table": "999x64 F", "lookup": "99x64 F"} | BLOCKS,
    "a table in a module": {"zorp/kernel": "999x64 F"} | BLOCKS,
    "positions, latents, codes": {"pos_enc": "16x64 F", "latents": "8x64 F", "zorp": "9x64 F"}
    | BLOCKS,
    "a table of relative positions in a block": BLOCKS
    | {"blocks/*/attn/relative_position_bias_table": "169x4 F", "blocks/*/zorp": "225x4 ?"},
    "a readout": {"lookup": "999x64 F", "readout/kernel": "64x999 F"} | BLOCKS,
    "a table and its readout, neither of them named": BLOCKS
    | {"fee": "999x64 ?", "fum/kernel": "64x999 ?"},
    "an output as wide as images": {"final_proj/kernel": "64x48 F"} | BLOCKS,
    "a vocabulary as large as the hidden width": BLOCKS
    | {"embed/embedding": "256x64 F", "fum/kernel": "64x256 F"},
    "a vocabulary as large as the width": BLOCKS
    | {"embed/embedding": "64x64 F", "Dense_0/kernel": "64x64 ?", "zorp": "64x64 ?"},
    "an actor": {
        "actor/Dense_0/kernel": "17x64 F",
        "actor/Dense_1/kernel": "64x64 M 64x64",
        "actor/Dense_2/kernel": "64x6 F",
    },
    "an actor of two matrices": {"Dense_0/kernel": "17x64 F", "Dense_1/kernel": "64x6 F"},
    "a list of layers, out first": {
        "layers/0/weight": "64x17 F",
        "layers/1/weight": "64x64 M 64x64",
        "layers/2/weight": "6x64 F",
    },
    "critics": {
        "critics_*/Dense_0/kernel": "17x64 F",
        "critics_*/Dense_1/kernel": "64x64 M 64x64",
        "critics_*/Dense_2/kernel": "64x1 F",
    },
    "a list of weights and biases": {
        "0/0": "17x64 F",
        "0/1": "64 F",
        "1/0": "64x64 M 64x64",
        "1/1": "64 F",
        "2/0": "64x6 F",
        "2/1": "6 F",
    },
    "an output as wide as the input": {
        "Dense_0/kernel": "8x64 F",
        "Dense_1/kernel": "64x32 M 64x32",
        "Dense_2/kernel": "32x64 M 32x64",
        "Dense_10/kernel": "64x8 F",
    },
    "an input and an output of one size, in no order": {
        "fee/kernel": "8x64 ?",
        "Dense_0/kernel": "64x64 M 64x64",
        "Dense_1/kernel": "64x64 M 64x64",
        "fum/kernel": "64x8 ?",
    },
    "an autoencoder": {
        "encoder/Dense_0/kernel": "784x256 ?",
        "encoder/Dense_1/kernel": "256x32 ?",
        "decoder/Dense_0/kernel": "32x256 ?",
        "decoder/Dense_1/kernel": "256x784 ?",
    },
    "two networks of which one reads what the other writes": {
        "generator/Dense_0/kernel": "16x64 F",
        "generator/Dense_1/kernel": "64x64 M 64x64",
        "generator/Dense_2/kernel": "64x784 ?",
        "discriminator/Dense_0/kernel": "784x64 ?",
        "discriminator/Dense_1/kernel": "64x64 M 64x64",
        "discriminator/Dense_2/kernel": "64x1 F",
    },
    "critics with a head of another name": {
        "critics_*/trunk/Dense_0/kernel": "17x64 F",
        "critics_*/trunk/Dense_1/kernel": "64x64 M 64x64",
        "critics_*/value/kernel": "64x1 F",
    },
    "a vmapped ensemble": {
        "VmapMLP_0/Dense_0/kernel": "5x17x64 ?",
        "VmapMLP_0/Dense_0/bias": "5x64 F",
        "VmapMLP_0/Dense_1/kernel": "5x64x64 ?",
        "VmapMLP_0/Dense_1/bias": "5x64 F",
    },
    "a list of arrays": {
        "0": "999x64 ?",
        "1": "64x4x16 ?",
        "2": "4x16 ?",
        "3": "64x256 ?",
        "4": "256 F",
    },
}
HIDDEN = {
    "an input called embed, out first": {
        "embed/weight": "64x48 F",
        "embed/bias": "64 F",
        "l1/weight": "64x64 M 64x64",
        "l2/weight": "64x64 M 64x64",
        "head/weight": "10x64 F",
    },
    "an MLP with no block around": {"square/kernel": "64x64 M 64x64"} | MLP,
    "a module of a block called embed": under("blocks/*/", MLP)
    | {"blocks/*/embed/kernel": "64x256 M 64x256", "blocks/*/ln/scale": "64 F"},
    "a projection of what a network outside of the blocks makes, called emb": {
        "time/linear_1/kernel": "64x256 M 64x256",
        "time/linear_2/kernel": "256x256 M 256x256",
        "blocks/*/emb/kernel": "256x64 M 256x64",
        "blocks/*/out/kernel": "64x64 M 64x64",
    },
    "layers called networks": {
        "encode/kernel": "9x64 F",
        "GraphNetwork_*/edges/Dense_0/kernel": "192x64 M 192x64",
        "GraphNetwork_*/edges/Dense_1/kernel": "64x64 M 64x64",
        "decode/kernel": "64x3 F",
    },
    "an MLP of two called a and b": under("blocks/*/attn/", ATTENTION)
    | {"blocks/*/mlp/a/kernel": "64x256 M 64x256", "blocks/*/mlp/b/kernel": "256x64 M 256x64"},
    "a head called cls": {"cls/kernel": "64x10 F"} | under("net/l*/", BLOCK),
    "as many bytes as hidden units": {
        "embed": "256x128 F",
        "up_0": "128x256 M 128x256",
        "down_0": "256x128 M 256x128",
        "head": "128x256 F",
    },
}
FUSED = {
    **{
        f"fused as {name}": under("blocks/*/", MLP)
        | {f"blocks/*/attn/{name}/kernel": "64x192 T 64x64"}
        | {"blocks/*/attn/out/kernel": "64x64 M 64x64"}
        for name in ("fused_qkv", "attn_qkv", "merged_qkv", "Wqkv", "zorp")
    },
    "fused beside unlike siblings": under("blocks/*/", MLP)
    | {"blocks/*/qkv_proj/kernel": "64x192 T 64x64", "blocks/*/out/kernel": "64x64 M 64x64"}
    | {"blocks/*/zorp/kernel": "64x128 M 64x128"},
    "thirds in a block that has no other names": under("blocks/*/", UNNAMED)
    | {"blocks/*/fie/kernel": "64x192 ?", "blocks/*/foe/kernel": "64x64 M 64x64"},
    "with a gate, laid out by heads": under("blocks/*/", MLP)
    | {"blocks/*/attn/in_proj_qkvz/kernel": "64x256 ?"}
    | {"blocks/*/attn/out_proj/kernel": "64x64 M 64x64"},
    "unnamed in a feed forward as wide as the stream, which may be gate and up": BLOCKS
    | {"blocks/*/other/proj_1/kernel": "64x128 ?", "blocks/*/other/proj_2/kernel": "64x64 M 64x64"},
    "heads in three": under("blocks/*/", MLP)
    | {"blocks/*/attn/qkv/kernel": "64x3x4x16 T 64x64"}
    | {"blocks/*/attn/out/kernel": "4x16x64 M 64x64", "blocks/*/ln/scale": "64 F"},
    **{
        f"gate and up as {name}": under("blocks/*/attn/", ATTENTION)
        | {f"blocks/*/mlp/{name}/kernel": "64x512 M 64x256"}
        | {"blocks/*/mlp/last/kernel": "256x64 M 256x64"}
        for name in ("gate_up_proj", "w13", "proj_1", "zorp")
    },
    "thirds of an input projection of no attention": under("blocks/*/mlp/", MLP)
    | {"blocks/*/in_proj/kernel": "64x192 ?", "blocks/*/out_proj/kernel": "64x64 M 64x64"},
    "a state-space layer's input projection": {
        "layers/*/mixer/in_proj/kernel": "64x256 M 64x256",
        "layers/*/mixer/x_proj/kernel": "128x20 M 128x20",
        "layers/*/mixer/dt_proj/kernel": "4x128 M 4x128",
        "layers/*/mixer/out_proj/kernel": "128x64 M 128x64",
        "layers/*/mixer/A_log": "128x16 F",
    },
}
LOW_RANK = {
    **{
        f"factors {a} and {b}": {
            "blocks/*/q/kernel": "64x64 T 64x64",
            f"blocks/*/q/{a}": "64x4 F",
            f"blocks/*/q/{b}": "4x64 F",
            "blocks/*/v/kernel": "64x64 T 64x64",
        }
        for a, b in (("a", "b"), ("A", "B"), ("down", "up"), ("lora_a", "lora_b"), ("fee", "fum"))
    },
    "two that lead through a narrow size": BLOCKS
    | {"blocks/*/zorp/fee": "64x4 ?", "blocks/*/zorp/fum": "4x256 ?"},
    "an adapter": BLOCKS
    | {
        "blocks/*/adapter/down/kernel": "64x4 M 64x4",
        "blocks/*/adapter/down/bias": "4 F",
        "blocks/*/adapter/up/kernel": "4x64 M 4x64",
        "blocks/*/adapter/up/bias": "64 F",
    },
    "factors in modules": under("blocks/*/mlp/", MLP)
    | {
        "blocks/*/mlp/side/base/kernel": "64x256 M 64x256",
        "blocks/*/mlp/side/fee/kernel": "64x4 F",
        "blocks/*/mlp/side/fum/kernel": "4x256 F",
    },
    "factors of heads": under("blocks/*/attn/", HEADS)
    | {"blocks/*/attn/out/kernel": "4x16x64 M 64x64"}
    | {"blocks/*/attn/query/a": "64x3 F", "blocks/*/attn/query/b": "3x4x16 F"},
    "latent attention": under("layers/*/mlp/", MLP)
    | {
        "layers/*/attn/q_a_proj/kernel": "64x16 M 64x16",
        "layers/*/attn/q_b_proj/kernel": "16x64 M 16x64",
        "layers/*/attn/kv_a_proj_with_mqa/kernel": "64x24 M 64x24",
        "layers/*/attn/kv_b_proj/kernel": "16x128 M 16x128",
        "layers/*/attn/o_proj/kernel": "64x64 M 64x64",
    },
}
EXPERTS = ("linear", "linear_v", "linear_1")
MIXTURES = {
    **{
        f"bare experts beside {router}": under("layers/*/attn/", ATTENTION)
        | {
            f"layers/*/mlp/{router}/kernel": "64x8 F",
            "layers/*/mlp/gate_proj": "8x64x128 M 64x128",
            "layers/*/mlp/up_proj": "8x64x128 M 64x128",
            "layers/*/mlp/down_proj": "8x128x64 M 128x64",
        }
        for router in ("router", "gate", "zorp")
    },
    "experts as modules": under("layers/*/attn/", ATTENTION)
    | {"layers/*/zorp/fie/kernel": "64x5 F"}
    | {
        f"layers/*/zorp/foe_{expert}/{name}/kernel": "128x64 M 128x64"
        if name == "linear_1"
        else "64x128 M 64x128"
        for expert in range(5)
        for name in EXPERTS
    },
    "experts with gate and up in one": under("layers/*/attn/", ATTENTION)
    | {
        "layers/*/moe/gating_einsum": "8x2x128x64 M 64x128",
        "layers/*/moe/linear": "8x128x64 M 128x64",
        "layers/*/moe/router_logits": "64x8 F",
    },
    "experts one after another": under("blocks/*/attn/", ATTENTION)
    | {"blocks/*/ffn/router/layer/kernel": "64x8 F"}
    | {f"blocks/*/ffn/experts/mlp/{name}": "1024x64 ?" for name in ("w1", "v1", "w2")},
    **{
        f"experts one after another, in {module} beside {router}": under("b/*/attn/", ATTENTION)
        | {f"b/*/{module}/{router}/kernel": "64x8 F"}
        | dict.fromkeys((f"b/*/{module}/{name}" for name in ("w1", "v1", "w2")), "1024x64 ?")
        for module, router in (("moe", "router"), ("ffn", "gate"))
    },
    "experts one after another along both widths": under("blocks/*/attn/", ATTENTION)
    | {"blocks/*/moe/router/kernel": "64x8 F"}
    | {"blocks/*/moe/gate": "512x128 ?", "blocks/*/moe/up": "512x128 ?"}
    | {"blocks/*/moe/down": "1024x64 ?"},
    "a shared expert and its gate": {
        "layers/*/mlp/gate/kernel": "64x8 F",
        "layers/*/mlp/experts/up/kernel": "8x64x128 M 64x128",
        "layers/*/mlp/experts/down/kernel": "8x128x64 M 128x64",
        "layers/*/mlp/shared_expert/up/kernel": "64x128 M 64x128",
        "layers/*/mlp/shared_expert/down/kernel": "128x64 M 128x64",
        "layers/*/mlp/zorp/kernel": "64x1 F",
    },
}
LAYERS = {
    "self and cross attention of one block": under("block/MultiHeadDotProductAttention_0/", ALONE)
    | under("block/MultiHeadDotProductAttention_1/", ALONE)
    | {"block/Dense_0/kernel": "64x256 M 64x256", "block/Dense_1/kernel": "256x64 M 256x64"},
    "heads for two tasks": {"heads_0/kernel": "64x6 F", "heads_1/kernel": "64x6 F"} | BLOCKS,
    "heads of attention as modules": {
        f"attn/zorp_{head}/{name}/kernel": "64x16 M 64x16"
        for head in range(4)
        for name in ("query", "key", "value")
    }
    | {"attn/out/kernel": "64x64 M 64x64"},
    "members of an ensemble": {
        f"members_{member}/{name}/kernel": "64x64 M 64x64"
        for member in range(2)
        for name in ("query", "key", "value", "out")
    },
    "two networks in a list": {
        f"{network}/{path}": row
        for network in range(2)
        for path, row in (
            under("attn/", ALONE) | {"embed/embedding": "99x64 F", "head/kernel": "64x99 F"}
        ).items()
    },
    "two that may be networks or layers": {
        f"{network}/{name}/kernel": "64x64 M 64x64" if name == "out" else "64x64 ?"
        for network in range(2)
        for name in ("query", "key", "value", "out")
    },
    "blocks that names alone show": under(
        "h*_attn_", dict.fromkeys(("q/w", "k/w", "v/w"), "64x64 T 64x64")
    )
    | under("h*_", {"attn_o/w": "64x64 M 64x64", "mlp_up/w": "64x256 M 64x256"})
    | {"h*_mlp_down/w": "256x64 M 256x64", "h*_ln/scale": "64 F", "embed/w": "99x64 F"},
    "a number inside of a name": under(
        "gpt/h*_attn/", dict.fromkeys(("query/w", "key/w", "value/w"), "64x64 T 64x64")
    )
    | {
        "gpt/h*_attn/linear/w": "64x64 M 64x64",
        "gpt/h*_mlp/linear/w": "64x256 M 64x256",
        "gpt/h*_mlp/linear_1/w": "256x64 M 256x64",
    },
    **{
        f"scanned as {name}": {
            **{f"{name}/attn/{part}/kernel": "6x64x64 T 64x64" for part in ("query", "key")},
            f"{name}/attn/out/kernel": "6x64x64 M 64x64",
            f"{name}/LayerNorm_0/scale": "6x64 F",
            f"{name}/up/kernel": "6x64x256 M 64x256",
            f"{name}/up/bias": "6x256 F",
            f"{name}/down/kernel": "6x256x64 M 256x64",
            "Embed_0/embedding": "99x64 F",
        }
        for name in ("ScanBlock_0", "layers", "zorp")
    },
}
PER_HEAD = {
    "an output projection of Keras": under("layers/*/attention/", HEADS)
    | {"layers/*/attention/attention_output/kernel": "4x16x64 M 64x64"}
    | {"layers/*/attention/query/bias": "4x16 F"},
    "an output projection of any name": under("layers/*/zorp/", HEADS)
    | {"layers/*/zorp/fum/kernel": "4x16x64 M 64x64"},
    "heads without any name": {
        "layers/*/zorp/fee/kernel": "64x4x16 T 64x64",
        "layers/*/zorp/fie/kernel": "64x2x16 T 64x32",
        "layers/*/zorp/foe/kernel": "64x2x16 T 64x32",
        "layers/*/zorp/fum/kernel": "4x16x64 M 64x64",
    },
    "as many heads as they are long, and nothing that shows whether they are layers": {
        "layers/*/zorp/query/kernel": "64x8x8 ?",
        "layers/*/zorp/key/kernel": "64x8x8 ?",
        "layers/*/zorp/value/kernel": "64x8x8 ?",
        "layers/*/zorp/out/kernel": "8x8x64 ?",
    },
    "latent attention with heads": {
        "layers/*/zorp/wq_a/kernel": "32x16 M 32x16",
        "layers/*/zorp/wq_b/kernel": "16x4x24 M 16x96",
        "layers/*/zorp/wkv_a/kernel": "32x20 M 32x20",
        "layers/*/zorp/wkv_b/kernel": "16x4x16 M 16x64",
        "layers/*/zorp/out/kernel": "4x8x32 M 32x32",
    },
    "scales for each head": under("layers/*/attn/", HEADS)
    | {"layers/*/attn/out/kernel": "4x16x64 M 64x64", "layers/*/attn/zorp": "4x16 F"},
    "vectors of two axes": BLOCKS
    | {
        "blocks/*/s4/log_step": "64x1 F",
        "blocks/*/s4/zorp": "64x1 F",
        "blocks/*/time/time_faaaa": "4x16 F",
        "blocks/*/cema/gamma_real": "64x5 F",
        "blocks/*/cema/omega": "64x5 ?",
    },
    "a convolution over time and the matrix behind it": BLOCKS
    | {"blocks/*/conv/k": "4x128 F", "blocks/*/conv/w": "128x128 ?"},
    "a feed forward with key and value": {
        "blocks/*/feed_forward/key/kernel": "64x128 M 64x128",
        "blocks/*/feed_forward/value/kernel": "128x64 M 128x64",
        "blocks/*/feed_forward/receptance/kernel": "64x64 M 64x64",
    },
}
NAMELESS = {
    "grouped queries, wider than the stream": {
        "zorp/*/fo/fee/kernel": "64x96 T 64x96",
        "zorp/*/fo/fie/kernel": "64x32 T 64x32",
        "zorp/*/fo/foe/kernel": "64x32 T 64x32",
        "zorp/*/fo/fum/kernel": "96x64 M 96x64",
    }
    | under("zorp/*/mi/", UNNAMED),
    "grouped queries": {
        "zorp/*/fo/fee/kernel": "64x64 ?",
        "zorp/*/fo/fie/kernel": "64x32 T 64x32",
        "zorp/*/fo/foe/kernel": "64x32 T 64x32",
        "zorp/*/fo/fum/kernel": "64x64 ?",
    }
    | under("zorp/*/mi/", UNNAMED),
    "four equal matrices": {
        f"zorp/*/fo/{name}/kernel": "64x64 ?" for name in ("fee", "fie", "foe", "fum")
    }
    | under("zorp/*/mi/", UNNAMED),
    "a gated MLP with a gate to one number": {
        "zorp/*/fo/fee/kernel": "64x96 M 64x96",
        "zorp/*/fo/fie/kernel": "64x96 M 64x96",
        "zorp/*/fo/foe/kernel": "64x1 M 64x1",
        "zorp/*/fo/fum/kernel": "96x64 M 96x64",
    },
    "a query of another name": {
        "blocks/*/attn/asks/kernel": "64x64 ?",
        "blocks/*/attn/key/kernel": "64x64 T 64x64",
        "blocks/*/attn/value/kernel": "64x64 T 64x64",
        "blocks/*/attn/out/kernel": "64x64 M 64x64",
    },
}
ORIENTED = {
    "kernels that are out first, as reading and writing the stream shows": {
        "blocks/*/q/kernel": "96x64 T 64x96",
        "blocks/*/k/kernel": "32x64 T 64x32",
        "blocks/*/v/kernel": "32x64 T 64x32",
        "blocks/*/o/kernel": "64x96 M 96x64",
        "blocks/*/up/kernel": "256x64 M 64x256",
        "blocks/*/down/kernel": "64x256 M 256x64",
        "blocks/*/square/kernel": "64x64 M 64x64",
        "blocks/*/ln/scale": "64 F",
    },
    "weights that are in first": {
        "blocks/*/q/weight": "64x96 T 64x96",
        "blocks/*/o/weight": "96x64 M 96x64",
        "blocks/*/k/weight": "64x32 T 64x32",
        "blocks/*/ln/weight": "64 F",
    },
    "one bias shows it for all that are called alike": {
        "blocks/*/fee/weight": "64x96 M 64x96",
        "blocks/*/fee/bias": "96 F",
        "blocks/*/fum/weight": "96x64 M 96x64",
    },
}
KINDS = {
    f"{kind}: {name}": rows
    for kind, cases in {
        "tables": TABLES,
        "hidden": HIDDEN,
        "fused": FUSED,
        "low rank": LOW_RANK,
        "mixtures": MIXTURES,
        "layers": LAYERS,
        "heads": PER_HEAD,
        "nameless": NAMELESS,
        "orientation": ORIENTED,
    }.items()
    for name, rows in cases.items()
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_leaf_is_what_the_sizes_around_it_show_or_is_asked(kind):
    rows = KINDS[kind]
    expected = {path: verdict for path, (_, verdict) in expanded(rows).items()}
    assert verdicts(tree_of(rows)) == expected


def test_the_v_of_a_gated_feed_forward_is_no_v_projection():
    names = ("query", "key", "value", "out")
    attention = {name: {"kernel": array(16, 16)} for name in names}
    mlp = {"u_proj": array(16, 40), "v_proj": array(16, 40), "o_proj": array(40, 16)}
    block = {"attn": attention, "mlp": {name: {"kernel": leaf} for name, leaf in mlp.items()}}
    groups = plan({"block_0": block, "block_1": block}).groups
    assert {len(group.members) for group in groups if "/mlp/" in group.members[0]} == {1}
