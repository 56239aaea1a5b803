"""Counting, encoding and the tokenizer's folder, against keras.layers.TextVectorization."""

import json
import string
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.common.errors import InputError
from minigpt.data import interface, tokenizer
from minigpt.data.text import STYLES, tokenise
from minigpt.data.tokenizer import WordTokenizer

SAMPLE = Path(__file__).resolve().parents[2] / "data/sample/reviews.tar.gz"

WORDS = st.sampled_from(
    [
        *("a", "b", "The", "film", "İ", "é", "日本", "[UNK]", "\\", "<br />", "'", '"', "."),
        *" \t\n\v\f\r\x00\x1c\x85\xa0\u2028",
    ]
)
TEXTS = st.lists(WORDS | st.just(" ") | st.text(max_size=3), max_size=40).map("".join)


def adapted(texts: list[str], max_tokens: int):
    """Adapts the layer of the published script, with its output neither cut nor padded."""
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
    ours = tokenizer.build(tokenizer.count(array, "published"), max_tokens, "published")
    # Keras lists its entries through a NumPy array, which drops NULs at the end of a string.
    assert [token.rstrip("\0") for token in ours.tokens] == layer.get_vocabulary()
    ids, offsets = ours.encode(array)
    theirs = layer(tf.constant(texts))
    np.testing.assert_array_equal(ids, theirs.flat_values)
    np.testing.assert_array_equal(offsets, theirs.row_splits)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(3, 30))
def test_same_as_keras_on_any_texts(texts, max_tokens):
    if len(tokenise(pa.array(texts), "published").values):
        assert_same_as_keras(texts, max_tokens)


def test_same_as_keras_on_the_sample_corpus():
    with tarfile.open(SAMPLE) as archive:
        files = (archive.extractfile(member) for member in archive if member.name[-6:] != "_0.txt")
        texts = [file.read().decode() for file in files if file]
    assert len(texts) > 4000
    assert_same_as_keras(texts, 500)


def test_count_orders_by_count_then_bytes_last_first():
    texts = pa.chunked_array([["b a c b", "é z"], ["Z \\ b", ""]])
    counts = tokenizer.count(texts, "published")
    assert counts.to_pydict() == {
        "token": ["b", "z", "é", "c", "a", "\\"],
        "count": [3, 2, 1, 1, 1, 1],
    }


def test_the_number_of_pieces_changes_nothing(monkeypatch):
    texts = pa.array([f"word{i % 7} and {i}" for i in range(50)])
    whole = tokenizer.count(texts, "spaced")
    ids, offsets = tokenizer.build(whole, 20, "spaced").encode(texts)
    long = sum(map(len, texts.to_pylist()[:2])) + 1  # two texts to a piece, and then one
    monkeypatch.setattr(tokenizer, "_PIECES_TO_ADD", 4)
    changes = ((interface, "_PIECE", 3), (tokenizer, "_PIECE_BYTES", long))
    for module, name, value in (*changes, (tokenizer, "_PIECE_BYTES", 1)):
        monkeypatch.setattr(module, name, value)
        assert tokenizer.count(texts, "spaced").equals(whole)
        batches = (texts[start : start + 8] for start in range(0, 50, 8))
        assert tokenizer.count(batches, "spaced").equals(whole)
        again = tokenizer.build(whole, 20, "spaced").encode(texts)
        np.testing.assert_array_equal(again[0], ids)
        np.testing.assert_array_equal(again[1], offsets)


def test_a_piece_has_only_so_many_bytes():
    texts = pa.chunked_array([["a" * 25, "", "bb"], ["ccc", "dddd", "e" * 11, "f"]])
    pieces = [piece.to_pylist() for piece in interface.pieces(texts, 10, 2000)]
    assert [text for piece in pieces for text in piece] == texts.to_pylist()
    assert [[len(text) for text in piece] for piece in pieces] == [[25, 0, 2, 3, 4], [11, 1]]


@pytest.mark.parametrize(
    ("texts", "why"),
    [([], "the corpus is empty, or all of it is held out"), (["", " <br /> "], "white space and")],
)
def test_nothing_to_count_is_an_error(texts, why):
    with pytest.raises(InputError, match=f"no token to count in {len(texts)} texts: .*{why}"):
        tokenizer.count(pa.array(texts, pa.string()), "published")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("这部电影很好看、我们都很喜欢它的音乐。", True),
        ("यह फ़िल्म बहुत अच्छी थी।", False),
        ("Donaudampfschifffahrtsgesellschaft a film", False),
    ],
)
def test_texts_without_spaces_are_told_so(caplog, text, told):
    tokenizer.count(pa.array([text] * 3), "spaced")
    assert ("groups.vocabulary=bpe" in caplog.text) == told


def test_build_never_lists_the_special_tokens_twice():
    counts = pa.table({"token": ["[UNK]", "a", "", "b", "c"], "count": [9, 8, 7, 6, 5]})
    built = tokenizer.build(counts, 4, "spaced")
    assert built == WordTokenizer(("", "[UNK]", "a", "b"), "spaced") and len(built) == 4


def test_build_leaves_out_what_occurs_too_seldom():
    counts = pa.table({"token": ["a", "b", "c", "d"], "count": [9, 3, 2, 1]})
    for min_count, expected in ((1, "abcd"), (2, "abc"), (3, "ab"), (10, "")):
        built = tokenizer.build(counts, 10, "words", separated=True, min_count=min_count)
        assert built.tokens[3:] == tuple(expected)


def test_encode_and_decode():
    words = WordTokenizer(("", "[UNK]", "good", "film", "!"), "published")
    texts = pa.array(["Good film!", "", "bad  FILM"])
    assert words.split(texts).to_pylist() == [["good", "film", "!"], [], ["bad", "film"]]
    ids, offsets = words.encode(texts)
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert ids.tolist() == [2, 3, 4, 1, 3]
    assert offsets.tolist() == [0, 3, 3, 5]
    assert words.ids(words.split(texts).values).tolist() == ids.tolist()
    assert words.decode(ids[3:]) == ["[UNK]", "film"]
    assert words.complete("A Zyx", [0, *ids[:3]]) == "A zyx good film!"
    ids, offsets = words.encode(pa.array([], pa.string()))
    assert (ids.tolist(), offsets.tolist()) == ([], [0])


def test_metrics():
    counts = tokenizer.count(pa.array(["a a a b b c", "d d"]), "published")
    words = tokenizer.build(counts, 4, "published")
    assert tokenizer.metrics(words, counts, tokenizer.totals(counts)) == (
        {"tokens": 8, "types": 4, "entries": 4, "unk_share": 3 / 8}
    )
    ids, _ = words.encode(pa.array(["a a a b b c", "d d"]))
    assert np.mean(ids == tokenizer.UNKNOWN) == 3 / 8
    everything = tokenizer.build(counts, 100, "published")
    assert tokenizer.metrics(everything, counts, tokenizer.totals(counts))["unk_share"] == 0
    others = [pa.array(["a x", ""]), pa.array(["y d"])]
    assert tokenizer.unknown(everything, others) == (2, 4)
    assert tokenizer.unknown(everything, []) == (0, 0)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(texts=st.lists(TEXTS, max_size=5), style=st.sampled_from(STYLES))
def test_the_folder_is_safe_for_any_token(tmp_path_factory, texts, style):
    folder = tmp_path_factory.mktemp("made") / "tokenizer"
    counts = tokenizer.count(pa.array([*texts, "\u2028 \x85 \x00 \x1c"]), style)
    words = tokenizer.build(counts, 1000, style)
    words.save(folder)
    again = tokenizer.load(folder)
    assert again == words
    assert again.sha256 == words.sha256
    assert (folder / "vocabulary.txt").read_bytes().count(b"\n") == len(words)


def test_what_the_folder_holds(tmp_path):
    words = WordTokenizer(("", "[UNK]", "é"), "spaced")
    words.save(tmp_path / "t")
    contents = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "t").iterdir()}
    assert contents.pop("vocabulary.txt") == "\n[UNK]\né\n"
    assert json.loads(contents.pop("tokenizer.json")) == {"kind": "words", "style": "spaced"}
    assert not contents
    assert words.sha256 == WordTokenizer(words.tokens, "spaced").sha256
    others = [WordTokenizer(words.tokens, "published"), WordTokenizer(words.tokens[:2], "spaced")]
    assert words.sha256 not in {other.sha256 for other in others}


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
        (None, "No such file"),
    ],
)
def test_a_vocabulary_that_save_does_not_write_is_refused(tmp_path, data, wrong):
    assert_refused(tmp_path / "t", "vocabulary.txt", data, wrong)


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (None, "No such file"),
        (b"{", "delimiter|Expecting"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "'kind': 'words', 'style': 'published'"),
        (b'{"kind": "bpe", "style": "spaced"}', "'bpe'.* is known"),
        (b'{"kind": "words", "style": "plain"}', "'plain'.* is known"),
        (b'{"kind": "words", "style": "spaced", "lower": true}', "is known"),
    ],
)
def test_settings_that_save_does_not_write_are_refused(tmp_path, data, wrong):
    assert_refused(tmp_path / "t", "tokenizer.json", data, wrong)


def assert_refused(folder: Path, name: str, data: bytes | None, wrong: str) -> None:
    WordTokenizer(("", "[UNK]", "a"), "spaced").save(folder)
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=wrong) as caught:
        tokenizer.load(folder)
    assert str(folder / name) in str(caught.value)
    assert "dvc repro vocab" in str(caught.value)
