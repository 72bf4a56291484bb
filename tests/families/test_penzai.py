"""penzai: parameters without names in their paths, so that every matrix needs a rule."""

import jax
from checks import answered, check, filled, library
from listings import trees
from optax.contrib import MuonDimensionNumbers
from tasks import TOKENS, D, F, G, V, next_token_loss

from teon_optax import Rule, default_rules, plan

pz = library("penzai.pz")
llamalike = library("penzai.models.transformer.variants.llamalike_common")


def problem():
    """A LLaMA of two blocks, whose parameters are a tuple."""
    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=G,
        query_head_multiplier=3,
        embedding_dim=D,
        projection_dim=4,
        mlp_hidden_dim=F,
        num_decoder_blocks=2,
        vocab_size=V,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    unbound = []

    def build(key):
        model = llamalike.build_llamalike_transformer(config, key)
        without, params = pz.unbind_params(model, freeze=True)
        unbound.append(without)
        return params

    shapes = jax.eval_shape(build, jax.random.key(0))
    tokens = pz.nx.wrap(TOKENS, "batch", "seq")

    def loss(params):
        logits = pz.bind_variables(unbound[0], params)(tokens)
        return next_token_loss(logits.unwrap("batch", "seq", "vocabulary"))

    return filled(shapes), loss


def test_every_matrix_needs_a_rule():
    params, loss = problem()
    check("penzai", params, loss)


def test_rules_by_position_join_the_same_projection_of_two_blocks():
    params, _ = problem()
    dims = MuonDimensionNumbers(0, (1, 2))
    query = Rule(r"^(?P<layer>2|11)$", stack=2, dims=MuonDimensionNumbers(0, (1, 2, 3)))
    key, value = (
        Rule(rf"^(?P<layer>{places})$", stack=2, dims=dims) for places in ("3|12", "4|13")
    )
    rules = default_rules(
        params, [query, key, value, *answered(params, trees("models/penzai")["penzai"])]
    )
    members = {group.members for group in plan(params, rules).groups if group.rule.stack == 2}
    assert members == {("2", "11"), ("3", "12"), ("4", "13")}
