"""Labels: what updates each leaf, in the tree of params, for `optax.partition`."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from teon_optax import Rule, labels, orthogonalize, polar_express, rules, teon

pytestmark = pytest.mark.promotes_dtypes

QUERIES = (Rule(r"block_(?P<layer>\d+)/query", stack=2),)
UP = (Rule("up"),)
QUICK = polar_express(1)


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    blocks = {f"block_{i}": {"query": rng.normal(size=(6, 4))} for i in range(2)}
    tree = blocks | {"up": rng.normal(size=(4, 6)), "bias": rng.normal(size=6)}
    return jax.tree.map(jnp.float32, tree)


def update_of(optimizer: optax.GradientTransformation, gradients: Any) -> Any:
    """The first update of some gradients, which stand for params too."""
    return optimizer.update(gradients, optimizer.init(gradients), gradients)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A tree that can be called, as Equinox's models are."""

    up: Any
    bias: Any

    def __call__(self, inputs: Any) -> Any:
        return inputs @ self.up + self.bias


def test_labels_say_what_updates_each_leaf():
    of_blocks = {"block_0": {"query": "teon"}, "block_1": {"query": "teon"}}
    assert labels(params(), QUERIES) == of_blocks | {"up": "fallback", "bias": "fallback"}
    stays = (Rule("block_0", stack=0), *QUERIES)
    assert labels(params(), stays)["block_0"] == {"query": "fallback"}


def test_without_rules_labels_are_those_of_the_default_rules():
    tree = params()
    assert labels(tree) == labels(tree, rules.paper(tree))
    assert labels(tree)["block_0"] == {"query": "teon"}


def test_labels_of_a_mapping_are_its_names_and_the_first_that_takes_a_leaf_counts():
    named = {"qkv": QUERIES, "hidden": (Rule("up"), Rule("block_1"))}
    of_blocks = {"block_0": {"query": "qkv"}, "block_1": {"query": "qkv"}}
    assert labels(params(), named) == of_blocks | {"up": "hidden", "bias": "fallback"}
    reversed_names = dict(reversed(named.items()))
    assert labels(params(), reversed_names)["block_1"] == {"query": "hidden"}


def test_a_name_that_the_fallback_has_is_refused():
    with pytest.raises(ValueError, match="'fallback' is the label of leaves that no rules take"):
        labels(params(), {"fallback": UP})


def test_rules_that_do_not_fit_are_refused_by_labels():
    with pytest.raises(ValueError, match="Rules do not fit the leaves that they take"):
        labels(params(), {"hidden": [Rule("up", split=4)]})


def test_a_partition_by_labels_is_what_teon_is():
    gradients = jax.tree.map(lambda leaf: leaf + 1, params())
    matrices = optax.chain(
        optax.trace(0.0), orthogonalize(QUERIES, method=QUICK), optax.scale_by_learning_rate(0.1)
    )
    parts: Any = {"teon": matrices, "fallback": optax.sgd(0.1)}
    by_hand = optax.partition(parts, labels(params(), QUERIES))
    ours = teon(0.1, QUERIES, beta=0.0, method=QUICK, fallback=optax.sgd(0.1))
    updates, expected = (update_of(each, gradients) for each in (by_hand, ours))
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_groups_of_matrices_can_have_rates_of_their_own():
    tree = params()
    named = {"qkv": QUERIES, "hidden": UP}
    rates = {"qkv": 0.02, "hidden": 0.01}
    parts: Any = {name: teon(rates[name], named[name], method=QUICK) for name in named}
    parts["fallback"] = optax.sgd(0.5)
    updates = update_of(optax.partition(parts, labels(tree, named)), tree)
    for name, rate in (("block_0", 0.02), ("up", 0.01)):
        expected = update_of(teon(rate, QUERIES + UP, method=QUICK), tree)
        chex.assert_trees_all_close(updates[name], expected[name], rtol=1e-6)
    chex.assert_trees_all_close(updates["bias"], -0.5 * tree["bias"])


def test_labels_of_a_tree_that_can_be_called_are_given_as_a_function():
    model = Model(params()["up"], params()["bias"])
    assert labels(model, UP) == Model("teon", "fallback")
    transforms: Any = {"teon": orthogonalize(UP, method="svd"), "fallback": optax.set_to_zero()}
    updates = update_of(optax.partition(transforms, lambda tree: labels(tree, UP)), model)
    assert np.linalg.matrix_rank(updates.up) == 4 and not updates.bias.any()


def test_labels_of_a_model_of_nnx_are_given_as_a_function():
    model: Any = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    rules = (Rule("kernel"),)
    transforms: Any = {"teon": orthogonalize(rules, method="svd"), "fallback": optax.set_to_zero()}
    partitioned = optax.partition(transforms, lambda tree: labels(tree, rules))
    optimizer, before = nnx.Optimizer(model, partitioned, wrt=nnx.Param), model.kernel[...]
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones(4)) ** 2))(model))
    assert not model.bias[...].any() and (model.kernel[...] != before).all()


def test_what_a_set_leaves_out_another_may_take():
    named = {"qkv": (*QUERIES, Rule("", stack=0)), "hidden": UP}
    found = labels(params(), named)
    assert found["up"] == "hidden" and found["bias"] == "fallback"
