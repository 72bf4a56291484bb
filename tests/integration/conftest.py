"""What whole programs train on, and a model that is small enough."""

import dataclasses
import random

import pytest

from examples.options import MODELS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Five files of a language with few words."""
    folder, words = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(5):
        text = " ".join(words.choice(["def", "return", "x", "y = 1\n"]) for _ in range(300))
        (folder / f"{number}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def small_model(quick_compilation):
    """A tiny model that compiles in a second or two."""
    small = dataclasses.replace(MODELS["tiny"], width=16, depth=2, heads=2, hidden=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", small)
        yield
