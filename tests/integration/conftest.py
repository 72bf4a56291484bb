"""Whole programs run as users run them, under JAX's default arithmetic."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """Programs take minutes in all: the quick tests leave them out."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def strict_arithmetic():
    """Flax and Optax promote dtypes and ranks."""
