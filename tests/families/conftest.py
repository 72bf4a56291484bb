"""Models of other libraries run under JAX's default arithmetic."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def strict_arithmetic():
    """Their layers promote dtypes and ranks."""
