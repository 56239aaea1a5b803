"""Byte-level BPE: nothing is lost, no text makes the separator, and memory stays bounded."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.common.errors import InputError
from minigpt.data import bpe, tokenizer
from minigpt.data.bpe import BytePairTokenizer

NSMC = Path(__file__).resolve().parents[3] / "shared/data/nsmc_ko.jsonl"
# Naver sentiment movie corpus (github.com/e9t/nsmc, CC0), Natsume Soseki's I Am a Cat, Goethe's
# Faust, Orhan Veli's language, the Universal Declaration of Human Rights, and our own code.
EXTRACTS = {
    "Korean": "아 더빙.. 진짜 짜증나네요 목소리\n교도소 이야기구먼 ..솔직히 재미는 없다..평점 조정",
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "German": "Da steh' ich nun, ich armer Tor! GROẞE STRASSE, Maß und Übermaß.",
    "Turkish": "İstanbul'u dinliyorum, gözlerim kapalı; ılık IŞIK iyi.",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق، وقد وُهبوا عقلاً.",
    "emoji": "👩‍👩‍👧‍👦 ❤️ 👍🏽 1️⃣ 🏳️‍🌈!",
    "code": 'def f(x):\n    """Doc."""\n\treturn x**2  # <|endoftext|>\r\n\n\n',
    "nothing": "",
}
TEXTS = st.lists(
    st.sampled_from([*EXTRACTS.values(), "<|endoftext|>", " ", "  ", "'", "’", "\0", "\u0301"])
    | st.text(max_size=8),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def words() -> BytePairTokenizer:
    return bpe.train([*EXTRACTS.values()] * 3, 400)


def decoded(words: BytePairTokenizer, texts: list[str]) -> list[str]:
    ids, offsets = words.encode(pa.array(texts, pa.string()))
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    parts = itertools.pairwise(offsets)
    return [words.to_bytes(ids[start:stop]).decode() for start, stop in parts]


@pytest.mark.parametrize("name", EXTRACTS)
def test_a_text_of_any_language_comes_back(words: BytePairTokenizer, name: str) -> None:
    assert decoded(words, [EXTRACTS[name]]) == [EXTRACTS[name]]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(TEXTS, max_size=4))
def test_any_text_comes_back_and_does_not_depend_on_the_others(
    words: BytePairTokenizer, texts: list[str]
) -> None:
    assert decoded(words, texts) == texts
    ids, _ = words.encode(pa.array(texts, pa.string()))
    alone = [words.encode(pa.array([text]))[0] for text in texts]
    assert ids.tolist() == [number for each in alone for number in each.tolist()]
    assert not len(ids) or (ids.min() > bpe.SEPARATOR and ids.max() < len(words))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(TEXTS, st.integers(1, 9))
def test_pretokens_are_the_text_in_short_pieces(text: str, longest: int) -> None:
    pieces, bounds = bpe.pretokens(pa.array([text], pa.string()), longest)
    assert "".join(pieces.to_pylist()) == text and bounds.tolist() == [0, len(pieces)]
    assert all(0 < len(piece) <= longest for piece in pieces.to_pylist())


def test_pretokens_are_words_with_the_space_before_them() -> None:
    text = "It's the  actors' 7,5 d’été...\n\n  x 👩‍👩‍👧 한국어 नमस्ते"
    pieces, _ = bpe.pretokens(pa.array([text]))
    expected = "It's| the| | actors|'| 7|,|5| d’été|...|\n\n | x| 👩‍👩‍👧| 한국어| नमस्ते"
    assert pieces.to_pylist() == expected.split("|")


def test_training_is_deterministic_and_keeps_to_the_limit() -> None:
    texts = [EXTRACTS["Korean"], "a film, the film, a film"] * 5
    found = [bpe.train(texts, size) for size in (257, 280, 280)]
    assert [len(made) for made in found] == [257, 280, 280] and found[1] == found[2]
    assert "film" in " ".join(found[1].decode(range(257, 280)))
    counted = bpe.metrics(found[1], texts)
    assert counted["bytes"] == sum(len(text.encode()) for text in texts)
    assert counted["entries"] == 280 and 1 < counted["bytes_per_token"] < 10


def test_what_is_streamed_waits_for_the_whole_character(words: BytePairTokenizer) -> None:
    ids = [byte + 1 for byte in "é漢😀".encode()]
    shown = [words.complete("a", ids[:n], ended=False) for n in range(len(ids) + 1)]
    assert shown == ["a"] * 2 + ["aé"] * 3 + ["aé漢"] * 4 + ["aé漢😀"]
    assert words.complete("a", ids[:-1]) == "aé漢\ufffd"
    added = words.parts(ids)
    assert ["a" + "".join(added[:n]) for n in range(len(ids) + 1)] == shown
    assert words.complete("", [0x81]) == words.complete("", [0x81], ended=False) == "\ufffd"


def test_the_folder_holds_merges_alone(tmp_path: Path, words: BytePairTokenizer) -> None:
    words.save(tmp_path / "t")
    assert {path.name for path in (tmp_path / "t").iterdir()} == {
        "tokenizer.json",
        "vocabulary.txt",
    }
    assert json.loads((tmp_path / "t/tokenizer.json").read_bytes()) == {"kind": "bpe"}
    again = tokenizer.load(tmp_path / "t")
    assert again == words and again.sha256 == words.sha256
    assert again.sha256 != BytePairTokenizer(words.merges[:-1]).sha256


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"1 2", "end with a line feed"),
        (b"1 2\n1 257\n1 2\n", "twice"),
        (b"1 2\n3 4 5\n", "line 2 must hold the ids of two tokens before it"),
        (b"0 1\n", "line 1"),
        (b"257 1\n", "line 1"),
        (b"01 2\n", "line 1"),
        (b"\xff\n", "line 1"),
        ("１ 2\n".encode(), "line 1"),
        (b"1 1\n257 257\n258 258\n259 259\n260 260\n261 261\n262 262\n263 263\n", "128 bytes"),
    ],
)
def test_merges_that_save_does_not_write_are_refused(
    tmp_path: Path, data: bytes, wrong: str
) -> None:
    BytePairTokenizer(()).save(tmp_path / "t")
    (tmp_path / "t/vocabulary.txt").write_bytes(data)
    with pytest.raises(InputError, match=wrong) as caught:
        tokenizer.load(tmp_path / "t")
    assert "vocabulary.txt" in str(caught.value) and "dvc repro vocab" in str(caught.value)


def test_long_texts_are_cut_at_characters_and_come_back(
    words: BytePairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["", "漢" * 50, "a b" * 30, "", "é😀" * 40, ""]
    monkeypatch.setattr(bpe, "_SEGMENT_BYTES", 16)
    monkeypatch.setattr(bpe, "_BATCH_BYTES", 64)
    assert decoded(words, texts) == texts
    sliced = pa.array(["before", *texts, "behind"]).slice(1, len(texts))
    ids, offsets = words.encode(sliced)
    expected = words.encode(pa.chunked_array([texts[:2], texts[2:]]))
    assert ids.tolist() == expected[0].tolist() and offsets.tolist() == expected[1].tolist()


def test_no_hub_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from minigpt.data import bpe; import pyarrow as pa\n"
        "bpe.train(['a film'] * 9, 260).encode(pa.array(['a film']))\n"
        "print([name for name in sys.modules if 'hugging' in name or 'http' in name])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_100_mb_in_one_line_take_no_more_memory_than_a_few_times_that() -> None:
    code = (
        "import resource; from minigpt.data import bpe; import pyarrow as pa\n"
        "words = bpe.train(['a film 漢字' * 9], 300)\n"
        "text = pa.array(['漢字が好き' * 6_666_666])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ids, _ = words.encode(text)\n"
        "assert words.to_bytes(ids[-9000:].tolist())  in text[0].as_py().encode()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, len(ids))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    more_mb, tokens = map(int, found.stdout.split())
    assert tokens > 10**7 and more_mb < 1500


@pytest.mark.slow
@pytest.mark.skipif(not NSMC.exists(), reason="the Korean reviews are absent")
def test_korean_reviews_come_back() -> None:
    with NSMC.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines][:20_000]
    words = bpe.train(texts[:5000], 4000)
    assert decoded(words, texts) == texts
