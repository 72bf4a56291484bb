# /// script
# requires-python = "==3.12.*"
# dependencies = [
#   "teon_optax",
#   "easydel[torch]==0.3.0",
#   "pillow==13.0.0",
#   "jax==0.9.2",
#   "optax==0.2.8",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-25T00:00:00Z"
# override-dependencies = ["jax==0.9.2", "jaxlib==0.9.2"]
# sources.teon_optax = { path = "../..", editable = true }
# ///
"""EasyDeL: `EasyDeLState.apply_gradients`, and a small Llama."""

import tempfile

import easydel as ed
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from shared import SAVED, VOCABULARY, check, text

from teon_optax import plan, teon

DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}
CONFIG = ed.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
OPTIMIZER = teon(0.01)


@jax.jit
def step(state, tokens):
    def loss_of(graphstate):
        logits = state.merge(graphstate)(input_ids=tokens[:, :-1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.graphstate)
    return state.apply_gradients(grads=gradients), loss


with CONFIG.mesh, tempfile.TemporaryDirectory() as folder:
    model = ed.LlamaForCausalLM.sequential_init(
        config=CONFIG, precision=None, rngs=nnx.Rngs(0), **DTYPES
    )
    state = model.to_state().init_tx(OPTIMIZER)
    print(plan(state.graphstate))
    losses, restarted = [], []
    for done, tokens in enumerate(text()):
        if done == SAVED:
            state.save_state(folder, save_optimizer=True)
        state, loss = step(state, tokens)
        losses.append(loss)
    state = ed.EasyDeLState.load_state(folder, tx_template=OPTIMIZER, **DTYPES)
    state = state.replace(tx=OPTIMIZER)  # `load_state` brings the optimizer's state alone.
    for tokens in text()[SAVED:]:
        state, loss = step(state, tokens)
        restarted.append(loss)
check(losses, restarted)
