"""What libraries and models call things: hints, which structure confirms or overrules."""

import functools
import re
from collections.abc import Iterable

# What libraries and models call things, torch's q_proj, wq and to_q included.
# Names are compared whole, after `stem`: `head` is in multi_head_attention, `embed` in embed_proj.
# Flax and MaxText call a weight kernel, Haiku and Gemma w, Equinox and haliax weight.
WEIGHT = re.compile(r"kernel|weights?|w")
_AROUND = r"(?:w_?|to_|linear_)?(?:{})(?:_(?:proj|projection|dense|linear|lin|layer))?"
PROJECTION = re.compile(_AROUND.format("(q|k|v|query|key|value|queries|keys|values)"))
OUTPUT = re.compile(_AROUND.format("o|out|output") + "|c_proj|proj|attn_vec_einsum")
FUSED = re.compile(_AROUND.format("qkv") + "|c_attn|query_key_value")
FUSED_PAIR = re.compile(_AROUND.format("kv|key_value"))
PACKED = re.compile(r"in_proj(?:_weight)?")  # Q, K and V in attention only: Mamba has one as well
ATTENTION = re.compile(r".*(?:attn|attention).*")
MULTI_HEAD = re.compile(r"multi_head_(?:dot_product_)?attention")  # Flax: one axis for the heads
LAYERS = re.compile(r".*(?:blocks?|layers?)|(?:.*_)?(?:h|stack|stacked)|layer_stack.*")
EXPERTS = re.compile(r"(?:.*_)?experts|moe_block")
MIXTURE = re.compile(r"(?:.*_)?moe|moe_block")  # holds experts, a router and perhaps more
ROUTER = re.compile(r"router(?:_.*)?|shared_expert_gate")
GATE = re.compile(r"gate|gating")  # a router beside experts, elsewhere a matrix of the MLP
LORA = re.compile(r"(?:.*_)?lora(?:_.*)?")
# Scales and biases: heads, scanning and `vmap` make them 2-D and more.
VECTOR = re.compile(r"(?:.*_)?(?:bias|scale|offset)|b|gamma|beta|mean|var|sinks|a_log")
NORM = re.compile(r".*norm|ln(?:_.*)?|bn|gn")
EMBEDDING = re.compile(
    r"(?:.*_)?(?:embed|embeds|embedding|embeddings|embedder|emb|embs|tokens?)"
    r"|embed_positions|wte|wpe|tok|pos|cls"
)
POSITIONS = re.compile(r".*pos.*|wpe")
HEAD = re.compile(
    r"(?:(?:lm|mlm|cls|classification|value|policy|out|output)_)?head|logits|logits_dense"
    r"|logitdense|classifier|unembed|unembedding|embed_out"
)
CONVOLUTION = re.compile(r"(?:.*_)?(?:conv(?:\d_?d)?|convolution|dwconv|depthwise|patch)(?:_.*)?")


@functools.lru_cache(4096)  # most segments come once per layer
def stem(key: str) -> str:
    """A segment in snake case, without its number: `LayerNorm_0` is layer_norm."""
    key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key)
    return re.sub(r"\d+$", "", key).lower().strip("_")


def anywhere(pattern: re.Pattern[str], keys: Iterable[str]) -> bool:
    """Whether any segment has such a name."""
    return any(pattern.fullmatch(stem(key)) for key in keys)
