"""What other libraries' training loops are compared with."""

import jax
import optax


def trained(optimizer, params, gradient, steps):
    """Params after some steps of plain Optax."""
    state, gradient = optimizer.init(params), jax.jit(gradient)
    for _ in range(steps):
        updates, state = optimizer.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    return params
