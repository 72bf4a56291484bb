"""Names and axes of Gemma and MaxText, by modules of Flax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from checks import check, filled
from tasks import TOKENS, D, E, F, G, H, K, V, attend, next_token_loss

INIT = nn.initializers.lecun_normal()


class Einsum(nn.Module):
    """Gemma's: one leaf `w`."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", INIT, self.shape))


class GemmaAttention(nn.Module):
    """Heads come first; query, key and value are one einsum where there are as many of each."""

    kv_heads: int

    @nn.compact
    def __call__(self, x):
        if self.kv_heads == H:
            read = Einsum((3, H, D, K), name="qkv_einsum")("btd,shdk->sbthk", x)
        else:
            query = Einsum((H, D, K), name="q_einsum")("btd,hdk->bthk", x)
            kv = Einsum((2, self.kv_heads, D, K), name="kv_einsum")("btd,shdk->sbthk", x)
            query = nn.RMSNorm(name="_query_norm")(query)
            read = query, *kv
        return Einsum((H, K, D), name="attn_vec_einsum")("bthk,hkd->btd", attend(*read))


class GemmaMlp(nn.Module):
    transposed: bool

    @nn.compact
    def __call__(self, x):
        shape = (2, F, D) if self.transposed else (2, D, F)
        gating = self.param("gating_einsum", nn.initializers.lecun_normal(), shape)
        gate, up = jnp.einsum("btd,sfd->sbtf" if self.transposed else "btd,sdf->sbtf", x, gating)
        return (nn.gelu(gate) * up) @ self.param("linear", INIT, (F, D))


class Embedder(nn.Module):
    def setup(self):
        self.table = self.param("input_embedding", nn.initializers.normal(0.3), (V, D))

    def encode(self, tokens):
        return self.table[tokens]

    def decode(self, x):
        return x @ self.table.T


class Gemma(nn.Module):
    kv_heads: int
    transposed: bool

    @nn.compact
    def __call__(self, tokens):
        embedder = Embedder(name="embedder")
        x = embedder.encode(tokens)
        for index in range(2):
            block = functools.partial(GemmaBlock, self.kv_heads, self.transposed)
            x = block(name=f"layer_{index}")(x)
        return embedder.decode(x)


class GemmaBlock(nn.Module):
    kv_heads: int
    transposed: bool

    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm(name="pre_attention_norm")(x)
        x = x + GemmaAttention(self.kv_heads, name="attn")(h)
        return x + GemmaMlp(self.transposed, name="mlp")(x)


def problem(model):
    params = filled(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
    params = params if isinstance(model, MaxText) else params["params"]
    return params, lambda params: next_token_loss(
        model.apply(params if isinstance(model, MaxText) else {"params": params}, TOKENS)
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_gemma(transposed):
    name = "gemma-fused" if transposed else "gemma"
    check(name, *problem(Gemma(H if transposed else G, transposed)))


def test_einsums_of_flax_are_read_beside_the_output_projection_that_they_fit():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            def einsum(name, heads):
                layer = nn.Einsum((heads, D, K), "btd,hdk->bthk", use_bias=False, name=name)
                return layer(x)

            read = einsum("q_einsum", H), einsum("k_einsum", G), einsum("v_einsum", G)
            out = nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="out")
            return x + out(attend(*read))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(V, D)
            x = embed(tokens)
            for _ in range(2):
                x = Block()(x)
            return embed.attend(x)

    check("linen-einsum", *problem(Model()))


class MaxTextAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        sizes = {"query": H, "key": G, "value": G}
        dense = functools.partial(nn.DenseGeneral, use_bias=False)
        read = [dense((heads, K), name=name)(x) for name, heads in sizes.items()]
        return dense(D, axis=(-2, -1), name="out")(attend(*read))


class MaxTextMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, use_bias=False)
        hidden = nn.silu(dense(F, name="wi_0")(x)) * dense(F, name="wi_1")(x)
        return dense(D, name="wo")(hidden)


class MaxTextExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        gates = jax.nn.softmax(nn.Dense(E, use_bias=False, name="gate")(x))
        wi_0, wi_1 = (self.param(name, INIT, (E, D, F)) for name in ("wi_0", "wi_1"))
        hidden = nn.silu(jnp.einsum("btd,edf->btef", x, wi_0)) * jnp.einsum(
            "btd,edf->btef", x, wi_1
        )
        return jnp.einsum("btef,efd,bte->btd", hidden, self.param("wo", INIT, (E, F, D)), gates)


class MaxTextLayer(nn.Module):
    experts: bool = False

    @nn.compact
    def __call__(self, x, _):
        h = nn.RMSNorm(name="pre_self_attention_layer_norm")(x)
        x = x + MaxTextAttention(name="self_attention")(h)
        mlp = MaxTextExperts(name="MoeBlock_0") if self.experts else MaxTextMlp(name="mlp")
        return x + mlp(x), None


class MaxTextDecoder(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            scan = functools.partial(
                nn.scan, variable_axes={"params": 1}, split_rngs={"params": True}, length=3
            )
            x, _ = scan(MaxTextLayer)(name="layers")(x, None)
            x, _ = scan(MaxTextLayer)(experts=True, name="moe_layers")(x, None)
        else:
            for index in range(2):
                x, _ = MaxTextLayer(name=f"layers_{index}")(x, None)
        return nn.Dense(V, use_bias=False, name="logits_dense")(nn.RMSNorm(name="decoder_norm")(x))


class MaxText(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, D, name="token_embedder")(tokens)
        return MaxTextDecoder(self.scanned, name="decoder")(x)


@pytest.mark.parametrize("scanned", [False, True])
def test_maxtext(scanned):
    check("maxtext-scanned" if scanned else "maxtext", *problem(MaxText(scanned)))
