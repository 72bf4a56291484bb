"""Whole programs run as users run them, under JAX's default arithmetic."""

import pytest


@pytest.fixture(autouse=True)
def strict_arithmetic():
    """Flax and Optax promote dtypes and ranks."""
