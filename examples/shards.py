"""FineWeb shards in the format of modded-nanogpt.

A `.bin` file is a header of 256 int32 (magic number, version, number of tokens) and the tokens as
uint16. Its name says `train` or `val`. Shards are mapped into memory, never read as a whole.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.errors import UserError

MAGIC = 20250401
VERSION = 1
HEADER = 256
VOCAB_SIZE = 50257
CHUNK = 1 << 24


def is_shards(data: Path | None) -> bool:
    """Whether this is a shard, or a folder with shards in it."""
    if data is None:
        return False
    return next(_shards(data), None) is not None if data.is_dir() else data.suffix == ".bin"


def _shards(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.bin") if path.is_file())


def load(
    data: Path, vocab_size: int, validation_share: float
) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """Maps a shard or a folder of shards.

    Args:
        data: The file or folder.
        vocab_size: No token may reach it.
        validation_share: The part of a single shard that is kept for validation.

    Returns:
        Training arrays, validation arrays, and how they were divided.

    Raises:
        UserError: If a header does not fit its file, a token is too large, or a name tells
            neither `train` nor `val`.
    """
    if not data.exists():
        raise UserError(f"no such file or folder: {data}")
    paths = sorted(_shards(data)) if data.is_dir() else [data]
    arrays = {path: read(path, vocab_size) for path in paths}
    if len(arrays) == 1:
        (tokens,) = arrays.values()
        cut = int(len(tokens) * (1 - validation_share))
        split = "one shard: its first 90 % are for training, the last 10 % for validation"
        return [tokens[:cut]], [tokens[cut:]], split
    parts = {path: _part(path) for path in paths}
    for part in ("train", "val"):
        if part not in parts.values():
            raise UserError(f"no shard in {data} has `{part}` in its name")
    training = [arrays[path] for path in paths if parts[path] == "train"]
    validation = [arrays[path] for path in paths if parts[path] == "val"]
    return training, validation, f"{len(training)} training and {len(validation)} val shards"


def read(path: Path, vocab_size: int) -> np.ndarray:
    """Maps one shard's tokens after checking header, length and largest token."""
    header = np.fromfile(path, "<i4", HEADER)
    if len(header) < HEADER:
        raise UserError(f"{path} is no FineWeb shard: it is shorter than the header of 1024 bytes")
    magic, version, promised = (int(number) for number in header[:3])
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(
            f"{path} is no FineWeb shard: magic number {magic}, version {version}; "
            f"expected {MAGIC}, {VERSION}"
        )
    follow = path.stat().st_size - header.nbytes
    if promised < 1 or follow != 2 * promised:
        raise UserError(
            f"{path}: the header promises {promised} tokens of 2 bytes and {follow} bytes follow"
        )
    tokens = np.memmap(path, "<u2", mode="r", offset=header.nbytes)
    largest = max(int(chunk.max()) for chunk in chunks(tokens))
    if largest >= vocab_size:
        raise UserError(f"{path} has token {largest}; --vocab-size {vocab_size} ends before it")
    return tokens


def chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The array in pieces small enough to hold in memory."""
    for start in range(0, len(tokens), CHUNK):
        yield tokens[start : start + CHUNK]


def _part(path: Path) -> str:
    for part in ("train", "val"):
        if part in path.name:
            return part
    raise UserError(f"{path}: the name says neither `train` nor `val`")
