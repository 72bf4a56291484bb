"""The default rules read no leaf otherwise than the program that uses it, unless they ask.

Each model is a listing with what is right, which the program must say too, and its forward pass.
Sizes differ wherever they may, so that a wrong reading cannot look right.
"""

import ast
import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from listings import FALLBACK, Found, array, expanded, parsed, read
from program import contradictions, read_program

from examples.model import GPT, MODELS

pytestmark = [pytest.mark.promotes_dtypes, pytest.mark.promotes_ranks]
ROOT = pathlib.Path(__file__).parents[1]
TOKENS, ROWS, IMAGES = array(2, 7, dtype=jnp.int32), array(3, 17), array(2, 8, 8, 3)
CASES: dict[str, tuple[str, Any, Any]] = {}


def model(listing, inputs):
    """Puts a forward pass and the listing of its parameters among the cases."""

    def put(apply):
        CASES[apply.__name__.strip("_")] = f"# {apply.__name__}\n{listing}", apply, inputs
        return apply

    return put


def norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def attend(q, k, v):
    """Softmax attention of (batch, tokens, heads, size); fewer heads in k and v are repeated."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bnhk,bmhk->bhnm", q, k) / 3)
    return jnp.einsum("bhnm,bmhk->bnhk", weights, v)


def heads(x, size):
    return x.reshape(*x.shape[:-1], -1, size)


def flat(x):
    return x.reshape(*x.shape[:-2], -1)


def turned(x):
    """Rotary positions, by halves of a head."""
    angles = jnp.arange(x.shape[1])[:, None, None] / jnp.arange(1, 1 + x.shape[-1] // 2)
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


AROUND = "embed/embedding: 31x12 F\nhead/kernel: 12x31 F\nfinal/scale: 12\n"


def language_model(block):
    """Embedding, the blocks, a head."""

    def apply(params, tokens):
        x = params["embed"]["embedding"][tokens]
        for layer in params["blocks"].values():
            x = block(layer, x)
        return (norm(x) * params["final"]["scale"]) @ params["head"]["kernel"]

    return apply


def of_blocks(name, rows, block):
    lines = "".join(f"blocks/{{0..2}}/{line}\n" for line in rows.strip().splitlines())
    apply = language_model(block)
    apply.__name__ = name
    model(AROUND + lines, TOKENS)(apply)


def mlp(p, x):
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


MLP = "up: 12x26 M io\ndown: 26x12 M io\n"


def grouped_queries(p, x):
    h = norm(x) * p["ln"]["scale"]
    q, k, v = (heads(h @ p[name]["kernel"], 10) for name in ("q_proj", "k_proj", "v_proj"))
    return mlp(p, x + flat(attend(turned(q), turned(k), v)) @ p["o_proj"]["kernel"])


of_blocks(
    "grouped_queries",
    "q_proj/kernel: 12x40 T io\nk_proj/kernel: 12x20 T io\nv_proj/kernel: 12x20 T io\n"
    "o_proj/kernel: 40x12 M io\nln/scale: 12\n" + MLP,
    grouped_queries,
)


def heads_everywhere(p, x):
    q, k, v = (
        jnp.einsum("bnd,dhk->bnhk", norm(x), p["attention"][n]["kernel"])
        for n in ("q_proj", "k_proj", "v_proj")
    )
    out = jnp.einsum("bnhk,dhk->bnd", attend(q, k, v), p["attention"]["o_proj"]["kernel"])
    return mlp(p, x + out * p["scale"])


of_blocks(
    "heads_everywhere",
    "attention/{q,k,v}_proj/kernel: 12x4x10 T ioo\nattention/o_proj/kernel: 12x4x10 M oii\n"
    "scale: 12\n" + MLP,
    heads_everywhere,
)


def fused(p, x):
    q, k, v = jnp.split(norm(x) @ p["attn"]["qkv"]["kernel"], 3, axis=-1)
    out = flat(attend(heads(q, 10), heads(k, 10), heads(v, 10)))
    return mlp(p, x + out @ p["attn"]["out"]["kernel"])


of_blocks(
    "fused",
    "attn/qkv/kernel: 12x120 T iO/3\nattn/out/kernel: 40x12 M io\n" + MLP,
    fused,
)


def fused_by_heads(p, x):
    q, k, v = jnp.split(heads(norm(x) @ p["attn"]["query_key_value"]["kernel"], 30), 3, axis=-1)
    return mlp(p, x + flat(attend(q, k, v)) @ p["attn"]["dense"]["kernel"])


of_blocks(
    "fused_by_heads",
    "attn/query_key_value/kernel: 12x120 T iobo as 12x4x3x10\nattn/dense/kernel: 40x12 M io\n"
    + MLP,
    fused_by_heads,
)


def fused_groups(p, x):
    q, k, v = jnp.split(norm(x) @ p["attn"]["qkv_proj"]["kernel"], [40, 60], axis=-1)
    out = flat(attend(heads(q, 10), heads(k, 10), heads(v, 10))) @ p["attn"]["o_proj"]["kernel"]
    gate, up = jnp.split(norm(x + out) @ p["mlp"]["gate_up_proj"]["kernel"], 2, axis=-1)
    return x + out + (jax.nn.silu(gate) * up) @ p["mlp"]["down_proj"]["kernel"]


of_blocks(
    "fused_groups",
    "attn/qkv_proj/kernel: 12x80 T iO/40+20+20\nattn/o_proj/kernel: 40x12 M io\n"
    "mlp/gate_up_proj/kernel: 12x52 M iO/2\nmlp/down_proj/kernel: 26x12 M io",
    fused_groups,
)


def experts(p, x):
    h, moe = norm(x), p["moe"]
    weights, chosen = jax.lax.top_k(jax.nn.softmax(h @ moe["router"]["kernel"]), 2)
    gates = (jax.nn.one_hot(chosen, 5) * weights[..., None]).sum(-2)
    hidden = jax.nn.silu(jnp.einsum("bnd,edf->bnef", h, moe["experts"]["gate"]))
    hidden = hidden * jnp.einsum("bnd,edf->bnef", h, moe["experts"]["up"])
    each = jnp.einsum("bnef,efd->bned", hidden, moe["experts"]["down"])
    return grouped_queries(p, x) + jnp.einsum("bned,bne->bnd", each, gates)


of_blocks(
    "experts",
    "q_proj/kernel: 12x40 T io\nk_proj/kernel: 12x20 T io\nv_proj/kernel: 12x20 T io\n"
    "o_proj/kernel: 40x12 M io\nln/scale: 12\nmoe/router/kernel: 12x5 F\n"
    "moe/experts/gate: 5x12x22 M bio\nmoe/experts/up: 5x12x22 M bio\n"
    "moe/experts/down: 5x22x12 M bio\n" + MLP,
    experts,
)


def latent(p, x):
    h, a = norm(x), p["attn"]
    q = heads(norm(h @ a["q_a_proj"]["kernel"]) @ a["q_b_proj"]["kernel"], 10)
    kv = heads(norm(h @ a["kv_a_proj"]["kernel"]) @ a["kv_b_proj"]["kernel"], 20)
    k, v = jnp.split(kv, 2, axis=-1)
    return mlp(p, x + flat(attend(q, k, v)) @ a["o_proj"]["kernel"])


of_blocks(
    "latent",
    "attn/q_a_proj/kernel: 12x8 M io\nattn/q_b_proj/kernel: 8x40 M io\n"
    "attn/kv_a_proj/kernel: 12x6 M io\nattn/kv_b_proj/kernel: 6x80 M io\n"
    "attn/o_proj/kernel: 40x12 M io\n" + MLP,
    latent,
)


def out_first(p, x):
    q, k, v = (heads(norm(x) @ p["attn"][n]["weight"].T, 10) for n in ("q", "k", "v"))
    x = x + flat(attend(q, k, v)) @ p["attn"]["o"]["weight"].T
    return x + jax.nn.gelu(x @ p["fc1"]["weight"].T) @ p["fc2"]["weight"].T


of_blocks(
    "out_first",
    "attn/{q,k,v}/weight: 40x12 T oi\nattn/o/weight: 12x40 M oi\n"
    "fc1/weight: 26x12 M oi\nfc2/weight: 12x26 M oi",
    out_first,
)


@model(
    AROUND
    + "layers/attn/{query,key,value}/kernel: 3x12x4x10 T lioo\n"
    + "layers/attn/out/kernel: 3x4x10x12 M liio\nlayers/ln/scale: 3x12 F\n"
    + "layers/up/kernel: 3x12x26 M lio\nlayers/down/kernel: 3x26x12 M lio\n",
    TOKENS,
)
def scanned(params, tokens):
    def block(x, p):
        h = norm(x) * p["ln"]["scale"]
        q, k, v = (
            jnp.einsum("bnd,dhk->bnhk", h, p["attn"][n]["kernel"])
            for n in ("query", "key", "value")
        )
        x = x + jnp.einsum("bnhk,hkd->bnd", attend(q, k, v), p["attn"]["out"]["kernel"])
        return x + jax.nn.gelu(norm(x) @ p["up"]["kernel"]) @ p["down"]["kernel"], None

    x, _ = jax.lax.scan(block, params["embed"]["embedding"][tokens], params["layers"])
    return (norm(x) * params["final"]["scale"]) @ params["head"]["kernel"]


@model(
    "Dense_0/kernel: 17x22 F\nDense_0/bias: 22\nDense_1/kernel: 22x26 M io\nDense_1/bias: 26\n"
    "Dense_2/kernel: 26x6 F\nDense_2/bias: 6\n",
    ROWS,
)
def actor(params, x):
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = jax.nn.relu(x) if name < "Dense_2" else x
    return x


@model(
    "conv_{0,1}/bias: 12\nconv_0/kernel: 3x3x3x12 F\nconv_1/kernel: 3x3x12x12 F\n"
    "hidden/kernel: 12x26 M io\nclassifier/kernel: 26x5 F\n",
    IMAGES,
)
def convolutions(params, x):
    for layer in (params["conv_0"], params["conv_1"]):
        dims = jax.lax.conv_dimension_numbers(
            x.shape, layer["kernel"].shape, ("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=dims)
        x = jax.nn.relu(x + layer["bias"])
    return jax.nn.relu(x.mean((1, 2)) @ params["hidden"]["kernel"]) @ params["classifier"]["kernel"]


@model(
    "stem/kernel: 48x12 F\npos_embed: 1x4x12 F\nhead/kernel: 12x5 F\n"
    "blocks/{0..2}/tokens/fc1/kernel: 4x14 M io\nblocks/{0..2}/tokens/fc2/kernel: 14x4 M io\n"
    "blocks/{0..2}/channels/fc1/kernel: 12x26 M io\n"
    "blocks/{0..2}/channels/fc2/kernel: 26x12 M io\n",
    IMAGES,
)
def mixer(params, images):
    x = images.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 48)
    x = x @ params["stem"]["kernel"] + params["pos_embed"]
    for block in params["blocks"].values():
        y = jnp.swapaxes(norm(x), 1, 2) @ block["tokens"]["fc1"]["kernel"]
        x = x + jnp.swapaxes(jax.nn.gelu(y) @ block["tokens"]["fc2"]["kernel"], 1, 2)
        y = jax.nn.gelu(norm(x) @ block["channels"]["fc1"]["kernel"])
        x = x + y @ block["channels"]["fc2"]["kernel"]
    return x.mean(1) @ params["head"]["kernel"]


@model(
    "embed/embedding: 31x12 F\ncell/input/kernel: 12x88 M io\ncell/hidden/kernel: 22x88 M io\n"
    "cell/bias: 88\nhead/kernel: 22x31 F\n",
    TOKENS,
)
def recurrent(params, tokens):
    cell = params["cell"]

    def step(carry, x):
        hidden, memory = carry
        gates = x @ cell["input"]["kernel"] + hidden @ cell["hidden"]["kernel"] + cell["bias"]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(memory)
        return (hidden, memory), hidden

    x = jnp.swapaxes(params["embed"]["embedding"][tokens], 0, 1)
    start = jnp.zeros((2, 22)), jnp.zeros((2, 22))
    return jax.lax.scan(step, start, x)[1] @ params["head"]["kernel"]


@model(
    "encode/kernel: 17x12 F\ndecode/kernel: 12x4 F\n"
    "layers/{0..2}/edges/kernel: 24x14 M io\nlayers/{0..2}/nodes/kernel: 26x12 M io\n",
    ROWS,
)
def graph(params, nodes):
    senders, receivers = jnp.array([0, 1, 2]), jnp.array([1, 2, 0])
    x = jax.nn.relu(nodes @ params["encode"]["kernel"])
    for layer in params["layers"].values():
        pairs = jnp.concatenate([x[senders], x[receivers]], -1)
        edges = jax.nn.relu(pairs @ layer["edges"]["kernel"])
        sums = jax.ops.segment_sum(edges, receivers, 3)
        x = x + jax.nn.relu(jnp.concatenate([x, sums], -1) @ layer["nodes"]["kernel"])
    return x @ params["decode"]["kernel"]


@model(
    "Dense_0/kernel: 5x17x22 ? F\nDense_0/bias: 5x22 F\nDense_1/kernel: 5x22x26 ? M bio\n"
    "Dense_1/bias: 5x26 F\nDense_2/kernel: 5x26x1 F\nDense_2/bias: 5x1 F\n",
    ROWS,
)
def ensemble(params, x):
    def critic(params):
        y = jax.nn.relu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        y = jax.nn.relu(y @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])
        return y @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]

    return jax.vmap(critic)(params).min(0)


ATTENTION = "{q,k,v}_proj/kernel: 12x40 T io\n", "out_proj/kernel: 40x12 M io\n"


@model(
    "shared/embedding: 31x12 F\nlm_head/kernel: 12x31 F\n"
    + "".join(
        f"{stack}/layers/{{0..2}}/{name}/{line}"
        for stack, names in {
            "encoder": ["self_attn"],
            "decoder": ["self_attn", "encoder_attn"],
        }.items()
        for name in names
        for line in ATTENTION
    )
    + "{encoder,decoder}/layers/{0..2}/fc1/kernel: 12x26 M io\n"
    + "{encoder,decoder}/layers/{0..2}/fc2/kernel: 26x12 M io\n",
    TOKENS,
)
def translator(params, tokens):
    def attention(p, x, memory):
        q = heads(norm(x) @ p["q_proj"]["kernel"], 10)
        k, v = (heads(memory @ p[name]["kernel"], 10) for name in ("k_proj", "v_proj"))
        return x + flat(attend(q, k, v)) @ p["out_proj"]["kernel"]

    def feed_forward(p, x):
        return x + jax.nn.relu(norm(x) @ p["fc1"]["kernel"]) @ p["fc2"]["kernel"]

    memory = x = params["shared"]["embedding"][tokens]
    for layer in params["encoder"]["layers"].values():
        memory = feed_forward(layer, attention(layer["self_attn"], memory, norm(memory)))
    for layer in params["decoder"]["layers"].values():
        x = attention(layer["self_attn"], x, norm(x))
        x = feed_forward(layer, attention(layer["encoder_attn"], x, memory))
    return x @ params["lm_head"]["kernel"]


@model(
    "time/linear_1/kernel: 12x26 F | ?\ntime/linear_2/kernel: 26x22 M io | ?\n"
    "conv_in/kernel: 3x3x3x12 F\nconv_out/kernel: 3x3x12x3 F\n"
    "blocks/{0..2}/conv_1/kernel: 3x3x12x12 F\nblocks/{0..2}/conv_2/kernel: 3x3x12x12 F\n"
    "blocks/{0..2}/time_proj/kernel: 22x12 M io\nblocks/{0..2}/norm/scale: 12\n",
    IMAGES,
)
def denoiser(params, x):
    def conv(x, kernel):
        dims = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    angles = x.mean((1, 2, 3))[:, None] * jnp.arange(6)
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    embedding = jax.nn.silu(embedding @ params["time"]["linear_1"]["kernel"])
    embedding = jax.nn.silu(embedding @ params["time"]["linear_2"]["kernel"])
    x = conv(x, params["conv_in"]["kernel"])
    for block in params["blocks"].values():
        y = conv(jax.nn.silu(norm(x) * block["norm"]["scale"]), block["conv_1"]["kernel"])
        y = y + (embedding @ block["time_proj"]["kernel"])[:, None, None]
        x = x + conv(jax.nn.silu(y), block["conv_2"]["kernel"])
    return conv(x, params["conv_out"]["kernel"])


def sorted_experts(p, x):
    """Each token's expert by a product of groups of rows, as in MegaBlocks."""
    rows = norm(x).reshape(-1, 12)
    scores = jax.nn.softmax(rows @ p["moe"]["router"]["kernel"])
    chosen = scores.argmax(-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=5).astype(jnp.int32)
    hidden = jax.nn.gelu(jax.lax.ragged_dot(rows[order], p["moe"]["experts"]["up"], sizes))
    out = jax.lax.ragged_dot(hidden, p["moe"]["experts"]["down"], sizes)
    return x + out[jnp.argsort(order)].reshape(x.shape) * scores.max(-1).reshape(2, 7, 1)


of_blocks(
    "sorted_experts",
    "moe/router/kernel: 12x5 F\nmoe/experts/up: 5x12x22 M bio\nmoe/experts/down: 5x22x12 M bio",
    sorted_experts,
)


# What the default rules read otherwise than the program uses it, by case. A leaf that is read
# rightly again fails its test, and goes from here.
MISREAD = {
    "denoiser": {"time/linear_1/kernel"},  # it reads as many sines as the stream is wide
}


@functools.cache
def case(name):
    """The listing of a case, and what its program says."""
    listing, apply, inputs = CASES[name]
    (tree,) = parsed(listing)
    return tree, read_program(apply, tree.params, inputs)


def right_of(line):
    return (line.answer.readings or line.answer.offered)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_program_says_what_each_of_its_leaves_is(name):
    tree, leaves = case(name)
    answers = {path: Found(right_of(line)) for path, line in tree.lines_by_path.items()}
    assert contradictions(leaves, answers) == {}
    matrices = {path for path, line in tree.lines_by_path.items() if len(line.shape) > 1}
    assert {path for path in matrices if leaves[path].role == "unknown"} == set()


@pytest.mark.parametrize("name", CASES)
def test_no_leaf_is_read_otherwise_than_its_program_uses_it(name):
    tree, leaves = case(name)
    found = contradictions(leaves, read(tree.params, tree.lines_by_path))
    assert found.keys() == {path for each in MISREAD.get(name, ()) for path in expanded(each)}


@pytest.mark.parametrize("name", CASES)
def test_a_program_contradicts_transposed_and_stacked_readings(name):
    """The oracle can fail: each reading turned over, or of another kind, is contradicted."""
    tree, leaves = case(name)
    for path, line in tree.lines_by_path.items():
        right = right_of(line)
        if right.kind == "F":
            continue
        axes = right.axes.translate(str.maketrans("ioO", "oii"))
        wrong = [FALLBACK, right._replace(axes=axes, parts=1)]
        if leaves[path].role == "hidden":
            wrong.append(right._replace(kind="T"))
        for reading in wrong:
            assert contradictions({path: leaves[path]}, {path: Found(reading)}), (path, reading)


def test_what_enters_a_kernel_of_its_own_is_unknown():
    def apply(params, x):
        shape = jax.ShapeDtypeStruct((3, 4), jnp.float32)
        y = jax.pure_callback(lambda x, w: x @ w, shape, x, params["custom"])
        return jax.nn.relu(y) @ params["head"]

    leaves = read_program(apply, {"custom": array(17, 4), "head": array(4, 2)}, ROWS)
    assert leaves["custom"].role == "unknown"


def test_factors_that_only_add_to_a_matrix_are_unknown():
    def apply(params, x):
        merged = params["base"] + params["a"] @ params["b"]
        return jax.nn.relu(jax.nn.relu(x @ params["first"]) @ merged) @ params["head"]

    shapes = {"first": (17, 6), "base": (6, 8), "a": (6, 2), "b": (2, 8), "head": (8, 3)}
    params = {name: array(*shape) for name, shape in shapes.items()}
    roles = {path: leaf.role for path, leaf in read_program(apply, params, ROWS).items()}
    assert roles == {
        **{"first": "input", "base": "hidden", "head": "head"},
        **{"a": "unknown", "b": "unknown"},
    }


def classes_of(path):
    """The classes of a script that trains when it is imported, and needs other libraries for it."""
    names: dict[str, Any] = {"__name__": path.stem, "VOCABULARY": 31}
    for node in ast.parse(path.read_text("utf-8")).body:
        sets_number = isinstance(node, ast.Assign) and not isinstance(
            node.value, ast.Call | ast.List
        )
        if sets_number or isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef):
            with contextlib.suppress(ImportError):
                exec(compile(ast.Module([node], []), str(path), "exec"), names)
    return names


def nnx_problem(make):
    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
    return params, lambda params, tokens: nnx.merge(graph, params, rest)(tokens)


def nnx_script(path, *arguments, **options):
    make = classes_of(ROOT / path)["GPT"]
    return nnx_problem(lambda: make(*arguments, **options, rngs=nnx.Rngs(0)))


def minimal():
    names = classes_of(ROOT / "examples" / "minimal.py")
    params, _ = nnx_problem(lambda: names["GPT"](nnx.Rngs(0)))
    graph, _, rest = nnx.split(nnx.eval_shape(lambda: names["GPT"](nnx.Rngs(0))), nnx.Param, ...)
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
    return params, lambda params, tokens: nnx.merge(graph, params, rest).loss(tokens)


def train_gpt(name):
    small = {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "vocab_size": 31, "context": 7}
    config = dataclasses.replace(MODELS[name], **small)
    params = jax.eval_shape(GPT(config).init, jax.random.key(0), TOKENS)["params"]
    return params, lambda params, tokens: GPT(config).apply({"params": params}, tokens)


def with_equinox():
    eqx = pytest.importorskip("equinox")
    make = classes_of(ROOT / "examples/trainers/with_equinox.py")["GPT"]
    model = eqx.filter_eval_shape(make, jax.random.key(0))
    params, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return params, lambda params, tokens: jax.vmap(eqx.combine(params, static))(tokens)


EXAMPLES = {
    "minimal.py": minimal,
    "train_gpt, GPT": lambda: train_gpt("gpt-small"),
    "train_gpt, LLaMA": lambda: train_gpt("llama-60m"),
    "with_nnx.py": lambda: nnx_script("examples/trainers/with_nnx.py"),
    "with_nnx.py, scanned": lambda: nnx_script("examples/trainers/with_nnx.py", scanned=True),
    "with_equinox.py": with_equinox,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_models_of_examples_are_read_as_their_programs_use_them(name):
    params, apply = EXAMPLES[name]()
    leaves = read_program(apply, params, TOKENS)
    assert contradictions(leaves, read(params)) == {}
    assert {leaf.role for leaf in leaves.values()} >= {"projection", "hidden", "table"}
    assert all(leaf.role != "unknown" for leaf in leaves.values() if len(leaf.shape) > 1)


def test_the_network_of_numpyro_is_read_as_its_program_uses_it():
    network = classes_of(ROOT / "examples/trainers/with_numpyro.py")["Network"]()
    params = jax.eval_shape(network.init, jax.random.key(0), ROWS)
    leaves = read_program(network.apply, params, ROWS)
    assert contradictions(leaves, read(params)) == {}
    assert {leaf.role for leaf in leaves.values()} == {"input", "hidden", "head", "vector"}
