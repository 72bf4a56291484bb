"""The Flax models of Hugging Face's transformers 4, built from configurations."""

import warnings

import jax
import jax.numpy as jnp
from checks import check, filled, library
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


def test_gpt2_keeps_its_kernels_out_in():
    config = transformers.GPT2Config(
        n_embd=D, n_layer=2, n_head=H, n_inner=F, vocab_size=V, n_positions=N + 1
    )
    check("hf-gpt2", *problem("FlaxGPT2LMHeadModel", config))


def test_llama():
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=G, vocab_size=V, max_position_embeddings=N + 1
    )
    check("hf-llama", *problem("FlaxLlamaForCausalLM", config))


def test_bert():
    config = transformers.BertConfig(**SIZES, vocab_size=V, max_position_embeddings=N + 1)
    check("hf-bert", *problem("FlaxBertForMaskedLM", config))


def test_vit():
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5)
    images = jnp.transpose(IMAGES, (0, 3, 1, 2))
    built = problem(
        "FlaxViTForImageClassification",
        config,
        lambda outputs: label_loss(outputs.logits),
        pixel_values=images,
    )
    check("hf-vit", *built)
