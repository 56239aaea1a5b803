"""Windows, shards, their manifest and the batches made from them."""

import itertools
import json
import os
import string

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig, SequencesConfig
from minigpt.data import corpus, cutting, own_files, sequences, shards, tokenizer
from minigpt.data.text import STYLES
from minigpt.data.tokenizer import SEPARATOR, SEPARATOR_TOKEN, UNKNOWN, WordTokenizer

LENGTH = 5
POLICIES = ("head", "windows")
WORDS = WordTokenizer(("", "[UNK]", "film"), "spaced")
LENGTHS = [1, 2, 6, 7, 11, 12, 0, 30, 3, 5, 16, 23]
HELD_OUT = {1, 4, 9}


def reviews(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Makes reviews of tokens that are all different, except for some that are unknown."""
    ids = np.arange(2, sum(lengths) + 2, dtype=np.int32)
    ids[::9] = UNKNOWN
    return ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def encoded(ids, offsets, held_out=HELD_OUT, cuts=()):
    """The reviews in batches that end at the cuts."""
    names = pa.array([f"train/pos/{i}_é" for i in range(len(offsets) - 1)], pa.string())
    mask = np.isin(np.arange(len(names)), list(held_out))
    for start, stop in itertools.pairwise([0, *cuts, len(names)]):
        first, last = offsets[start], offsets[stop]
        yield cutting.Encoded(
            names[start:stop], ids[first:last], offsets[start : stop + 1] - first, mask[start:stop]
        )


def write(directory, batches=None, progress=None, tokenizer=WORDS, text=None, **changes):
    settings = {"length": LENGTH, "policy": "windows", "shards": 3, "validation_fraction": 0.2}
    config = SequencesConfig(**{**settings, **changes})
    batches = encoded(*reviews(LENGTHS)) if batches is None else batches
    return shards.write(
        directory, batches, config=config, tokenizer=tokenizer, text=text, progress=progress
    )


def batches(*arguments, **options) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(sequences.dataset(*arguments, **options).as_numpy_iterator())


def rows(directory, split, **options) -> list[tuple[int, ...]]:
    """Returns each sequence as it was before it was split into x and y."""
    made = batches(directory, split, 4, **options)
    return [
        tuple(np.trim_zeros(np.append(a, b[-1]), "b").tolist())
        for x, y in made
        for a, b in zip(x, y, strict=True)
    ]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.integers(0, 25), max_size=12), st.integers(1, 8))
def test_windows_make_every_token_but_the_first_a_target_once(lengths, length):
    ids, offsets = reviews(lengths)
    starts, stops, owners = sequences.windows(ids, offsets, length, "windows")
    targets = [t for a, b in zip(starts, stops, strict=True) for t in range(a + 1, b)]
    expected = [t for a, b in itertools.pairwise(offsets) for t in range(a + 1, b)]
    assert targets == expected
    assert np.all(stops - starts <= length + 1) and np.all(stops - starts >= 2)
    assert np.all(starts >= offsets[owners]) and np.all(stops <= offsets[owners + 1])


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.integers(0, 25), max_size=12), st.integers(1, 8))
def test_head_takes_one_window_of_every_review(lengths, length):
    ids, offsets = reviews(lengths)
    starts, stops, owners = sequences.windows(ids, offsets, length, "head")
    assert owners.tolist() == list(range(len(lengths)))
    assert starts.tolist() == offsets[:-1].tolist()
    assert (stops - starts).tolist() == [min(n, length + 1) for n in lengths]


def test_any_reader_opens_the_records(tmp_path):
    import tensorflow as tf

    manifest = write(tmp_path / "s")
    ids, offsets = reviews(LENGTHS)
    starts, stops, owners = sequences.windows(ids, offsets, LENGTH, "windows")
    expected = [
        (f"train/pos/{r}_é", a - offsets[r], ids[a:b].tolist())
        for a, b, r in zip(starts, stops, owners, strict=True)
        if r not in HELD_OUT
    ]
    files = [str(tmp_path / "s" / shard["file"]) for shard in manifest["splits"]["train"]["shards"]]
    schema = {
        "tokens": tf.io.VarLenFeature(tf.int64),
        "review": tf.io.FixedLenFeature((), tf.string),
        "start": tf.io.FixedLenFeature((), tf.int64),
    }
    found = []
    for record in tf.data.TFRecordDataset(files):
        f = tf.io.parse_single_example(record, schema)
        tokens = tf.sparse.to_dense(f["tokens"]).numpy().tolist()
        found.append((f["review"].numpy().decode(), f["start"].numpy(), tokens))
        example = tf.train.Example.FromString(record.numpy())
        assert example.SerializeToString(deterministic=True) == record.numpy()
    assert found == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_manifest_counts(tmp_path, policy):
    manifest = write(tmp_path / "s", policy=policy)
    assert manifest == json.loads((tmp_path / "s/manifest.json").read_text())
    assert manifest["tokenizer"] == {"sha256": WORDS.sha256, "size": 3}
    assert (manifest["length"], manifest["policy"]) == (LENGTH, policy)
    for split, files in (("train", 3), ("validation", 1)):
        counts = manifest["splits"][split]
        made = batches(tmp_path / "s", split, 4, seed=None)
        y = np.concatenate([y for _, y in made])
        assert counts["sequences"] == len(y) == sum(s["records"] for s in counts["shards"])
        assert counts["targets"] == np.count_nonzero(y)
        assert counts["unknown_targets"] == np.count_nonzero(y == UNKNOWN) > 0
        assert len(counts["shards"]) == files
    assert manifest["splits"]["validation"]["reviews"] == len(HELD_OUT)
    listed = {s["file"] for split in manifest["splits"].values() for s in split["shards"]}
    assert {p.name for p in (tmp_path / "s").iterdir()} == listed | {"manifest.json"}
    assert "train-00002-of-00003.tfrecord" in listed
    assert sequences.verify(tmp_path / "s", WORDS) == manifest


def test_a_loss_in_bits_per_byte(tmp_path):
    write(tmp_path / "s", text={"bytes": 1000, "targets": 200, "charged": 30.5})
    found = sequences.bits_per_byte(sequences.verify(tmp_path / "s"), 2.5)
    assert found == pytest.approx((2.5 * 200 + 30.5) / np.log(2) / 1000)
    assert sequences.bits_per_byte(write(tmp_path / "s"), 2.5) is None


def test_same_input_gives_the_same_bytes_and_replaces_the_directory(tmp_path):
    first = write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/stale.tfrecord").write_bytes(b"old")
    steps = []
    second = write(tmp_path / "b", progress=lambda done, total: steps.append((done, total)))
    assert first == second
    contents = [{p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("a", "b")]
    assert contents[0] == contents[1]
    total = sum(split["sequences"] for split in second["splits"].values())
    assert steps == [(total, None), (total, total)]  # of one batch, and of all
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_division_into_batches_changes_nothing(tmp_path, policy):
    whole = write(tmp_path / "whole", policy=policy)
    cuts = [1, 1, 4, 7, 11]  # one of them is empty
    parts = write(tmp_path / "parts", encoded(*reviews(LENGTHS), cuts=cuts), policy=policy)
    assert parts == whole  # with the checksum of every shard
    sizes = [shard["records"] for shard in whole["splits"]["train"]["shards"]]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("cuts", [(), (1, 1, 4, 7, 11), range(1, 12)])
@pytest.mark.parametrize("policy", ["head", "windows", "packed"])
@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_shards_that_are_planned_and_written_one_by_one_are_the_same(
    tmp_path, policy, separator, cuts
):
    words = SEPARATED if separator else WORDS
    config = SequencesConfig(length=LENGTH, policy=policy, shards=3, validation_fraction=0.2)
    documents = sequences.documents(*reviews(LENGTHS), separator)
    batches = list(encoded(*documents, cuts=cuts))
    whole = write(tmp_path / "whole", batches, policy=policy, tokenizer=words)
    counts = [cutting.count(batch, config, separator is not None) for batch in batches]
    for split, expected in whole["splits"].items():
        sizes = np.array([count[split][1] for count in counts])
        planned = cutting.plan(split, sizes, config, separator is not None)
        written = [
            shards.write_shard(
                tmp_path, shard, batches[slice(*shard.batches)], config=config, tokenizer=words
            )
            for shard in planned
        ]
        assert [entry for entry, _ in written] == expected["shards"]
        for name in ("sequences", "targets", "unknown_targets"):
            assert sum(numbers[name] for _, numbers in written) == expected[name]
        assert sum(count[split][0] for count in counts) == expected["reviews"]


SEPARATED = WordTokenizer(("", "[UNK]", SEPARATOR_TOKEN, "film"), "words")


def separated(lengths, cuts=(), held_out=HELD_OUT):
    """Reviews of tokens that are all different, behind separators, in batches."""
    ids, offsets = reviews(lengths)
    ids[ids != UNKNOWN] += 10
    return encoded(*sequences.documents(ids, offsets, SEPARATOR), held_out, cuts)


def stream_of(lengths, held_out, split):
    """All tokens of a split in a row, with the separator that ends the last review."""
    (batch,) = separated(lengths)
    chosen = [i in held_out for i in range(len(lengths))]
    parts = [batch.ids[a:b] for a, b in itertools.pairwise(batch.offsets)]
    kept = [p for p, held in zip(parts, chosen, strict=True) if held == (split == "validation")]
    return [*np.concatenate(kept).tolist(), SEPARATOR]


@pytest.mark.parametrize("cuts", [(), (1, 1, 4, 7, 11)])
def test_packed_reviews_have_no_padding_and_each_token_is_a_target_once(tmp_path, cuts):
    options = {"policy": "packed", "tokenizer": SEPARATED}
    manifest = write(tmp_path / "s", separated(LENGTHS, cuts), **options)
    for split in sequences.SPLITS:
        stream = stream_of(LENGTHS, HELD_OUT, split)
        made = rows(tmp_path / "s", split, seed=None)
        whole = (len(stream) - 1) // LENGTH
        assert made == [tuple(stream[i * LENGTH :][: LENGTH + 1]) for i in range(whole)]
        counts = manifest["splits"][split]
        assert (counts["sequences"], counts["targets"]) == (whole, whole * LENGTH)
        assert counts["unknown_targets"] == stream[1 : whole * LENGTH + 1].count(UNKNOWN)
    assert sum(counts["reviews"] for counts in manifest["splits"].values()) == len(LENGTHS)


def test_a_packed_sequence_names_the_review_that_it_begins_in(tmp_path):
    import tensorflow as tf

    options = {"policy": "packed", "tokenizer": SEPARATED, "validation_fraction": 0.0, "shards": 1}
    write(tmp_path / "s", separated(LENGTHS, (2, 8), ()), **options)
    files = [str(path) for path in (tmp_path / "s").glob("*.tfrecord")]
    (batch,) = separated(LENGTHS)
    for record in tf.data.TFRecordDataset(files).as_numpy_iterator():
        feature = tf.train.Example.FromString(record).features.feature
        review = batch.review_ids.index(feature["review"].bytes_list.value[0].decode()).as_py()
        start = batch.offsets[review] + feature["start"].int64_list.value[0]
        assert batch.ids[start] == feature["tokens"].int64_list.value[0]


def test_a_stream_shorter_than_a_sequence_is_refused(tmp_path):
    options = {"policy": "packed", "tokenizer": SEPARATED, "validation_fraction": 0.0}
    write(tmp_path / "s", separated([1, 1, 2], (), ()), length=7, **options)  # one whole sequence
    with pytest.raises(InputError, match=r"train split has no whole sequence: .* than 9 tokens"):
        write(tmp_path / "s", separated([1, 1, 2], (), ()), length=8, **options)


def test_windows_of_separated_reviews_begin_and_end_with_the_separator(tmp_path):
    options = {"tokenizer": SEPARATED, "validation_fraction": 0.0, "length": 30}
    manifest = write(tmp_path / "s", separated([3, 30, 2], (1,), ()), **options)
    made = rows(tmp_path / "s", "train", seed=None)
    assert [len(row) for row in made] == [5, 31, 2, 4]
    assert all(row[0] == row[-1] == SEPARATOR for row in (made[0], made[3]))
    assert made[1][0] == made[2][-1] == SEPARATOR
    assert manifest["splits"]["train"]["targets"] == 3 + 30 + 2 + 3


def test_every_target_comes_once_through_the_dataset(tmp_path):
    ids, offsets = reviews(LENGTHS)
    write(tmp_path / "s", encoded(ids, offsets, []), validation_fraction=0.0)
    expected = [ids[a + 1 : b].tolist() for a, b in itertools.pairwise(offsets)]
    for seed in (None, 7):
        targets: list[int] = []
        for x, y in batches(tmp_path / "s", "train", 4, seed=seed):
            assert x.dtype == y.dtype == np.int32
            assert x.shape == y.shape and x.shape[1] == LENGTH
            np.testing.assert_array_equal(x[:, 1:][y[:, 1:] > 0], y[:, :-1][y[:, 1:] > 0])
            targets += y[y > 0].tolist()
        assert sorted(targets) == sorted(itertools.chain(*expected))
        if seed is None:
            assert targets == list(itertools.chain(*expected))


def test_batches_are_padded_and_counted(tmp_path):
    count = write(tmp_path / "s")["splits"]["train"]["sequences"]
    data = sequences.dataset(tmp_path / "s", "train", 4, seed=3)
    sizes = [len(x) for x, _ in data]
    assert int(data.cardinality()) == len(sizes) == -(-count // 4)
    assert sum(sizes) == count and set(sizes[:-1]) == {4}


@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 2), (3, 6)])
def test_processes_share_the_same_batches(tmp_path, monkeypatch, processes, devices):
    write(tmp_path / "s")
    options = {"seed": 3, "epoch": 1, "skip": 1, "processes": processes, "devices": devices}
    whole = batches(tmp_path / "s", "train", 5, seed=3, epoch=1, skip=1)
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *where: read.append(where) or pread(*where))
    shares = [batches(tmp_path / "s", "train", 5, rank=r, **options) for r in range(processes)]
    assert len(read) == sum(len(x) for x, _ in whole)  # each record by one process, once
    assert len(whole[-1][0]) < 5  # the last batch is filled up further than the others
    for (x, y), *parts in zip(whole, *shares, strict=True):
        filled = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
        assert len(filled[0]) == -(-5 // devices) * devices
        assert all(len(part[0]) * processes == len(filled[0]) for part in parts)
        real = filled[2] == 1
        np.testing.assert_array_equal(filled[0][real], x)
        np.testing.assert_array_equal(filled[1][real], y)
        assert not filled[0][~real].any() and not filled[2][~real].any()


def test_order_depends_on_seed_and_epoch_only(tmp_path):
    import tensorflow as tf

    write(tmp_path / "s")

    def order(seed, epoch):
        return rows(tmp_path / "s", "train", seed=seed, epoch=epoch)

    plain = order(None, 0)
    shuffled = [order(s, e) for s, e in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(rows) == sorted(plain) for rows in shuffled)
    assert len({tuple(rows) for rows in [plain, *shuffled]}) == 4
    tf.random.set_seed(99)
    assert order(1, 0) == shuffled[0]
    data = sequences.dataset(tmp_path / "s", "train", 4, seed=1)
    passes = [[x.tolist() for x, _ in data.as_numpy_iterator()] for _ in range(2)]
    assert passes[0] == passes[1]


def test_a_damaged_shard_is_named(tmp_path):
    manifest = write(tmp_path / "s")
    path = tmp_path / "s" / manifest["splits"]["train"]["shards"][1]["file"]
    data = path.read_bytes()

    def complaint() -> str:
        with pytest.raises(InputError) as caught:
            sequences.verify(tmp_path / "s")
        assert path.name in str(caught.value) and "dvc repro sequences" in str(caught.value)
        return str(caught.value)

    path.write_bytes(data[:-3])
    with pytest.raises(InputError, match=rf"{path.name} was altered.*dvc repro sequences"):
        sequences.dataset(tmp_path / "s", "train", 4, seed=1)
    assert f"has {len(data) - 3} bytes, not {len(data)}" in complaint()
    path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    assert "altered" in complaint()
    path.unlink()
    assert "missing" in complaint()
    path.write_bytes(data)
    sequences.verify(tmp_path / "s")


def test_another_tokenizer_or_no_manifest_is_refused(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(InputError, match=r"another tokenizer.*dvc repro sequences"):
        sequences.verify(tmp_path / "s", WordTokenizer(WORDS.tokens, "published"))
    (tmp_path / "s/manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json.*dvc repro sequences"):
        sequences.verify(tmp_path / "s")
    with pytest.raises(InputError, match=r"manifest\.json"):
        sequences.dataset(tmp_path / "nowhere", "train", 4, seed=None)


@pytest.mark.parametrize(
    ("held_out", "fraction", "message"),
    [
        ([], 0.05, r"nothing is held out: .* 12 reviews, .*\(60 or more are enough\), or raise"),
        (
            range(len(LENGTHS)),
            0.2,
            r"nothing is left to train on: .* 12 reviews, .*\(15 or more are enough\), or lower",
        ),
        ([0], 0.2, r"in the validation split: none of its reviews \(1 of 12\) has two tokens"),
    ],
)
def test_a_corpus_that_is_too_small_leaves_the_old_sequences(tmp_path, held_out, fraction, message):
    write(tmp_path / "s")
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    with pytest.raises(InputError, match=message):
        write(tmp_path / "s", encoded(*reviews(LENGTHS), held_out), validation_fraction=fraction)
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("style", STYLES)
def test_texts_without_spaces_are_told_so(tmp_path, style):
    ids, offsets = WordTokenizer(("", "[UNK]"), style).encode(pa.array(["这部电影很好看" * 99] * 3))
    with pytest.raises(
        InputError, match=r"train split: .*\(3 of 3\) .*choose groups.vocabulary=bpe"
    ):
        write(tmp_path / "s", encoded(ids, offsets, []), validation_fraction=0.0)


def test_without_a_validation_split(tmp_path):
    manifest = write(tmp_path / "s", encoded(*reviews(LENGTHS), []), validation_fraction=0.0)
    assert manifest["splits"]["validation"]["shards"] == []
    assert not list((tmp_path / "s").glob("validation*"))
    with pytest.raises(InputError, match="validation_fraction"):
        sequences.dataset(tmp_path / "s", "validation", 4, seed=None)


# Reviews that are malicious, or that a careless scraper collects.
HOSTILE = {
    "marks": string.punctuation * 3,
    "one mark": "!",
    "nul": "a \0 film\0 \0\0",
    "right to left": "\u202eevil\u202c \u200f\u05e9\u05dc\u05d5\u05dd film \u2066x",
    "special tokens": "[UNK] [unk] the [UNK]film [PAD] <br /><br />",
    "the empty token": "'' \"\" film \u200b \ufeff",
    "only a tag": "<br />",
    "spaces of all kinds": "a\u3000b\u2028c\x85d\xa0e\x1cf\x0bg",
    "a word of a million letters": "a" * 10**6,
    "words of one letter": "b " * 10**5,
    "one mark again and again": '"' * 10**5,
    "astral": "\U0001f600\U0010ffff film \ud7ff\ufffe",
}


def read(path):
    return own_files.read(str(path), CorpusConfig(format="files", url=str(path)))


@pytest.mark.parametrize("style", STYLES)
def test_hostile_reviews_go_right_through(tmp_path, style):
    path = tmp_path / "mine.jsonl"
    rows = [{"id": name, "text": text} for name, text in HOSTILE.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus.write_reviews(read(path), tmp_path / "reviews.parquet")
    reviews = corpus.read_reviews(tmp_path / "reviews.parquet", ["id", "text"])
    assert dict(zip(reviews["id"].to_pylist(), reviews["text"].to_pylist(), strict=True)) == HOSTILE

    tokenizer.build(tokenizer.count(reviews["text"], style), 100, style).save(tmp_path / "t")
    words = tokenizer.load(tmp_path / "t")
    assert {"\0", "film", "a" * 10**6} <= set(words.tokens)
    ids, offsets = words.encode(reviews["text"])
    tokens = words.split(reviews["text"]).to_pylist()
    for review, (start, stop) in zip(tokens, itertools.pairwise(offsets), strict=True):
        known = [t if t in words.tokens else "[UNK]" for t in review[:50]]
        assert words.decode(ids[start : min(start + 50, stop)]) == known
        assert "" not in review and "[UNK]" not in review
        words.complete("", ids[start : min(start + 10_000, stop)])

    write(
        tmp_path / "sequences",
        encoded(ids, offsets, held_out=()),
        length=10_000,
        validation_fraction=0.0,
        shards=1,
    )
    made = batches(tmp_path / "sequences", "train", 500, seed=None)
    assert set(np.unique(np.concatenate([x.ravel() for x, _ in made]))) - {0} <= set(np.unique(ids))
    targets = sum(np.count_nonzero(y) for _, y in made)
    assert targets == np.maximum(np.diff(offsets) - 1, 0).sum()


def test_a_review_of_100_mb_in_one_line(tmp_path):
    text = "a film, " * (100 * 2**20 // 8)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus.write_reviews(read(tmp_path), tmp_path / "reviews.parquet")
    kept = corpus.read_reviews(tmp_path / "reviews.parquet", ["text"])
    assert kept["text"][0].as_py() == text
