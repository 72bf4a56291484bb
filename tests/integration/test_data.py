"""The example's corpora: what is read, how it is divided, and what a batch is."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from examples import data
from examples.command_line import UserError

HEADER = 256


def write_shard(path, tokens, magic=data.MAGIC, version=1, promised=None):
    header = np.zeros(HEADER, np.int32)
    header[:3] = magic, version, len(tokens) if promised is None else promised
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())
    return path


def write_texts(folder, texts):
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def words(arrays):
    return b"".join(array.tobytes() for array in arrays).split(b"\0")[:-1]


@pytest.fixture(scope="module")
def standard_library():
    return data.load(None, "byte", 256)


def test_the_default_corpus_is_the_standard_library_alone(standard_library):
    files = set(words([*standard_library.training, *standard_library.validation]))
    assert Path(re.__file__).read_bytes() in files
    assert Path(pytest.__file__).read_bytes() not in files
    assert sum(map(len, standard_library.training)) > 5_000_000


def test_a_tenth_of_the_default_corpus_is_held_out(standard_library):
    # Of the files' bytes: the zero that ends each document is not theirs.
    training, validation = (
        sum(map(len, words(part)))
        for part in (standard_library.training, standard_library.validation)
    )
    assert 0.09 < validation / (training + validation) <= 0.1


def test_no_file_is_in_both_parts(tmp_path):
    texts = {f"{name}/{number}.txt": f"{name}{number}" for name in "ab" for number in range(20)}
    corpus = data.load(write_texts(tmp_path, texts), "byte", 256)
    training, validation = map(words, (corpus.training, corpus.validation))
    assert sorted(training + validation) == sorted(text.encode() for text in texts.values())
    assert len(validation) == 4


def test_the_same_files_are_held_out_in_any_order():
    sizes = {f"{number}.txt": 100 + number for number in range(50)}
    reordered = dict(reversed(sizes.items()))
    assert data.held_out_files(sizes) == data.held_out_files(reordered)


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [
        ({"a": 5}, set()),
        ({"a": 500, "b": 400}, {"b"}),
        ({"b": 5, "a": 5}, {"a"}),
        ({"a": 1000, "b": 20, "c": 90}, {"b", "c"}),
    ],
)
def test_small_folders_hold_out_small_files(sizes, held_out):
    assert data.held_out_files(sizes) == held_out


def test_hidden_empty_and_binary_files_are_no_text(tmp_path):
    texts = {"a": "one", "b": "two", ".c": "x", ".d/e": "y", "f": "", "g.png": b"\x89PNG\0\0"}
    corpus = data.load(write_texts(tmp_path, texts), "byte", 256)
    assert sorted(words([*corpus.training, *corpus.validation])) == [b"one", b"two"]


def test_a_single_file_is_cut_and_says_so(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(100, 200)))
    corpus = data.load(path, "byte", 256)
    assert words(corpus.training) == [bytes(range(100, 190))]
    assert words(corpus.validation) == [bytes(range(190, 200))]
    assert "first 90 %" in corpus.description


@pytest.mark.parametrize(
    ("texts", "name", "message"),
    [
        ({}, "nowhere", "no file or folder"),
        ({}, "", "no text in"),
        ({"a": ""}, "", "no text in"),
        ({"a": ""}, "a", "is empty"),
        ({"a.png": b"\0"}, "", "no text in"),
        ({"a.png": b"\x89PNG\0\0"}, "a.png", "is no text: it has zero bytes"),
    ],
)
def test_a_corpus_without_text_is_refused(tmp_path, texts, name, message):
    write_texts(tmp_path, texts)
    with pytest.raises(UserError, match=message):
        data.load(tmp_path / name, "byte", 256)


def test_files_whose_names_are_not_utf_8_are_read(tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"\xff\xfe", b"c")]
    corpus = data.load(write_texts(tmp_path, dict.fromkeys(names, "text")), "byte", 256)
    assert words([*corpus.training, *corpus.validation]) == [b"text"] * 3


def test_a_folder_that_cannot_be_read_is_refused_not_left_out(tmp_path, monkeypatch):
    write_texts(tmp_path, {"a/x": "one", "b/x": "two"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read the corpus: .* Permission denied"):
        data.load(tmp_path, "byte", 256)


def test_a_text_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    def fail(_):
        raise MemoryError

    (tmp_path / "text").write_text("much")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match="text does not fit into memory"):
        data.load(tmp_path / "text", "byte", 256)


def test_a_part_shorter_than_a_sequence_and_its_target_is_refused(tmp_path):
    corpus = data.load(write_texts(tmp_path, {"a": "x" * 500, "b": "y" * 19}), "byte", 256)
    data.check_length(corpus, 19)
    with pytest.raises(UserError, match=r"validation part has 20 tokens .* needs 21"):
        data.check_length(corpus, 20)
    with pytest.raises(UserError, match="training part has 501"):
        data.check_length(corpus, 501)


def test_bpe_decodes_to_the_text_and_is_shorter_than_bytes(tmp_path):
    text = "naïve café: for x in range(10): print(x) \N{SNOWMAN}\n" * 40
    serialized = data.train_bpe([text.encode()], 300)
    size, encode = data.load_bpe(serialized)
    tokens = encode([text.encode(), b"end"])
    decoded = data.Tokenizer.from_str(serialized).decode(tokens.tolist())
    assert decoded == text + "\0end\0"
    assert size <= 300
    assert len(tokens) < len(text) / 2


def test_bpe_reads_bytes_that_are_no_utf_8(tmp_path):
    size, encode = data.load_bpe(data.train_bpe([b"abc \xff\xfe abc"], 260))
    assert encode([b"\xff\xfe"]).max() < size


def test_bpe_learns_from_training_files_alone(tmp_path):
    texts = {"a": "aaaa bbbb " * 100, "b": "zzzz " * 10}
    corpus = data.load(write_texts(tmp_path, texts), "bpe", 270)
    assert corpus.tokenizer is not None
    vocabulary = data.Tokenizer.from_str(corpus.tokenizer).get_vocab()
    assert "aa" in vocabulary
    assert "zz" not in vocabulary


def test_a_saved_tokenizer_is_used_as_it_is(tmp_path):
    write_texts(tmp_path, {"a": "aaaa bbbb " * 100, "b": "zzzz " * 10})
    saved = data.train_bpe([b"zzzz"], 258)
    corpus = data.load(tmp_path, "bpe", 4096, saved)
    assert (corpus.tokenizer, corpus.vocab_size) == (saved, data.load_bpe(saved)[0])


def test_a_damaged_tokenizer_is_refused():
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        data.load_bpe("{")


def test_a_tokenizer_with_tokens_outside_its_vocabulary_is_refused():
    saved = data.train_bpe([b"zzzz"], 258).replace('"a":', '"a": 70000, "unused":', 1)
    with pytest.raises(UserError, match="damaged: its tokens are not numbered in a row"):
        data.load_bpe(saved)


def test_a_tokenizer_without_what_it_refers_to_is_refused():
    _, encode = data.load_bpe(
        '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}'
    )
    with pytest.raises(UserError, match="tokenizer.json is damaged: .*b"):
        encode([b"other words"])


def test_shards_are_mapped_and_divided_by_name(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [7, 8, 9])
    write_shard(tmp_path / "fineweb_train_000002.bin", [4, 5, 50256])
    write_shard(tmp_path / "fineweb_train_000001.bin", [1, 2, 3])
    corpus = data.load(tmp_path, "shards", data.SHARDS_VOCAB_SIZE)
    assert [array.tolist() for array in corpus.training] == [[1, 2, 3], [4, 5, 50256]]
    assert [array.tolist() for array in corpus.validation] == [[7, 8, 9]]
    assert all(isinstance(array, np.memmap) for array in corpus.training)


def test_a_single_shard_is_cut(tmp_path):
    path = write_shard(tmp_path / "fineweb_train_000001.bin", range(20))
    corpus = data.load(path, "shards", data.SHARDS_VOCAB_SIZE)
    assert [array.tolist() for array in corpus.training] == [list(range(18))]
    assert [array.tolist() for array in corpus.validation] == [[18, 19]]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"magic": 20240520}, "magic number 20240520, version 1; expected 20250401, 1"),
        ({"version": 2}, "version 2"),
        ({"promised": 4}, "promises 4 tokens of 2 bytes and 6 bytes follow"),
        ({"promised": 2}, "promises 2 tokens of 2 bytes and 6 bytes follow"),
        ({"promised": -1}, "promises -1 tokens"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, header, message):
    path = write_shard(tmp_path / "train.bin", [1, 2, 3], **header)
    with pytest.raises(UserError, match=message):
        data.read_shard(path, 10)


def test_a_shard_of_text_or_nothing_is_refused(tmp_path):
    path = tmp_path / "train.bin"
    for content in (b"", b"short", b"text " * 1000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no FineWeb shard"):
            data.read_shard(path, 10)


def test_a_folder_named_like_a_shard_is_none(tmp_path):
    (tmp_path / "train.bin").mkdir()
    write_texts(tmp_path, {"a": "one", "train.bin/b": "two"})
    assert not data.is_shards(tmp_path)
    corpus = data.load(tmp_path, "byte", 256)
    assert sorted(words([*corpus.training, *corpus.validation])) == [b"one", b"two"]


def test_a_shard_without_tokens_is_refused(tmp_path):
    with pytest.raises(UserError, match="promises 0 tokens"):
        data.read_shard(write_shard(tmp_path / "train.bin", []), 10)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    path = write_shard(tmp_path / "train.bin", [1, 300, 2])
    assert data.read_shard(path, 301).tolist() == [1, 300, 2]
    with pytest.raises(UserError, match="has token 300; --vocab-size 300"):
        data.read_shard(path, 300)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train_0.bin", "train_1.bin"], "`val` in its name"),
        (["val_0.bin", "val_1.bin"], "`train` in its name"),
        (["train_0.bin", "other.bin"], "neither `train` nor `val`"),
    ],
)
def test_shards_that_name_no_part_are_refused(tmp_path, names, message):
    for name in names:
        write_shard(tmp_path / name, [1, 2])
    with pytest.raises(UserError, match=message):
        data.load(tmp_path, "shards", 10)


def corpus_of(training, validation=()):
    return data.Corpus(training, validation, 256, "")


def test_a_batch_depends_on_seed_and_step_alone():
    corpus = corpus_of([np.arange(1000)])
    batches = {
        (seed, step): data.training_batch(corpus, 8, 4, seed, step).tobytes()
        for seed in range(3)
        for step in range(3)
    }
    assert len(set(batches.values())) == 9
    assert data.training_batch(corpus, 8, 4, 2, 1).tobytes() == batches[2, 1]


def test_a_sequence_never_spans_two_arrays():
    arrays = [np.arange(5), np.arange(100, 103), np.arange(200, 211)]
    count = data.window_count(arrays, 4)
    rows = data.windows(arrays, 4, np.arange(count))
    starts = [0, *range(200, 207)]
    assert rows.tolist() == [list(range(start, start + 5)) for start in starts]
    assert rows.dtype == np.int32


def test_every_sequence_can_be_drawn():
    corpus = corpus_of([np.arange(6), np.arange(50, 55)])
    drawn = np.concatenate([data.training_batch(corpus, 3, 8, 0, step) for step in range(20)])
    assert set(drawn[:, 0].tolist()) == {0, 1, 2, 50, 51}


def test_validation_is_always_the_same_and_reaches_both_ends():
    corpus = corpus_of([np.arange(10)], [np.arange(1000)])
    first, second = (list(data.validation_batches(corpus, 10, 8)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.shape(first) == (12, 8, 11)
    assert (np.min(first), np.max(first)) == (0, 999)


def test_validation_fits_one_sequence_into_a_batch():
    corpus = corpus_of([np.arange(10)], [np.arange(11)])
    (batch,) = data.validation_batches(corpus, 10, 3)
    np.testing.assert_array_equal(batch, np.tile(np.arange(11), (3, 1)))


def test_the_fingerprint_changes_with_any_token_and_any_cut():
    tokens = np.arange(20, dtype=np.uint8)
    changed = tokens.copy()
    changed[7] += 1
    corpora = [corpus_of([tokens]), corpus_of([changed]), corpus_of([tokens[:10]], [tokens[10:]])]
    assert len({data.fingerprint(corpus) for corpus in corpora}) == 3
    assert data.fingerprint(corpora[0]) == data.fingerprint(corpus_of([tokens.copy()]))
