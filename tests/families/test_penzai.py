"""penzai: parameters without names in their paths, so that every matrix needs a rule."""

import jax
from checks import FALLBACK, check, filled, library, muon_of, offers
from tasks import D, F, G, K, TOKENS, V, next_token_loss

penzai = library("penzai")
library("penzai.models")

from penzai import pz  # noqa: E402
from penzai.models.transformer.variants import llamalike_common as llamalike  # noqa: E402


def problem():
    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=G,
        query_head_multiplier=2,
        embedding_dim=D,
        projection_dim=K + 1,
        mlp_hidden_dim=F,
        num_decoder_blocks=2,
        vocab_size=V,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    model = llamalike.build_llamalike_transformer(config, jax.random.key(0))
    unbound, params = pz.unbind_params(model, freeze=True)
    return unbound, params


def test_x():
    unbound, params = problem()
    for p in params:
        print(p.label, p.value.named_shape, jax.tree.leaves(p)[0].shape)
    from checks import default_rules
    try: print(default_rules(params))
    except ValueError as e: print(e)
    assert 0
