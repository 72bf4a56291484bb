"""Tests that run with and without `jax.jit`, by `chex.variants`.

Chex declares that a decorated test is an `object` and that `variant` never returns: true only
before it decorates.
"""

from typing import Any

import chex

with_and_without_jit: Any = chex.variants(with_jit=True, without_jit=True)


class TestCase(chex.TestCase):
    variant: Any
