"""Hostile input at random: `make fuzz MINUTES=1` (or `python tests/fuzz.py MINUTES [TARGET ...]`).

Hypothesis makes the inputs: well-formed ones, then bytes of them altered, cut out and put in.
Each target gets its share of the time in a process of its own, so that a crash or a hang is a
finding too.  Anything but a result or the error that the target allows is one; it is printed with
the smallest input that Hypothesis finds for it.
"""

import contextlib
import gzip
import io
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

from minigpt import config
from minigpt.common.errors import InputError
from minigpt.data import archive, corpus, sequences, tokenizer
from minigpt.data.text import STYLES, detokenise, tokenise

ROOT = Path(__file__).resolve().parents[1]
LIMITS = archive.Limits(max_bytes=2**22, max_members=100)
MOST_MEMORY = 8 * 2**30  # bytes
HERE = Path(tempfile.mkdtemp(prefix="fuzz-"))

Case = tuple[st.SearchStrategy[Any], Callable[[Any], object]]
TARGETS: dict[str, Callable[[], Case]] = {}


def target(make: Callable[[], Case]) -> Callable[[], Case]:
    """Registers what makes a target: its inputs, and what is done with one."""
    TARGETS[make.__name__] = make
    return make


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 16), st.binary(max_size=16)), max_size=6)


def altered(data: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Data with some bytes cut out and others put in, at places all over it."""

    def alter(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
        for place, cut, put in edits:
            at = int(place * len(data))
            data = data[:at] + put + data[at + cut :]
        return data

    return st.builds(alter, data, EDITS)


def file(name: str, content: bytes) -> Path:
    """The content as a file, the same one each time."""
    path = HERE / name
    path.write_bytes(content)
    return path


ODD = ["", " ", "\0", "<br />", "[UNK]", '"', "'s", "\u202eabc", "\u017f", "\u0130", "1,000", "..."]
TEXT = st.text(max_size=20) | st.sampled_from([*ODD, "\ud800"])
TEXTS = st.lists(TEXT, max_size=12).map("".join)
NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf")])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@target
def archive() -> Case:
    """A .tar.gz with headers of every kind, altered before and after it is packed."""
    names = st.sampled_from(["a/train/pos/1_7.txt", "a/train/neg/2_1.txt", "a/x", "/etc/x", "../x"])
    kinds = st.sampled_from([*b"0125xgLKS3\0"]).map(lambda kind: bytes([kind]))
    records = st.sampled_from(["path", "size", "mtime", "GNU.sparse.map", "GNU.sparse.major"])
    values = st.sampled_from(["1", "0", "-1", "9" * 20, "1,2", "a", "a/train/pos/3_3.txt"])
    members = st.tuples(
        *(names | TEXT, kinds, st.binary(max_size=40), st.sampled_from([None, 2**33, 513])),
        st.dictionaries(records | st.just("GNU.sparse.minor") | TEXT, values | TEXT, max_size=3),
    )

    def pack(members: list[Any]) -> bytes:
        packed = io.BytesIO()
        for name, kind, data, size, headers in members:
            member = tarfile.TarInfo(name.replace("\0", ""))
            member.type, member.size, member.pax_headers = kind, size or len(data), headers
            with contextlib.suppress(ValueError, UnicodeError):  # what tarfile itself won't write
                head = member.tobuf(tarfile.PAX_FORMAT if headers else tarfile.GNU_FORMAT)
                packed.write(head + data + bytes(-len(data) % 512))
        return packed.getvalue() + bytes(1024)

    def read(data: bytes) -> None:
        path = file("a.tar.gz", data)
        for undecodable in ("fail", "replace"):
            list(archive.read_archive(path, ["a/train/pos", "a/train/neg"], undecodable, LIMITS))

    tars = altered(st.lists(members, max_size=6).map(pack))
    zipped = tars.map(lambda tar: gzip.compress(tar, 1, mtime=0))
    return zipped | altered(zipped), read


@target
def files() -> Case:
    """.jsonl and .parquet of a user's own."""
    columns = st.sampled_from(["text", "id", "split", "label", "rating"])
    row = st.dictionaries(columns | TEXT, ANYTHING, max_size=5)
    lines = st.lists(row, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    tables = st.lists(st.text(max_size=9), min_size=1, max_size=4).map(parquet)
    kinds = (("mine.jsonl", altered(lines)), ("mine.parquet", altered(tables)))
    inputs = st.one_of(*(st.tuples(st.just(name), made) for name, made in kinds))

    def read(given: tuple[str, bytes]) -> None:
        batches = list(archive.read_files(file(*given), limits=LIMITS))
        corpus.write_reviews(batches, HERE / "reviews.parquet")
        assert corpus.read_reviews(HERE / "reviews.parquet").equals(pa.Table.from_batches(batches))

    return inputs, read


def parquet(texts: list[str]) -> bytes:
    """A Parquet file of texts."""
    made = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), made)
    return made.getvalue()


@target
def text() -> Case:
    """Texts to tokens, ids and back, in both styles."""

    def through(texts: list[str]) -> None:
        array = pa.array(texts, pa.string())
        for style in STYLES:
            tokens = tokenise(array, style).to_pylist()
            if not any(tokens):
                continue
            words = tokenizer.build(tokenizer.count(array, style), 20)
            words.save(HERE / "vocabulary.txt")
            assert tokenizer.load(HERE / "vocabulary.txt") == words
            ids, _ = words.encode(array, style)
            known = [t if t in words.tokens else "[UNK]" for row in tokens for t in row]
            assert words.decode(ids.tolist()) == known
            shown = detokenise(known)
            assert shown.replace(" ", "").lower() == "".join(known).replace(" ", "").lower()

    characters = st.characters(exclude_categories=["Cs"])
    pieces = TEXT.filter(lambda piece: "\ud800" not in piece) | st.text(characters, max_size=40)
    return st.lists(st.lists(pieces, max_size=30).map("".join), min_size=1, max_size=5), through


@target
def vocabulary_file() -> Case:
    """What `vocabulary.load` is given."""
    lines = st.lists(TEXTS.map(lambda t: t.encode(errors="replace")), max_size=6).map(b"\n".join)
    inputs = altered(lines.map(lambda rest: b"\n[UNK]\n" + rest + b"\n"))
    return inputs, lambda data: tokenizer.load(file("vocabulary.txt", data))


@target
def tfrecord() -> Case:
    """Shards that were altered, with a manifest that says so or doesn't, and the manifest."""
    import numpy as np
    import tensorflow as tf

    ids, offsets = np.arange(60, dtype=np.int32) % 9, np.array([0, 20, 40, 60])
    held_out = np.array([False, False, True])
    reviews = sequences.Encoded(pa.array(["a", "b", "c"]), ids, offsets, held_out)
    given: dict[str, Any] = {"length": 8, "policy": "windows", "shards": 1}
    given |= {"validation_fraction": 0.3, "vocabulary_sha256": "a", "vocabulary_size": 9}
    sequences.write(HERE / "sequences", [reviews], **given)
    shard = next((HERE / "sequences").glob("train*"))
    manifest = json.loads((HERE / "sequences/manifest.json").read_text())
    whole = shard.read_bytes()

    def read(given: tuple[bytes, bool]) -> None:
        shard.write_bytes(given[0])
        entry = manifest["splits"]["train"]["shards"][0]
        entry.update(sequences._fingerprint(shard) if given[1] else {"sha256": "0"})
        (HERE / "sequences/manifest.json").write_text(json.dumps(manifest))
        sequences.verify(HERE / "sequences")
        with contextlib.suppress(tf.errors.OpError):  # TensorFlow's own word for a damaged record
            for x, y in sequences.dataset(HERE / "sequences", "train", 4, seed=None):
                assert x.shape == y.shape

    return st.tuples(altered(st.just(whole)), st.booleans()), read


@target
def configuration() -> Case:
    """A resolved.yaml whose values or whose very text was altered."""
    composed = config.as_dict(config.compose(ROOT / "conf", ROOT / "params.yaml"))
    keys = [(a, b) for a, section in composed.items() for b in section]
    odd = ANYTHING | st.sampled_from(["${oc.env:HOME}", "${train.epochs}", "???", "${", "null"])

    def change(changes: list[tuple[tuple[str, str], Any]]) -> bytes:
        made = json.loads(json.dumps(composed))
        for (section, key), value in changes:
            made[section][key] = value
        return yaml.safe_dump(made).encode(errors="replace")

    texts = st.lists(st.tuples(st.sampled_from(keys), odd), max_size=2).map(change)

    def load(data: bytes) -> None:
        again = config.load(file("resolved.yaml", data))
        config.save(again, HERE / "again.yaml")
        assert config.load(HERE / "again.yaml") == again

    return texts | altered(texts), load


@target
def request() -> Case:
    """What the registered model is asked."""
    import pandas as pd
    from mlflow.exceptions import MlflowException

    from minigpt.tracking import pyfunc

    limits = {name: 50 for name in pyfunc.LIMITS}
    writer = pyfunc.ReviewWriter()
    writer.limits, writer.one_at_a_time = limits, contextlib.nullcontext()  # type: ignore[assignment]
    writer.sampling = SimpleNamespace  # type: ignore[assignment]

    def generate(prompts: list[str], sampling: Any) -> list[str]:
        assert 1 <= len(prompts) * sampling.max_tokens <= 50
        assert sum(len(prompt.encode()) for prompt in prompts) <= 50
        for name, value in vars(sampling).items():
            meta = pyfunc.SETTINGS[name].metadata
            assert meta["low"] is None or meta["low"] <= value <= meta["high"], name
        return prompts

    writer.generate = generate  # type: ignore[assignment]
    names = st.sampled_from(sorted(pyfunc.SETTINGS)) | TEXT
    params = st.none() | st.dictionaries(names, ANYTHING | NUMBERS, max_size=3)
    prompts = ANYTHING | st.lists(TEXTS | ANYTHING, max_size=60)
    frames = st.lists(TEXTS | ANYTHING, max_size=9).map(
        lambda rows: pd.DataFrame({"prompt": pd.Series(rows, dtype=object)})
    )

    def ask(given: tuple[Any, Any]) -> None:
        with contextlib.suppress(MlflowException):
            writer.predict(None, *given)

    return st.tuples(prompts | frames, params), ask


@target
def model_file() -> Case:
    """A .keras file whose description or weights were altered, with right checksums."""
    from minigpt.model import directory, network

    settings = dict.fromkeys(("embed_dim", "num_heads", "key_dim", "feed_forward_dim"), 4)
    settings |= {"vocabulary_size": 9, "context_length": 5, "num_blocks": 1}
    made = network.MiniGPT(**settings, dropout=0.1, tied_embeddings=False)
    words = tokenizer.Vocabulary(("", "[UNK]", "film"))
    path = HERE / "model"
    directory.save(path, made, words, {"vocabulary": {"style": "spaced"}})
    with zipfile.ZipFile(path / directory.MODEL_FILE) as saved:
        members = {name: saved.read(name) for name in saved.namelist()}
    described = json.loads(members["config.json"])

    def redescribed(changes: dict[str, Any]) -> bytes:
        changed = {**described, "config": {**described["config"], **changes}}
        return json.dumps(changed).encode()

    keys = st.sampled_from(sorted(described["config"]))
    descriptions = st.dictionaries(keys, ANYTHING | NUMBERS, max_size=2).map(redescribed)
    inputs = st.tuples(
        st.just(members["config.json"]) | altered(descriptions),
        altered(st.just(members["model.weights.h5"])),
    )

    def load(given: tuple[bytes, bytes]) -> None:
        with zipfile.ZipFile(directory / directory.MODEL_FILE, "w") as archive:
            archive.writestr("config.json", given[0])
            archive.writestr("model.weights.h5", given[1])
        directory.load(directory)

    return inputs, load


def attempts(name: str, seconds: float) -> Iterator[str]:
    """Tries inputs on a target for so long; yields the findings, then the number of inputs."""
    # What asks for more memory than this shall fail here, and not take other programs' along.
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    inputs, check = TARGETS[name]()
    end, tried, seed = time.monotonic() + seconds, 0, random.randrange(2**32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quiet = {"deadline": None, "database": None, "print_blob": False}
    while time.monotonic() < end:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=200, suppress_health_check=list(hypothesis.HealthCheck), **quiet
        )
        @hypothesis.given(inputs)
        def once(given: Any) -> None:
            nonlocal tried, before
            if time.monotonic() < end + 60:  # a minute more to make a finding small
                tried += 1
                with contextlib.suppress(InputError):
                    check(given)
                if (peak := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) > before + 2**20:
                    raise MemoryError(f"{peak} KiB of memory, {before} before this input")
                before = peak

        try:
            once()
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            yield f"{type(error).__name__}: {error}\n{notes}"
            break
        seed += 1
    yield str(tried)


def main(minutes: str, *names: str) -> int:
    """Runs the targets one after the other and prints a table; 1 where something was found."""
    names = names or tuple(TARGETS)
    seconds, found = float(minutes) * 60 / len(names), 0
    print(f"{'target':16}{'inputs':>10}  found", flush=True)
    for name in names:
        command = [sys.executable, __file__, "--one", name, str(seconds)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300)
            *findings, tried = ran.stdout.rstrip("\n").split("\f")
            if ran.returncode:
                findings.append(f"the process ended with {ran.returncode}: {ran.stderr[-2000:]}")
        except subprocess.TimeoutExpired:
            findings, tried = ["no end within 5 minutes more than it was given"], "?"
        found += bool(findings)
        print(
            f"{name:16}{tried:>10}  {'nothing' if not findings else ''.join(findings)}", flush=True
        )
    return min(found, 1)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.disable()
    if sys.argv[1] == "--one":
        print("\f".join(attempts(sys.argv[2], float(sys.argv[3]))))
    else:
        sys.exit(main(*sys.argv[1:]))
