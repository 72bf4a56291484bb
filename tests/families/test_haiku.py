"""Haiku: one key per module, and no number in the first block's name."""

import jax
from checks import check, filled, library
from tasks import TOKENS, D, F, H, K, V, next_token_loss

hk = library("haiku")


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
    check("haiku", *problem(False))


def test_layer_stack():
    check("haiku-layer-stack", *problem(True))
