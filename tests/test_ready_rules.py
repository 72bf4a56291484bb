"""`teon_optax.rules`: what each ready set does to every model family, and its text as code."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from listings import array, nested, parsed, trees
from optax.contrib import MuonDimensionNumbers

from teon_optax import Rule, default_rules, labels, plan, rules, teon

FAMILIES = trees("kinds/families")
SETS = {
    "paper": rules.paper,
    "muon": rules.muon,
    "all_hidden": lambda params, **first: rules.all_hidden(params, 3, **first),
    "attention_out": lambda params, **first: rules.attention_out(params, 3, **first),
}
# Output projections of attention, as the families call them.
OUTPUTS = re.compile(
    r"(attn|attention|Attention)(_\d)?/(out|o|(o|out|output|c)_proj|attn_vec_einsum|linear"
    r"|output/dense)/|layers/\d/wo$|block_\d/output/"
)


def tree_of(shapes):
    """The tree of these shapes, written as in the listings."""
    (tree,) = parsed(
        "# A tree\n" + "".join(f"{path}: {shape} F\n" for path, shape in shapes.items())
    )
    return tree.params


def treatments(planned):
    """Member -> (K of its rule, whether that counts layers, all else)."""
    return {
        member: (
            group.rule.stack,
            "(?P<layer>" in group.rule.pattern or group.rule.layer_axis is not None,
            (group.rule.mode, group.rule.dims, group.fan_in, group.fan_out, group.batch),
        )
        for group in planned.groups
        for member in group.members
    }


def expected(name, member, stack, counts_layers):
    if name in ("paper", "muon"):
        return stack if name == "paper" else 1
    more = name == "all_hidden" or OUTPUTS.search(member)
    return 3 if stack == 2 or (more and counts_layers) else 1


@pytest.mark.filterwarnings("ignore:Q, K and V are recognized")
@pytest.mark.parametrize("name", SETS)
def test_a_set_takes_the_leaves_of_the_default_rules_and_changes_k_alone(name):
    for family, tree in FAMILIES.items():
        params = tree.params
        default, made = plan(params), plan(params, SETS[name](params))
        before, after = treatments(default), treatments(made)
        assert made.fallback == default.fallback, family
        assert {member: rest for member, (*_, rest) in after.items()} == {
            member: rest for member, (*_, rest) in before.items()
        }, family
        stacks = {member: stack for member, (stack, *_) in after.items()}
        assert stacks == {
            member: expected(name, member, stack, counts)
            for member, (stack, counts, _) in before.items()
        }, family
        assert not made.unused, family


@pytest.mark.filterwarnings("ignore:Q, K and V are recognized")
@pytest.mark.parametrize("name", SETS)
def test_a_set_printed_is_code_that_makes_it(name):
    for family, tree in FAMILIES.items():
        made = SETS[name](tree.params)
        names = {"Rule": Rule, "MuonDimensionNumbers": MuonDimensionNumbers}
        pasted: dict = dict(names)
        exec(f"rules = {made}", pasted)
        assert eval(str(made), names) == pasted["rules"] == made == tuple(made), family
        assert isinstance(made, tuple) and all(isinstance(rule, Rule) for rule in made)


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("stack", [1, 2, 4])
def test_the_paper_s_set_has_the_k_and_the_mode_that_are_asked_for(stack, mode):
    attention = {name: {"kernel": array(6, 6)} for name in ("query", "key", "value", "out")}
    params = {f"block_{i}": {"attn": attention, "up": array(6, 9)} for i in range(4)}
    made = rules.paper(params, stack, mode)
    found = {(group.rule.stack, group.rule.mode) for group in plan(params, made).groups}
    assert found == {(1, 1), (stack, mode if stack > 1 else 1)}
    assert rules.paper(params) == default_rules(params)


def test_a_rule_put_first_keeps_its_mode():
    first = (Rule(r"block_(?P<layer>\d+)/query", stack=2, mode=3),)
    params = {f"block_{i}": {"query": array(6, 6), "key": array(6, 6)} for i in range(2)}
    assert [rule.mode for rule in rules.paper(params, mode=2, first=first)] == [3, 2]


def mixture():
    """Two blocks with attention, a router, experts along an axis and by name, and a shared one."""
    attention = {name: {"kernel": array(16, 16)} for name in ("query", "key", "value", "out")}
    mlp = {
        "router": {"kernel": array(16, 4)},
        "up": array(4, 16, 32),
        "down": array(4, 32, 16),
        "shared_expert": {"up": {"kernel": array(16, 24)}, "down": {"kernel": array(24, 16)}},
    }
    named = {f"expert_{i}": {"up": {"kernel": array(16, 40)}} for i in range(2)}
    block = {"attn": attention, "norm": {"scale": array(16)}}
    blocks = [block | {"moe": mlp}, block | {"moe": named}]
    return {"embed": {"embedding": array(64, 16)}} | {f"block_{i}": b for i, b in enumerate(blocks)}


def test_rules_by_role_name_what_matrices_do():
    params = mixture()
    found = labels(params, rules.by_role(params))
    dense = {"kernel": "hidden"}
    assert found["block_0"] == {
        "attn": {
            name: {"kernel": "out" if name == "out" else "qkv"}
            for name in ("query", "key", "value", "out")
        },
        "norm": {"scale": "fallback"},
        "moe": {
            "router": {"kernel": "fallback"},
            "up": "experts",
            "down": "experts",
            "shared_expert": {"up": dense, "down": dense},
        },
    }
    assert found["block_1"]["moe"]["expert_1"] == {"up": {"kernel": "experts"}}
    assert found["embed"] == {"embedding": "fallback"}


@pytest.mark.parametrize("kind", ["kinds/families", "libraries"])
def test_rules_by_role_take_what_the_default_rules_take_with_the_same_rules(kind):
    for family, tree in trees(kind).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                default = default_rules(tree.params)
            except ValueError:
                continue
            kinds = rules.by_role(tree.params)
        before = treatments(plan(tree.params, default))
        after: dict = {}
        for name, some in kinds.items():
            taken = treatments(plan(tree.params, some))
            assert not after.keys() & taken.keys(), (family, name)
            after |= taken
        assert after == before, family


def test_a_kind_that_a_tree_lacks_has_no_rules_and_what_comes_first_has_its_own_name():
    attention = {name: array(16, 16) for name in ("query", "key", "mix")}
    params = {"block_0": {"attn": attention}}
    first = [Rule("mix", mode=2)]
    kinds = rules.by_role(params, first)
    assert list(kinds) == ["first", "qkv", "out", "hidden", "experts"]
    assert kinds["first"] == tuple(first) and kinds["out"] == kinds["experts"] == ()
    expected = {"query": "qkv", "key": "qkv", "mix": "first"}
    assert labels(params, kinds) == {"block_0": {"attn": expected}}


def test_no_kind_takes_what_comes_first_also_where_it_goes_to_the_fallback():
    params = mixture()
    first = (Rule("block_0/attn/query", stack=0), Rule("block_1/attn/out", mode=2))
    kinds = rules.by_role(params, iter(first))
    found = labels(params, kinds)
    assert found["block_0"]["attn"]["query"] == {"kernel": "fallback"}
    assert found["block_1"]["attn"]["query"] == {"kernel": "qkv"}
    assert found["block_1"]["attn"]["out"] == {"kernel": "first"}
    given = ("block_0/attn/query/kernel", "block_1/attn/out/kernel")
    of_kinds = (plan(params, kinds[name]) for name in ("qkv", "out", "hidden", "experts"))
    assert not {leaf for each in of_kinds for leaf in treatments(each)} & {*given}
    one = treatments(plan(params, default_rules(params, first)))
    several: dict = {}
    for some in kinds.values():
        several |= treatments(plan(params, some))
    assert several == one


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("expert_3", "experts"),
        ("Expert_3", "experts"),
        ("MLPExpert_3", "experts"),
        ("experts/3", "experts"),
        ("local_experts/3", "experts"),
        ("shared_expert", "hidden"),
        ("SharedExpert_0", "hidden"),
        ("shared_experts/0", "hidden"),
        ("expert_gate", "hidden"),
    ],
)
def test_modules_of_experts_are_known_by_the_last_word_of_their_name(module, kind):
    up = {"up": {"kernel": array(16, 40)}, "down": {"kernel": array(40, 16)}}
    for name in reversed(module.split("/")):
        up = {name: up}
    params = {f"block_{i}": {"moe": up} for i in range(2)}
    kinds = rules.by_role(params)
    assert kinds[kind] and sum(map(bool, kinds.values())) == 1


def test_what_default_rules_ask_and_warn_of_rules_by_role_do_too():
    with pytest.raises(ValueError, match="which axes are heads, layers, fan_in"):
        rules.by_role({"attn": {name: array(16, 16, 16) for name in ("query", "key", "value")}})
    with pytest.warns(UserWarning, match="No leaf is orthogonalized") as caught:
        rules.by_role({"embed": {"embedding": array(64, 16)}})
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.promotes_dtypes
def test_each_kind_of_matrix_has_a_rate_of_its_own():
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), mixture()
    )
    kinds = rules.by_role(params)
    rates = {"qkv": 0.02, "out": 0.01, "hidden": 0.005, "experts": 0.0025}
    parts: Any = {name: teon(rate, kinds[name]) for name, rate in rates.items()}
    found = labels(params, kinds)
    optimizer = optax.partition(parts | {"fallback": optax.adamw(3e-4)}, found)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    one: Any = teon(1.0, fallback=optax.adamw(3e-4))
    expected, _ = one.update(params, one.init(params), params)

    def of_its_rate(update, whole, label):
        np.testing.assert_allclose(update, rates.get(label, 1.0) * whole, rtol=1e-5, atol=1e-7)

    jax.tree.map(of_its_rate, updates, expected, found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stack": 0}, "stack should be a positive integer"),
        ({"mode": 4}, r"`rules.paper\(params, mode=4\)`: mode should be 1, 2 or 3"),
        ({"mode": True}, "mode should be 1, 2 or 3"),
    ],
)
def test_the_paper_s_set_refuses_another_k_or_mode(arguments, words):
    with pytest.raises(ValueError, match=words):
        rules.paper({"query": array(6, 6)}, **arguments)


def test_all_names_the_sets_alone():
    assert all(getattr(rules, name).__module__ == rules.__name__ for name in rules.__all__)
    functions = {name for name, value in vars(rules).items() if callable(value)}
    own = {name for name in functions if getattr(rules, name).__module__ == rules.__name__}
    assert {name for name in own if not name.startswith("_")} == {*rules.__all__}


def test_printed_rules_have_a_line_each_and_name_their_imports():
    heads = {"query": (6, 4, 5), "key": (6, 4, 5), "out": (4, 5, 6)}
    attention = {name: {"kernel": array(*shape)} for name, shape in heads.items()}
    params = {f"block_{i}": {"attn": attention, "up": array(6, 9)} for i in range(2)}
    assert str(default_rules(params)).split("\n") == [
        "(  # from optax.contrib import MuonDimensionNumbers; from teon_optax import Rule",
        r'    Rule(r"^block_(?P<layer>\d+)/attn/(key|query)/kernel$", stack=2, '
        "dims=MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))),",
        r'    Rule(r"^block_(?P<layer>\d+)/attn/out/kernel$", '
        "dims=MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=2)),",
        r'    Rule(r"^block_(?P<layer>\d+)/up$"),',
        ")",
    ]
    assert str(default_rules({"block_0": {"up": array(6, 9)}})).split("\n") == [
        "(  # from teon_optax import Rule",
        r'    Rule(r"^block_(?P<layer>\d+)/up$"),',
        ")",
    ]
    assert str(default_rules({})) == "()"


@pytest.mark.parametrize("name", SETS)
def test_rules_put_first_stay_as_they_are(name):
    params = nested({f"block_{i}/attn/query/kernel": array(4, 5, 6) for i in range(2)})
    with pytest.raises(ValueError, match="cannot tell how to read"):
        SETS[name](params)
    first = (Rule(r"(?P<layer>\d+)/attn", stack=2, dims=MuonDimensionNumbers(1, (0, 2))),)
    assert SETS[name](params, first=first) == first


def test_a_default_rule_is_parted_where_it_takes_more_than_output_projections():
    """In every other layer, a matrix of the same name and shape belongs to something else."""
    attention = {name: array(6, 6) for name in ("q_proj", "k_proj", "out_proj", "gate_proj")}
    mamba = {name: array(6, 6) for name in ("x_proj", "out_proj", "gate_proj")}
    params = {"layers": {str(i): {"mixer": mamba if i % 2 else attention} for i in range(12)}}
    made = plan(params, rules.attention_out(params))
    stacked = {m for group in made.groups if group.rule.stack == 2 for m in group.members}
    assert stacked == {
        f"layers/{i}/mixer/{name}"
        for i in range(0, 12, 2)
        for name in ("q_proj", "k_proj", "out_proj")
    }
    assert not made.unused


NAMES = ("query", "key", "value")


def shapes_of(*projections):
    attention = dict(zip(NAMES, projections, strict=True))
    leaves = {name: {"kernel": array(*shape)} for name, shape in attention.items()}
    leaves["out"] = {"kernel": array(8, 8)}
    return {f"block_{i}": {"attn": leaves} for i in range(2)}


def test_per_head_has_each_head_alone():
    heads = shapes_of((8, 4, 2), (8, 2, 2), (8, 2, 2))
    for block in heads.values():
        block["attn"]["out"]["kernel"] = array(4, 2, 8)
    for tree, head_dim in ((heads, None), (shapes_of((8, 8), (8, 4), (8, 4)), 2)):
        planned = plan(tree, rules.per_head(tree, head_dim))
        found = {}
        for group in planned.groups:
            assert len(group.members) == 1
            name = group.members[0].split("/")[2]
            found.setdefault(name, set()).add((group.fan_in, group.fan_out))
            found[name, "count"] = found.get((name, "count"), 0) + group.batch
        assert [found[name] for name in NAMES] == [{(8, 2)}] * 3
        assert [found[name, "count"] for name in NAMES] == [8, 4, 4]
        assert found["out"] == {(8, 8)} and not planned.unused
    for head_dim in (None, 3):
        with pytest.raises(ValueError, match="does not show its heads: pass a head_dim"):
            rules.per_head(shapes_of((8, 8), (8, 4), (8, 4)), head_dim)
    wrong: tuple[Any, ...] = (0, -2, 2.0, "2")
    for head_dim in wrong:
        with pytest.raises(ValueError, match="'block_0/attn/key/kernel', shape .*its heads"):
            rules.per_head(shapes_of((8, 8), (8, 8), (8, 8)), head_dim)


@pytest.mark.parametrize(
    "narrow", [[(1, "key")], [(1, "key"), (0, "value")], [(0, "query")]], ids=str
)
def test_per_head_cuts_each_leaf_at_its_own_heads(narrow):
    tree = shapes_of((8, 8), (8, 8), (8, 8))
    tree["block_1"] = {"attn": dict(tree["block_1"]["attn"])}
    for layer, name in narrow:
        tree[f"block_{layer}"]["attn"][name] = {"kernel": array(8, 4)}
    planned = plan(tree, rules.per_head(tree, head_dim=2))
    assert not planned.unused
    heads = {}
    for group in planned.groups:
        if group.fan_out == 2:
            path = group.members[0].split(":")[0]
            heads[path] = heads.get(path, 0) + 1
    assert heads == {
        f"block_{layer}/attn/{name}/kernel": 2 if (layer, name) in narrow else 4
        for layer in range(2)
        for name in NAMES
    }


def sizes_by_path(planned):
    """Path -> (fan_in, fan_out) of its matrices, and how many it holds."""
    found = {}
    for group in planned.groups:
        path = re.sub(r"(:\d+)?(\[\d+\])?$", "", group.members[0])
        size = group.fan_in, group.fan_out
        assert len(group.members) == 1 and found.setdefault(path, (size, 0))[0] == size
        found[path] = size, found[path][1] + group.batch
    return found


def test_per_head_of_latent_attention():
    latent = {
        "layers/{0..2}/attn/q_a_proj/kernel": "64x16",
        "layers/{0..2}/attn/q_b_proj/kernel": "16x96",
        "layers/{0..2}/attn/kv_b_proj/kernel": "16x120",
        "layers/{0..2}/attn/o_proj/kernel": "64x64",
    }
    found = sizes_by_path(plan(tree_of(latent), rules.per_head(tree_of(latent), head_dim=24)))
    assert found["layers/1/attn/q_b_proj/kernel"] == ((16, 24), 4)
    assert found["layers/1/attn/kv_b_proj/kernel"] == ((16, 24), 5)
    assert found["layers/1/attn/q_a_proj/kernel"] == ((64, 16), 1)
    with_heads = {
        "layers/{0..2}/attn/wq_b/kernel": "16x4x24",
        "layers/{0..2}/attn/wkv_b/kernel": "16x4x16",
        "layers/{0..2}/attn/out/kernel": "4x8x32",
    }
    found = sizes_by_path(plan(tree_of(with_heads), rules.per_head(tree_of(with_heads))))
    assert found["layers/1/attn/wq_b/kernel"] == ((16, 24), 4)
    assert found["layers/1/attn/wkv_b/kernel"] == ((16, 16), 4)


def test_per_head_of_fused_projections_whose_parts_differ():
    dbrx = {
        "blocks/{0..2}/attn/Wqkv/kernel": "32x48",
        "blocks/{0..2}/attn/out/kernel": "32x32",
    }
    found = sizes_by_path(plan(tree_of(dbrx), rules.per_head(tree_of(dbrx), head_dim=8)))
    assert found["blocks/2/attn/Wqkv/kernel"] == ((32, 8), 6)
    assert found["blocks/2/attn/out/kernel"] == ((32, 32), 1)
    heads = {
        "blocks/{0..2}/attn/qkv_proj/kernel": "32x8x4",
        "blocks/{0..2}/attn/out/kernel": "4x4x32",
    }
    found = sizes_by_path(plan(tree_of(heads), rules.per_head(tree_of(heads))))
    assert found["blocks/2/attn/qkv_proj/kernel"] == ((32, 4), 8)
    threes = {
        "blocks/{0..2}/attn/qkv/kernel": "32x3x4x8",
        "blocks/{0..2}/attn/out/kernel": "4x8x32",
        "blocks/{0..2}/ln/scale": "32",
    }
    found = sizes_by_path(plan(tree_of(threes), rules.per_head(tree_of(threes))))
    assert found["blocks/2/attn/qkv/kernel"] == ((32, 8), 12)


def test_per_head_does_not_ask_for_heads_of_what_rules_put_first_take():
    tree = tree_of({"blocks/*/attn/query/kernel": "64x64", "blocks/*/attn/out/kernel": "64x64"})
    first = Rule("query", split=2)
    assert rules.per_head(tree, first=[first])[0] == first


@pytest.mark.parametrize("name", [*SETS, "lora", "per_head"])
@pytest.mark.parametrize("first", ["query", Rule("query"), 2], ids=str)
def test_what_is_no_tuple_of_rules_cannot_be_put_first(name, first):
    with pytest.raises(ValueError, match=re.escape(f"`first={first!r}` should be a tuple of `R")):
        ({**SETS, "lora": rules.lora, "per_head": rules.per_head}[name])(
            tree_of({"blocks/*/attn/query/kernel": "64x64"}), first=first
        )


def test_per_head_says_so_where_there_are_no_projections():
    mlp = tree_of({"blocks/{0..2}/up/kernel": "64x256", "blocks/{0..2}/down/kernel": "256x64"})
    with pytest.raises(ValueError, match="finds no Q, K or V projection, so there are no heads"):
        rules.per_head(mlp, head_dim=8)


def test_lora_gives_b_to_muon_and_a_to_the_fallback():
    factors = {
        "blocks/{0..2}/q/w_lora_a": "64x4",
        "blocks/{0..2}/q/w_lora_b": "4x8x16",
        "blocks/{0..2}/up/kernel": "64x256",
        "blocks/{0..2}/up/fee": "64x4",
        "blocks/{0..2}/up/fum": "4x256",
        "blocks/{0..2}/down/kernel": "256x64",
    }
    params = tree_of(factors)
    planned = plan(params, rules.lora(params))
    found = sizes_by_path(planned)
    assert found["blocks/1/q/w_lora_b"] == ((4, 128), 1)
    assert found["blocks/1/up/fum"] == ((4, 256), 1)
    assert {"blocks/1/q/w_lora_a", "blocks/1/up/fee"} <= set(planned.fallback)
    assert found["blocks/1/down/kernel"] == ((256, 64), 1) and not planned.unused
    with pytest.raises(ValueError, match="no leaf is a low-rank factor by name"):
        rules.lora(
            tree_of({"blocks/{0..2}/up/kernel": "64x256", "blocks/{0..2}/down/kernel": "256x64"})
        )


@pytest.mark.parametrize("name", ["all_hidden", "attention_out"])
@pytest.mark.parametrize("stack", [0, -1, True, 2.0, [Rule("x")]], ids=str)
def test_a_stack_that_is_no_positive_integer_is_refused(name, stack):
    with pytest.raises(ValueError, match=rf"`rules.{name}\(.*a positive integer, K.*`first=`"):
        getattr(rules, name)({"w": array(4, 4)}, stack)


def test_lora_knows_factors_called_down_and_up():
    query = {"kernel": array(16, 16), "lora_down": array(16, 4), "lora_up": array(4, 16)}
    params = {f"block_{i}": {"attn": {"query": query}} for i in range(2)}
    taken = {m for group in plan(params, rules.lora(params)).groups for m in group.members}
    assert {f"block_{i}/attn/query/lora_up" for i in range(2)} <= taken
    assert not any("lora_down" in member for member in taken)
