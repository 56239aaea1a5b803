"""The network against Keras's own layers, its cache, and the model directory."""

import io
import json
import mmap
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

from minigpt.common.errors import InputError
from minigpt.data.tokenizer import Vocabulary
from minigpt.model import directory, network

pytestmark = pytest.mark.backend

WORDS = Vocabulary(("", "[UNK]", *(f"word{number}" for number in range(40))))
CONFIG = {"vocabulary": {"style": "spaced"}, "train": {"preview": {"prompts": ["où ?"]}}}


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60, shape).astype("int32")


@pytest.fixture(scope="module")
def logits(compiled: Any) -> Any:
    functions: dict[Any, Any] = {}

    def logits(network: Any, tokens: np.ndarray) -> np.ndarray:
        call = functions.setdefault(network, compiled(network.call))
        return ops.convert_to_numpy(call(tokens))

    return logits


def published(network: network.MiniGPT, tokens: np.ndarray) -> Any:
    """The logits of the published script, of Keras's own layers with the same weights."""
    given = network.settings

    def run(layer: Any, *sources: Any, inputs: Any, **options: Any) -> Any:
        layer(*inputs, **options)  # which builds it
        layer.set_weights([weight for source in sources for weight in source.get_weights()])
        return layer(*inputs, **options)

    embedding = layers.Embedding(given["vocabulary_size"], given["embed_dim"])
    x = run(embedding, network.token_embedding, inputs=[tokens])
    embedding = layers.Embedding(given["context_length"], given["embed_dim"])
    x = x + run(embedding, network.position_embedding, inputs=[np.arange(tokens.shape[1])])
    for block in network.blocks:
        attention = layers.MultiHeadAttention(given["num_heads"], given["key_dim"])
        projections = block.query, block.key, block.value, block.attention_output
        attended = run(attention, *projections, inputs=[x, x], use_causal_mask=True)
        norm = layers.LayerNormalization(epsilon=1e-6)
        x = run(norm, block.attention_norm, inputs=[x + attended])
        expand = layers.Dense(given["feed_forward_dim"], activation="relu")
        fed = run(expand, block.expand, inputs=[x])
        fed = run(layers.Dense(given["embed_dim"]), block.contract, inputs=[fed])
        norm = layers.LayerNormalization(epsilon=1e-6)
        x = run(norm, block.feed_forward_norm, inputs=[x + fed])
    head = layers.Dense(given["vocabulary_size"])
    head(x)
    head.set_weights([ops.convert_to_numpy(weight) for weight in network.head])
    return ops.convert_to_numpy(head(x))


# The network.


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_published_models(make_network: Any, tied: bool, logits: Any) -> None:
    network = make_network(tied_embeddings=tied)
    tokens = ids(3, network.settings["context_length"])
    expected = published(network, tokens)
    assert expected.std() > 1
    np.testing.assert_allclose(logits(network, tokens), expected, atol=1e-4, rtol=1e-4)


def test_a_new_model_has_the_published_size_and_initialisers() -> None:
    words, context, width, heads, key, inner = 20000, 80, 256, 2, 256, 256
    embeddings = (words + context) * width
    attention = 3 * (width + 1) * heads * key + (heads * key + 1) * width
    feed_forward = (width + 1) * inner + (inner + 1) * width
    norms = 2 * 2 * width
    head = (width + 1) * words
    made = network.MiniGPT(words, context, width, 1, heads, key, inner, 0.1, False)
    expected = embeddings + attention + feed_forward + norms + head
    assert made.count_params() == expected == 10_939_168

    for weight in network.trainable_variables:
        values = ops.convert_to_numpy(weight)
        if weight.name in ("gamma", "bias", "beta", "head_bias"):
            assert (values == (weight.name == "gamma")).all()
        elif "embedding" in weight.path:  # Keras's "uniform"
            assert 0.049 < np.abs(values).max() <= 0.05
        else:  # Glorot's, of the attention's matrices with their heads side by side
            ends = width + heads * key if values.ndim == 3 else sum(values.shape)
            limit = (6 / ends) ** 0.5
            assert 0.99 * limit < np.abs(values).max() <= limit


def test_a_tied_head_has_no_matrix_of_its_own(make_network: Any) -> None:
    untied, tied = make_network().count_params(), make_network(tied_embeddings=True).count_params()
    assert untied - tied == 60 * 16


@pytest.fixture(scope="module")
def causal(make_network: Any) -> Any:
    return make_network()


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(0, 2**16), st.integers(0, 19), st.integers(0, 59))
def test_a_token_changes_nothing_before_it(
    causal: Any, logits: Any, seed: int, at: int, other: int
) -> None:
    tokens = ids(1, 20, seed=seed)
    changed = tokens.copy()
    changed[0, at] = other
    before, after = logits(causal, np.concatenate([tokens, changed]))
    np.testing.assert_array_equal(before[:at], after[:at])
    if other != tokens[0, at]:
        assert np.abs(before[at] - after[at]).max() > 1e-3


def test_a_shorter_text_reads_like_the_start_of_a_longer_one(causal: Any, logits: Any) -> None:
    tokens = ids(2, 20)
    np.testing.assert_allclose(
        logits(causal, tokens[:, :7]), logits(causal, tokens)[:, :7], atol=1e-5
    )


def test_dropout_is_for_training_alone(causal: Any, logits: Any) -> None:
    tokens = ids(2, 20)
    still = logits(causal, tokens)
    np.testing.assert_array_equal(still, logits(causal, tokens))
    assert np.abs(ops.convert_to_numpy(causal(tokens, training=True)) - still).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_reading_in_pieces_is_reading_at_once(make_network: Any, compiled: Any, dtype: str) -> None:
    network = make_network(dtype=dtype)
    tokens = ids(2, 17)
    whole = ops.convert_to_numpy(ops.cast(compiled(network.hidden)(tokens), "float32"))
    cache, pieces, advance = network.empty_cache(2, 24), [], compiled(network.advance)
    for start, stop in ((0, 9), (9, 10), (10, 17)):
        hidden, cache = advance(tokens[:, start:stop], start, np.zeros(2, "int32"), cache)
        pieces.append(ops.convert_to_numpy(ops.cast(hidden, "float32")))
    tolerance = 1e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=tolerance)


def test_texts_that_begin_later_read_the_same(make_network: Any, compiled: Any) -> None:
    network = make_network()
    texts = [ids(length, seed=length) for length in (12, 5, 2)]
    padding = np.array([12 - len(text) for text in texts], "int32")
    tokens = np.stack([np.pad(text, (12 - len(text), 0), constant_values=33) for text in texts])
    cache, pieces, advance = network.empty_cache(3, 14), [], compiled(network.advance)
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        hidden, cache = advance(tokens[:, start:stop], start, padding, cache)
        pieces.append(ops.convert_to_numpy(hidden))
    found = np.concatenate(pieces, 1)
    for row, text in zip(found, texts, strict=True):
        alone = ops.convert_to_numpy(compiled(network.hidden)(text[None]))[0]
        np.testing.assert_allclose(row[-len(text) :], alone, atol=1e-5)


def test_half_precision_begins_after_the_embeddings(make_network: Any) -> None:
    network, tokens = make_network(dtype="mixed_bfloat16"), ids(3, 7)
    tables = network.token_embedding.embeddings, network.position_embedding.embeddings
    rows, positions = (ops.convert_to_numpy(table) for table in tables)
    expected = ops.cast(rows[tokens] + positions[:7], "bfloat16")  # rounded once, not each
    found = network.embed(tokens, np.arange(7))
    assert ops.convert_to_numpy(ops.all(found == expected))


def test_logits_are_float32_under_mixed_precision(
    make_network: Any, logits: Any, compiled: Any
) -> None:
    network = make_network(dtype="mixed_bfloat16")
    tokens = ids(2, 20)
    assert keras.backend.standardize_dtype(compiled(network.hidden)(tokens).dtype) == "bfloat16"
    assert {keras.backend.standardize_dtype(v.dtype) for v in network.trainable_variables} == {
        "float32"
    }
    found, full = logits(network, tokens), logits(make_network(), tokens)
    assert found.dtype == np.float32
    assert np.abs(found - full).mean() < 0.05 * full.std()


# The model directory.


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_is_loaded(
    tmp_path: Path, make_network: Any, tied: bool, dtype: str, logits: Any
) -> None:
    network = make_network(tied_embeddings=tied, dtype=dtype, num_blocks=1)
    directory.save(tmp_path / "model", network, WORDS, CONFIG)
    loaded = directory.load(tmp_path / "model")
    assert (loaded.vocabulary, loaded.config) == (WORDS, CONFIG)
    assert loaded.network.settings == network.settings
    assert loaded.network.dtype_policy.name == dtype
    tokens = ids(2, 20)
    np.testing.assert_array_equal(logits(loaded.network, tokens), logits(network, tokens))


def test_its_configuration_makes_a_model_again(make_network: Any) -> None:
    network = make_network(key_dim=5, dropout=0.25)
    again = network.MiniGPT.from_config(json.loads(json.dumps(network.get_config())))
    assert again.get_config() == network.get_config()
    assert [w.shape for w in again.weights] == [w.shape for w in network.weights]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_network: Any) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "model"
    directory.save(directory, make_network(num_blocks=1), WORDS, CONFIG)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def test_the_directory_holds_three_files_and_nothing_pickled(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == [
        directory.CONFIG_FILE,
        directory.MODEL_FILE,
        directory.VOCABULARY_FILE,
    ]
    with zipfile.ZipFile(saved / directory.MODEL_FILE) as archive:
        assert sorted(archive.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]
        assert archive.read("model.weights.h5").startswith(b"\x89HDF")
        json.loads(archive.read("config.json")), json.loads(archive.read("metadata.json"))
    assert json.loads((saved / directory.CONFIG_FILE).read_text()) == CONFIG


def test_an_old_directory_is_replaced_whole(copied: Path, make_network: Any, logits: Any) -> None:
    (copied / "stray.txt").write_text("from another run")
    network = make_network(1, num_blocks=1)
    directory.save(copied, network, WORDS, CONFIG)
    assert not (copied / "stray.txt").exists()
    assert [entry.name for entry in copied.parent.iterdir()] == ["model"]
    tokens = ids(1, 20)
    np.testing.assert_array_equal(
        logits(directory.load(copied).network, tokens), logits(network, tokens)
    )


def test_the_same_weights_give_the_same_bytes(make_network: Any, tmp_path: Path) -> None:
    network = make_network(num_blocks=1)
    directory.save(tmp_path / "now", network, WORDS, CONFIG)
    directory.save(tmp_path / "later", network, WORDS, CONFIG)
    for path in (tmp_path / "now").iterdir():
        assert path.read_bytes() == (tmp_path / "later" / path.name).read_bytes()
    with zipfile.ZipFile(tmp_path / "now" / directory.MODEL_FILE) as file:  # no time of its making
        assert {entry.date_time[0] for entry in file.infolist()} == {1980}
        assert b"1980" in file.read("metadata.json")


def test_an_old_directory_stays_when_the_new_one_cannot_be_written(
    copied: Path, make_network: Any
) -> None:
    with pytest.raises(TypeError):
        directory.save(copied, make_network(1, num_blocks=1), WORDS, {"not plain": object()})
    assert directory.load(copied).config == CONFIG


@pytest.mark.parametrize(
    "name", [directory.CONFIG_FILE, directory.MODEL_FILE, directory.VOCABULARY_FILE]
)
def test_a_missing_file(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(InputError, match=rf"{name}.*dvc repro") as raised:
        directory.load(copied)
    assert str(copied) in str(raised.value)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def altered(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(byte ^ 255 for byte in content[middle : middle + 64])
        + content[middle + 64 :]
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (directory.MODEL_FILE, cut),
        (directory.MODEL_FILE, altered),
        (directory.MODEL_FILE, lambda content: b""),
        (directory.MODEL_FILE, lambda content: b"not a zip"),
        (directory.CONFIG_FILE, cut),
        (directory.CONFIG_FILE, lambda content: b""),
        (directory.CONFIG_FILE, lambda content: b"[1, 2]"),
        (directory.CONFIG_FILE, lambda content: b"\xff"),
        (directory.VOCABULARY_FILE, lambda content: b"a\nb\n"),
    ],
)
def test_a_malformed_file(copied: Path, name: str, change: Any) -> None:
    (copied / name).write_bytes(change((copied / name).read_bytes()))
    with pytest.raises(InputError, match="dvc repro") as raised:
        directory.load(copied)
    assert str(copied) in str(raised.value)


def test_another_kind_of_model(copied: Path) -> None:
    keras.Sequential([keras.Input((2,)), layers.Dense(1)]).save(copied / directory.MODEL_FILE)
    with pytest.raises(InputError, match="is no MiniGPT; run `dvc repro"):
        directory.load(copied)


def test_code_in_a_model_file_is_not_run(copied: Path) -> None:
    unsafe = keras.Sequential([keras.Input((2,)), layers.Lambda(lambda x: x)])
    unsafe.save(copied / directory.MODEL_FILE)
    with pytest.raises(InputError, match="is no MiniGPT"):
        directory.load(copied)


def rewrite(
    file: Path, change: Any = None, weights: bytes = b"", extra: dict[str, bytes] | None = None
) -> None:
    """Writes a model file anew with another description or other weights, and right checksums."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if change:
        described = json.loads(members["config.json"])
        change(described)
        members["config.json"] = json.dumps(described).encode()
    members["model.weights.h5"] = weights or members["model.weights.h5"]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {**members, **(extra or {})}.items():
            archive.writestr(name, content)


def settings_of(**changes: Any) -> Any:
    return lambda description: description["config"].update(changes)


LAMBDA = {"class_name": "__lambda__", "config": {"value": "code"}}
SYSTEM = {"module": "os", "class_name": "system", "config": "id", "registered_name": "os>system"}
GET_FILE = {"module": "keras.utils", "class_name": "function", "config": "get_file"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (settings_of(dropout=LAMBDA), "dropout is"),
        (settings_of(vocabulary_size=SYSTEM), "vocabulary_size is"),
        (settings_of(dtype=GET_FILE), "dvc repro"),
        (settings_of(dtype={"config": {"name": "int8_from_float32"}}), "its dtype policy is"),
        (settings_of(vocabulary_size=10**12), "describes more weights than it holds"),
        (settings_of(context_length=10**12), "describes more weights than it holds"),
        (settings_of(num_heads=10**6), "describes more weights than it holds"),
        (settings_of(feed_forward_dim=10**9), "describes more weights than it holds"),
        (settings_of(num_blocks=10**9), "describes more weights than it holds"),
        (settings_of(num_heads=4), "dvc repro"),
        (settings_of(embed_dim=0), "embed_dim is 0"),
        (settings_of(embed_dim=True), "embed_dim is True"),
        (settings_of(embed_dim="16"), "embed_dim is '16'"),
        (settings_of(dropout=float("nan")), "dropout is nan"),
        (settings_of(tied_embeddings=1), "tied_embeddings is 1"),
        (lambda given: given.update(SYSTEM), "is no MiniGPT"),
        (lambda given: given.pop("config"), "config"),
        (lambda given: given["config"].pop("key_dim"), "key_dim"),
    ],
)
def test_a_description_that_asks_for_something_else(copied: Path, change: Any, says: str) -> None:
    rewrite(copied / directory.MODEL_FILE, change)
    with pytest.raises(InputError, match=says):
        directory.load(copied)


def test_only_the_settings_of_a_description_count(copied: Path) -> None:
    def change(given: dict[str, Any]) -> None:
        given.update(module="os", class_name="system", compile_config=LAMBDA, build_config=LAMBDA)
        given["config"].update(name=LAMBDA, trainable=SYSTEM, other=GET_FILE)

    rewrite(copied / directory.MODEL_FILE, change, extra={"assets/x": b"", "../../outside": b"x"})
    assert directory.load(copied).network.settings["embed_dim"] == 16
    assert not (copied.parent.parent / "outside").exists()


def test_a_bomb_in_the_zip(copied: Path) -> None:
    with zipfile.ZipFile(copied / directory.MODEL_FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", bytes(2**20))
    with pytest.raises(InputError, match=r"'config\.json' is compressed"):
        directory.load(copied)


def not_a_number(group: Any) -> None:
    group["0"][3, 4] = np.nan


def enormous(group: Any) -> None:
    del group["0"]
    group.create_dataset("0", (2**20, 2**20), "float32", chunks=(1024, 1024), compression="gzip")


def elsewhere(group: Any) -> None:
    del group["0"]
    group["0"] = h5py.ExternalLink("/etc/passwd", "/")


def words(group: Any) -> None:
    del group["0"]
    group["0"] = ["a", "b"]


def smaller(group: Any) -> None:
    del group["0"]
    group["0"] = np.zeros((3, 4), "float32")


def in_pieces(group: Any) -> None:
    table = group["0"][()]
    del group["0"]
    group.create_dataset("0", data=table, chunks=(1, 1))


def in_another_file(group: Any) -> None:
    table = group["0"][()]
    del group["0"]
    outside = [("/etc/passwd", 0, table.nbytes)]
    group.create_dataset("0", table.shape, table.dtype, external=outside)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (not_a_number, "embeddings holds values that are no numbers"),
        (enormous, "layers/embedding/vars/0 is of another shape or type"),
        (elsewhere, "lacks layers/embedding/vars/0"),
        (words, "layers/embedding/vars/0 is of another shape or type"),
        (smaller, "layers/embedding/vars/0 is of another shape or type"),
        (in_pieces, "layers/embedding/vars/0 is not stored in one piece"),
        (in_another_file, "layers/embedding/vars/0 is not stored in one piece"),
    ],
)
def test_weights_that_make_no_sense(copied: Path, change: Any, says: str) -> None:
    with zipfile.ZipFile(copied / directory.MODEL_FILE) as archive:
        file = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(file, "r+") as weights:
        change(weights["layers/embedding/vars"])
    rewrite(copied / directory.MODEL_FILE, weights=file.getvalue())
    with pytest.raises(InputError, match=says):
        directory.load(copied)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_file_that_asks_for_more_memory_than_it_is_worth(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*files: Any) -> None:
        # As libhdf5 takes what a file tells it to, but not through malloc, whose state would stay.
        mmap.mmap(-1, 2**31, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    with monkeypatch.context() as patch:
        patch.setattr(directory, "_copy_weights", greedy)
        with pytest.raises(InputError, match=r"not a whole model directory: .*allocate memory"):
            directory.load(copied)
    greedy()  # the limit is gone
    directory.load(copied)


@pytest.mark.parametrize(
    "config", [{}, {"vocabulary": None}, {"vocabulary": {"style": "other"}}, {"vocabulary": []}]
)
def test_a_configuration_without_a_style(copied: Path, config: Any) -> None:
    (copied / directory.CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match="dvc repro"):
        directory.load(copied)


def test_a_vocabulary_larger_than_the_model(copied: Path) -> None:
    words = ("", "[UNK]", *(f"w{number}" for number in range(59)))
    Vocabulary(words).save(copied / directory.VOCABULARY_FILE)
    with pytest.raises(InputError, match="has 61 entries, the model only 60"):
        directory.load(copied)
