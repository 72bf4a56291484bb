"""`clip_qk` against the logits themselves: those past the threshold come back to it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as D

from teon_optax import Rule, contrib, teon

LAYERS, WIDTH, HEADS, SIZE, GROUPS = 3, 12, 4, 6, 2
THRESHOLD = 20.0
# What they return is no tree of numbers to pyright.
apply_updates: Any = optax.apply_updates
clip_qk: Any = contrib.clip_qk


def gaussians(seed=0, groups=GROUPS):
    """Q [layers, width, heads, size], K and V [layers, width, groups, size], and their biases."""
    rng = np.random.default_rng(seed)
    of = {"q": HEADS, "k": groups, "v": groups}
    kernels: Any = {n: rng.normal(size=(LAYERS, WIDTH, c, SIZE)) for n, c in of.items()}
    biases: Any = {n: rng.normal(size=(LAYERS, c, SIZE)) for n, c in of.items()}
    # Some heads far above the threshold, some below.
    kernels["q"] *= np.array([0.05, 1.0, 3.0, 0.5])[:, None]
    biases["q"] *= np.array([0.05, 1.0, 3.0, 0.5])[:, None]
    return kernels, biases


def largest_logits(kernels, biases=None, seed=5):
    """[layers, heads], of one batch of 16 positions that each layer sees, in float64."""
    x: Any = np.random.default_rng(seed).normal(size=(16, WIDTH))
    q, k = (np.einsum("td,ldhs->lths", x, np.float64(kernels[name])) for name in "qk")
    if biases is not None:
        q, k = (a + np.asarray(biases[name])[:, None] for a, name in ((q, "q"), (k, "k")))
    k = np.repeat(k, HEADS // k.shape[2], axis=2)
    return np.einsum("lths,luhs->lhtu", q, k).max((2, 3)) / np.sqrt(SIZE)


def flat(kernel):
    return kernel.reshape(*kernel.shape[:-2], -1)


def unflat(kernel):
    return kernel.reshape(*kernel.shape[:-1], -1, SIZE)


NAMES = {"q": "query", "k": "key", "v": "value"}


def per_layer(hold, back):
    """Blocks with a kernel for each of Q, K and V, as a function holds it."""

    def tree(kernels):
        return {
            f"block_{i + 9}": {"attn": {NAMES[n]: {"kernel": hold(kernels[n][i])} for n in "qkv"}}
            for i in range(LAYERS)
        }

    def taken(tree):
        return {
            n: np.stack(
                [back(tree[f"block_{i + 9}"]["attn"][NAMES[n]]["kernel"]) for i in range(LAYERS)]
            )
            for n in "qkv"
        }

    return tree, taken


def scanned():
    def tree(kernels):
        return {"h": {"attn": {f"{n}_proj": {"kernel": flat(kernels[n])} for n in "qkv"}}}

    def taken(tree):
        return {n: unflat(tree["h"]["attn"][f"{n}_proj"]["kernel"]) for n in "qkv"}

    return tree, taken


def fused(join, cut):
    def tree(kernels):
        return {
            f"h_{i}": {"attn": {"qkv": {"kernel": join([kernels[n][i] for n in "qkv"])}}}
            for i in range(LAYERS)
        }

    def taken(tree):
        cuts = [cut(tree[f"h_{i}"]["attn"]["qkv"]["kernel"]) for i in range(LAYERS)]
        return {n: np.stack([parts[at] for parts in cuts]) for at, n in enumerate("qkv")}

    return tree, taken


def unequal(kernel):
    bounds = [HEADS * SIZE, (HEADS + GROUPS) * SIZE]
    return [unflat(part) for part in np.split(kernel, bounds, axis=-1)]


SHARING = HEADS // GROUPS


def in_turns(parts):
    """The heads of Q of each group, then its one of K and its one of V: (width, -1)."""
    q, k, v = parts
    q = q.reshape(WIDTH, GROUPS, SHARING, SIZE)
    return np.concatenate([q, k[:, :, None], v[:, :, None]], 2).reshape(WIDTH, -1)


def out_of_turns(kernel):
    kernel = kernel.reshape(WIDTH, GROUPS, SHARING + 2, SIZE)
    q, k, v = np.split(kernel, [SHARING, SHARING + 1], 2)
    return [q.reshape(WIDTH, HEADS, SIZE), k[:, :, 0], v[:, :, 0]]


TURNS: Any = {"view": (WIDTH, GROUPS, SHARING + 2, SIZE), "split": (SHARING, 1, 1)}
LAYER = r"h_(?P<layer>\d+)/attn/qkv"
# How leaves hold the kernels, how many heads of K there are, and rules, where they are not read.
HOLDINGS = {
    "kernels": (per_layer(flat, unflat), GROUPS, None),
    "kernels by heads": (
        per_layer(lambda x: x, lambda x: x),
        GROUPS,
        [Rule(r"block_(?P<layer>\d+)/attn", dims=D(0, (1, 2)))],
    ),
    "one head of K": (per_layer(flat, unflat), 1, None),
    "as many heads of K": (per_layer(flat, unflat), HEADS, None),
    "weights (out, in)": (
        per_layer(lambda x: flat(x).T, lambda x: unflat(x.T)),
        GROUPS,
        [Rule(r"block_(?P<layer>\d+)/attn", dims=D(1, 0))],
    ),
    "each head a matrix": (
        per_layer(lambda x: x, lambda x: x),
        GROUPS,
        [Rule(r"block_(?P<layer>\d+)/attn", dims=D(0, 2))],
    ),
    "joined heads": (
        per_layer(lambda x: x, lambda x: x),
        GROUPS,
        [Rule(r"block_(?P<layer>\d+)/attn", dims=D(0, 2), join="heads")],
    ),
    "scanned": (scanned(), GROUPS, [Rule("attn", layer_axis=0)]),
    "fused": (
        fused(
            lambda parts: np.concatenate([flat(part) for part in parts], -1),
            lambda kernel: [unflat(part) for part in np.split(kernel, 3, -1)],
        ),
        HEADS,
        [Rule(LAYER, split=3)],
    ),
    "fused of unequal sizes": (
        fused(lambda parts: np.concatenate([flat(part) for part in parts], -1), unequal),
        GROUPS,
        [Rule(LAYER, split=(HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE))],
    ),
    "fused by heads": (
        fused(
            lambda parts: np.stack(parts, 2).reshape(WIDTH, -1),
            lambda kernel: list(np.moveaxis(kernel.reshape(WIDTH, HEADS, 3, SIZE), 2, 0)),
        ),
        HEADS,
        [Rule(LAYER, view=(WIDTH, HEADS, 3, SIZE), dims=D(0, (1, 3)))],
    ),
    "fused, each head a matrix": (
        fused(lambda parts: np.stack(parts, 1), lambda kernel: list(np.moveaxis(kernel, 1, 0))),
        HEADS,
        [Rule(LAYER, dims=D(0, (1, 3)), split=3)],
    ),
    "fused, by groups in turns": (
        fused(in_turns, out_of_turns),
        GROUPS,
        [Rule(LAYER, dims=D(0, (2, 1, 3)), **TURNS)],
    ),
    "fused, by groups in turns, each group a matrix": (
        fused(in_turns, out_of_turns),
        GROUPS,
        [Rule(LAYER, dims=D(0, (2, 3)), **TURNS)],
    ),
    "groups along an axis": (
        per_layer(
            lambda x: x.reshape(WIDTH, GROUPS, -1, SIZE), lambda x: x.reshape(WIDTH, -1, SIZE)
        ),
        GROUPS,
        [Rule(r"block_(?P<layer>\d+)/attn", dims=D(0, (2, 1, 3)))],
    ),
    "heads behind what they hold": (
        per_layer(lambda x: np.swapaxes(x, 1, 2), lambda x: np.swapaxes(x, 1, 2)),
        GROUPS,
        [Rule(r"block_(?P<layer>\d+)/attn", dims=D(0, (2, 1)))],
    ),
}


def on_float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def clipped(holding, kernels, logits, **arguments):
    """Kernels after a step of zero."""
    (tree, taken), _, rules = HOLDINGS[holding]
    params = on_float32(tree(kernels))
    transform = clip_qk(THRESHOLD, rules, **arguments)
    state = transform.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(transform.update)(zeros, state, params, attention_logits=logits)
    return taken(jax.tree.map(np.asarray, apply_updates(params, updates)))


def expected_logits(logits, groups):
    """A head's logits get the root of its own ratio, and that of the largest of its group."""
    roots = np.sqrt(np.minimum(1, THRESHOLD / logits))
    least = roots.reshape(LAYERS, groups, -1).min(2)
    return logits * roots * np.repeat(least, HEADS // groups, axis=1)


@pytest.mark.parametrize("holding", HOLDINGS)
def test_logits_past_the_threshold_come_back_to_it_however_leaves_hold_the_heads(holding):
    _, groups, _ = HOLDINGS[holding]
    kernels, _ = gaussians(groups=groups)
    before = largest_logits(kernels)
    assert before.max() > 2 * THRESHOLD and before.min() < THRESHOLD / 2
    new = clipped(holding, kernels, jnp.asarray(before, jnp.float32))
    after = largest_logits(new)
    np.testing.assert_allclose(after, expected_logits(before, groups), rtol=1e-5)
    assert after.max() <= THRESHOLD * (1 + 1e-5)
    if groups == HEADS:
        np.testing.assert_allclose(after, np.minimum(before, THRESHOLD), rtol=1e-5)
    np.testing.assert_allclose(new["v"], kernels["v"], rtol=1e-6)


@pytest.mark.parametrize("by_heads", [False, True])
def test_biases_of_q_and_k_are_clipped_with_their_kernels(by_heads):
    kernels, biases = gaussians()
    shaped = (lambda x: x) if by_heads else flat
    params = on_float32(
        {
            f"layers_{i}": {
                "self_attn": {
                    f"{n}_proj": {"kernel": shaped(kernels[n][i]), "bias": shaped(biases[n][i])}
                    for n in "qkv"
                }
            }
            for i in range(LAYERS)
        }
    )
    before = largest_logits(kernels, biases)
    dims = D(0, (1, 2)) if by_heads else None
    transform = clip_qk(THRESHOLD, [Rule(r"layers_(?P<layer>\d+).*kernel", dims=dims)])
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(
        zeros, transform.init(params), params, attention_logits=jnp.asarray(before, jnp.float32)
    )
    new = apply_updates(params, updates)

    def stacked(name):
        return {
            n: np.stack(
                [
                    np.reshape(new[f"layers_{i}"]["self_attn"][f"{n}_proj"][name], (-1, c, SIZE))
                    for i in range(LAYERS)
                ]
            )
            for n, c in (("q", HEADS), ("k", GROUPS))
        }

    after = largest_logits(
        stacked("kernel"), {n: bias[:, 0] for n, bias in stacked("bias").items()}
    )
    np.testing.assert_allclose(after, expected_logits(before, GROUPS), rtol=1e-5)


def test_it_multiplies_the_stepped_parameters_and_leaves_other_heads_bit_for_bit():
    params = {"attn": {"query": jnp.ones((2, 4)), "key": jnp.ones((2, 4))}, "up": jnp.ones((2, 4))}
    updates = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    transform = clip_qk(100.0)
    logits = jnp.array([[400.0, 100.0]])
    new, _ = transform.update(updates, transform.init(params), params, attention_logits=logits)
    stepped = apply_updates(params, new)
    np.testing.assert_allclose(stepped["attn"]["query"][:, :2], 0.5 * 1.3, rtol=1e-6)
    np.testing.assert_array_equal(new["attn"]["query"][:, 2:], updates["attn"]["query"][:, 2:])
    assert new["up"] is updates["up"]


@pytest.mark.parametrize("logit", [np.nan, np.inf, -np.inf, 0.0, -500.0])
def test_logits_that_are_not_finite_or_below_clip_nothing(logit):
    params = {"attn": {"query": jnp.ones((2, 4)), "key": jnp.ones((2, 4))}}
    transform = clip_qk(100.0)
    logits = jnp.full((1, 2), logit)
    new, _ = transform.update(params, transform.init(params), params, attention_logits=logits)
    jax.tree.map(np.testing.assert_array_equal, new, params)


def test_16_bit_params_keep_their_dtype_and_logits_may_be_of_16_bits():
    params = {"attn": {name: jnp.ones((2, 4), "bfloat16") for name in ("query", "key")}}
    transform = clip_qk(100.0)
    logits = jnp.array([[400.0, 4.0]], "bfloat16")
    zeros = jax.tree.map(jnp.zeros_like, params)
    new, _ = transform.update(zeros, transform.init(params), params, attention_logits=logits)
    assert new["attn"]["query"].dtype == "bfloat16"
    np.testing.assert_array_equal(new["attn"]["query"][0], [-0.5, -0.5, 0, 0])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("groups", "spec"),
    [(HEADS, P("data", None)), (HEADS, P(None, "data")), (1, P("data", None))],
    ids=str,
)
def test_on_a_mesh_logits_come_back_and_leaves_stay_where_they_lay(groups, spec, axis_type):
    kernels, _ = gaussians(groups=groups)
    tree, taken = HOLDINGS["kernels"][0]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    before = largest_logits(kernels)
    put = jax.device_put(on_float32(tree(kernels)), NamedSharding(mesh, spec))
    transform = clip_qk(THRESHOLD)
    with jax.set_mesh(mesh):
        state, zeros = transform.init(put), jax.tree.map(jnp.zeros_like, put)
        update = jax.jit(transform.update)
        # Along the heads, as a tensor-parallel model makes them.
        logits = jax.device_put(np.float32(before), NamedSharding(mesh, P(None, "data")))
        updates, _ = update(zeros, state, put, attention_logits=logits)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, put)
    for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(put), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
    new = taken(jax.tree.map(lambda w, u: np.asarray(w) + np.asarray(u), put, updates))
    np.testing.assert_allclose(largest_logits(new), expected_logits(before, groups), rtol=1e-5)


def attended(params, x):
    """A stack of causal attention, and the largest logit of each layer and head."""
    logits = []
    for block in params.values():
        attn = block["attn"]
        q, k, v = (
            (x @ attn[name]["kernel"]).reshape(*x.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bths,buhs->bhtu", q, k) / jnp.sqrt(q.shape[-1])
        seen = jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        logits.append(jnp.max(scores, (0, 2, 3)))
        mixed = jnp.einsum("bhtu,buhs->bths", jax.nn.softmax(scores), v)
        x = x + mixed.reshape(x.shape) @ attn["out"]["kernel"]
    return x, jnp.stack(logits)


@pytest.mark.promotes_dtypes
@pytest.mark.promotes_ranks
def test_in_training_logits_that_grow_stay_near_the_threshold():
    rng = np.random.default_rng(3)
    names = ("query", "key", "value", "out")
    params = {
        f"block_{i}": {
            "attn": {
                n: {"kernel": jnp.asarray(rng.normal(size=(16, 16)) / 4, jnp.float32)}
                for n in names
            }
        }
        for i in range(2)
    }
    x = jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.float32)

    def loss(params):
        # It falls as long as logits grow.
        y, logits = attended(params, x)
        return -jnp.mean(jnp.square(logits)) + jnp.mean(jnp.square(y)), logits

    def largest(optimizer):
        @jax.jit
        def step(params, state):
            gradients, logits = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(gradients, state, params, attention_logits=logits)
            return apply_updates(params, updates), state

        new, state = params, optimizer.init(params)
        for _ in range(40):
            new, state = step(new, state)
        return float(jnp.max(loss(new)[1]))

    assert largest(teon(0.03)) > 1000
    # The last step comes after the logits that were clipped.
    assert largest(optax.chain(teon(0.03), clip_qk(10.0))) < 15


def attention(*names, shape=(4, 4), **more):
    return {"attn": {name: {"kernel": jnp.ones(shape)} for name in names} | more}


@pytest.mark.parametrize(
    "norm", ["q_norm", "QueryNorm", "k_rms_norm", "q_rmsnorm", "key_l2norm", "ln_q", "rms_norm_k"]
)
@pytest.mark.parametrize("above", [(), ("norms",)], ids=["beside", "one module deeper"])
def test_normalized_q_or_k_are_refused(above, norm):
    norms = {name: {norm: {"scale": jnp.ones(4)}} for name in above} or {norm: jnp.ones(4)}
    params = {"block_0": attention("query", "key", **norms)}
    with pytest.raises(ValueError, match="normalizes Q or K after the projection"):
        clip_qk().init(params)


def test_norms_of_an_attention_inside_are_found_and_those_of_an_mlp_do_not_count():
    inner = attention("query", "key", q_norm=jnp.ones(4))["attn"]
    params = {"block_0": attention("query", "key")["attn"] | {"latent": inner}}
    ours = [Rule("block_0/(query|key)"), Rule("latent")]
    with pytest.raises(ValueError, match="'block_0/latent/q_norm' normalizes Q or K"):
        clip_qk(rules=ours).init(params)
    del inner["q_norm"]
    params["block_0"]["mlp"] = {"norm": jnp.ones(4)}
    clip_qk(rules=ours).init(params)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"up": jnp.ones((4, 4))}, "finds no projections of Q and K: pass `rules=`"),
        (
            attention("query", "key", "value", q_norm={"scale": jnp.ones(4)}),
            "'attn/q_norm/scale' normalizes Q or K after the projection",
        ),
        (
            attention("q_proj", "v_proj", "o_proj"),
            r"one of K in each layer, and finds \['q'\] in \['attn/q_proj/kernel'\]",
        ),
    ],
    ids=["no attention", "normalized", "no K"],
)
def test_what_cannot_be_clipped_is_refused(params, words):
    with pytest.raises(ValueError, match=words):
        clip_qk().init(params)


def changed(leaves):
    """Paths of the leaves that a clip of two layers of two heads changes."""
    params = {path: jnp.ones(shape) for path, shape in leaves.items()}
    transform = clip_qk(1.0)
    state, zeros = transform.init(params), jax.tree.map(jnp.zeros_like, params)
    logits = jnp.full((2, 2), 4.0)
    updates, _ = transform.update(zeros, state, params, attention_logits=logits)
    return {path for path, update in updates.items() if np.any(update)}


def test_the_bias_of_a_fused_projection_is_clipped_and_that_of_the_output_is_not():
    shapes = {"c_attn/kernel": (4, 12), "c_attn/bias": (12,), "c_proj/kernel": (4, 4)}
    shapes |= {"c_proj/bias": (4,)}
    leaves = {f"h_{i}/attn/{path}": shape for i in range(2) for path, shape in shapes.items()}
    expected = {f"h_{i}/attn/c_attn/{name}" for i in range(2) for name in ("kernel", "bias")}
    assert changed(leaves) == expected


def test_a_first_layer_without_a_number_belongs_to_the_others():
    names = ("query", "key", "value", "linear")
    leaves = {
        f"gpt/block{number}/multi_head_attention/{name}/w": (4, 4)
        for number in ("", "_1")
        for name in names
    }
    assert len(changed(leaves)) == 4


def test_low_rank_factors_of_q_and_k_are_refused():
    factors = {"kernel": jnp.ones((4, 4)), "lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}
    params = {"attn": {"query": factors, "key": {"kernel": jnp.ones((4, 4))}}}
    with pytest.raises(ValueError, match="'attn/query/lora_a' is a low-rank factor of Q or K"):
        clip_qk(rules=[Rule("kernel")]).init(params)


def test_latent_attention_is_refused_with_the_reason():
    shapes = {
        "q_a_proj": (64, 24),
        "q_b_proj": (24, 64),
        "kv_a_proj_with_mqa": (64, 20),
        "kv_b_proj": (16, 96),
        "o_proj": (64, 64),
    }
    block = {"self_attn": {n: {"kernel": jnp.ones(shape)} for n, shape in shapes.items()}}
    mlp = {"up_proj": {"kernel": jnp.ones((64, 96))}, "down_proj": {"kernel": jnp.ones((96, 64))}}
    params = {f"layers_{i}": block | {"mlp": mlp} for i in range(2)}
    with pytest.raises(ValueError, match="does not clip latent attention, .*rotary part of K"):
        clip_qk().init(params)


def test_several_stacks_of_attention_have_logits_by_name():
    params = {name: {"block_0": attention("query", "key")} for name in ("encoder", "decoder")}
    transform = clip_qk(1.0)
    state = transform.init(params)
    names = {f"{name}/block_*/attn" for name in params}
    with pytest.raises(ValueError, match=r"for each of \['decoder/block_\*/attn', 'encoder/"):
        transform.update(params, state, params, attention_logits=jnp.ones((1, 2)))
    logits = {name: jnp.full((1, 2), 4.0 if "encoder" in name else 0.5) for name in names}
    updates, _ = transform.update(params, state, params, attention_logits=logits)
    new = apply_updates(params, updates)
    np.testing.assert_array_equal(new["decoder"]["block_0"]["attn"]["query"]["kernel"], 2)
    np.testing.assert_array_equal(new["encoder"]["block_0"]["attn"]["query"]["kernel"], 1)
    with pytest.raises(ValueError, match=r"`attention_logits` has \['encoder'\], and should have"):
        transform.update(params, state, params, attention_logits={"encoder": jnp.ones((1, 2))})


def test_patterns_tell_q_and_k_that_have_other_names():
    params = {f"block_{i}": {"attn": {n: jnp.ones((4, 4)) for n in "ab"}} for i in range(2)}
    rules = [Rule(r"block_(?P<layer>\d+)/attn/[ab]")]
    with pytest.raises(ValueError, match=r"which of Q, K and V 'block_0/attn/a', shape \(4, 4\)"):
        clip_qk(1.0, rules).init(params)
    transform = clip_qk(1.0, rules, query="attn/a", key="attn/b")
    logits = jnp.array([[4.0, 1.0], [1.0, 1.0]])
    updates, _ = transform.update(params, transform.init(params), params, attention_logits=logits)
    new = apply_updates(params, updates)
    np.testing.assert_array_equal(new["block_0"]["attn"]["b"][0], [1, 1, 2, 2])
    np.testing.assert_array_equal(new["block_1"]["attn"]["b"][0], [2, 2, 2, 2])


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (None, r"needs params and the largest logit .* attention_logits=logits\)`"),
        (jnp.ones(2), r"of 'block_\*/attn' has shape \(2,\), and should be \[layers, heads\]"),
        (jnp.ones((3, 2)), r"has shape \(3, 2\), and should be \[layers, heads\], of 2 layers"),
        (jnp.ones((2, 3)), "has 3 heads, which do not fit the 4 features of Q and 4 of K"),
    ],
    ids=["absent", "one axis", "other layers", "other heads"],
)
def test_logits_that_do_not_fit_are_refused(logits, words):
    params = {f"block_{i}": attention("query", "key") for i in range(2)}
    transform = clip_qk()
    state = transform.init(params)
    with pytest.raises(ValueError, match=words):
        transform.update(params, state, params, attention_logits=logits)


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), "much"])
def test_a_threshold_that_is_no_positive_number_is_refused(threshold):
    with pytest.raises(ValueError, match="`threshold=.*` should be a number, at least"):
        clip_qk(threshold)
