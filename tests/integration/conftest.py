"""Whole programs run as users run them, under JAX's default arithmetic."""

import random

import pytest


@pytest.fixture(autouse=True)
def strict_arithmetic():
    """Flax and Optax promote dtypes and ranks."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Five files of a language with few words."""
    folder, words = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(5):
        text = " ".join(words.choice(["def", "return", "x", "y = 1\n"]) for _ in range(300))
        (folder / f"{number}.py").write_text(text)
    return folder
