"""Models of other libraries run under JAX's default arithmetic."""

import pytest


@pytest.fixture(autouse=True)
def strict_arithmetic():
    """Their layers promote dtypes and ranks."""
