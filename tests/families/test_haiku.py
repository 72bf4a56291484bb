"""Haiku: one key per module, and no number in the first block's name."""

import jax
from checks import FALLBACK, check, filled, library, muon_of, teon_of, under
from tasks import TOKENS, D, F, H, K, V, next_token_loss

hk = library("haiku")

PROJECTIONS = {f"{name}/w": "io" for name in ("query", "key", "value")}
AROUND = {"gpt/embed/embeddings": FALLBACK, "gpt/linear/w": FALLBACK}


def rows(layer=lambda axes: axes):
    attention = {path: teon_of(layer(axes)) for path, axes in PROJECTIONS.items()}
    attention |= {"linear/w": muon_of(layer("io"))}
    attention |= {f"{name}/b": FALLBACK for name in ("query", "key", "value", "linear")}
    linear = {"linear/w": muon_of(layer("io")), "linear_1/w": muon_of(layer("io"))}
    linear |= {"linear/b": FALLBACK, "linear_1/b": FALLBACK}
    norm = {"layer_norm/scale": FALLBACK, "layer_norm/offset": FALLBACK}
    return under("multi_head_attention/", attention) | linear | norm


def block(x):
    """Made in `hk.transform`: Haiku numbers the modules."""
    h = hk.LayerNorm(-1, True, True)(x)
    init = hk.initializers.VarianceScaling()
    x = x + hk.MultiHeadAttention(H, K, model_size=D, w_init=init)(h, h, h)
    return x + hk.Linear(D)(jax.nn.gelu(hk.Linear(F)(x)))


class Block(hk.Module):
    def __call__(self, x):
        return block(x)


class GPT(hk.Module):
    def __init__(self, stacked):
        super().__init__(name="gpt")
        self.stacked = stacked

    def __call__(self, tokens):
        x = hk.Embed(V, D)(tokens)
        if self.stacked:
            x = hk.experimental.layer_stack(3)(lambda x: Block()(x))(x)
        else:
            for _ in range(3):
                x = Block()(x)
        return hk.Linear(V, with_bias=False)(x)


def problem(stacked):
    model = hk.without_apply_rng(hk.transform(lambda tokens: GPT(stacked)(tokens)))
    params = filled(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
    return params, lambda params: next_token_loss(model.apply(params, TOKENS))


def test_the_first_block_has_no_number_and_is_layer_0():
    check("haiku", *problem(False), under("gpt/block@/", rows()) | AROUND)


def test_layer_stack():
    expected = under("gpt/__layer_stack_no_per_layer/block/", rows(lambda axes: "l" + axes))
    check("haiku-layer-stack", *problem(True), expected | AROUND)
