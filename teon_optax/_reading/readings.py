"""All that the shape of a leaf allows it to be: its kind, and a letter for each of its axes."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from optax.contrib import MuonDimensionNumbers as D

# Kinds that are orthogonalized: Q, K, V or several of them in one; what makes heads of a latent
# vector; the output projection of attention; any other matrix; the factors of a low-rank one.
MATRICES = "qkv", "latent", "out", "hidden", "lora_a", "lora_b"
# Kinds of the fallback.
ENDS = "table", "input", "head"
FALLBACK = *ENDS, "vector", "convolution", "router", "constant"

# How one matrix may lie, by the number of its axes: i is fan_in, o fan_out, p the parts of fan_out
# and b a batch. The order is that of their likelihood: Flax and MaxText keep fan_in first, Gemma
# the heads, haliax and PyTorch fan_out.
_READERS = {2: ("io", "oi"), 3: ("ioo", "oio", "ooi"), 4: ("iooo", "oooi")}
_PARTED = {
    3: ("pio", "poi", "ipo", "iop", "opi"),
    4: ("poio", "ipoo", "pioo", "pooi", "iopo", "bpio", "bpoi", "bipo", "biop"),
}
_MIXERS = {4: ("iioo", "ooii")}
_WRITERS = {2: ("io", "oi"), 3: ("iio", "oii"), 4: ("iiio", "oiii")}


Splits = tuple[int | tuple[int, ...], ...]


class Reading(NamedTuple):
    """Says what a leaf may be.

    Attributes:
      kind: One of `MATRICES` or of `FALLBACK`.
      axes: A letter for each axis of the array, or of `view`: i for fan_in, o for fan_out, p for
        its parts, b for a batch, l for layers. Nothing for the kinds of the fallback.
      split: As of a rule.
      view: As of a rule.
    """

    kind: str
    axes: str = ""
    split: int | tuple[int, ...] = 1
    view: tuple[int, ...] | None = None

    @property
    def is_matrix(self) -> bool:
        """Tells whether it is orthogonalized."""
        return self.axes != ""

    @property
    def layer_axis(self) -> int | None:
        """Gives the axis that counts layers, if one does."""
        return self.axes.index("l") if "l" in self.axes else None

    @property
    def dims(self) -> D | None:
        """Gives the axes as a rule does: None for a matrix (fan_in, fan_out)."""
        if self.axes.replace("l", "") == "io":
            return None
        axes = self.axes.replace("l", "") if self.view else self.axes
        fans = _places(axes, "i"), _places(axes, "p") + _places(axes, "o")
        return D(*(axes[0] if len(axes) == 1 else axes for axes in fans))

    def along(self, axis: int | None) -> "Reading":
        """Gives the reading of an array that has the layers along one more axis."""
        if axis is None or not self.axes:
            return self
        return self._replace(axes=self.axes[:axis] + "l" + self.axes[axis:])


def _places(axes: str, letter: str) -> tuple[int, ...]:
    return tuple(place for place, each in enumerate(axes) if each == letter)


def sizes(axes: str, shape: Sequence[int], letters: str) -> list[int]:
    """Gives the sizes of the axes that have one of the letters, in the array's order."""
    return [size for letter, size in zip(axes, shape, strict=True) if letter in letters]


def fan(axes: str, shape: Sequence[int], letters: str) -> int:
    """Multiplies the sizes of the axes that have one of the letters."""
    return math.prod(sizes(axes, shape, letters))


@functools.lru_cache(8192)
def readings_of(
    shape: tuple[int, ...],
    parts: tuple[tuple[str, Splits], ...],
    is_scanned: bool = False,
    is_batch: bool = False,
) -> tuple[Reading, ...]:
    """Lists all that a leaf may be.

    Args:
      shape: Of one layer, without the axis that is known to count layers.
      parts: Kinds, and the splits of what may lie in one leaf of the kind, one after another.
      is_scanned: Whether an axis is known to count layers. If not, each of the first two may.
      is_batch: Whether something shows that a projection may have a batch axis, as in an ensemble.
    """
    found = []
    for kind in MATRICES:
        splits = dict(parts).get(kind, ())
        layouts = [*_layouts(kind, shape, splits, is_batch)]
        if not is_scanned and 2 < len(shape) < 6 and not kind.startswith("lora"):
            for axis in (0, 1):
                inner = _layouts(kind, (*shape[:axis], *shape[axis + 1 :]), splits, is_batch)
                layouts += [axes[:axis] + "l" + axes[axis:] for axes in inner]
        for axes in dict.fromkeys(layouts):
            if "p" in axes:
                found.append(Reading(kind, axes, fan(axes, shape, "p")))
            else:
                fits = (split for split in splits if _divides(axes, shape, split))
                found += [Reading(kind, axes, split) for split in (*fits, 1)]
    return *found, *(Reading(kind) for kind in FALLBACK)


def _layouts(kind: str, shape: Sequence[int], splits: Splits, is_batch: bool) -> Iterator[str]:
    """Yields how one matrix of a kind, or a batch of them, may lie in an array, likely first."""
    rank = len(shape)
    batches = ["b" * (rank - 2) + matrix for matrix in ("io", "oi")] if rank > 2 else []
    if kind.startswith("lora"):
        yield "i" + "o" * (rank - 1)
    elif kind == "out":
        yield from _WRITERS.get(rank, ())
        yield from (f"b{axes}" for axes in _WRITERS.get(rank - 1, ()) if is_batch)
    elif kind == "hidden":
        yield from batches
        yield from (axes for axes in _PARTED.get(rank, ()) if fan(axes, shape, "p") == 2)
        yield from _WRITERS.get(rank, ())
        yield from _READERS.get(rank, ())
        yield from _MIXERS.get(rank, ())
    else:
        yield from (axes for axes in _PARTED.get(rank, ()) if fan(axes, shape, "p") in splits)
        yield from _READERS.get(rank, ())
        yield from (f"b{axes}" for axes in _READERS.get(rank - 1, ()) if is_batch)


def _divides(axes: str, shape: Sequence[int], split: int | tuple[int, ...]) -> bool:
    """Tells whether a split cuts the first axis of fan_out into parts, of more than one each."""
    first = sizes(axes, shape, "o")[0]
    if isinstance(split, tuple):
        return sum(split) == first
    return first % split == 0 and first > split
