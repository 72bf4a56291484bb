"""Byte-level BPE, trained on the corpus itself."""

from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.errors import UserError

# A long text is cut into pieces of this many characters, so that every core has work.
PIECE = 1 << 18
PIECES_AT_ONCE = 64


def train(texts: Sequence[bytes], vocab_size: int) -> str:
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


def load(serialized: str) -> tuple[int, Callable[[Sequence[bytes]], np.ndarray]]:
    """The vocabulary's size, and a function from texts to all their tokens in a row."""
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
    """The text in pieces, then the zero byte that ends every file."""
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)] + ["\0"]
