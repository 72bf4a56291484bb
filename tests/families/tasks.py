"""What the tiny models learn, and their sizes: no two agree, or a wrong reading may look right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Width, query heads, key-value heads, their size, hidden, vocabulary, layers, experts, LoRA rank.
D, H, G, K, F, V, L, E, R = 12, 4, 2, 5, 14, 19, 3, 8, 6
A, N = H * K, 7  # width of attention; tokens in a sequence

_rng = np.random.default_rng(0)
TOKENS = jnp.asarray(_rng.integers(V, size=(4, N)), jnp.int32)
IMAGES = jnp.asarray(_rng.normal(size=(4, 8, 8, 3)), jnp.float32)
INPUTS = jnp.asarray(_rng.normal(size=(8, D)), jnp.float32)
LABELS = jnp.asarray(_rng.integers(V, size=8), jnp.int32)


def next_token_loss(logits, tokens=TOKENS):
    """Mean cross-entropy of (batch, tokens, vocabulary)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()


def label_loss(logits):
    """Mean cross-entropy of (batch, classes), against as many of `LABELS`."""
    labels = LABELS[: logits.shape[0]] % logits.shape[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def attend(query, key, value):
    """Grouped-query attention: (batch, tokens, heads, size), and fewer heads in key and value."""
    key, value = (jnp.repeat(x, query.shape[-2] // x.shape[-2], axis=-2) for x in (key, value))
    weights = jax.nn.softmax(jnp.einsum("bnhk,bmhk->bhnm", query, key))
    return jnp.einsum("bhnm,bmhk->bnhk", weights, value)
