"""Counting, encoding and the vocabulary file, against keras.layers.TextVectorization."""

import hashlib
import os
import string
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.common.errors import InputError
from minigpt.data import tokenizer
from minigpt.data.text import tokenise
from minigpt.data.tokenizer import Vocabulary

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data/sample/reviews.tar.gz"
REAL = Path(os.environ.get("MINIGPT_IMDB_ARCHIVE", ROOT.parent / "shared/data/aclImdb_v1.tar.gz"))

WORDS = st.sampled_from(
    [
        *("a", "b", "The", "film", "İ", "é", "日本", "[UNK]", "\\", "<br />", "'", '"', "."),
        *" \t\n\v\f\r\x00\x1c\x85\xa0\u2028",
    ]
)
TEXTS = st.lists(WORDS | st.just(" ") | st.text(max_size=3), max_size=40).map("".join)


def adapted(texts: list[str], max_tokens: int):
    """Adapt the layer of the published script, with its output neither cut nor padded."""
    import keras
    import tensorflow as tf

    def custom_standardization(input_string):
        lowercased = tf.strings.lower(input_string)
        stripped_html = tf.strings.regex_replace(lowercased, "<br />", " ")
        return tf.strings.regex_replace(stripped_html, f"([{string.punctuation}])", r" \1")

    layer = keras.layers.TextVectorization(
        standardize=custom_standardization, max_tokens=max_tokens, output_mode="int", ragged=True
    )
    layer.adapt(tf.data.Dataset.from_tensor_slices(texts).batch(128))
    return layer


def assert_same_as_keras(texts: list[str], max_tokens: int) -> None:
    import tensorflow as tf

    layer = adapted(texts, max_tokens)
    array = pa.array(texts, pa.string())
    ours = tokenizer.build(tokenizer.count(array, "published"), max_tokens)
    # Keras lists its entries through a NumPy array, which drops NULs at the end of a string.
    assert [token.rstrip("\0") for token in ours.tokens] == layer.get_vocabulary()
    ids, offsets = ours.encode(array, "published")
    for i in range(0, len(texts), 5000):
        theirs = layer(tf.constant(texts[i : i + 5000]))
        begin, end = offsets[i], offsets[min(i + 5000, len(texts))]
        np.testing.assert_array_equal(ids[begin:end], theirs.flat_values)
        np.testing.assert_array_equal(offsets[i : i + 5001] - begin, theirs.row_splits)


def archived(path: Path) -> list[str]:
    folders = {"train/pos", "train/neg", "test/pos", "test/neg"}
    with tarfile.open(path) as archive:
        files = (
            archive.extractfile(member)
            for member in archive
            if "/".join(Path(member.name).parts[1:3]) in folders
        )
        return [file.read().decode() for file in files if file]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(3, 30))
def test_same_as_keras_on_any_texts(texts, max_tokens):
    if len(tokenise(pa.array(texts), "published").values):
        assert_same_as_keras(texts, max_tokens)


def test_same_as_keras_on_the_sample_corpus():
    assert_same_as_keras(archived(SAMPLE), 500)


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="no real corpus")
def test_same_as_keras_on_the_real_corpus():
    texts = archived(REAL)
    assert len(texts) == 50_000
    assert_same_as_keras(texts, 19_999)


def test_count_orders_by_count_then_bytes_last_first():
    texts = pa.chunked_array([["b a c b", "é z"], ["Z \\ b", ""]])
    counts = tokenizer.count(texts, "published")
    assert counts.to_pydict() == {
        "token": ["b", "z", "é", "c", "a", "\\"],
        "count": [3, 2, 1, 1, 1, 1],
    }


def test_count_is_the_same_however_many_pieces(monkeypatch):
    texts = pa.array([f"word{i % 7} and {i}" for i in range(50)])
    whole = tokenizer.count(texts, "spaced")
    ids, offsets = tokenizer.build(whole, 20).encode(texts, "spaced")
    long = sum(map(len, texts.to_pylist()[:2])) + 1  # two texts to a piece, and then one
    monkeypatch.setattr(tokenizer, "_PIECES_TO_ADD", 4)
    for name, value in (("_PIECE", 3), ("_PIECE_BYTES", long), ("_PIECE_BYTES", 1)):
        monkeypatch.setattr(tokenizer, name, value)
        assert tokenizer.count(texts, "spaced").equals(whole)
        batches = (texts[start : start + 8] for start in range(0, 50, 8))
        assert tokenizer.count(batches, "spaced").equals(whole)
        again = tokenizer.build(whole, 20).encode(texts, "spaced")
        np.testing.assert_array_equal(again[0], ids)
        np.testing.assert_array_equal(again[1], offsets)


def test_a_piece_is_no_longer_than_an_arrow_array(monkeypatch):
    monkeypatch.setattr(tokenizer, "_PIECE_BYTES", 10)
    texts = pa.chunked_array([["a" * 25, "", "bb"], ["ccc", "dddd", "e" * 11, "f"]])
    pieces = [piece.to_pylist() for piece in tokenizer._pieces(texts)]
    assert [text for piece in pieces for text in piece] == texts.to_pylist()
    assert [[len(text) for text in piece] for piece in pieces] == [[25, 0, 2, 3, 4], [11, 1]]


@pytest.mark.parametrize("texts", [[], ["", " <br /> "]])
def test_nothing_to_count_is_an_error(texts):
    with pytest.raises(InputError, match=f"no token to count in {len(texts)} texts"):
        tokenizer.count(pa.array(texts, pa.string()), "published")


def test_build_never_lists_the_special_tokens_twice():
    counts = pa.table({"token": ["[UNK]", "a", "", "b", "c"], "count": [9, 8, 7, 6, 5]})
    assert tokenizer.build(counts, 4).tokens == ("", "[UNK]", "a", "b")


def test_encode_and_decode():
    words = Vocabulary(("", "[UNK]", "good", "film", "!"))
    ids, offsets = words.encode(pa.array(["Good film!", "", "bad  FILM"]), "published")
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert ids.tolist() == [2, 3, 4, 1, 3]
    assert offsets.tolist() == [0, 3, 3, 5]
    assert words.decode(ids[3:]) == ["[UNK]", "film"]
    ids, offsets = words.encode(pa.array([], pa.string()), "published")
    assert (ids.tolist(), offsets.tolist()) == ([], [0])


def test_metrics():
    counts = tokenizer.count(pa.array(["a a a b b c", "d d"]), "published")
    words = tokenizer.build(counts, 4)
    assert tokenizer.metrics(words, counts) == (
        {"tokens": 8, "types": 4, "entries": 4, "unk_share": 3 / 8}
    )
    ids, _ = words.encode(pa.array(["a a a b b c", "d d"]), "published")
    assert np.mean(ids == tokenizer.UNKNOWN) == 3 / 8
    everything = tokenizer.build(counts, 100)
    assert tokenizer.metrics(everything, counts)["unk_share"] == 0


@settings(deadline=None, max_examples=50, derandomize=True)
@given(texts=st.lists(TEXTS, max_size=5))
def test_the_file_is_safe_for_any_token(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.txt"
    counts = tokenizer.count(pa.array([*texts, "\u2028 \x85 \x00 \x1c"]), "published")
    words = tokenizer.build(counts, 1000)
    words.save(path)
    again = tokenizer.load(path)
    assert again == words
    assert again.sha256 == words.sha256
    assert path.read_bytes().count(b"\n") == len(words)
    assert [p.name for p in path.parent.iterdir()] == ["vocabulary.txt"]


def test_the_checksum_is_the_file_s(tmp_path):
    words = Vocabulary(("", "[UNK]", "é"))
    words.save(tmp_path / "v.txt")
    data = (tmp_path / "v.txt").read_bytes()
    assert data == "\n[UNK]\né\n".encode()
    assert words.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"", "begin with"),
        (b"the\na\n", "begin with"),
        (b"\r\n[UNK]\r\na\r\n", "begin with"),
        (b"\n[UNK]\na\nb", "end with a line feed"),
        (b"\n[UNK]\na\n\nb\n", "empty or holds white space"),
        (b"\n[UNK]\na b\n", "empty or holds white space"),
        (b"\n[UNK]\na\r\n", "empty or holds white space"),
        (b"\n[UNK]\na\nb\na\n", "twice"),
        (b"\n[UNK]\n\xff\n", "utf-8"),
    ],
)
def test_load_refuses_what_save_does_not_write(tmp_path, data, wrong):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=wrong) as caught:
        tokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "dvc repro vocab" in str(caught.value)


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        tokenizer.load(tmp_path / "vocabulary.txt")
