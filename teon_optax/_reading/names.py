"""What libraries and models call things: hints, which structure confirms or overrules.

To add a model family, add words to a row. A segment of a path is compared in snake case, without
its digits: `LayerNorm_0` is layer_norm, `w1` is w.
"""

import functools
import re


def _last(words: str) -> str:
    """Names that end with one of these words, as `lm_head` does with head."""
    return f"(?:.*_)?(?:{words})"


def _any(words: str) -> str:
    """Names that have one of these words anywhere, as `merged_qkv` has qkv."""
    return f"(?:.*_)?(?:{words})(?:_.*)?"


# What stands around the word of a projection: to_q, q_proj, attn_q, linear_v, wq.
_AROUND = (
    "(?:.*_(?:attn|attention|mha)_)?"
    "(?:(?:w|to|linear|self|cross|attn|attention|add|mha|proj|dense|fc|lin)_)*{}(?:_(?:{}))*"
)
_LAYER = "proj|projection|dense|linear|lin|layer|einsum|kernel|weight|w|head|heads"

NAMES = {
    "layers": "(?!.*embed)"
    + _last("[a-z]*blocks?(?:_d)?|layers|h|stack|stacked")
    + "|layer|.*layer_stack.*",
    "layer": "(?:.*_)?[a-z]*layer(?!_norm)(?:_[a-z]+)?",  # with a number: a `final_layer` is none
    "scanned": "scan_.*|.*layer_stack.*",
    "members": _last("members?|experts?|ensembles?|critics?|actors?|heads?|networks?|nets?")
    + "|vmap_.*",
    "network": _last("members?|ensembles?|critics?|actors?"),
    "attention": _any("[a-z]*attn|[a-z]*attention|att|mha|mhsa"),
    "multi head": "multi_head_(?:dot_product_)?attention",
    "projection": _AROUND.format("w?(q|k|v|query|key|value|queries|keys|values)", _LAYER),
    # A gate of Q is none: AlphaFold's gating_query.
    "in attention": "(?!(?:.*_)?gat)(?:.*_)?"
    "(q|k|v|query|key|value|queries|keys|values)(?:_.*)?",
    "fused": _any("w?qkv[a-z]?|c_attn|query_key_value|key_query_value"),
    "by heads": _any("query_key_value|linear_qkv|qkv[a-z]"),  # Megatron, Qwen3-Next: by heads first
    "gated": _any("qkvz"),
    "fused pair": _any("w?kv|w?qk|key_value|query_key"),
    "packed": "in_proj(?:_weight)?",  # Q, K and V in attention only: Mamba has one as well
    "latent": "w?(?:q|k|v|kv|qkv)_(?:[a-z]*_)?(?:a|b|up|down|latent)(?:_.*)?|w(?:q|kv)_[ab]",
    "latent up": ".*_(?:b|up)(?:_.*)?",
    "output": _AROUND.format("w?(?:o|out|output)", _LAYER) + "|c_proj|proj|attn_vec_einsum",
    "einsum": _last("einsum"),
    "gating": "gating_einsum",
    "reads": _last("up|gate|wi|fc_in|c_fc|intermediate|q|query|wq|fused")
    + "|(?:up|gate|q|query)_.*",
    "writes": _last("down|wo|fc_out|c_proj|o|out|output|out_proj|o_proj|output_proj|down_proj"),
    "mlp": _any("up|down|gate|fc|wi|wo|mlp|ffn?|feed|hidden|dense|linear|proj|projector|layers?|w")
    + "|" + _any("projection|transition|resblock[a-z]*")
    + "|pre_logits",
    "experts": _any("experts?"),
    "mixture": _any("moe|mo_e|mixture"),
    "shared": "shared.*",
    "router": _any("router|routing|shared_expert_gate"),
    "gate": "gate|gating",
    "recurrent": _any("[a-z]*cell|lstm|gru|rnn"),
    # What goes from the state of a recurrent cell to itself.
    "state": _last("hh|dense_h|hi|hf|hg|ho|hn|hr|hz|recurrent_kernel"),
    "low rank": _any("lora|lokr|loha|adalora"),
    "adapter": _any("adapters?"),
    "vector": _last("bias|scale|offset|mean|var|sinks|gains?|log")
    + "|(?:.*_)?(?:gamma|beta|log)_.*|gamma|beta",
    "norm": ".*norm|ln(?:_.*)?|(?:bn|gn)(?:_.*)?|.*norm_[a-z]",
    "table": _last("embed|embeds|embedder|embeddings?|embs?|tokens?|tok|pos|cls|wte|wpe|latents")
    + "|" + _last("positions?|positional|pos_enc|encodings?|tables?|lookup|codebooks?|vocab")
    + "|embed_(?:in|tokens?|positions?)",
    "positions": ".*pos.*|wpe",
    "head": "(?!pre_)" + _last("head|logits|classifier|unembed|unembedding|readout|embed_out")
    + "|logits_dense|logitdense",
    "convolution": _any("conv|conv_d|convolution|dwconv|depthwise|patch"),
}  # fmt: skip
_ROWS = {row: re.compile(pattern) for row, pattern in NAMES.items()}
# Flax and MaxText call a weight kernel, Haiku and Gemma w, Equinox, haliax and PyTorch weight.
WEIGHT = re.compile(r"kernel|weights?|w")


def spoken(key: str) -> str:
    """Joins the words of a segment with _ between them: `h0_attn` is h_attn."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key)
    return "_".join(re.findall(r"[a-z]+", snake.lower()))


@functools.lru_cache(65536)
def rows_of(key: str) -> frozenset[str]:
    """Lists the rows of the table that a segment's name is in."""
    name = spoken(key)
    return frozenset(row for row, pattern in _ROWS.items() if pattern.fullmatch(name))


def letter_of(row: str, key: str) -> str:
    """Gives q, k or v, the letter of the projection that a segment is called as in a row."""
    found = _ROWS[row].fullmatch(spoken(key))
    return found[1][:1] if found else ""


def says(row: str, *keys: str) -> bool:
    """Tells whether the name of any of these segments is in a row."""
    return any(row in rows_of(key) for key in keys)
