"""What a leaf can be: its role and its axes, or a question and the choices."""

from collections.abc import Iterable
from typing import NamedTuple

from optax.contrib import MuonDimensionNumbers as D

from teon_optax._reading.axes import options, other_options
from teon_optax._reading.tree import Leaf


class Role(NamedTuple):
    """What a leaf is and where its matrices are, or what to ask.

    Attributes:
      name: "qkv"; "latent", what makes heads of a latent vector; "out", the output projection of
        attention; "hidden", any other matrix; "lora_a" and "lora_b"; "fallback"; "refused" where it
        may be a projection and "unknown" where it may be a matrix, if none of these is certain.
      dims, layer_axis, split: As of a rule.
      question: What is not certain, for people.
      choices: What it may be, the likely first.
    """

    name: str
    dims: D | None = None
    layer_axis: int | None = None
    split: int | tuple[int, ...] = 1
    question: str = ""
    choices: tuple["Role", ...] = ()


FALLBACK = Role("fallback")


def refused(question: str, choices: Iterable[Role]) -> Role:
    """An error with these choices, and the fallback."""
    return Role("refused", question=question, choices=(*choices, FALLBACK))


def unknown(leaf: Leaf, is_batch: bool = False) -> Role:
    """The fallback, with a warning and a rule to paste.

    With `is_batch` the first rule that it offers takes the last two axes as those of matrices.
    """
    last = len(leaf.shape) - 1
    batch = [Role("hidden", D(last - 1, last))] if is_batch else []
    return Role("unknown", choices=(*batch, *others(leaf), FALLBACK))


def projections(leaf: Leaf, split: int = 1) -> list[Role]:
    """All that a leaf may be if it is Q, K or V, or several of them in one."""
    return [Role("qkv", dims, axis, split) for dims, axis in options(leaf, split)]


def others(leaf: Leaf) -> list[Role]:
    """All that a leaf may be if it is another matrix."""
    return [Role("hidden", dims, axis) for dims, axis in other_options(leaf)]


def ask_axes(leaf: Leaf) -> Role:
    """The error for Q, K or V of which only the axes are not certain."""
    return refused("which axes are heads, layers, fan_in?", projections(leaf))
