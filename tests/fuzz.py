"""Random hostile input: `make fuzz MINUTES=1`, or `python tests/fuzz.py MINUTES [TARGET ...]`.

Hypothesis makes the inputs: well-formed ones, and ones with bytes altered, removed and inserted.
Each target runs in a process of its own for its share of the time, so that a crash or a hang is a
finding too. So is every exception but the one that the target allows. A finding is printed with the
smallest input that Hypothesis finds for it.
"""

import contextlib
import csv
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

from minigpt import composition, config
from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig
from minigpt.data import archive, corpus, cutting, own_files, sequences, shards, tokenizer
from minigpt.data.text import STYLES
from minigpt.data.tokenizer import WordTokenizer

ROOT = Path(__file__).resolve().parents[1]
MOST_MEMORY = 8 * 2**30  # bytes
HERE = Path(tempfile.mkdtemp(prefix="fuzz-"))

Case = tuple[st.SearchStrategy[Any], Callable[[Any], object]]
TARGETS: dict[str, Callable[[], Case]] = {}


def target(make: Callable[[], Case]) -> Callable[[], Case]:
    """Registers a target, a function that returns its inputs and what to do with one."""
    TARGETS[make.__name__] = make
    return make


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 16), st.binary(max_size=16)), max_size=6)


def altered(data: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Data with some bytes removed and others inserted, anywhere in it."""

    def alter(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
        for place, cut, put in edits:
            at = int(place * len(data))
            data = data[:at] + put + data[at + cut :]
        return data

    return st.builds(alter, data, EDITS)


def file(name: str, content: bytes) -> Path:
    """Writes the content to a file, the same one each time."""
    path = HERE / name
    path.write_bytes(content)
    return path


def corpus_config(**changes: Any) -> CorpusConfig:
    """The section `corpus`, with small limits."""
    given: dict[str, Any] = {"url": "x", "sha256": "0" * 64, "max_bytes": 2**22, "max_members": 100}
    return CorpusConfig(**given, folders=["a/train/pos", "a/train/neg"], **changes)


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
def archives() -> Case:
    """A .tar.gz with headers of every kind, altered before and after compression."""
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
            list(archive.read(path, corpus_config(format="archive", undecodable=undecodable)))

    tars = altered(st.lists(members, max_size=6).map(pack))
    zipped = tars.map(lambda tar: gzip.compress(tar, 1, mtime=0))
    return zipped | altered(zipped), read


@target
def own_file() -> Case:
    """.jsonl and .csv, also with .gz, and .parquet files of the user's own."""
    columns = st.sampled_from(["text", "id", "split", "label", "rating"])
    row = st.dictionaries(columns | TEXT, ANYTHING, max_size=5)
    lines = st.lists(row, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    tables = st.lists(st.text(max_size=9), min_size=1, max_size=4).map(parquet)
    header = st.lists(columns | TEXT, max_size=4).map(lambda names: ["text", *names])
    cells = st.lists(st.lists(TEXTS, max_size=5), max_size=4)
    kinds = {"jsonl": lines, "csv": st.builds(comma_separated, header, cells), "parquet": tables}
    made = {f"mine.{name}": altered(content) for name, content in kinds.items()}
    for name in ("jsonl", "csv"):
        packed = altered(kinds[name]).map(lambda content: gzip.compress(content, 1))
        made[f"mine.{name}.gz"] = altered(packed) | packed
    inputs = st.one_of(*(st.tuples(st.just(name), content) for name, content in made.items()))

    def read(given: tuple[str, bytes]) -> None:
        batches = list(own_files.read(str(file(*given)), corpus_config(format="files")))
        corpus.write_reviews(batches, HERE / "reviews.parquet")
        again = corpus.read_reviews(HERE / "reviews.parquet", corpus.SCHEMA.names)
        assert again.equals(pa.Table.from_batches(batches))

    return inputs, read


def comma_separated(header: list[str], rows: list[list[str]]) -> bytes:
    """A CSV file."""
    made = io.StringIO()
    csv.writer(made).writerows([header, *rows])
    return made.getvalue().encode("utf-8", "surrogatepass")


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
            tokens = WordTokenizer((), style).split(array).flatten().to_pylist()
            if not tokens:
                continue
            words = tokenizer.build(tokenizer.count(array, style), 20, style)
            words.save(HERE / "tokenizer")
            assert tokenizer.load(HERE / "tokenizer") == words
            ids, _ = words.encode(array)
            known = [token if token in words.tokens else "[UNK]" for token in tokens]
            assert words.decode(ids.tolist()) == known
            shown = words.complete("", ids.tolist())
            assert shown.replace(" ", "").lower() == "".join(known).replace(" ", "").lower()

    characters = st.characters(exclude_categories=["Cs"])
    pieces = TEXT.filter(lambda piece: "\ud800" not in piece) | st.text(characters, max_size=40)
    return st.lists(st.lists(pieces, max_size=30).map("".join), min_size=1, max_size=5), through


@target
def tokenizers() -> Case:
    """Both files of a tokenizer's folder."""
    lines = st.lists(TEXTS.map(lambda t: t.encode(errors="replace")), max_size=6).map(b"\n".join)
    vocabularies = altered(lines.map(lambda rest: b"\n[UNK]\n" + rest + b"\n"))
    kinds = st.just({"kind": "words", "style": "spaced"}) | ANYTHING
    settings = kinds.map(lambda kind: json.dumps(kind).encode())
    WordTokenizer((), "spaced").save(HERE / "tokenizer")

    def load(given: tuple[bytes, bytes]) -> None:
        for name, content in zip(("vocabulary.txt", "tokenizer.json"), given, strict=True):
            file(f"tokenizer/{name}", content)
        tokenizer.load(HERE / "tokenizer")

    return st.tuples(vocabularies, settings | altered(settings)), load


@target
def tfrecord() -> Case:
    """Altered shards, whose manifest has the right checksum or a wrong one."""
    import numpy as np
    import tensorflow as tf

    ids, offsets = np.arange(60, dtype=np.int32) % 9, np.array([0, 20, 40, 60])
    held_out = np.array([False, False, True])
    reviews = cutting.Encoded(pa.array(["a", "b", "c"]), ids, offsets, held_out)
    settings = {"length": 8, "policy": "windows", "shards": 1, "validation_fraction": 0.3}
    shards.write(
        HERE / "sequences",
        [reviews],
        config=config.SequencesConfig(**settings),  # type: ignore[arg-type]
        tokenizer=WordTokenizer(("", "[UNK]"), "spaced"),
    )
    shard = next((HERE / "sequences").glob("train*"))
    manifest = json.loads((HERE / "sequences/manifest.json").read_text())
    whole = shard.read_bytes()

    def read(given: tuple[bytes, bool]) -> None:
        shard.write_bytes(given[0])
        entry = manifest["splits"]["train"]["shards"][0]
        entry.update({"bytes": len(given[0]), "sha256": files.sha256(shard) if given[1] else "0"})
        (HERE / "sequences/manifest.json").write_text(json.dumps(manifest))
        sequences.verify(HERE / "sequences")
        with contextlib.suppress(tf.errors.OpError):  # TensorFlow's own word for a damaged record
            for x, y in sequences.dataset(HERE / "sequences", "train", 4, seed=None):
                assert x.shape == y.shape

    return st.tuples(altered(st.just(whole)), st.booleans()), read


@target
def configuration() -> Case:
    """A resolved.yaml with altered values, or altered as text."""
    composed = composition.compose(ROOT / "conf", ROOT / "params.yaml").model_dump(mode="json")
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
    """Requests to the registered model."""
    import pandas as pd
    from mlflow.exceptions import MlflowException

    from minigpt.tracking import pyfunc

    writer = pyfunc.ReviewWriter()
    writer.limits = config.RequestConfig(
        max_prompts=50, max_prompt_bytes=50, max_tokens=50, max_total_tokens=50
    )
    writer.one_at_a_time = contextlib.nullcontext()  # type: ignore[assignment]

    def generate(prompts: list[str], sampling: config.SamplingConfig) -> list[str]:
        assert 1 <= len(prompts) * sampling.max_tokens <= 50
        assert sum(len(prompt.encode()) for prompt in prompts) <= 50
        assert config.SamplingConfig(**sampling.model_dump()) == sampling
        return prompts

    writer.generator = generate  # type: ignore[assignment]
    names = st.sampled_from(sorted(config.SamplingConfig.model_fields)) | TEXT
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
def model_directory() -> Case:
    """A model directory with altered files, whose config.json has the right checksums or others."""
    from minigpt.model import directory, network

    settings = dict.fromkeys(("embed_dim", "num_heads", "key_dim", "feed_forward_dim"), 4)
    settings |= {"vocabulary_size": 9, "context_length": 5, "num_blocks": 1}
    model = config.ModelConfig(**settings, dtype_policy="float32")  # type: ignore[arg-type]
    words = WordTokenizer(("", "[UNK]", "film"), "spaced")
    path = HERE / "model"
    sections = {
        "vocabulary": {"style": "spaced", "max_tokens": 9},
        "sequences": {"policy": "head", "length": 5},
        "train": {"epochs": 1, "batch_size": 1, "learning_rate": 0.1},
    }
    directory.save(path, network.MiniGPT(model), words, sections)
    described = json.loads((path / "config.json").read_text(encoding="utf-8"))
    weights = (path / "weights.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    tensors = json.loads(weights[8:start])

    def retold(changes: list[tuple[str, str, Any]]) -> bytes:
        """The weights, with other facts about some tensors in the header."""
        told = json.loads(json.dumps(tensors))
        for name, fact, value in changes:
            told[name][fact] = value
        header = json.dumps(told).encode()
        return len(header).to_bytes(8, "little") + header + weights[start:]

    odd = ANYTHING | NUMBERS
    facts = st.sampled_from(["dtype", "shape", "data_offsets", "more"])
    values = st.sampled_from(["F64", "BF16", [], [2**40], [0, 2**63], [1, 4]]) | odd
    changes = st.tuples(st.sampled_from(sorted(tensors)), facts, values)
    inputs = st.tuples(
        st.dictionaries(st.sampled_from(sorted(described)), odd, max_size=1),
        st.dictionaries(st.sampled_from(sorted(settings)), odd, max_size=2),
        altered(st.just(weights)) | st.lists(changes, max_size=2).map(retold),
        st.booleans(),
    )

    def load(given: tuple[dict[str, Any], dict[str, Any], bytes, bool]) -> None:
        outer, inner, content, right = given
        made = json.loads(json.dumps(described))
        made["config"]["model"].update(inner)
        (path / "weights.safetensors").write_bytes(content)
        if right:
            made["sha256"]["weights.safetensors"] = files.sha256(path / "weights.safetensors")
        file("model/config.json", json.dumps({**made, **outer}).encode(errors="replace"))
        directory.load(path)

    return inputs, load


def attempts(name: str, seconds: float) -> Iterator[str]:
    """Tries inputs on a target for a time; yields the findings, then the number of inputs."""
    # An input that asks for more memory than this fails, and other programs go on.
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
            if time.monotonic() < end + 60:  # another minute to shrink a finding
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
    """Runs the targets one after the other and prints a table; returns 1 after a finding."""
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
            findings, tried = ["it was still running 5 minutes after its time"], "?"
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
