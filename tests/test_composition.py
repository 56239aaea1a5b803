"""What conf/ and params.yaml compose to, and what is said of what does not compose."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt import composition, config
from minigpt.common.errors import InputError
from minigpt.config import Config

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
FILES = {folder.name: sorted(folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()}

# The published script's settings, key by key.
SEED = yaml.safe_load("""
corpus:
  format: archive
  url: https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz
  sha256: c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe
  folders: [aclImdb/train/pos, aclImdb/train/neg, aclImdb/test/pos, aclImdb/test/neg]
  text_column: text
  undecodable: fail
  white_space: collapse
  max_bytes: 2000000000
  max_members: 1000000
  max_ratio: 100.0
vocabulary: {style: published, max_tokens: 19999, min_count: 1, sample_bytes: 10000000}
sequences: {policy: head, length: 80, validation_fraction: 0.0, shards: 8}
model:
  {vocabulary_size: 20000, context_length: 80, positions: learned, token_shift: false,
   embed_dim: 256, num_blocks: 1, num_heads: 2, key_dim: 256, kernels: heads, feed_forward_dim: 256,
   dropout: 0.1, tied_embeddings: false, cutoff: 0, tail_dim: 128, dtype_policy: float32}
train:
  {epochs: 25, batch_size: 128, loss: padded, optimizer: adam, learning_rate: 0.001,
   matrix_rate: 0.01, warmup_steps: 0, decay: constant, weight_decay: 0.0, clip_norm: 0.0,
   early_stopping: 0,
   keep: last, backend: tensorflow, jit_compile: false, seed: 1}
preview: &sampling
  {max_tokens: 40, temperature: 1.0, top_k: 10, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0,
   allow_unknown: true, seed: 1, prompts: [this movie is]}
checkpointing: {steps: 200, resume: true}
logging: {steps: 50}
evaluate:
  {<<: *sampling, max_tokens: 120, top_k: 0, allow_unknown: false,
   prompts: &prompts [this movie is, the acting was, i loved, what a waste of],
   reviews: 200, ngram_order: 5, sample_bytes: 100000000}
sample: {<<: *sampling, prompts: *prompts, reviews_per_prompt: 2}
gate: {max_perplexity: 1000.0, max_copied_run: 50.0, max_unk_share: 0.2, min_improvement: 0.005,
  promote: workspace}
tracking:
  model_name: minigpt
  alias: challenger
  request:
    {max_prompts: 256, max_prompt_bytes: 100000, max_tokens: 1000, max_total_tokens: 10000}
serving:
  {slots: 32, queue: 64, max_body_bytes: 1000000, max_connections: 1000, slow_s: 10, drain_s: 30}
""")


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """What conf/ composes to, with nothing laid over."""
    return compose(tmp_path_factory.mktemp("defaults"), {})


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy of conf/ to edit."""
    return shutil.copytree(CONF, tmp_path / "conf")


def compose(folder: Path, params: Any, conf: Path = CONF) -> Config:
    """Composes with a params.yaml that is given as text, or as what it holds."""
    file = folder / "params.yaml"
    file.write_text(params if isinstance(params, str) else yaml.safe_dump(params), "utf-8")
    return composition.compose(conf, file)


def refused(folder: Path, params: Any, conf: Path = CONF) -> str:
    """Composes what must be refused; returns the message without the folder."""
    with pytest.raises(InputError) as raised:
        compose(folder, params, conf)
    return str(raised.value).replace(f"{folder}/", "")


def flat(config: Config) -> dict[str, Any]:
    """Returns the plain values of a configuration, each under its full name."""
    plain = config.model_dump(mode="json")
    return {f"{name}.{key}": value for name in plain for key, value in plain[name].items()}


def test_each_section_is_a_group_that_params_name() -> None:
    sections = set(Config.model_fields) - {"checkpointing", "logging", "serving"}
    groups = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))["groups"]
    assert sections | {"experiment"} == set(FILES) == set(groups)


@pytest.mark.parametrize("number", range(max(map(len, FILES.values()))))
def test_each_file_composes_and_states_no_default(tmp_path: Path, number: int) -> None:
    picked = {group: found[number % len(found)] for group, found in FILES.items()}
    experiment = picked.pop("experiment")
    if picked["vocabulary"].stem == "bpe":  # which works with one of them only
        picked["sequences"] = CONF / "sequences/packed.yaml"
    compose(tmp_path, {"groups": {"experiment": experiment.stem}})
    params: dict[str, Any] = {"groups": {group: file.stem for group, file in picked.items()}}
    if picked["engine"].stem == "ray":
        params["train"] = {"backend": "jax"}
    made = flat(compose(tmp_path, params))
    for group, file in picked.items():
        stated = yaml.safe_load(file.read_text("utf-8")) or {}
        differs_from_another_file = bool(stated.pop("defaults", None))
        fields = Config.model_fields[group].annotation.model_fields  # type: ignore[union-attr]
        for key, value in stated.items():
            assert made[f"{group}.{key}"] == value or "${" in str(value)
            assert fields[key].default != value or differs_from_another_file


def test_the_committed_resolved_yaml_is_up_to_date() -> None:
    made = composition.compose(CONF, ROOT / "params.yaml")
    assert made == config.load(ROOT / "resolved.yaml"), "run `dvc repro compose`, and commit it"


def test_the_seed_experiment_is_the_published_script(tmp_path: Path) -> None:
    made = compose(tmp_path, {"groups": {"experiment": "seed"}})
    composed = made.model_dump(mode="json")
    for section, values in SEED.items():  # a key that is new may have any neutral default
        assert {key: composed[section].get(key) for key in values} == values, section


def test_null_leaves_things_as_composed(tmp_path: Path, defaults: Config) -> None:
    nulls = {"groups": {"train": None}, "corpus": None, "train": {"epochs": None}, "sample": {}}
    assert compose(tmp_path, {**nulls, "logging": {"steps": None}}) == defaults
    assert compose(tmp_path, "groups:\n") == defaults


def test_a_value_beats_a_group_and_a_group_an_experiment(
    tmp_path: Path, defaults: Config, conf: Path
) -> None:
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [override /sample: greedy, override /sequences: head]\n"
        "train: {batch_size: 7, epochs: 9}\n",
        "utf-8",
    )
    mine = {"sample.temperature": 0.0, "sample.reviews_per_prompt": 1, "sequences.policy": "head"}
    mine |= {"sequences.length": 80, "model.context_length": 80}
    mine |= {"train.batch_size": 7, "train.epochs": 9}
    made = compose(tmp_path, {"groups": {"experiment": "mine"}}, conf)
    assert flat(made) == flat(defaults) | mine
    params = {"groups": {"experiment": "mine", "sequences": "windows"}, "train": {"epochs": 3}}
    mine |= {"sequences.policy": "windows", "train.epochs": 3}
    assert flat(compose(tmp_path, params, conf)) == flat(defaults) | mine


def test_a_value_may_be_another_one(tmp_path: Path) -> None:
    text = (
        "model: {embed_dim: '${model.key_dim}', key_dim: 64}\n"
        "sequences: {length: '${model.feed_forward_dim}'}\n"  # conf/model/ refers to the length
        "checkpointing: {steps: '${logging.steps}'}\n"  # a default
        "evaluate: {prompts: '${sample.prompts}'}\n"
    )
    made = compose(tmp_path, text)
    assert (made.model.embed_dim, made.model.context_length) == (64, 1024)
    assert made.checkpointing.steps == 50
    assert made.evaluate.prompts == made.sample.prompts


# What is refused: the message names the key, the file, the value and what is allowed.


def test_unknown_choices(tmp_path: Path) -> None:
    groups = {"tain": 1, 1: "fast", "train": "fsat", "sample": "../train/fast", "model": ["x"]}
    known = ", ".join(sorted(FILES))
    samples = "allowed are greedy, nucleus, published"
    assert refused(tmp_path, {"groups": groups}).replace(" in params.yaml", "").splitlines() == [
        f"unknown group groups.tain: allowed are {known} (did you mean train?)",
        f"unknown group groups.1: allowed are {known}",
        "groups.train is 'fsat': allowed are default, fast, published (did you mean fast?)",
        f"groups.sample is '../train/fast': {samples}",
        "groups.model is ['x']: allowed are deep, minigpt, published",
    ]
    assert refused(tmp_path, {"groups": "fast"}) == (
        "groups in params.yaml is 'fast': allowed is a choice per group"
    )


def test_unknown_keys(tmp_path: Path) -> None:
    params = {"tain": {}, "train": {"epoch": 3, 1: 2, "a\nb": 2}, "epochs": 3}
    params |= {"tracking": {"request": {"x": 9}}}
    lines = refused(tmp_path, params).splitlines()
    assert [re.sub(": .*, ", " ... ", line) for line in lines] == [
        "unknown key train.epoch in params.yaml ... seed (did you mean epochs?)",
        "unknown key train[1] in params.yaml ... seed",
        "unknown key train.a\\nb in params.yaml ... seed",
        "unknown key tracking.request.x in params.yaml ... max_total_tokens",
        "unknown key epochs in params.yaml ... serving",
        "unknown key tain in params.yaml ... serving (did you mean train?)",
    ]


def test_all_problems_are_told_at_once(tmp_path: Path, conf: Path) -> None:
    (conf / "preview" / "default.yaml").write_text("prompts: [5]\ntop_k: 30_000\n", "utf-8")
    params: dict[str, Any] = {
        "corpus": {"sha256": "", "folders": []},
        "model": {"embed_dim": 3, "dtype_policy": "${nowhere}"},
        "train": {"epochs": 0, "epoch": 1, "weight_decay": 1},
        "sample": {"top_p": 0, "prompts": ["${oc.env:HOME}"]},
        "logging": {"steps": "???"},
    }
    assert [line.split(":")[0] for line in refused(tmp_path, params, conf).splitlines()] == [
        "model.dtype_policy in params.yaml is '${nowhere}'",
        "logging.steps in params.yaml is '???'",
        "sample.prompts[0] in params.yaml is '${oc.env",
        "corpus.sha256 is ''",
        "corpus.folders is empty",
        "train.epochs in params.yaml is 0",
        "unknown key train.epoch in params.yaml",
        "preview.max_tokens in conf/ is missing",
        "preview.prompts[0] in conf/ is 5",
        "sample.top_p in params.yaml is 0",
    ]


def test_a_contradiction_is_not_told_where_the_choice_of_a_file_is_wrong(tmp_path: Path) -> None:
    params = {"groups": {"train": "publishd"}, "sequences": {"validation_fraction": 0}}
    params |= {"model": {"num_heads": 3}}
    assert refused(tmp_path, params).startswith("groups.train in params.yaml is 'publishd': ")
    lines = refused(tmp_path, params | {"tracking": {"alias": "champion"}}).splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["groups.train", "tracking.alias"]


def test_a_bad_value_in_conf(tmp_path: Path, conf: Path) -> None:
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "train: {epochs: , epoch: 3, seed: '${nope}'}\n"
        "sample: {prompts: ['${oc.env:HOME}', '???']}\n",
        "utf-8",
    )
    message = refused(tmp_path, {"groups": {"experiment": "mine"}}, conf)
    assert [line.rpartition(":")[0] for line in message.splitlines()] == [
        "train.seed in conf/ is '${nope}'",
        "sample.prompts[0] in conf/ is '${oc.env:HOME}'",
        "sample.prompts[1] in conf/ is '???'",
        "train.epochs in conf/ is None",
        "unknown key train.epoch in conf/",
    ]


@pytest.mark.parametrize("content", ["train: [", "train: !!bool maybe", "5", "- train"])
def test_a_bad_file_of_conf(tmp_path: Path, conf: Path, content: str) -> None:
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}\n", "utf-8")
    message = refused(tmp_path, {"groups": {"experiment": "mine"}}, conf)
    assert message.startswith("conf/ can't be composed: ")
    assert refused(tmp_path, {}, tmp_path / "none").startswith("none/ is missing; run `dvc repro`")


def test_nothing_is_interpolated_but_other_values(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    texts = ["${oc.env:HOME}", "x${oc.env:MLFLOW_TRACKING_PASSWORD,none}", "${oc.decode:'1'}"]
    texts += ["${now:%Y}", "${hydra:runtime.cwd}", "${${corpus.url}}", "\\${corpus.url}"]
    texts += ["a ${corpus.url}"]
    only = "of `${...}` only the key of another value is allowed, such as ${sequences.length}"
    assert refused(tmp_path, {"sample": {"prompts": texts}}).splitlines() == [
        f"sample.prompts[{at}] in params.yaml is {text!r}: {only}" for at, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("${train.nope}", "is '${train.nope}': train.nope has no value"),
        ("${.seed}", "is '${.seed}': .seed has no value"),
        ("${sample.prompts}", "is '${sample.prompts}': sample.prompts leads back to itself"),
        ("${sample}", "is '${sample}': sample holds references itself"),
        ("${train.seed}", "is 1: allowed is a list, not empty; an entry is a text in valid"),
        ("${logging}", "is {'steps': 50}: allowed is a list, not empty; an entry is a text in"),
    ],
)
def test_a_reference_that_is_refused(tmp_path: Path, value: str, says: str) -> None:
    message = refused(tmp_path, {"sample": {"prompts": value}})
    assert message.startswith(f"sample.prompts in params.yaml {says}") and "\n" not in message
