"""The Flax models of Hugging Face's transformers 4, built from configurations."""

import warnings

import jax
import jax.numpy as jnp
from checks import FALLBACK, check, filled, library, muon_of, teon_of, under
from tasks import IMAGES, TOKENS, N, V, label_loss, next_token_loss

transformers = library("transformers")

D, H, G, F = 16, 4, 2, 22  # these models tie the width of attention to the width of the stream
SIZES = {
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "intermediate_size": F,
}


def problem(model, config, loss=lambda outputs: next_token_loss(outputs.logits), **inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = getattr(transformers, model)(config, _do_init=False)
    shape = IMAGES.shape if "pixel_values" in inputs else (1, N)
    shapes = jax.eval_shape(lambda: built.init_weights(jax.random.PRNGKey(0), shape))
    inputs = inputs or {"input_ids": TOKENS}
    return filled(shapes), lambda params: loss(built(**inputs, params=params))


def norm(name):
    return {f"{name}/scale": FALLBACK, f"{name}/bias": FALLBACK}


def dense(name, how):
    return {f"{name}/kernel": how, f"{name}/bias": FALLBACK}


def test_gpt2_keeps_its_kernels_out_in():
    config = transformers.GPT2Config(
        n_embd=D, n_layer=2, n_head=H, n_inner=F, vocab_size=V, n_positions=N + 1
    )
    expected = dense("attn/c_attn", teon_of("oi", 3)) | dense("attn/c_proj", muon_of("oi"))
    expected |= dense("mlp/c_fc", muon_of("oi")) | dense("mlp/c_proj", muon_of("oi"))
    expected = under("h/*/", expected | norm("ln_1") | norm("ln_2")) | norm("ln_f")
    expected |= {"wte/embedding": FALLBACK, "wpe/embedding": FALLBACK}
    check("hf-gpt2", *problem("FlaxGPT2LMHeadModel", config), under("transformer/", expected))


def test_llama():
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=G, vocab_size=V, max_position_embeddings=N + 1
    )
    projections = under("self_attn/", dict.fromkeys("qkv", teon_of("io")), "_proj/kernel")
    others = ["self_attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"]
    block = projections | under("", dict.fromkeys(others, muon_of("io")), "/kernel")
    block |= {"input_layernorm/weight": FALLBACK, "post_attention_layernorm/weight": FALLBACK}
    expected = under("model/layers/*/", block) | {"lm_head/kernel": FALLBACK}
    expected |= {"model/embed_tokens/embedding": FALLBACK, "model/norm/weight": FALLBACK}
    check("hf-llama", *problem("FlaxLlamaForCausalLM", config), expected)


def encoder(attention):
    projections = [dense(f"{attention}/{n}", teon_of("io")) for n in ("query", "key", "value")]
    block = projections[0] | projections[1] | projections[2]
    block |= dense("attention/output/dense", muon_of("io"))
    return block | dense("intermediate/dense", muon_of("io")) | dense("output/dense", muon_of("io"))


def test_bert():
    config = transformers.BertConfig(**SIZES, vocab_size=V, max_position_embeddings=N + 1)
    block = (
        encoder("attention/self") | norm("output/LayerNorm") | norm("attention/output/LayerNorm")
    )
    expected = under("bert/encoder/layer/*/", block) | norm("bert/embeddings/LayerNorm")
    tables = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    expected |= under("bert/embeddings/", dict.fromkeys(tables, FALLBACK), "/embedding")
    head = (
        norm("transform/LayerNorm") | dense("transform/dense", muon_of("io")) | {"bias": FALLBACK}
    )
    expected |= under("cls/predictions/", head)
    check("hf-bert", *problem("FlaxBertForMaskedLM", config), expected)


def test_vit():
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5)
    block = encoder("attention/attention") | norm("layernorm_before") | norm("layernorm_after")
    expected = under("vit/encoder/layer/*/", block) | norm("vit/layernorm")
    expected |= dense("vit/embeddings/patch_embeddings/projection", FALLBACK)
    expected |= {
        "vit/embeddings/cls_token": FALLBACK,
        "vit/embeddings/position_embeddings": FALLBACK,
    }
    expected |= dense("classifier", FALLBACK)
    images = jnp.transpose(IMAGES, (0, 3, 1, 2))
    built = problem(
        "FlaxViTForImageClassification",
        config,
        lambda outputs: label_loss(outputs.logits),
        pixel_values=images,
    )
    check("hf-vit", *built, expected)
