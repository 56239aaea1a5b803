"""What conf/ and params.yaml compose to, and what is said of values that can't be meant."""

import math
import re
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from minigpt import config
from minigpt.common.errors import InputError

CONF = Path(__file__).resolve().parents[1] / "conf"
CHOICES = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml"))


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """The defaults of conf/, nothing laid over."""
    return compose(tmp_path_factory.mktemp("defaults"), {})


def compose(folder: Path, params: Any, conf: Path = CONF) -> config.Config:
    """Composes with a params.yaml that is given as text, or as what it holds."""
    file = folder / "params.yaml"
    file.write_text(params if isinstance(params, str) else yaml.safe_dump(params))
    return config.compose(conf, file)


def refused(folder: Path, params: Any, conf: Path = CONF) -> str:
    with pytest.raises(InputError) as raised:
        compose(folder, params, conf)
    return str(raised.value)


def nested(key: str, value: Any) -> dict[str, Any]:
    first, *rest = key.split(".", 1)
    return {first: nested(rest[0], value) if rest else value}


def integers(section: Any = config.Config, prefix: str = "") -> list[tuple[str, int, int]]:
    """Every whole number of the configuration, with its limits."""
    found = []
    for item in fields(section):
        if is_dataclass(item.type):
            found += integers(item.type, f"{prefix}{item.name}.")
        elif item.type is int:
            found.append((prefix + item.name, item.metadata["low"], item.metadata["high"]))
    return found


# What composes.


def test_each_group_has_a_file_and_a_default() -> None:
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    sections = {item.name for item in fields(config.Config)}
    assert groups == sections | {"experiment"}
    assert {group for group, _ in CHOICES} == groups


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_each_file_composes(tmp_path: Path, group: str, choice: str) -> None:
    made = compose(tmp_path, {"groups": {group: choice}})
    if group != "experiment":
        given = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
        section = config.as_dict(made)[group]
        stated = {k: v for k, v in given.items() if k != "defaults" and "${" not in str(v)}
        assert {key: section[key] for key in stated if key != "preview"} == {
            key: value for key, value in stated.items() if key != "preview"
        }


def test_the_projects_own_selection_composes() -> None:
    config.compose(CONF, CONF.parent / "params.yaml")


def test_what_is_saved_is_what_is_loaded(tmp_path: Path, composed: config.Config) -> None:
    made = replace(composed, sample=replace(composed.sample, prompts=["où ?", "on: 12:30", "null"]))
    config.save(made, tmp_path / "resolved.yaml")
    assert config.load(tmp_path / "resolved.yaml") == made
    assert [file.name for file in tmp_path.iterdir()] == ["resolved.yaml"]
    assert "${" not in (tmp_path / "resolved.yaml").read_text()


def test_the_same_configuration_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        config.save(compose(tmp_path, {"groups": {"experiment": "demo"}}), file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_as_dict_is_plain(composed: config.Config) -> None:
    plain = config.as_dict(composed)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["train"]["preview"]["top_k"] == composed.train.preview.top_k


@pytest.mark.parametrize(
    "params",
    [
        "",
        "# nothing\n",
        "groups:\n",
        {"groups": {"train": None, "experiment": None}},
        {"train": None},
        {"train": {"epochs": None, "preview": {"top_k": None}}, "sample": {}},
    ],
)
def test_null_leaves_things_as_composed(
    tmp_path: Path, composed: config.Config, params: Any
) -> None:
    assert compose(tmp_path, params) == composed


def test_a_group_is_picked(tmp_path: Path, composed: config.Config) -> None:
    made = compose(tmp_path, {"groups": {"train": "fast"}})
    assert (made.train.epochs, made.train.early_stopping) == (1, 0)
    assert replace(made, train=composed.train) == composed


def test_a_value_is_laid_over_the_picked_group(tmp_path: Path) -> None:
    made = compose(tmp_path, {"groups": {"train": "fast"}, "train": {"epochs": 3}})
    assert (made.train.epochs, made.train.early_stopping) == (3, 0)


def test_an_experiment_states_its_differences(tmp_path: Path, composed: config.Config) -> None:
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /sample: greedy]\ntrain: {batch_size: 7}\n"
    )
    made = compose(tmp_path, {"groups": {"experiment": "mine"}}, conf)
    assert made == replace(
        composed,
        train=replace(composed.train, batch_size=7),
        sample=replace(composed.sample, temperature=0, reviews_per_prompt=1),
    )


def test_a_group_that_is_picked_beats_the_experiments_choice(tmp_path: Path) -> None:
    alone = compose(tmp_path, {"groups": {"experiment": "seed"}})
    made = compose(tmp_path, {"groups": {"experiment": "seed", "sample": "greedy"}})
    assert (alone.sample.temperature, made.sample.temperature) == (1, 0)
    assert replace(made, sample=alone.sample) == alone


def test_a_value_beats_the_experiments(tmp_path: Path) -> None:
    made = compose(tmp_path, {"groups": {"experiment": "demo"}, "train": {"batch_size": 7}})
    assert made.train.batch_size == 7


def test_the_seed_experiment_is_the_published_script(tmp_path: Path) -> None:
    made = compose(tmp_path, {"groups": {"experiment": "seed"}})
    assert made.vocabulary == config.VocabularyConfig("published", 19999)
    assert (made.sequences.policy, made.sequences.length) == ("head", 80)
    assert made.sequences.validation_fraction == 0
    assert made.model == config.ModelConfig(
        vocabulary_size=20000,
        context_length=80,
        embed_dim=256,
        num_blocks=1,
        num_heads=2,
        key_dim=256,
        feed_forward_dim=256,
        dropout=0.1,
        tied_embeddings=False,
        dtype_policy="float32",
    )
    train = made.train
    assert (train.epochs, train.batch_size, train.loss) == (25, 128, "padded")
    assert (train.optimizer, train.learning_rate, train.decay) == ("adam", 0.001, "constant")
    assert (train.warmup_steps, train.clip_norm, train.weight_decay) == (0, 0, 0)
    assert (train.early_stopping, train.keep) == (0, "last")
    assert (made.sample.top_k, made.sample.max_tokens, made.sample.temperature) == (10, 40, 1)


def test_the_context_follows_the_sequences(tmp_path: Path) -> None:
    assert compose(tmp_path, {"sequences": {"length": 48}}).model.context_length == 48


# What is refused: the message names the key, the value and what is allowed.


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (
            {"groups": {"tain": "fast"}},
            ["unknown group groups.tain", "allowed are corpus,", "(did you mean train?)"],
        ),
        ({"groups": {1: "fast"}}, ["unknown group groups.1", "allowed are corpus,"]),
        (
            {"groups": {"train": "fsat"}},
            ["groups.train is 'fsat'", "default, fast, published", "(did you mean fast?)"],
        ),
        ({"groups": {"train": "../train/fast"}}, ["groups.train is '../train/fast'"]),
        ({"groups": {"train": ["fast"]}}, ["groups.train is ['fast']", "allowed are default"]),
        ({"groups": "fast"}, ["groups in", "is 'fast'", "a choice for each group"]),
        (
            {"tain": {"epochs": 3}},
            ["unknown key tain in", "params.yaml", "train, vocabulary (did you mean train?)"],
        ),
        ({"epochs": 3}, ["unknown key epochs in", "allowed are corpus,"]),
        (
            {"train": {"epoch": 3}},
            ["unknown key train.epoch in", "batch_size,", "(did you mean epochs?)"],
        ),
        (
            {"train": {"preview": {"topk": 3}}},
            ["unknown key train.preview.topk in", "(did you mean top_k?)"],
        ),
        ("train: {1: 2}", ["unknown key train.1 in", "allowed are batch_size,"]),
    ],
)
def test_unknown_names(tmp_path: Path, params: Any, says: list[str]) -> None:
    message = refused(tmp_path, params)
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.epochs", "many", "'many' of type 'str' could not be converted to Integer"),
        ("train.epochs", 2.5, "'2.5' of type 'float' could not be converted to Integer"),
        ("train.epochs", True, "'True' of type 'bool' could not be converted to Integer"),
        ("train.epochs", [1], "'[1]' of type 'ListConfig' could not be converted to Integer"),
        ("train.epochs", {"a": 1}, "could not be converted to Integer"),
        ("train.learning_rate", "fast", "'fast' of type 'str' could not be converted to Float"),
        ("train.resume", "maybe", "'maybe' is not a valid bool"),
        ("train.preview.seed", "a", "'a' of type 'str' could not be converted to Integer"),
        ("sample.prompts", "this movie", "is 'this movie': expected a list"),
        ("sample.prompts", {"a": "b"}, "is {'a': 'b'}: expected a list"),
        ("sample.prompts", ["a", ["b"]], "is ['a', ['b']]: expected a list of texts"),
        ("corpus.folders", [{"a": "b"}], "is [{'a': 'b'}]: expected a list of texts"),
        ("sample.prompts", ["a", None], "NoneType is not a subclass of str"),
        ("train", 5, "is 5: expected keys and values"),
        ("train", [1], "is [1]: expected keys and values"),
        ("train.preview", "long", "is 'long': expected keys and values"),
        ("train.epochs", "???", "is '???': expected a value"),
    ],
)
def test_wrong_types(tmp_path: Path, key: str, value: Any, says: str) -> None:
    message = refused(tmp_path, nested(key, value))
    assert message.startswith(key) and "params.yaml" in message and says in message, message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train.epochs", 0, "1 to 100000"),
        ("model.num_heads", 0, "1 to 1024"),
        ("train.epochs", 100_001, "1 to 100000"),
        ("train.seed", -1, "0 to 2147483647"),
        ("sample.seed", 2**63, "0 to 9223372036854775807"),
        ("sequences.validation_fraction", 0.51, "0 to 0.5"),
        ("sequences.validation_fraction", -0.1, "0 to 0.5"),
        ("train.learning_rate", 0.0, "1e-12 to 1000"),
        ("train.learning_rate", math.nan, "1e-12 to 1000"),
        ("train.learning_rate", math.inf, "1e-12 to 1000"),
        ("train.preview.temperature", -math.inf, "0 to 100"),
        ("sample.min_p", math.nan, "0 to 1"),
        ("sample.repetition_penalty", 0.9, "1 to 100"),
        ("model.dropout", 1.0, "0 to 0.99"),
    ],
)
def test_values_out_of_range(tmp_path: Path, key: str, value: float, allowed: str) -> None:
    assert refused(tmp_path, nested(key, value)) == f"{key} is {value}: allowed is {allowed}"


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.sampled_from(integers()), st.booleans(), st.integers(1, 2**62))
def test_any_whole_number_out_of_range_is_named(
    composed: config.Config,
    tmp_path_factory: pytest.TempPathFactory,
    limits: tuple[str, int, int],
    below: bool,
    beyond: int,
) -> None:
    key, low, high = limits
    value = low - beyond if below else high + beyond
    saved = OmegaConf.structured(composed)
    OmegaConf.update(saved, key, value)
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    config.save(saved, file)
    with pytest.raises(InputError) as raised:
        config.load(file)
    assert f"{key} is {value}: allowed is {low} to {high}" in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train.loss", "token", "tokens, padded (did you mean tokens?)"),
        ("train.optimizer", "sgd", "adam, adamw"),
        ("train.keep", "all", "best, last"),
        ("train.decay", "linear", "constant, cosine"),
        ("model.dtype_policy", "mixed_float16", "auto, float32, mixed_bfloat16"),
        ("sequences.policy", "tail", "head, windows"),
        ("vocabulary.style", "Spaced", "published, spaced"),
        ("corpus.format", "zip", "archive, files"),
        ("corpus.undecodable", "ignore", "fail, replace"),
    ],
)
def test_choices(tmp_path: Path, key: str, value: str, allowed: str) -> None:
    assert f"{key} is {value!r}: allowed are {allowed}" in refused(tmp_path, nested(key, value))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("sample.prompts", [], "is empty: expected texts to go on from"),
        ("sample.prompts", ["a", "  "], "holds an empty entry: expected texts to go on from"),
        ("train.preview.prompts", [], "is empty: expected one text for each"),
        ("corpus.url", "", "is empty: expected http(s)://"),
        ("corpus.folders", [], "is empty: name the folders"),
        ("corpus.folders", ["aclImdb", ""], "holds an empty entry: expected folders"),
        ("tracking.model_name", "", "is empty: expected name of the registered model"),
    ],
)
def test_nothing_where_something_is_needed(tmp_path: Path, key: str, value: Any, says: str) -> None:
    assert f"{key} {says}" in refused(tmp_path, nested(key, value))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (
            {"model": {"embed_dim": 250, "num_heads": 4}},
            "model.embed_dim is 250, not divisible by model.num_heads, 4",
        ),
        (
            {"model": {"context_length": 96}},
            "model.context_length is 96 but sequences.length is 80: set both the same",
        ),
        (
            {"model": {"vocabulary_size": 19_998}},
            "model.vocabulary_size is 19998, below vocabulary.max_tokens, 19999: raise it, or 0",
        ),
        (
            {"sequences": {"validation_fraction": 0}, "train": {"keep": "last"}},
            "train.early_stopping is 2 and train.keep is last, but sequences.validation_fraction "
            "is 0: nothing is held out",
        ),
        (
            {"sequences": {"validation_fraction": 0}, "train": {"early_stopping": 0}},
            "train.early_stopping is 0 and train.keep is best, but sequences.validation_fraction",
        ),
        (
            {"train": {"weight_decay": 0.1}},
            "train.weight_decay is 0.1 but train.optimizer is adam: only adamw decays weights",
        ),
        ({"sample": {"top_p": 0}}, "sample.top_p is 0: allowed is above 0, to 1"),
        ({"train": {"preview": {"top_p": 0}}}, "train.preview.top_p is 0: allowed is above 0"),
        (
            {"sample": {"top_k": 20_000}},
            "sample.top_k is 20000, above vocabulary.max_tokens, 19999",
        ),
        (
            {"vocabulary": {"max_tokens": 5}},
            "train.preview.top_k is 10, above vocabulary.max_tokens, 5",
        ),
        (
            {"corpus": {"sha256": ""}},
            "corpus.sha256 is '': an archive needs 64 hexadecimal digits",
        ),
        (
            {"corpus": {"sha256": "C40F"}},
            "corpus.sha256 is 'C40F': an archive needs 64 hexadecimal digits",
        ),
        ({"tracking": {"alias": "latest"}}, "tracking.alias is 'latest': MLflow reserves it"),
        ({"tracking": {"alias": "champion"}}, "tracking.alias is 'champion': the gate gives that"),
    ],
)
def test_values_that_contradict_each_other(tmp_path: Path, params: Any, says: str) -> None:
    assert says in refused(tmp_path, params)


def test_values_that_agree_again(tmp_path: Path) -> None:
    compose(tmp_path, {"groups": {"corpus": "files"}})  # no checksum, no folders
    compose(tmp_path, {"train": {"optimizer": "adamw", "weight_decay": 0.1}})
    compose(tmp_path, {"model": {"vocabulary_size": 19_999}})
    nothing = {"early_stopping": 0, "keep": "last"}
    compose(tmp_path, {"sequences": {"validation_fraction": 0}, "train": nothing})


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, {"train": {"epochs": 0}, "sample": {"top_p": 0}})
    assert "train.epochs is 0" in message and "sample.top_p is 0" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train: {epochs: }\n", r"^train\.epochs in .*conf/: .*None"),
        ("train: {epochs: many}\n", r"^train\.epochs in .*conf/: .*'many'.*Integer"),
        ("train: {epoch: 3}\n", r"^unknown key train\.epoch in .*conf/.*did you mean epochs\?"),
        ("train: {epochs: 0}\n", r"^train\.epochs is 0: allowed is 1 to 100000"),
        ("train: {epochs: '${nope}'}\n", r"^train\.epochs: .*'nope' not found; set it in conf/"),
        ("train: [\n", r"conf/ can't be composed: .*"),
    ],
)
def test_a_bad_file_of_conf(tmp_path: Path, content: str, says: str) -> None:
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}")
    message = refused(tmp_path, {"groups": {"experiment": "mine"}}, conf)
    assert re.search(says, message, re.DOTALL), message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("style: spaced\n", r"^vocabulary\.max_tokens: .*missing mandatory value.*; set it in"),
        ("style: spaced\nmax_tokens: ???\n", r"^vocabulary\.max_tokens in .*conf/ is '\?\?\?'"),
    ],
)
def test_a_key_that_is_left_open(tmp_path: Path, content: str, says: str) -> None:
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "vocabulary" / "mine.yaml").write_text(content)
    assert re.search(says, refused(tmp_path, {"groups": {"vocabulary": "mine"}}, conf))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train: [", "can't be read as YAML"),
        ("train: {epochs: 1, epochs: 2}", "can't be read as YAML: .*duplicate key epochs"),
        ("\x00", "can't be read as YAML"),
        ("a: !!python/object:os.system x", "can't be read as YAML"),
        ("5", "can't be read as YAML"),
        ("- train", "must hold keys and values, not a list"),
    ],
)
def test_a_params_file_that_is_no_mapping(tmp_path: Path, content: str, says: str) -> None:
    message = refused(tmp_path, content)
    assert message.startswith(str(tmp_path / "params.yaml"))
    assert re.search(says, message, re.DOTALL), message


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}",
        "x${oc.env:MLFLOW_TRACKING_PASSWORD,none}",
        "${oc.decode:'1'}",
        "${oc.create:{}}",
        "${now:%Y}",
        "${hydra:runtime.cwd}",
        "${${corpus.url}}",
        "\\${corpus.url}",
    ],
)
def test_nothing_is_interpolated_but_other_values(
    tmp_path: Path, monkeypatch: Any, text: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    message = refused(tmp_path, {"sample": {"prompts": ["fine", text]}})
    assert message.startswith(f"sample.prompts in {tmp_path}"), message
    assert "is allowed, such as ${sequences.length}" in message and "hunter2" not in message


@pytest.mark.parametrize("text", ["${corpus.url", "${a b}", "${}"])
def test_an_interpolation_that_can_not_be_read(tmp_path: Path, text: str) -> None:
    assert "sample.prompts" in refused(tmp_path, {"sample": {"prompts": [text]}})


def test_no_interpolation_comes_in_by_another_file(tmp_path: Path, composed: config.Config) -> None:
    change = {"sample": {"prompts": ["${oc.env:HOME}"]}}
    conf = shutil.copytree(CONF, tmp_path / "conf")
    made = "# @package _global_\n" + yaml.safe_dump(change)
    (conf / "experiment" / "mine.yaml").write_text(made)
    messages = [refused(tmp_path, {"groups": {"experiment": "mine"}}, conf)]
    plain = config.as_dict(composed)
    plain["sample"]["prompts"] = ["${oc.env:HOME}"]
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(InputError) as raised:
        config.load(tmp_path / "resolved.yaml")
    for message in [*messages, str(raised.value)]:
        assert message.startswith(f"sample.prompts in {tmp_path}"), message


def test_a_value_may_be_another_one(tmp_path: Path) -> None:
    text = "model: {embed_dim: '${model.key_dim}', key_dim: 64}"
    assert compose(tmp_path, text).model.embed_dim == 64
    message = refused(tmp_path, {"corpus": {"url": "${corpus.url}"}})
    assert message.startswith("corpus.url")


@pytest.mark.parametrize(
    ("key", "value", "is_"),
    [
        ("corpus.folders", "${train.epochs}", "2"),
        ("sample.prompts", "${corpus.format}", "'archive'"),
    ],
)
def test_an_interpolation_of_another_type(tmp_path: Path, key: str, value: str, is_: str) -> None:
    assert f"{key} is {is_}: expected a list of texts" in refused(tmp_path, nested(key, value))


@pytest.mark.parametrize(
    "text", ["a; rm -rf x", "$(touch x)", "`id`", "a && b", "| sh", "$HOME", "\n"]
)
def test_what_a_shell_would_run_is_a_text(tmp_path: Path, text: str) -> None:
    made = compose(
        tmp_path, {"sample": {"prompts": [f"word {text}"]}, "corpus": {"url": f"x{text}"}}
    )
    config.save(made, tmp_path / "resolved.yaml")
    again = config.load(tmp_path / "resolved.yaml")
    assert (again.sample.prompts, again.corpus.url) == ([f"word {text}"], f"x{text}")


@pytest.mark.parametrize("text", ['"a\\0b"', '"a\\ud800b"'])
def test_characters_that_no_file_can_hold(tmp_path: Path, text: str) -> None:
    message = refused(tmp_path, f"sample: {{prompts: [{text}]}}\n")
    assert message.startswith("sample.prompts in ") and "a NUL or half a character" in message
    message.encode()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tracking.model_name", "../x", "allowed are up to 200 letters"),
        ("tracking.model_name", "a/b", "allowed are up to 200 letters"),
        ("tracking.model_name", "a:b", "allowed are up to 200 letters"),
        ("tracking.model_name", "a' or name like '%", "allowed are up to 200 letters"),
        ("tracking.model_name", "x" * 201, "allowed are up to 200 letters"),
        ("tracking.alias", "a/b", "allowed are up to 200 letters"),
        ("tracking.alias", "V7", "MLflow reserves it"),
        ("corpus.folders", ["/etc/x/y"], "no folder of an archive lies outside"),
        ("corpus.folders", ["a/../../b"], "no folder of an archive lies outside"),
        ("corpus.url", "https://me:hunter2@example.org/a.tar.gz", "put them into ~/.netrc"),
        ("corpus.url", "HTTP://token@example.org/a", "put them into ~/.netrc"),
    ],
)
def test_names_and_paths_that_lead_elsewhere(
    tmp_path: Path, key: str, value: Any, says: str
) -> None:
    message = refused(tmp_path, nested(key, value))
    assert message.startswith(key) and says in message and "hunter2" not in message
    compose(
        tmp_path, {"corpus": {"url": "file:///home/a@b/c"}, "tracking": {"model_name": "My 2.0"}}
    )


def test_a_missing_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    for read in (lambda: config.compose(CONF, missing), lambda: config.load(missing)):
        with pytest.raises(InputError, match=r"missing\.yaml is missing; run `dvc repro`"):
            read()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": None}, "train"),
        ({"tain": 5}, "unknown key tain in"),
        ({"sample": {}}, "sample.max_tokens: "),
    ],
)
def test_a_resolved_file_that_was_altered(
    tmp_path: Path, composed: config.Config, change: Any, says: str
) -> None:
    file = tmp_path / "resolved.yaml"
    file.write_text(yaml.safe_dump({**config.as_dict(composed), **change}))
    with pytest.raises(InputError) as raised:
        config.load(file)
    assert str(raised.value).startswith(says)
