"""What is compiled for a run: first state, train step, evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import optimizers
from examples.model import GPT, MODELS
from examples.options import Options


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Any
    opt_state: Any


class Program(NamedTuple):
    """What is compiled for a run.

    Attributes:
        init: From a random key to the first state.
        train_step: From a state, which it consumes, and a batch to the next state and the loss.
        eval_step: From parameters and a batch to the loss.
        shapes: The state's shapes and dtypes, and on a mesh its shardings.
    """

    init: Callable[[jax.Array], TrainState]
    train_step: Callable[[TrainState, np.ndarray], tuple[TrainState, jax.Array]]
    eval_step: Callable[[Any, np.ndarray], jax.Array]
    shapes: TrainState


def build(options: Options, vocab_size: int, place: Callable[[Any], Any] | None = None) -> Program:
    """Model, optimizer, and the functions made of them.

    Args:
        options: Of the run.
        vocab_size: Of the corpus.
        place: From a tree of shapes, with the paths of parameters, to their shardings; None is one
            device.
    """
    model = GPT(
        dataclasses.replace(
            MODELS[options.model],
            depth=options.depth,
            hidden=options.hidden,
            vocab_size=vocab_size,
            context=options.context,
            dtype=options.dtype,
        )
    )

    def init_params(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, options.context), jnp.int32))["params"]

    params = jax.eval_shape(init_params, jax.random.key(0))
    if options.optimizer == "teon":
        optimizers.check_rules(options.rules, params)
    optimizer = optimizers.build(options, place and place(params))

    def init(key: jax.Array) -> TrainState:
        params = init_params(key)
        return TrainState(params, optimizer.init(params))

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def parts(batch: jax.Array) -> jax.Array:
        return batch.reshape(options.microbatches, -1, batch.shape[1])

    def mean_loss(params: Any, batch: jax.Array) -> jax.Array:
        if options.microbatches == 1:
            return loss(params, batch)
        return jax.lax.map(lambda part: loss(params, part), parts(batch)).mean()

    def mean_gradients(params: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        if options.microbatches == 1:
            return jax.value_and_grad(loss)(params, batch)
        sums, _ = jax.lax.scan(
            lambda sums, part: (
                jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, part)),
                None,
            ),
            (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)),
            parts(batch),
        )
        return jax.tree.map(lambda total: total / options.microbatches, sums)

    def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
        value, gradients = mean_gradients(state.params, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

    shapes = jax.eval_shape(init, jax.random.key(0))
    if place is None:
        return Program(
            jax.jit(init), jax.jit(train_step, donate_argnums=0), jax.jit(mean_loss), shapes
        )
    # A compiled `init` cannot see where moments should lie, and a step should not move the state.
    state = place(shapes)
    shapes = jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), shapes, state
    )
    return Program(
        jax.jit(init, out_shardings=state),
        jax.jit(train_step, donate_argnums=0, out_shardings=(state, None)),
        jax.jit(mean_loss),
        shapes,
    )
