"""What conf/ and params.yaml compose to, and what is said of values that make no sense."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt import config
from minigpt.common.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
CHOICES = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml"))

# The published script's settings, key by key.
SEED = yaml.safe_load("""
corpus:
  format: archive
  url: https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz
  sha256: c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe
  folders: [aclImdb/train/pos, aclImdb/train/neg, aclImdb/test/pos, aclImdb/test/neg]
  text_column: text
  undecodable: fail
  max_bytes: 2000000000
  max_members: 1000000
  max_ratio: 100.0
vocabulary: {style: published, max_tokens: 19999}
sequences: {policy: head, length: 80, validation_fraction: 0.0, shards: 8}
model:
  {vocabulary_size: 20000, context_length: 80, embed_dim: 256, num_blocks: 1, num_heads: 2,
   key_dim: 256, feed_forward_dim: 256, dropout: 0.1, tied_embeddings: false, dtype_policy: float32}
train:
  {epochs: 25, batch_size: 128, loss: padded, optimizer: adam, learning_rate: 0.001,
   warmup_steps: 0, decay: constant, weight_decay: 0.0, clip_norm: 0.0, early_stopping: 0,
   keep: last, jit_compile: false, seed: 1}
preview: &sampling
  {max_tokens: 40, temperature: 1.0, top_k: 10, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0,
   allow_unknown: true, seed: 1, prompts: [this movie is]}
checkpointing: {steps: 200, resume: true}
logging: {steps: 50}
evaluate:
  {<<: *sampling, max_tokens: 120, top_k: 0, allow_unknown: false,
   prompts: &prompts [this movie is, the acting was, i loved, what a waste of],
   reviews: 200, ngram_order: 5}
sample: {<<: *sampling, prompts: *prompts, reviews_per_prompt: 2}
gate: {max_perplexity: 1000.0, max_copied_run: 50.0, max_unk_share: 0.2, min_improvement: 0.005}
tracking:
  model_name: minigpt
  alias: challenger
  request:
    {max_prompts: 256, max_prompt_bytes: 100000, max_tokens: 1000, max_total_tokens: 10000}
""")


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """The defaults of conf/, nothing laid over."""
    return compose(tmp_path_factory.mktemp("defaults"), {})


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy of conf/ to edit."""
    return shutil.copytree(CONF, tmp_path / "conf")


def compose(folder: Path, params: Any, conf: Path = CONF) -> config.Config:
    """Composes with a params.yaml that is given as text, or as what it holds."""
    file = folder / "params.yaml"
    file.write_text(params if isinstance(params, str) else yaml.safe_dump(params), "utf-8")
    return config.compose(conf, file)


def refused(folder: Path, params: Any, conf: Path = CONF) -> str:
    """Composes what must be refused; returns the message without the folder."""
    with pytest.raises(InputError) as raised:
        compose(folder, params, conf)
    return str(raised.value).replace(f"{folder}/", "")


def not_loaded(folder: Path, text: str) -> str:
    """Loads a resolved.yaml that must be refused; returns the message without the folder."""
    (folder / "resolved.yaml").write_text(text, "utf-8")
    with pytest.raises(InputError) as raised:
        config.load(folder / "resolved.yaml")
    return str(raised.value).replace(f"{folder}/", "")


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


# What composes.


def test_each_group_has_a_file_and_a_default() -> None:
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    sections = set(config.Config.model_fields) - {"checkpointing", "logging"}
    assert groups == sections | {"experiment"} == {group for group, _ in CHOICES}
    assert set(yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))["groups"]) == groups


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_each_file_composes(tmp_path: Path, group: str, choice: str) -> None:
    made = compose(tmp_path, {"groups": {group: choice}}).model_dump(mode="json")
    stated = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text("utf-8"))
    differs_from_another_file = bool(stated.pop("defaults", None))
    for section, values in (stated if group == "experiment" else {group: stated}).items():
        plain = {key: value for key, value in values.items() if "${" not in str(value)}
        assert {key: made[section][key] for key in plain} == plain
        fields = config.Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        if not differs_from_another_file:
            assert not [key for key, value in plain.items() if fields[key].default == value]


def test_the_projects_own_selection_composes() -> None:
    config.compose(CONF, ROOT / "params.yaml")


def test_the_seed_experiment_is_the_published_script(tmp_path: Path) -> None:
    made = compose(tmp_path, {"groups": {"experiment": "seed"}})
    assert made.model_dump(mode="json") == SEED


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


def test_null_leaves_things_as_composed(tmp_path: Path, composed: config.Config) -> None:
    for params in (
        "groups:\n",
        {"groups": {"train": None, "experiment": None}, "train": None},
        {"train": {"epochs": None}, "sample": {}, "logging": {"steps": None}},
    ):
        assert compose(tmp_path, params) == composed


def test_a_value_beats_a_group_and_a_group_an_experiment(
    tmp_path: Path, composed: config.Config, conf: Path
) -> None:
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [override /sample: greedy, override /sequences: head]\n"
        "train: {batch_size: 7, epochs: 9}\n",
        "utf-8",
    )
    mine = {"sample.temperature": 0.0, "sample.reviews_per_prompt": 1, "sequences.policy": "head"}
    mine |= {"train.batch_size": 7, "train.epochs": 9}
    made = compose(tmp_path, {"groups": {"experiment": "mine"}}, conf)
    assert made.model_dump(mode="json") == altered(composed, mine)
    params = {"groups": {"experiment": "mine", "sequences": "windows"}, "train": {"epochs": 3}}
    mine |= {"sequences.policy": "windows", "train.epochs": 3}
    assert compose(tmp_path, params, conf).model_dump(mode="json") == altered(composed, mine)


def test_a_value_may_be_another_one(tmp_path: Path) -> None:
    text = (
        "model: {embed_dim: '${model.key_dim}', key_dim: 64}\n"
        "sequences: {length: 48}\n"  # conf/model/ has ${sequences.length}
        "checkpointing: {steps: '${logging.steps}'}\n"  # a default
        "evaluate: {prompts: '${sample.prompts}'}\n"
        "tracking: {model_name: '${corpus.format}-${train.epochs}'}\n"
    )
    made = compose(tmp_path, text)
    assert (made.model.embed_dim, made.model.context_length) == (64, 48)
    assert made.checkpointing.steps == 50
    assert made.evaluate.prompts == made.sample.prompts
    assert made.tracking.model_name == "archive-2"


# What is refused: the message names the key, the file, the value and what is allowed.


@pytest.mark.parametrize(
    ("params", "says", "meant"),
    [
        ({"groups": {"tain": 1}}, "unknown group groups.tain in FILE: allowed are cor", "train"),
        ({"groups": {1: "fast"}}, "unknown group groups.1 in FILE: allowed are corpus, ", ""),
        ({"groups": {"train": "fsat"}}, "groups.train in FILE is 'fsat': allowed are def", "fast"),
        ({"groups": {"train": "../train/fast"}}, "groups.train in FILE is '../train/fast'", ""),
        ({"groups": {"train": ["fast"]}}, "groups.train in FILE is ['fast']: allowed are", ""),
        ({"groups": "fast"}, "groups in FILE is 'fast': allowed is a choice per group", ""),
        ({"tain": {"epochs": None}}, "unknown key tain in FILE: allowed are corpus, ", "train"),
        ({"epochs": 3}, "unknown key epochs in FILE: allowed are corpus, ", ""),
        ({"train": {"epoch": 3}}, "unknown key train.epoch in FILE: allowed are ep", "epochs"),
        ("tracking: {request: {x: 9}}", "unknown key tracking.request.x in FILE: allowed are", ""),
        ("train: {1: 2}", "unknown key train.1 in FILE: allowed are epochs, ", ""),
        ('train: {"a\\nb": 2}', "unknown key train.a\\nb in FILE: allowed are epochs, ", ""),
    ],
)
def test_unknown_names(tmp_path: Path, params: Any, says: str, meant: str) -> None:
    message = refused(tmp_path, params)
    assert message.startswith(says.replace("FILE", "params.yaml"))
    assert message.endswith(f" (did you mean {meant}?)" if meant else "")


NONE_HELD_OUT = {"sequences.validation_fraction": 0}
WHOLE = "allowed is a whole number, 1 to 100000"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.epochs", "many", f"is 'many': {WHOLE}"),
        ("train.epochs", "3", f"is '3': {WHOLE}"),
        ("train.epochs", 2.0, f"is 2.0: {WHOLE}"),
        ("train.epochs", True, f"is True: {WHOLE}"),
        ("train.epochs", [1], f"is [1]: {WHOLE}"),
        ("train.epochs", {"a": 1}, f"is {{'a': 1}}: {WHOLE}"),
        ("train.epochs", None, f"is None: {WHOLE}"),
        ("train.epochs", "???", "is '???': allowed is a value"),
        ("train.learning_rate", "0.1", "is '0.1': allowed is a number, 1e-12 to 1000"),
        ("train.learning_rate", True, "is True: allowed is a number, 1e-12 to 1000"),
        ("train.seed", -1, "is -1: allowed is 0 to 2147483647"),
        ("sample.seed", 2**63, f"is {2**63}: allowed is 0 to {2**63 - 1}"),
        ("sequences.validation_fraction", 0.51, "is 0.51: allowed is 0 to 0.5"),
        ("sample.top_p", 0, "is 0: allowed is above 0 to 1"),
        ("checkpointing.resume", "maybe", "is 'maybe': allowed is true or false"),
        ("checkpointing.resume", 1, "is 1: allowed is true or false"),
        ("train", 5, "is 5: allowed is keys and values"),
        ("train", None, "is None: allowed is keys and values"),
        ("tracking.request", [1], "is [1]: allowed is keys and values"),
        # Lists and their entries.
        ("sample.prompts", "this movie", "is 'this movie': allowed is a list, not empty"),
        ("sample.prompts", {"a": "b"}, "is {'a': 'b'}: allowed is a list, not empty"),
        ("sample.prompts", [], "is []: allowed is a list, not empty; an entry is a text, not"),
        ("sample.prompts[1]", ["a", ["b"]], "is ['b']: allowed is a text"),
        ("sample.prompts[1]", ["a", None], "is None: allowed is a text"),
        ("sample.prompts[1]", ["a", "  "], "is '  ': allowed is a text, not blank"),
        ("sample.prompts[0]", ["a\0b"], r"is 'a\x00b': allowed is a text, not blank, in valid"),
        ("sample.prompts[0]", ["a\ud800b"], r"is 'a\ud800b': allowed is a text, not blank, in"),
        ("corpus.folders[0]", [{"a": "b"}], "is {'a': 'b'}: allowed is a folder"),
        # Choices and texts.
        ("train.loss", "token", "is 'token': allowed are tokens, padded (did you mean tokens?)"),
        ("vocabulary.style", "Spaced", "is 'Spaced': allowed are published, spaced"),
        ("model.dtype_policy", ["auto"], "is ['auto']: allowed are auto, float32, mixed_bfl"),
        ("corpus.url", "", "is '': allowed is http(s)://, file:// or a path"),
        ("corpus.sha256", "C40F", "is 'C40F': allowed is 64 hexadecimal digits, or nothing"),
        ("tracking.model_name", 7, "is 7: allowed is up to 200 letters"),
    ],
)
def test_values_of_another_kind(
    tmp_path: Path, composed: config.Config, key: str, value: Any, says: str
) -> None:
    values = altered(composed, {key.partition("[")[0]: value})
    message = not_loaded(tmp_path, yaml.safe_dump(values))
    assert message.startswith(f"{key} in resolved.yaml {says}")
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
        low, high = (getattr(limit, limit.__slots__[0]) for limit in field.metadata)
        odd = [low - 1, high + 1, low - 2**62, high + 2**62]
        odd += [float("nan"), float("inf"), float("-inf")] if field.annotation is float else []
        for value in odd:
            with pytest.raises(InputError) as raised:
                config.validate(config.Config, altered(composed, {key: value}))
            assert f"{key} is {value}: allowed is " in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.num_heads": 3}, "model.embed_dim is 256, not divisible by model.num_heads, 3"),
        (
            {"model.context_length": 96},
            "model.context_length is 96 but sequences.length is 80: set",
        ),
        ({"model.vocabulary_size": 9}, "model.vocabulary_size is 9, below vocabulary.max_tokens, "),
        (
            {**NONE_HELD_OUT, "train.keep": "last"},
            "train.early_stopping is 2 and train.keep is last",
        ),
        (
            {**NONE_HELD_OUT, "train.early_stopping": 0},
            "train.early_stopping is 0 and train.keep is b",
        ),
        (
            {"train.weight_decay": 0.1},
            "train.weight_decay is 0.1 but train.optimizer is adam: only",
        ),
        ({"sample.top_k": 20_000}, "sample.top_k is 20000, above vocabulary.max_tokens, 19999"),
        ({"vocabulary.max_tokens": 5}, "preview.top_k is 10, above vocabulary.max_tokens, 5"),
        ({"corpus.sha256": ""}, "corpus.sha256 is '': an archive needs 64 hexadecimal digits"),
        ({"corpus.folders": []}, "corpus.folders is empty: name the folders of the archive"),
    ],
)
def test_values_that_contradict_each_other(
    composed: config.Config, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(says)}"):
        config.validate(config.Config, altered(composed, changes))


def test_values_that_agree(composed: config.Config) -> None:
    changes: dict[str, Any]
    for changes in (
        {"corpus.format": "files", "corpus.sha256": "", "corpus.folders": []},
        {"train.optimizer": "adamw", "train.weight_decay": 0.1},
        {"model.vocabulary_size": 19_999},
        {**NONE_HELD_OUT, "train.early_stopping": 0, "train.keep": "last"},
        {"corpus.url": "file:///home/a@b/c", "tracking.model_name": "My 2.0"},
    ):
        config.validate(config.Config, altered(composed, changes))


def test_all_problems_are_told_at_once(tmp_path: Path, conf: Path) -> None:
    (conf / "preview" / "default.yaml").write_text("prompts: ['']\ntop_k: 30_000\n", "utf-8")
    params: dict[str, Any] = {
        "corpus": {"url": "${nowhere}", "folders": []},
        "model": {"embed_dim": 3},
        "train": {"epochs": 0, "epoch": 1, "weight_decay": 1},
        "sample": {"top_p": 0, "prompts": ["${oc.env:HOME}"]},
    }
    assert [line.split(":")[0] for line in refused(tmp_path, params, conf).splitlines()] == [
        "corpus.url in params.yaml is '${nowhere}'",
        "sample.prompts[0] in params.yaml is '${oc.env",
        "corpus.folders in params.yaml is empty",
        "model.embed_dim in params.yaml is 3, not divisible by model.num_heads, 2",
        "train.epochs in params.yaml is 0",
        "unknown key train.epoch in params.yaml",
        "train.weight_decay in params.yaml is 1 but train.optimizer is adam",
        "preview.max_tokens in conf/ is missing",
        "preview.prompts[0] in conf/ is ''",
        "sample.top_p in params.yaml is 0",
        "preview.top_k in conf/ is 30000, above vocabulary.max_tokens, 19999",
    ]


def test_a_contradiction_is_not_told_where_the_choice_of_a_file_is_wrong(tmp_path: Path) -> None:
    params = {"groups": {"train": "publishd"}, "sequences": {"validation_fraction": 0}, "epochs": 1}
    lines = refused(tmp_path, params).splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["groups.train", "unknown key epochs"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train: {epochs: }", "train.epochs in conf/ is None: allowed is a whole number"),
        ("train: {epoch: 3}", "unknown key train.epoch in conf/: allowed are "),
        ("train: {epochs: '${nope}'}", "train.epochs in conf/ is '${nope}': nope has no value"),
        ("logging: {steps: '???'}", "logging.steps in conf/ is '???': allowed is a value"),
        ("sample: {prompts: ['${oc.env:HOME}']}", "sample.prompts[0] in conf/ is '${oc.env:HOME}"),
        ("train: [", "conf/ can't be composed: "),
        ("train: !!bool maybe", "conf/ can't be composed: "),
        ("5", "conf/ can't be composed: "),
        ("- train", "conf/ can't be composed: "),
    ],
)
def test_a_bad_file_of_conf(tmp_path: Path, conf: Path, content: str, says: str) -> None:
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}\n", "utf-8")
    assert refused(tmp_path, {"groups": {"experiment": "mine"}}, conf).startswith(says)


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
        b"sample: {prompts: ['${corpus.url']}",
        b"sample: {prompts: ['${}']}",
        b"5",
        b"- train",
    ],
    ids=range(12),
)
def test_a_file_that_is_no_mapping(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    for read in (lambda: config.compose(CONF, file), lambda: config.load(file)):
        with pytest.raises(
            InputError, match=r"params\.yaml (can't be read as YAML|must hold keys)"
        ):
            read()


def test_a_missing_file_or_key(tmp_path: Path, composed: config.Config) -> None:
    missing = tmp_path / "missing.yaml"
    for read in (lambda: config.compose(CONF, missing), lambda: config.load(missing)):
        with pytest.raises(InputError, match=r"missing\.yaml is missing; run `dvc repro`"):
            read()
    assert refused(tmp_path, {}, tmp_path / "none").startswith("none/ is missing; run `dvc repro`")
    values = altered(composed, {"vocabulary": {"style": "spaced"}})
    assert not_loaded(tmp_path, yaml.safe_dump(values)) == (
        "vocabulary.max_tokens in resolved.yaml is missing: allowed is a whole number, 3 to "
        "10000000"
    )


@pytest.mark.parametrize(
    "text",
    [
        f"train: {{epochs: 0x{'f' * 5_000}, {'x' * 100_000}: 1, keep: {'y' * 100_000}}}",
        f"sample: {{prompts: [{'1,' * 1_000}]}}",
        "".join(f"key{number}: 1\n" for number in range(1_000)),
    ],
    ids=["long", "list", "keys"],
)
def test_what_is_huge_is_told_in_short(tmp_path: Path, text: str) -> None:
    assert len(not_loaded(tmp_path, text)) < 15_000


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}",
        "x${oc.env:MLFLOW_TRACKING_PASSWORD,none}",
        "${oc.decode:'1'}",
        "${now:%Y}",
        "${hydra:runtime.cwd}",
        "${${corpus.url}}",
        "\\${corpus.url}",
    ],
)
def test_nothing_is_interpolated_but_other_values(
    tmp_path: Path, composed: config.Config, monkeypatch: Any, text: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    values = altered(composed, {"sample.prompts": ["fine", text]})
    message = not_loaded(tmp_path, yaml.safe_dump(values))
    assert message.startswith("sample.prompts[1] in resolved.yaml is ")
    assert "is allowed, such as ${sequences.length}" in message and "hunter2" not in message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("corpus.folders", "${train.epochs}", "is 2: allowed is a list"),
        ("sample.prompts", "${corpus.format}", "is 'archive': allowed is a list"),
        ("sample.prompts", ["${corpus.folders}"], "is ['aclImdb/"),
        ("corpus.url", "${logging}", "is {'steps': 50}: allowed is http(s)://"),
        ("corpus.url", "${train.nope}", "is '${train.nope}': train.nope has no value"),
        ("corpus.url", "${.folders}", "is '${.folders}': .folders has no value"),
        ("corpus.url", "a${corpus.url}", "is 'a${corpus.url}': corpus.url leads back to itself"),
        ("corpus.url", "${corpus}", "is '${corpus}': corpus leads back to itself"),
        ("sample.prompts", ["${sample.prompts}"], "is '${sample.prompts}': sample.prompts leads"),
    ],
)
def test_an_interpolation_of_another_type(
    tmp_path: Path, composed: config.Config, key: str, value: Any, says: str
) -> None:
    message = not_loaded(tmp_path, yaml.safe_dump(altered(composed, {key: value})))
    assert message.replace("[0]", "").startswith(f"{key} in resolved.yaml {says}")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tracking.model_name", "../x", "is '../x': allowed is up to 200 letters"),
        ("tracking.model_name", "a' or name like '%", "allowed is up to 200 letters"),
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
    with pytest.raises(InputError, match=f"^{key}.*{re.escape(says)}") as raised:
        config.validate(config.Config, altered(composed, {key: value}))
    assert "hunter2" not in str(raised.value)


# One section alone: a request to the served model, the settings in a model directory.


def test_a_section_alone() -> None:
    made = config.validate(config.SamplingConfig, {"max_tokens": 5, "temperature": 0}, "request")
    assert made == config.SamplingConfig(max_tokens=5, temperature=0.0)
    assert made.greedy and config.SamplingConfig(max_tokens=5, top_k=1).greedy
    assert not config.SamplingConfig(max_tokens=5).greedy
    with pytest.raises(ValueError, match="frozen"):
        made.max_tokens = 6  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "prefix", "says"),
    [
        (
            {"top_q": 1, "top_p": 2},
            "",
            "max_tokens is missing: allowed is a whole number, 1 to 100000\n"
            "top_p is 2: allowed is above 0 to 1\n"
            "unknown key top_q: allowed are max_tokens, temperature, top_k, top_p, min_p, "
            "repetition_penalty, allow_unknown, seed (did you mean top_p?)",
        ),
        ({"max_tokens": "5"}, "a", f"a.max_tokens is '5': {WHOLE}"),
        ([1], "request", "request is [1]: allowed is keys and values"),
    ],
)
def test_a_section_alone_that_is_refused(values: Any, prefix: str, says: str) -> None:
    with pytest.raises(InputError) as raised:
        config.validate(config.SamplingConfig, values, prefix)
    assert str(raised.value) == says


def test_the_documentation_is_up_to_date() -> None:
    written = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert written == config.documentation(), (
        "out of date: run `python -m minigpt.config > docs/configuration.md`"
    )
