"""The embedded sample corpus: reproducible, small, and as untidy as the real one."""

import gzip
import re
import string
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SAMPLE = Path(__file__).resolve().parents[2] / "data/sample"
ARCHIVE = SAMPLE / "reviews.tar.gz"
LABELLED = re.compile(r"aclImdb/(train|test)/(pos|neg)/(\d+)_(\d+)\.txt")


@pytest.fixture(scope="module")
def members() -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(ARCHIVE) as archive:
        return [
            (member, file.read() if (file := archive.extractfile(member)) else b"")
            for member in archive
        ]


@pytest.fixture(scope="module")
def reviews(members: list[tuple[tarfile.TarInfo, bytes]]) -> dict[str, str]:
    return {
        member.name: data.decode() for member, data in members if LABELLED.fullmatch(member.name)
    }


def test_the_generator_writes_the_committed_archive_again(tmp_path: Path) -> None:
    again = tmp_path / "again.tar.gz"
    command = [sys.executable, str(SAMPLE / "generate.py"), "--output", str(again)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    # Compared without compression, which depends on the version of zlib.
    assert gzip.decompress(again.read_bytes()) == gzip.decompress(ARCHIVE.read_bytes())
    assert [file.name for file in tmp_path.iterdir()] == ["again.tar.gz"]
    for part in (str(again), str(again.stat().st_size), "sha256", "4000 labelled reviews"):
        assert part in shown


def test_it_is_small_and_holds_no_trace_of_its_maker(
    members: list[tuple[tarfile.TarInfo, bytes]],
) -> None:
    assert ARCHIVE.stat().st_size < 1_000_000
    assert ARCHIVE.read_bytes()[4:8] == bytes(4)  # gzip's own time stamp
    for member, _ in members:
        assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
        assert (member.uname, member.gname) == ("", "")
        assert member.mode == (0o755 if member.isdir() else 0o644)
        assert member.isdir() or member.isreg()


def test_layout_is_that_of_the_real_archive(
    members: list[tuple[tarfile.TarInfo, bytes]], reviews: dict[str, str]
) -> None:
    folders: dict[tuple[str, str], list[int]] = {}
    for path in reviews:
        match = LABELLED.fullmatch(path)
        assert match
        split, label, number, rating = match.groups()
        assert int(rating) in (range(7, 11) if label == "pos" else range(1, 5))
        folders.setdefault((split, label), []).append(int(number))
    assert len(folders) == 4
    for numbers in folders.values():
        assert sorted(numbers) == list(range(1000))
        assert numbers != sorted(numbers)  # exposes a reader that trusts the order

    rest = {member.name: data for member, data in members if member.name not in reviews}
    assert {name for name in rest if not re.search(r"/unsup/\d+_0\.txt$", name)} == {
        *("aclImdb", "aclImdb/README", "aclImdb/imdb.vocab", "aclImdb/imdbEr.txt"),
        *("aclImdb/train", "aclImdb/train/pos", "aclImdb/train/neg", "aclImdb/train/unsup"),
        *("aclImdb/train/urls_pos.txt", "aclImdb/train/urls_neg.txt"),
        *("aclImdb/train/urls_unsup.txt", "aclImdb/train/labeledBow.feat"),
        *("aclImdb/test", "aclImdb/test/pos", "aclImdb/test/neg"),
        *("aclImdb/test/urls_pos.txt", "aclImdb/test/urls_neg.txt"),
        "aclImdb/test/labeledBow.feat",
    }
    assert sum("/unsup/" in name for name in rest) == 40
    assert len(rest["aclImdb/test/urls_pos.txt"].splitlines()) == 1000
    vocabulary = rest["aclImdb/imdb.vocab"].decode().splitlines()
    assert len(vocabulary) == len(rest["aclImdb/imdbEr.txt"].splitlines())


def test_reviews_are_short_and_nearly_all_distinct(reviews: dict[str, str]) -> None:
    lengths = [len(text.replace("<br />", " ").split()) for text in reviews.values()]

    assert min(lengths) >= 40
    assert max(lengths) <= 140
    assert 70 <= sum(lengths) / len(lengths) <= 90
    assert len(set(reviews.values())) >= 0.99 * len(reviews)
    sentences = [
        s for text in reviews.values() for s in re.split(r"(?<=[.!?]) |<br /><br />", text)
    ]
    assert len(set(sentences)) >= 15_000  # a grammar, not a handful of fixed sentences


def test_every_slot_of_the_grammar_is_filled(reviews: dict[str, str]) -> None:
    for path, text in reviews.items():
        assert not re.search(r"[{}|_@]|  |\ba [aei]|\s$", text), path


def test_vocabulary_suits_a_tiny_model(reviews: dict[str, str]) -> None:
    text = " ".join(reviews.values()).lower().replace("<br />", " ")
    words = re.sub(f"([{re.escape(string.punctuation)}])", r" \1 ", text).split()

    assert 1500 <= len(set(words)) <= 3000


@pytest.mark.parametrize(
    "pattern",
    [
        *("<br /><br />", '"', r"\.\.\.", r"\(", r"\w-\w", "--", "!", r"\?", ";", r"\*\*\*"),
        *("isn't", "movie's", r"\b(19|20)\d\d\b", r"\b\d+/10\b", r"\d+ minutes", r"\$\d"),
        *(r"\b[A-Z]{4,}\b", "é", "ï", "ö", "cliché"),
        *("(?i)this movie is", "(?i)the acting was", "I loved", "(?i)the plot"),
        "What a waste of",
    ],
)
def test_quirks_of_the_real_reviews_are_there(pattern: str, reviews: dict[str, str]) -> None:
    assert sum(bool(re.search(pattern, text)) for text in reviews.values()) >= 40


def test_sentiment_agrees_with_the_rating(reviews: dict[str, str]) -> None:
    def share(pattern: str, label: str) -> float:
        texts = [text for path, text in reviews.items() if f"/{label}/" in path]
        return sum(bool(re.search(pattern, text)) for text in texts) / len(texts)

    for pattern, label, other in (
        (r"Don't miss it|ighly recommend|Two thumbs up", "pos", "neg"),
        (r"[Ww]aste of|NOT waste|Two thumbs down|I hated", "neg", "pos"),
    ):
        assert share(pattern, label) > 0.1
        assert share(pattern, other) == 0
    for path, text in reviews.items():
        stated = re.search(r"\b(\d+)(/10| out of 10| of 10 stars)", text)
        assert not stated or path.endswith(f"_{stated[1]}.txt")
