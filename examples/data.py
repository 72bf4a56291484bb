"""Corpora: from files to token arrays, and from token arrays to batches.

A corpus is the Python standard library's own source, a text file, a folder of text files, or
FineWeb shards (see `shards.py`). Training and validation never share a file where there are two.
Every batch is a pure function of (seed, step), so a resumed run sees what it would have seen.
"""

import dataclasses
import hashlib
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from examples import bpe, shards
from examples.errors import UserError

VALIDATION_SHARE = 0.1
EVAL_TOKENS = 65_536
INSTALLED = frozenset({"site-packages", "dist-packages"})


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and tokens to be tested on.

    Attributes:
        training: Arrays of tokens; a sequence never spans two of them.
        validation: The same, from other files.
        vocab_size: Every token is below it.
        description: What was read and how it was split, for the user.
        tokenizer: The BPE tokenizer's JSON, or None.
    """

    training: Sequence[np.ndarray]
    validation: Sequence[np.ndarray]
    vocab_size: int
    description: str
    tokenizer: str | None = None


def load(
    data: Path | None, tokenizer: str, vocab_size: int, saved_tokenizer: str | None = None
) -> Corpus:
    """Reads and tokenizes a corpus.

    Args:
        data: A text file, a folder, a shard, or None for the standard library's source.
        tokenizer: `byte`, `bpe`, or `shards` for files that already hold tokens.
        vocab_size: The size of a new BPE vocabulary, or the one that the shards were made with.
        saved_tokenizer: JSON of the BPE tokenizer to use instead of training one.

    Returns:
        The corpus.

    Raises:
        UserError: If there is nothing to read, or it is not what it seems.
    """
    try:
        if tokenizer == "shards" and data is not None:
            training, validation, split = shards.load(data, vocab_size, VALIDATION_SHARE)
            return Corpus(training, validation, vocab_size, f"{data}: {split}")
        training_texts, validation_texts, description = read_texts(data)
    except OSError as error:
        raise UserError(f"cannot read the corpus: {error}") from error
    except MemoryError as error:
        raise UserError(f"{data} does not fit into memory: FineWeb shards are mapped") from error
    if tokenizer == "byte":
        training_tokens, validation_tokens = map(byte_tokens, (training_texts, validation_texts))
        return Corpus([training_tokens], [validation_tokens], 256, description)
    saved = saved_tokenizer or bpe.train(training_texts, vocab_size)
    size, encode = bpe.load(saved)
    return Corpus(
        [encode(training_texts)], [encode(validation_texts)], size, description, tokenizer=saved
    )


def byte_tokens(texts: Sequence[bytes]) -> np.ndarray:
    """Bytes as tokens; a zero byte, which text does not hold, ends every file."""
    return np.frombuffer(b"".join(text + b"\0" for text in texts), np.uint8)


def read_texts(data: Path | None) -> tuple[list[bytes], list[bytes], str]:
    """Training texts, validation texts, and a line that says what they are."""
    if data is not None and data.is_file():
        text = data.read_bytes()
        if not _is_text(text):
            raise UserError(f"{data} is " + ("no text: it has zero bytes" if text else "empty"))
        cut = int(len(text) * (1 - VALIDATION_SHARE))
        split = "one file: the first 90 % are for training, the last 10 % for validation"
        return [text[:cut]], [text[cut:]], f"{data}: {split}"
    if data is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = list(_files(folder, skip=INSTALLED, suffix=".py"))
        name = f"Python's standard library ({folder})"
    elif data.is_dir():
        folder, files, name = data, list(_files(data)), str(data)
    else:
        raise UserError(f"no file or folder: {data}")
    texts = {file: text for file in files if _is_text(text := (folder / file).read_bytes())}
    if not texts:
        raise UserError(f"no text in {name}")
    held_out = held_out_files({file: len(text) for file, text in texts.items()})
    training = [text for file, text in texts.items() if file not in held_out]
    validation = [text for file, text in texts.items() if file in held_out]
    split = f"{len(training)} files for training, {len(validation)} held out for validation"
    return training, validation, f"{name}: {split}"


def held_out_files(sizes: dict[str, int]) -> set[str]:
    """The files for validation: some tenth of the bytes, the same ones for the same files.

    Args:
        sizes: Bytes of each file.

    Returns:
        Names, in an order given by their hashes as long as they fit into the tenth; the smallest
        file where none fits; nothing of a folder with a single file.
    """
    if len(sizes) < 2:
        return set()
    budget = sum(sizes.values()) * VALIDATION_SHARE
    held_out: set[str] = set()
    for file in sorted(sizes, key=_hash):
        if sizes[file] <= budget:
            held_out.add(file)
            budget -= sizes[file]
    return held_out or {min(sizes, key=lambda name: (sizes[name], name))}


def _hash(name: str) -> bytes:
    """Of the name's bytes, which need not be UTF-8."""
    return hashlib.sha256(os.fsencode(name)).digest()


def _files(folder: Path, skip: frozenset[str] = frozenset(), suffix: str = "") -> Iterator[str]:
    """Paths relative to the folder, without hidden ones, in an order that no file system sets."""
    for where, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if name not in skip and name[0] != ".")
        for name in sorted(names):
            path = Path(where, name)
            if name[0] != "." and name.endswith(suffix) and path.is_file():
                yield path.relative_to(folder).as_posix()


def _refuse(error: OSError) -> NoReturn:
    """A folder that cannot be read makes another corpus, not a smaller one."""
    raise error


def _is_text(data: bytes) -> bool:
    """git's rule: no zero byte near the beginning."""
    return bool(data) and b"\0" not in data[:8000]


def check_length(corpus: Corpus, context: int) -> None:
    """Raises UserError where a part of the corpus does not hold one sequence and its target."""
    for part, arrays in (("training", corpus.training), ("validation", corpus.validation)):
        if window_count(arrays, context) == 0:
            longest = max((len(array) for array in arrays), default=0)
            raise UserError(
                f"the corpus is too small: its {part} part has {longest} tokens in a row and "
                f"--context {context} needs {context + 1} ({corpus.description})"
            )


def fingerprint(corpus: Corpus) -> str:
    """Changes when any token does."""
    checksum = 0
    for array in (*corpus.training, *corpus.validation):
        for chunk in shards.chunks(array):
            checksum = zlib.crc32(chunk.tobytes(), checksum)
    sizes = "+".join(str(sum(map(len, part))) for part in (corpus.training, corpus.validation))
    return f"{sizes} tokens, crc32 {checksum:08x}"


def window_count(arrays: Sequence[np.ndarray], context: int) -> int:
    """How many sequences of context + 1 tokens there are to choose from."""
    return sum(max(0, len(array) - context) for array in arrays)


def windows(arrays: Sequence[np.ndarray], context: int, indices: np.ndarray) -> np.ndarray:
    """Sequences by their number, none across two arrays.

    Args:
        arrays: The tokens.
        context: Length of a sequence without its last target.
        indices: (batch,) numbers below `window_count`.

    Returns:
        (batch, context + 1) int32.
    """
    counts = np.array([max(0, len(array) - context) for array in arrays])
    ends = np.cumsum(counts)
    owners = np.searchsorted(ends, indices, side="right")
    starts = indices - (ends - counts)[owners]
    rows = [
        arrays[owner][start : start + context + 1]
        for owner, start in zip(owners, starts, strict=True)
    ]
    return np.stack(rows).astype(np.int32)


def training_batch(
    corpus: Corpus, context: int, batch_size: int, seed: int, step: int
) -> np.ndarray:
    """The batch of one step: random sequences of the training part."""
    generator = np.random.default_rng((seed, step))
    indices = generator.integers(window_count(corpus.training, context), size=batch_size)
    return windows(corpus.training, context, indices)


def validation_batches(corpus: Corpus, context: int, batch_size: int) -> Iterator[np.ndarray]:
    """Sequences spread evenly over the validation part, always the same ones."""
    count = window_count(corpus.validation, context)
    tokens = min(EVAL_TOKENS, count)
    batches = max(1, tokens // (batch_size * context))
    indices = np.linspace(0, count - 1, batches * batch_size).astype(np.int64)
    for batch in np.split(indices, batches):
        yield windows(corpus.validation, context, batch)
