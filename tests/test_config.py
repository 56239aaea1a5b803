"""The sections of the configuration: what is said of values that make no sense, and the files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigpt import composition, config
from minigpt.common.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """A valid configuration: the defaults of conf/."""
    params = tmp_path_factory.mktemp("defaults") / "params.yaml"
    params.write_text("groups:\n", "utf-8")
    return composition.compose(ROOT / "conf", params)


def altered(composed: config.Config, changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the plain configuration with other values, each under its full name."""
    plain = composed.model_dump(mode="json")
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = plain
        for part in sections:
            section = section[part]
        section[name] = value
    return plain


def not_valid(composed: config.Config, changes: dict[str, Any]) -> str:
    """Validates what must be refused; returns the message."""
    with pytest.raises(InputError) as raised:
        config.validate(config.Config, altered(composed, changes), file="FILE")
    return str(raised.value)


def not_loaded(path: Path, content: bytes | None) -> str:
    """Loads a file that must be refused; returns the message without the folder."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        config.load(path)
    return str(raised.value).replace(f"{path.parent}/", "")


def test_what_is_saved_is_what_is_loaded(tmp_path: Path, composed: config.Config) -> None:
    odd = ["où ?", "on: 12:30", "null", "1e3", "0x1F", "=", "~", "a\u2028b\x85", "x " * 100, "\n a"]
    shell = ["a; rm -rf x", "$(touch x)", "`id`", "a && b", "| sh", "$HOME"]
    values = {
        "sample.prompts": odd + shell,
        "sample.seed": 2**63 - 1,
        "sample.temperature": 1 / 3,
        "train.learning_rate": 1e-12,
        "train.clip_norm": 1e-300,
        "gate.max_perplexity": 123456789.123456789,
    }
    made = config.validate(config.Config, altered(composed, values))
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    config.save(made, files[0])
    again = config.load(files[0])
    config.save(again, files[1])
    assert again == made
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files
    text = files[0].read_text("utf-8")
    assert text.startswith("# Written by the compose stage from conf/ and params.yaml; edit those")
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == list(config.Config.model_fields)


NONE_HELD_OUT = {"sequences.validation_fraction": 0}
WHOLE = "allowed is a whole number, 1 to 100000"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.epochs", "3", f"is '3': {WHOLE}"),
        ("train.epochs", 2.0, f"is 2.0: {WHOLE}"),
        ("train.epochs", True, f"is True: {WHOLE}"),
        ("train.epochs", None, f"is None: {WHOLE}"),
        ("train.learning_rate", "0.1", "is '0.1': allowed is a number, 1e-12 to 1000"),
        ("train.seed", -1, "is -1: allowed is 0 to 2147483647"),
        ("sample.seed", 2**63, f"is {2**63}: allowed is 0 to {2**63 - 1}"),
        ("sequences.validation_fraction", 0.51, "is 0.51: allowed is 0 to 0.5"),
        ("sample.top_p", 0, "is 0: allowed is above 0 to 1"),
        ("checkpointing.resume", 1, "is 1: allowed is true or false"),
        ("train", 5, "is 5: allowed is keys and values"),
        ("tracking.request", [1], "is [1]: allowed is keys and values"),
        # Lists and their entries.
        ("sample.prompts", "this movie", "is 'this movie': allowed is a list, not empty"),
        ("sample.prompts", [], "is []: allowed is a list, not empty; an entry is a text in"),
        ("sample.prompts[1]", ["a", ["b"]], "is ['b']: allowed is a text"),
        ("sample.prompts[0]", ["a\0b"], r"is 'a\x00b': allowed is a text in valid Unicode"),
        ("sample.prompts[0]", ["a\ud800b"], r"is 'a\ud800b': allowed is a text in valid"),
        ("corpus.folders[0]", [{"a": "b"}], "is {'a': 'b'}: allowed is a folder"),
        # Choices and texts.
        ("train.loss", "token", "is 'token': allowed are tokens, padded (did you mean tokens?)"),
        ("model.dtype_policy", ["auto"], "is ['auto']: allowed are auto, float32, mixed_bfl"),
        ("corpus.url", "", "is '': allowed is http(s)://, file://, another"),
        ("corpus.sha256", "C40F", "is 'C40F': allowed is 64 hexadecimal digits, or nothing"),
        ("engine.storage", "memory://x", "is 'memory://x': allowed is a folder that all machines"),
        ("engine.address", "ray://x:1", "is 'ray://x:1': allowed is host:port, or nothing"),
        ("tracking.model_name", 7, "is 7: allowed is up to 200 letters"),
    ],
)
def test_values_of_another_kind(composed: config.Config, key: str, value: Any, says: str) -> None:
    message = not_valid(composed, {key.partition("[")[0]: value})
    assert message.startswith(f"{key} in FILE {says}")
    message.encode()


def numbers(section: Any = config.Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of the configuration, with its field."""
    for name, field in section.model_fields.items():
        if field.annotation in (int, float):
            yield prefix + name, field
        elif hasattr(field.annotation, "model_fields"):
            yield from numbers(field.annotation, f"{prefix}{name}.")


def test_any_number_out_of_range_is_named(composed: config.Config) -> None:
    for key, field in numbers():
        bounds = (
            m for m in field.metadata if {"ge", "gt", "le", "lt"} & set(getattr(m, "__slots__", ()))
        )
        low, high = (getattr(bound, bound.__slots__[0]) for bound in bounds)
        odd = [low - 1, high + 1, low - 2**62, high + 2**62]
        odd += [float("nan"), float("inf"), float("-inf")] if field.annotation is float else []
        for value in odd:
            assert f"{key} in FILE is {value}: allowed" in not_valid(composed, {key: value})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.num_heads": 3}, "model.embed_dim is 256, not divisible by model.num_heads, 3"),
        ({"model.context_length": 96}, "model.context_length is 96 but sequences.length is 256: "),
        ({"model.vocabulary_size": 9}, "model.vocabulary_size is 9, below vocabulary.max_tokens, "),
        (NONE_HELD_OUT | {"train.keep": "last"}, "train.early_stopping is 2 and train.keep is las"),
        (
            NONE_HELD_OUT | {"train.early_stopping": 0},
            "train.early_stopping is 0 and train.keep i",
        ),
        (
            {"train.optimizer": "adam", "train.weight_decay": 0.1},
            "train.weight_decay is 0.1 but train.optimizer is adam: ",
        ),
        ({"model.kernels": "heads"}, "train.optimizer is muon but model.kernels is heads: "),
        ({"model.key_dim": 3}, "model.key_dim is 3: rotary positions need an even number"),
        ({"sample.top_k": 60_000}, "sample.top_k is 60000, above vocabulary.max_tokens, 59999"),
        ({"vocabulary.max_tokens": 5}, "preview.top_k is 10, above vocabulary.max_tokens, 5"),
        (
            {"vocabulary.style": "bpe", "sequences.policy": "windows"},
            "vocabulary.style is bpe but sequences.policy is windows: ",
        ),
        (
            {"vocabulary.style": "bpe", "vocabulary.max_tokens": 256},
            "vocabulary.max_tokens is 256: vocabulary.style bpe needs at least 257",
        ),
        (
            {"engine.kind": "ray"},
            "train.backend is tensorflow but engine.kind is ray and engine.workers is 1: only",
        ),
        (
            {"engine.workers": 2},
            "train.backend is tensorflow but engine.kind is local and engine.workers is 2: only",
        ),
        (
            {"engine.address": "10.0.0.1:6379"},
            "engine.address is '10.0.0.1:6379' but engine.kind is local: only Ray takes it; ",
        ),
        ({"engine.storage": "s3://b"}, "engine.storage is 's3://b' but engine.kind is local: only"),
        ({"engine.use_gpu": True}, "engine.use_gpu is True but engine.kind is local: only Ray"),
        ({"corpus.sha256": ""}, "corpus.sha256 is '': an archive needs 64 hexadecimal digits"),
        ({"corpus.folders": []}, "corpus.folders is empty: name the folders of the archive"),
    ],
)
def test_values_that_contradict_each_other(
    composed: config.Config, changes: dict[str, Any], says: str
) -> None:
    assert not_valid(composed, changes).startswith(says)


def test_values_that_agree(composed: config.Config) -> None:
    changes: dict[str, Any]
    for changes in (
        {"corpus.format": "files", "corpus.sha256": "", "corpus.folders": []},
        {"train.optimizer": "adamw", "train.weight_decay": 0.1},
        {"model.vocabulary_size": 59_999},
        {"engine.workers": 2, "train.backend": "jax"},
        {"engine.kind": "ray", "engine.address": "head-1.lan:6379", "train.backend": "jax"},
        {**NONE_HELD_OUT, "train.early_stopping": 0, "train.keep": "last"},
        {"corpus.url": "file:///home/a@b/c", "tracking.model_name": "My 2.0"},
    ):
        config.validate(config.Config, altered(composed, changes))


def test_all_contradictions_are_told_at_once(composed: config.Config) -> None:
    changes = {"sequences": {"policy": "head", "length": 9}, "vocabulary.max_tokens": 5}
    assert [line.split(" is ")[0] for line in not_valid(composed, changes).splitlines()] == [
        "model.context_length",
        "train.early_stopping",
        "preview.top_k",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"train: [",
        b"train: {epochs: 1, epochs: 2}",
        b"\x00",
        b"train: \xff",
        b"train: !!python/object:os.system x",
        b"train: !!bool maybe",
        b"train: &a {epochs: *a}",
        b"train: " + b"[" * 1_000,
        b"sample: {prompts: ['${}']}",
        b"5",
        b"- train",
    ],
    ids=range(11),
)
def test_a_file_that_is_no_mapping(tmp_path: Path, content: bytes) -> None:
    message = not_loaded(tmp_path / "params.yaml", content)
    assert re.match(r"params\.yaml (can't be read as YAML|must hold keys)", message)


def test_a_missing_file_or_key(tmp_path: Path) -> None:
    file = tmp_path / "resolved.yaml"
    missing = "resolved.yaml is missing; run `dvc repro` in the project's folder"
    assert not_loaded(file, None) == missing
    assert not_loaded(file, b"vocabulary: {style: spaced}").splitlines()[:2] == [
        "corpus in resolved.yaml is missing: allowed is keys and values",
        "vocabulary.max_tokens in resolved.yaml is missing: allowed is a whole number, 3 to "
        "10000000",
    ]


def test_what_is_huge_is_told_in_short(tmp_path: Path) -> None:
    for text in (
        f"train: {{epochs: 0x{'f' * 5_000}, {'x' * 100_000}: 1, keep: {'y' * 100_000}}}",
        f"sample: {{prompts: [{'1,' * 1_000}]}}",
        "".join(f"key{number}: 1\n" for number in range(1_000)),
    ):
        assert len(not_loaded(tmp_path / "resolved.yaml", text.encode())) < 15_000


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tracking.model_name", "../x", "is '../x': allowed is up to 200 letters"),
        ("tracking.model_name", "x" * 201, "allowed is up to 200 letters"),
        ("tracking.model_name", "a\n", "allowed is up to 200 letters"),
        ("tracking.alias", "a/b", "allowed is up to 200 letters"),
        ("tracking.alias", "latest", "not what MLflow reserves"),
        ("tracking.alias", "V7", "not what MLflow reserves"),
        ("tracking.alias", "champion", "nor champion, which the gate gives"),
        ("corpus.folders", ["/etc/x/y"], "is '/etc/x/y': allowed is a folder inside the archive"),
        ("corpus.folders", ["a/../../b"], "allowed is a folder inside the archive"),
        ("corpus.url", "https://me:hunter2@example.org/a.tar.gz", "put them into ~/.netrc"),
        ("corpus.url", "HTTP://hunter2@example.org/a", "put them into ~/.netrc"),
        ("corpus.url", ["https://me:hunter2@example.org/a"], "is ['https://example.org/a']"),
    ],
)
def test_names_and_paths_that_lead_elsewhere(
    composed: config.Config, key: str, value: Any, says: str
) -> None:
    message = not_valid(composed, {key: value})
    assert message.startswith(key) and says in message and "hunter2" not in message


# One section alone: a request to the served model, the settings in a model directory.


def test_a_section_alone() -> None:
    made = config.validate(config.SamplingConfig, {"max_tokens": 5, "temperature": 0}, "request")
    assert made == config.SamplingConfig(max_tokens=5, temperature=0.0)
    with pytest.raises(ValueError, match="frozen"):
        made.max_tokens = 6  # type: ignore[misc]


def test_a_section_alone_that_is_refused() -> None:
    for values, prefix, says in (
        (
            {"max_tokens": "5", "top_p": 2},
            "",
            f"max_tokens is '5': {WHOLE}\ntop_p is 2: allowed is",
        ),
        ({"top_q": 1}, "a", f"a.max_tokens is missing: {WHOLE}\nunknown key a.top_q: allowed are"),
        ([1], "request", "request is [1]: allowed is keys and values"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(says)}"):
            config.validate(config.SamplingConfig, values, prefix)


def test_the_documentation_is_up_to_date() -> None:
    written = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert written == config.documentation(), (
        "out of date: run `python -m minigpt.config > docs/configuration.md`"
    )
