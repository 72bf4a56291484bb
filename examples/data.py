"""Corpora: from files to token arrays, and from token arrays to batches.

A corpus is the Python standard library's own source, a text file, a folder of text files, or
FineWeb shards in the format of modded-nanogpt. Text becomes bytes, or the tokens of a byte-level
BPE that is trained on the corpus itself. Training and validation never share a file where there
are two. Every batch is a pure function of (seed, step), so a resumed run sees what it would have
seen.
"""

import dataclasses
import hashlib
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.command_line import UserError

VALIDATION_SHARE = 0.1
EVAL_TOKENS = 65_536
INSTALLED = frozenset({"site-packages", "dist-packages"})
# Of a shard: 256 int32 (magic number, version, number of tokens), then tokens as uint16.
MAGIC, VERSION, HEADER = 20250401, 1, 256
SHARDS_VOCAB_SIZE = 50257
TOKENS_AT_ONCE = 1 << 24
# A long text is cut into pieces of this many characters, so that every core has work.
PIECE = 1 << 18
PIECES_AT_ONCE = 64

Encoder = Callable[[Sequence[bytes]], np.ndarray]


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
            return _load_shards(data, vocab_size)
        training_texts, validation_texts, description = _read_texts(data)
    except OSError as error:
        raise UserError(f"cannot read the corpus: {error}") from error
    except MemoryError as error:
        raise UserError(f"{data} does not fit into memory: FineWeb shards are mapped") from error
    if tokenizer == "byte":
        # A zero byte, which text does not hold, ends every file.
        training, validation = (
            np.frombuffer(b"".join(text + b"\0" for text in texts), np.uint8)
            for texts in (training_texts, validation_texts)
        )
        return Corpus([training], [validation], 256, description)
    saved = saved_tokenizer or train_bpe(training_texts, vocab_size)
    size, encode = load_bpe(saved)
    training, validation = encode(training_texts), encode(validation_texts)
    return Corpus([training], [validation], size, description, tokenizer=saved)


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
    """Sums a corpus up in a line that changes when any token does."""
    checksum = 0
    for array in (*corpus.training, *corpus.validation):
        for chunk in _chunks(array):
            checksum = zlib.crc32(chunk.tobytes(), checksum)
    sizes = "+".join(str(sum(map(len, part))) for part in (corpus.training, corpus.validation))
    return f"{sizes} tokens, crc32 {checksum:08x}"


# Batches.


def window_count(arrays: Sequence[np.ndarray], context: int) -> int:
    """Counts the sequences of context + 1 tokens that there are to choose from."""
    return sum(max(0, len(array) - context) for array in arrays)


def windows(arrays: Sequence[np.ndarray], context: int, indices: np.ndarray) -> np.ndarray:
    """Cuts sequences, known by their numbers, out of the tokens; none spans two arrays.

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
    """Draws the batch of one step: random sequences of the training part."""
    generator = np.random.default_rng((seed, step))
    indices = generator.integers(window_count(corpus.training, context), size=batch_size)
    return windows(corpus.training, context, indices)


def validation_batches(corpus: Corpus, context: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields sequences spread evenly over the validation part, always the same ones."""
    count = window_count(corpus.validation, context)
    tokens = min(EVAL_TOKENS, count)
    batches = max(1, tokens // (batch_size * context))
    indices = np.linspace(0, count - 1, batches * batch_size).astype(np.int64)
    for batch in np.split(indices, batches):
        yield windows(corpus.validation, context, batch)


# Texts.


def _read_texts(data: Path | None) -> tuple[list[bytes], list[bytes], str]:
    """Reads training texts and validation texts, and says in a line what they are."""
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
    """Chooses the files for validation: some tenth of the bytes, the same ones for the same files.

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
    # Of the name's bytes, which need not be UTF-8.
    for file in sorted(sizes, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        if sizes[file] <= budget:
            held_out.add(file)
            budget -= sizes[file]
    return held_out or {min(sizes, key=lambda name: (sizes[name], name))}


def _files(folder: Path, skip: frozenset[str] = frozenset(), suffix: str = "") -> Iterator[str]:
    """Yields paths below a folder, without hidden ones, in an order that no file system sets."""

    def refuse(error: OSError) -> NoReturn:
        # A folder that cannot be read makes another corpus, not a smaller one.
        raise error

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in skip and name[0] != ".")
        for name in sorted(names):
            path = Path(where, name)
            if name[0] != "." and name.endswith(suffix) and path.is_file():
                yield path.relative_to(folder).as_posix()


def _is_text(data: bytes) -> bool:
    """Tells text by git's rule: no zero byte near the beginning."""
    return bool(data) and b"\0" not in data[:8000]


# Byte-level BPE.


def train_bpe(texts: Sequence[bytes], vocab_size: int) -> str:
    """Learns a vocabulary of at most `vocab_size` tokens and returns the tokenizer as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_decode(text) for text in texts), trainer)
    return tokenizer.to_str()


def load_bpe(serialized: str) -> tuple[int, Encoder]:
    """Loads a tokenizer: the vocabulary's size, and what turns texts into all tokens in a row."""
    try:
        tokenizer = Tokenizer.from_str(serialized)
    except Exception as error:  # tokenizers raises bare Exceptions for what it cannot parse
        raise UserError(f"the run's tokenizer.json is damaged: {error}") from error
    size = tokenizer.get_vocab_size()
    if set(tokenizer.get_vocab().values()) != set(range(size)):
        raise UserError("the run's tokenizer.json is damaged: its tokens are not numbered in a row")

    def encode(texts: Sequence[bytes]) -> np.ndarray:
        pieces = [piece for text in texts for piece in _pieces(_decode(text))]
        tokens = [np.zeros(0, np.uint16)]
        for start in range(0, len(pieces), PIECES_AT_ONCE):
            try:
                encodings = tokenizer.encode_batch_fast(pieces[start : start + PIECES_AT_ONCE])
            except Exception as error:  # as above: of a tokenizer that lacks what it refers to
                raise UserError(f"the run's tokenizer.json is damaged: {error}") from error
            tokens += [np.array(encoding.ids, np.uint16) for encoding in encodings]
        return np.concatenate(tokens)

    return size, encode


def _decode(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")


def _pieces(text: str) -> list[str]:
    """Cuts a text into pieces, the last of which is the zero byte that ends every file."""
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)] + ["\0"]


# Shards, which are mapped into memory and never read as a whole.


def is_shards(data: Path | None) -> bool:
    """Tells a shard, or a folder with shards in it, from texts."""
    if data is None:
        return False
    return next(_shards(data), None) is not None if data.is_dir() else data.suffix == ".bin"


def _shards(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.bin") if path.is_file())


def _load_shards(data: Path, vocab_size: int) -> Corpus:
    """Maps a shard, or a folder of shards whose names say `train` or `val`."""
    if not data.exists():
        raise UserError(f"no such file or folder: {data}")
    paths = sorted(_shards(data)) if data.is_dir() else [data]
    arrays = {path: read_shard(path, vocab_size) for path in paths}
    if len(arrays) == 1:
        (tokens,) = arrays.values()
        cut = int(len(tokens) * (1 - VALIDATION_SHARE))
        split = "one shard: its first 90 % are for training, the last 10 % for validation"
        return Corpus([tokens[:cut]], [tokens[cut:]], vocab_size, f"{data}: {split}")
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for path, tokens in arrays.items():
        part = next((part for part in parts if part in path.name), None)
        if part is None:
            raise UserError(f"{path}: the name says neither `train` nor `val`")
        parts[part].append(tokens)
    for part, found in parts.items():
        if not found:
            raise UserError(f"no shard in {data} has `{part}` in its name")
    split = f"{len(parts['train'])} training and {len(parts['val'])} val shards"
    return Corpus(parts["train"], parts["val"], vocab_size, f"{data}: {split}")


def read_shard(path: Path, vocab_size: int) -> np.ndarray:
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
    largest = max(int(chunk.max()) for chunk in _chunks(tokens))
    if largest >= vocab_size:
        raise UserError(f"{path} has token {largest}; --vocab-size {vocab_size} ends before it")
    return tokens


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Yields an array in pieces small enough to hold in memory."""
    for start in range(0, len(tokens), TOKENS_AT_ONCE):
        yield tokens[start : start + TOKENS_AT_ONCE]
