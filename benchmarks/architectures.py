"""Parameter trees of published models as shapes, named and laid out as a JAX library has them.

Sizes are those of the file named as the source, paths and axes those of the library. Biases and
norms are there where the model has them, since rules read the whole tree. Dtypes are float32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Tree = dict[str, Any]
Shape = tuple[int, ...]


class Architecture(NamedTuple):
    """A published model.

    Attributes:
        source: Where its sizes are published.
        library: Whose names and layout the tree has.
        shapes: Builds its parameters, as `jax.ShapeDtypeStruct`.
    """

    source: str
    library: str
    shapes: Callable[[], Tree]


def tree_of(leaves: Mapping[str, Shape]) -> Tree:
    """Nested dicts from paths and shapes; nothing is allocated."""
    tree: Tree = {}
    for path, shape in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = jax.ShapeDtypeStruct(shape, "float32")
    return tree


def repeated(prefix: str, count: int, block: Mapping[str, Shape]) -> dict[str, Shape]:
    """The leaves of `count` equal blocks; `{}` in the prefix is the block's number."""
    return {
        f"{prefix.format(layer)}/{path}": shape
        for layer in range(count)
        for path, shape in block.items()
    }


def _dense(name: str, fan_in: int, fan_out: int) -> dict[str, Shape]:
    return {f"{name}/kernel": (fan_in, fan_out), f"{name}/bias": (fan_out,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def gpt2(d: int, depth: int) -> Tree:
    """Hugging Face's Flax GPT-2: one fused projection, and kernels are (out, in)."""
    block: dict[str, Shape] = _norm("ln_1", d) | _norm("ln_2", d)
    for name, fan_out, fan_in in (
        ("attn/c_attn", 3 * d, d),
        ("attn/c_proj", d, d),
        ("mlp/c_fc", 4 * d, d),
        ("mlp/c_proj", d, 4 * d),
    ):
        block |= {f"{name}/kernel": (fan_out, fan_in), f"{name}/bias": (fan_out,)}
    leaves = repeated("transformer/h/{}", depth, block) | _norm("transformer/ln_f", d)
    leaves |= {"transformer/wte/embedding": (50257, d), "transformer/wpe/embedding": (1024, d)}
    return tree_of(leaves)


def llama(d: int, depth: int, kv: int, hidden: int, vocabulary: int) -> Tree:
    """Hugging Face's Flax LLaMA: `kv` is fan_out of keys and values."""
    block: dict[str, Shape] = {
        "self_attn/q_proj/kernel": (d, d),
        "self_attn/k_proj/kernel": (d, kv),
        "self_attn/v_proj/kernel": (d, kv),
        "self_attn/o_proj/kernel": (d, d),
        "mlp/gate_proj/kernel": (d, hidden),
        "mlp/up_proj/kernel": (d, hidden),
        "mlp/down_proj/kernel": (hidden, d),
        "input_layernorm/weight": (d,),
        "post_attention_layernorm/weight": (d,),
    }
    leaves = repeated("model/layers/{}", depth, block) | {"model/norm/weight": (d,)}
    leaves |= {"model/embed_tokens/embedding": (vocabulary, d)}
    return tree_of(leaves | {"lm_head/kernel": (d, vocabulary)})


def qwen3(d: int, depth: int, heads: int, kv_heads: int, hidden: int, tied: bool) -> Tree:
    """tunix: heads are an axis of their own, of size 128."""
    size = 128
    block: dict[str, Shape] = {
        "attn/q_proj/w": (d, heads, size),
        "attn/k_proj/w": (d, kv_heads, size),
        "attn/v_proj/w": (d, kv_heads, size),
        "attn/o_proj/w": (heads, size, d),
        "attn/q_norm/w": (size,),
        "attn/k_norm/w": (size,),
        "mlp/gate_proj/kernel": (d, hidden),
        "mlp/up_proj/kernel": (d, hidden),
        "mlp/down_proj/kernel": (hidden, d),
        "input_layernorm/w": (d,),
        "post_attention_layernorm/w": (d,),
    }
    leaves = repeated("layers/{}", depth, block) | {"final_norm/w": (d,)}
    leaves |= {"embedder/input_embedding": (151936, d)}
    return tree_of(leaves if tied else leaves | {"lm_head/w": (d, 151936)})


def gemma3(d: int, depth: int, heads: int, kv_heads: int, size: int, hidden: int) -> Tree:
    """DeepMind's gemma, the text decoder: heads come first, gate and up are one leaf."""
    block: dict[str, Shape] = {
        "attn/q_einsum/w": (heads, d, size),
        "attn/kv_einsum/w": (2, kv_heads, d, size),
        "attn/attn_vec_einsum/w": (heads, size, d),
        "attn/_query_norm/scale": (size,),
        "attn/_key_norm/scale": (size,),
        "mlp/gating_einsum": (2, hidden, d),
        "mlp/linear": (hidden, d),
    }
    for norm in ("pre_attention", "post_attention", "pre_ffw", "post_ffw"):
        block[f"{norm}_norm/scale"] = (d,)
    leaves = repeated("layer_{}", depth, block) | {"final_norm/scale": (d,)}
    return tree_of(leaves | {"embedder/input_embedding": (262144, d)})


def mixtral() -> Tree:
    """MaxText, layers scanned along axis 1."""
    d, L, heads, kv_heads, size, hidden, experts, vocabulary = 4096, 32, 32, 8, 128, 14336, 8, 32000
    layers = "decoder/layers"
    moe = f"{layers}/MoeBlock_0"
    leaves: dict[str, Shape] = {
        f"{layers}/self_attention/query/kernel": (d, L, heads, size),
        f"{layers}/self_attention/key/kernel": (d, L, kv_heads, size),
        f"{layers}/self_attention/value/kernel": (d, L, kv_heads, size),
        f"{layers}/self_attention/out/kernel": (heads, L, size, d),
        f"{moe}/gate/kernel": (d, L, experts),
        f"{moe}/wi_0": (experts, L, d, hidden),
        f"{moe}/wi_1": (experts, L, d, hidden),
        f"{moe}/wo": (experts, L, hidden, d),
        f"{layers}/pre_self_attention_layer_norm/scale": (d, L),
        f"{layers}/post_self_attention_layer_norm/scale": (d, L),
    }
    return tree_of(leaves | _maxtext_ends(d, vocabulary))


def gpt_oss() -> Tree:
    """MaxText, pairs of layers scanned along axis 1: a sliding window, then full attention."""
    d, L, heads, kv_heads, size, hidden, experts = 2880, 24, 64, 8, 64, 2880, 32
    pairs = L // 2
    attention, mlp = "GptOssAttention", "GptOssMlp"
    block: dict[str, Shape] = {
        f"{attention}/query/kernel": (d, pairs, heads, size),
        f"{attention}/query/bias": (heads, pairs, size),
        f"{attention}/key/kernel": (d, pairs, kv_heads, size),
        f"{attention}/key/bias": (kv_heads, pairs, size),
        f"{attention}/value/kernel": (d, pairs, kv_heads, size),
        f"{attention}/value/bias": (kv_heads, pairs, size),
        f"{attention}/out/kernel": (heads, pairs, size, d),
        f"{attention}/out/bias": (d, pairs),
        f"{attention}/sinks": (heads, pairs),
        f"{mlp}/gate/kernel": (d, pairs, experts),
        f"{mlp}/gate/bias": (experts, pairs),
        f"{mlp}/wi_0": (experts, pairs, d, hidden),
        f"{mlp}/wi_0_bias": (experts, pairs, hidden),
        f"{mlp}/wi_1": (experts, pairs, d, hidden),
        f"{mlp}/wi_1_bias": (experts, pairs, hidden),
        f"{mlp}/wo": (experts, pairs, hidden, d),
        f"{mlp}/wo_bias": (experts, pairs, d),
        "pre_self_attention_layer_norm/scale": (d, pairs),
        "post_self_attention_layer_norm/scale": (d, pairs),
    }
    return tree_of(repeated("decoder/layers/layers_{}", 2, block) | _maxtext_ends(d, 201088))


def deepseek_v3() -> Tree:
    """MaxText, scanned along axis 1: latent attention, 3 dense layers, then 58 with 256 experts."""
    d, heads, rank_q, rank_kv, nope, rope, value = 7168, 128, 1536, 512, 128, 64, 128
    leaves: dict[str, Shape] = _maxtext_ends(d, 129280)
    for layers, L in (("decoder/dense_layers", 3), ("decoder/moe_layers", 58)):
        attention = f"{layers}/self_attention"
        leaves |= {
            f"{attention}/wq_a/kernel": (d, L, rank_q),
            f"{attention}/wq_b/kernel": (rank_q, L, heads, nope + rope),
            f"{attention}/wkv_a/kernel": (d, L, rank_kv + rope),
            f"{attention}/wkv_b/kernel": (rank_kv, L, heads, nope + value),
            f"{attention}/out/kernel": (heads, L, value, d),
            f"{attention}/q_norm/scale": (rank_q, L),
            f"{attention}/kv_norm/scale": (rank_kv, L),
            f"{layers}/pre_self_attention_layer_norm/scale": (d, L),
            f"{layers}/post_self_attention_layer_norm/scale": (d, L),
        }
    for name, fan_in, fan_out in (("wi_0", d, 18432), ("wi_1", d, 18432), ("wo", 18432, d)):
        leaves[f"decoder/dense_layers/mlp/{name}/kernel"] = (fan_in, 3, fan_out)
    block = "decoder/moe_layers/DeepSeekMoeBlock_0"
    leaves[f"{block}/MoeBlock_0/gate/kernel"] = (d, 58, 256)
    leaves[f"{block}/MoeBlock_0/gate/bias"] = (256, 58)
    for name, fan_in, fan_out in (("wi_0", d, 2048), ("wi_1", d, 2048), ("wo", 2048, d)):
        leaves[f"{block}/MoeBlock_0/{name}"] = (256, 58, fan_in, fan_out)
        leaves[f"{block}/shared_experts/{name}/kernel"] = (fan_in, 58, fan_out)
    return tree_of(leaves)


def _maxtext_ends(d: int, vocabulary: int) -> dict[str, Shape]:
    return {
        "token_embedder/embedding": (vocabulary, d),
        "decoder/decoder_norm/scale": (d,),
        "decoder/logits_dense/kernel": (d, vocabulary),
    }


def vit_large() -> Tree:
    """google-research/vision_transformer, patches of 16 x 16 pixels, 224 x 224 images."""
    d, depth, heads, size, classes = 1024, 24, 16, 64, 1000
    attention = "MultiHeadDotProductAttention_1"
    block: dict[str, Shape] = _norm("LayerNorm_0", d) | _norm("LayerNorm_2", d)
    for name in ("query", "key", "value"):
        block[f"{attention}/{name}/kernel"] = (d, heads, size)
        block[f"{attention}/{name}/bias"] = (heads, size)
    block |= {f"{attention}/out/kernel": (heads, size, d), f"{attention}/out/bias": (d,)}
    block |= _dense("MlpBlock_3/Dense_0", d, 4 * d) | _dense("MlpBlock_3/Dense_1", 4 * d, d)
    leaves = repeated("Transformer/encoderblock_{}", depth, block)
    leaves |= _norm("Transformer/encoder_norm", d) | _dense("head", d, classes)
    leaves |= {"Transformer/posembed_input/pos_embedding": (1, 197, d), "cls": (1, 1, d)}
    return tree_of(leaves | {"embedding/kernel": (16, 16, 3, d), "embedding/bias": (d,)})


def whisper_large() -> Tree:
    """Hugging Face's Flax Whisper, version 3: encoder and decoder of 32 layers."""
    d, depth = 1280, 32
    mlp = _dense("fc1", d, 4 * d) | _dense("fc2", 4 * d, d) | _norm("final_layer_norm", d)
    encoder = _whisper_attention("self_attn", d) | mlp
    decoder = encoder | _whisper_attention("encoder_attn", d)
    leaves = repeated("model/encoder/layers/{}", depth, encoder)
    leaves |= repeated("model/decoder/layers/{}", depth, decoder)
    leaves |= _norm("model/encoder/layer_norm", d) | _norm("model/decoder/layer_norm", d)
    leaves |= {"model/encoder/conv1/kernel": (3, 128, d), "model/encoder/conv1/bias": (d,)}
    leaves |= {"model/encoder/conv2/kernel": (3, d, d), "model/encoder/conv2/bias": (d,)}
    leaves |= {"model/encoder/embed_positions/embedding": (1500, d)}
    leaves |= {"model/decoder/embed_positions/embedding": (448, d)}
    return tree_of(leaves | {"model/decoder/embed_tokens/embedding": (51866, d)})


def _whisper_attention(name: str, d: int) -> dict[str, Shape]:
    leaves: dict[str, Shape] = _norm(f"{name}_layer_norm", d) | {f"{name}/k_proj/kernel": (d, d)}
    for projection in ("q_proj", "v_proj", "out_proj"):
        leaves |= _dense(f"{name}/{projection}", d, d)
    return leaves


def dit_xl() -> Tree:
    """kvfrans/jax-diffusion-transformer, patches of 2 x 2 latents, 256 x 256 images."""
    d, depth, heads, size = 1152, 28, 16, 72
    attention = "MultiHeadDotProductAttention_0"
    block: dict[str, Shape] = _dense("Dense_0", d, 6 * d)
    for name in ("query", "key", "value"):
        block[f"{attention}/{name}/kernel"] = (d, heads, size)
        block[f"{attention}/{name}/bias"] = (heads, size)
    block |= {f"{attention}/out/kernel": (heads, size, d), f"{attention}/out/bias": (d,)}
    block |= _dense("MlpBlock_0/Dense_0", d, 4 * d) | _dense("MlpBlock_0/Dense_1", 4 * d, d)
    leaves = repeated("DiTBlock_{}", depth, block)
    leaves |= _dense("TimestepEmbedder_0/Dense_0", 256, d)
    leaves |= _dense("TimestepEmbedder_0/Dense_1", d, d)
    leaves |= _dense("FinalLayer_0/Dense_0", d, 2 * d) | _dense("FinalLayer_0/Dense_1", d, 32)
    leaves |= {"PatchEmbed_0/Conv_0/kernel": (2, 2, 4, d), "PatchEmbed_0/Conv_0/bias": (d,)}
    leaves |= {"LabelEmbedder_0/Embed_0/embedding": (1001, d), "pos_embed": (1, 256, d)}
    return tree_of(leaves)


_HUGGING_FACE_FLAX, _MAXTEXT, _GEMMA = "Hugging Face Flax", "MaxText, scanned", "gemma"
_MAXTEXT_SIZES = "MaxText configs/models/{}.yml"


def _gpt2(name: str, d: int, depth: int) -> Architecture:
    source = f"Hugging Face openai-community/{name} config.json"
    return Architecture(source, _HUGGING_FACE_FLAX, functools.partial(gpt2, d, depth))


def _qwen3(name: str, *sizes: Any) -> Architecture:
    return Architecture(_MAXTEXT_SIZES.format(name), "tunix", functools.partial(qwen3, *sizes))


def _gemma3(name: str, *sizes: int) -> Architecture:
    source = f"gemma gm/nn/_gemma.py, {name}, the text decoder"
    return Architecture(source, _GEMMA, functools.partial(gemma3, *sizes))


ARCHITECTURES: dict[str, Architecture] = {
    "GPT-2 small": _gpt2("gpt2", 768, 12),
    "GPT-2 medium": _gpt2("gpt2-medium", 1024, 24),
    "GPT-2 large": _gpt2("gpt2-large", 1280, 36),
    "GPT-2 XL": _gpt2("gpt2-xl", 1600, 48),
    "Llama-3-8B": Architecture(
        _MAXTEXT_SIZES.format("llama3-8b"),
        _HUGGING_FACE_FLAX,
        functools.partial(llama, 4096, 32, 1024, 14336, 128256),
    ),
    "Qwen3-0.6B": _qwen3("qwen3-0.6b", 1024, 28, 16, 8, 3072, True),
    "Qwen3-8B": _qwen3("qwen3-8b", 4096, 36, 32, 8, 12288, False),
    "Gemma-3-1B": _gemma3("Gemma3_1B", 1152, 26, 4, 1, 256, 6912),
    "Gemma-3-27B": _gemma3("Gemma3_27B", 5376, 62, 32, 16, 128, 21504),
    "Mixtral-8x7B": Architecture(_MAXTEXT_SIZES.format("mixtral-8x7b"), _MAXTEXT, mixtral),
    "DeepSeek-V3": Architecture(_MAXTEXT_SIZES.format("deepseek3-671b"), _MAXTEXT, deepseek_v3),
    "gpt-oss-20b": Architecture(_MAXTEXT_SIZES.format("gpt-oss-20b"), _MAXTEXT, gpt_oss),
    "ViT-L/16": Architecture(
        "vision_transformer vit_jax/configs/models.py, get_l16_config",
        "vision_transformer (Flax)",
        vit_large,
    ),
    "Whisper-large-v3": Architecture(
        "Hugging Face openai/whisper-large-v3 config.json", _HUGGING_FACE_FLAX, whisper_large
    ),
    "DiT-XL/2": Architecture(
        "facebookresearch/DiT models.py, DiT_XL_2", "jax-diffusion-transformer (Flax)", dit_xl
    ),
}
