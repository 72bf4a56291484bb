"""Trees without a library: dicts, dataclasses, lists of weights and biases."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from checks import check, filled
from tasks import INPUTS, TOKENS, A, D, F, G, H, K, V, attend, label_loss, next_token_loss


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def attention(wq, wk, wv, wo, x):
    read = ((x @ w).reshape(*x.shape[:-1], heads, K) for w, heads in ((wq, H), (wk, G), (wv, G)))
    return attend(*read).reshape(*x.shape[:-1], A) @ wo


def test_dicts():
    shapes = {
        "wq": (D, A),
        "wk": (D, G * K),
        "wv": (D, G * K),
        "wo": (A, D),
        "w1": (D, F),
        "w2": (F, D),
    }
    layer = {name: array(*shape) for name, shape in shapes.items()} | {"norm": array(D)}
    params = filled({"wte": array(V, D), "layers": [layer, layer]})

    def loss(params):
        x = params["wte"][TOKENS]
        for layer in params["layers"]:
            h = x * (1 + layer["norm"])
            x = x + attention(layer["wq"], layer["wk"], layer["wv"], layer["wo"], h)
            x = x + jax.nn.gelu(x @ layer["w1"]) @ layer["w2"]
        return next_token_loss(x @ params["wte"].T)

    check("dict", params, loss)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: Any
    key: Any
    value: Any
    out: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    attention: Attention
    up: Any
    up_bias: Any
    down: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Transformer:
    embed: Any
    layers: list[Layer]
    head: Any

    def __call__(self, tokens):
        x = self.embed[tokens]
        for layer in self.layers:
            a = layer.attention
            x = x + attention(a.query, a.key, a.value, a.out, x)
            x = x + jax.nn.gelu(x @ layer.up + layer.up_bias) @ layer.down
        return x @ self.head


def test_dataclasses():
    # `value` is an attribute here, and a V projection, as its siblings show.
    heads = Attention(array(D, A), array(D, G * K), array(D, G * K), array(A, D))
    layer = Layer(heads, array(D, F), array(F), array(F, D))
    params = filled(Transformer(array(V, D), [layer, layer], array(D, V)))

    def loss(params):
        return next_token_loss(params(TOKENS))

    check("dataclass", params, loss)


def test_lists_of_weights_and_biases():
    sizes = D, F, F + 2, V
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    params = filled([(array(n_in, n_out), array(n_out)) for n_in, n_out in pairs])

    def loss(params):
        x = INPUTS
        for weight, bias in params[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        return label_loss(x @ params[-1][0] + params[-1][1])

    check("lists", params, loss)
