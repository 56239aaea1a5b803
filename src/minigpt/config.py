"""The configuration: one dataclass per section, composed by Hydra, validated before anything runs.

Each field carries its documentation and its range, so that both are written once.  A value that
switches something off is 0 (never null: in params.yaml null means "as composed").
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from minigpt.common import files
from minigpt.common.errors import InputError

_REFERENCE = re.compile(r"(?<!\\)\$\{[a-z0-9_.]+\}")  # ${section.key}, not \${section.key}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,199}")  # no path, no part of a query

CONF = Path("conf")
PARAMS = Path("params.yaml")
RESOLVED = Path("resolved.yaml")


def _value(
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    empty: bool = False,
) -> Any:
    """A mandatory field with its documentation and what is allowed in it."""
    return field(
        default=MISSING,
        metadata={"doc": doc, "low": low, "high": high, "choices": choices, "empty": empty},
    )


@dataclass
class CorpusConfig:
    """Where the reviews come from."""

    format: str = _value(
        "an archive like IMDB's, or files of your own", choices=("archive", "files")
    )
    url: str = _value("http(s)://, file:// or a path; files: a folder, a .jsonl or a .parquet")
    sha256: str = _value("checksum of the archive, 64 hexadecimal digits", empty=True)
    folders: list[str] = _value("folders of the archive that hold the reviews", empty=True)
    text_column: str = _value("the column of a .jsonl or .parquet that holds the text")
    undecodable: str = _value(
        "what to do with bytes that aren't UTF-8", choices=("fail", "replace")
    )
    max_bytes: int = _value(
        "most bytes: of the unpacked archive, or of the files' texts", low=1, high=10**15
    )
    max_members: int = _value("most members of the archive, or reviews", low=1, high=10**9)
    max_ratio: float = _value(
        "most bytes that one byte of the archive may unpack to", low=1, high=100_000
    )


@dataclass
class VocabularyConfig:
    """How text becomes tokens."""

    style: str = _value("standardisation", choices=("published", "spaced"))
    max_tokens: int = _value("entries, '' and [UNK] included", low=3, high=10_000_000)


@dataclass
class SequencesConfig:
    """How reviews become training sequences."""

    policy: str = _value(
        "head: the first tokens of a review; windows: all of them", choices=("head", "windows")
    )
    length: int = _value("targets in a sequence (it holds one token more)", low=1, high=65_536)
    validation_fraction: float = _value("share of the reviews held out", low=0, high=0.5)
    shards: int = _value("TFRecord files of the training split", low=1, high=10_000)


@dataclass
class ModelConfig:
    """The miniature GPT."""

    vocabulary_size: int = _value("rows of the head; 0: as many as entries", low=0, high=10_000_000)
    context_length: int = _value("positions the model has, in tokens", low=1, high=65_536)
    embed_dim: int = _value("width of a token's embedding", low=1, high=65_536)
    num_blocks: int = _value("transformer blocks", low=1, high=1_000)
    num_heads: int = _value("attention heads", low=1, high=1_024)
    key_dim: int = _value("width of one head's keys, queries and values", low=1, high=65_536)
    feed_forward_dim: int = _value("hidden width of a block's feed-forward", low=1, high=1_048_576)
    dropout: float = _value("share dropped after attention and feed-forward", low=0, high=0.99)
    tied_embeddings: bool = _value("whether the head reuses the token embeddings")
    dtype_policy: str = _value(
        "Keras dtype policy; auto: mixed_bfloat16 where the processor multiplies in bfloat16",
        choices=("auto", "float32", "mixed_bfloat16"),
    )


@dataclass
class SamplingConfig:
    """How the next token is chosen."""

    max_tokens: int = _value("tokens written after the prompt", low=1, high=100_000)
    temperature: float = _value("0: greedy", low=0, high=100)
    top_k: int = _value("keep the k most probable tokens; 0: all", low=0, high=10_000_000)
    top_p: float = _value("keep the most probable tokens up to this mass; 1: all", low=0, high=1)
    min_p: float = _value("keep tokens of this share of the top one's; 0: all", low=0, high=1)
    repetition_penalty: float = _value("divides the logits of tokens seen; 1: off", low=1, high=100)
    allow_unknown: bool = _value("whether [UNK] may be written")
    seed: int = _value("the same seed writes the same text", low=0, high=2**63 - 1)


@dataclass
class PreviewConfig(SamplingConfig):
    """The texts written after each epoch."""

    prompts: list[str] = _value("one text for each")


@dataclass
class TrainConfig:
    """How the model is trained."""

    epochs: int = _value("passes over the training sequences", low=1, high=100_000)
    batch_size: int = _value("sequences in a step", low=1, high=1_000_000)
    loss: str = _value(
        "tokens: mean over real tokens; padded: the published mean, padding included",
        choices=("tokens", "padded"),
    )
    optimizer: str = _value("Keras optimizer", choices=("adam", "adamw"))
    learning_rate: float = _value("peak learning rate", low=1e-12, high=1_000)
    warmup_steps: int = _value("steps of linear warm-up; 0: none", low=0, high=1_000_000_000)
    decay: str = _value("after the warm-up, to the last step", choices=("constant", "cosine"))
    weight_decay: float = _value("decoupled weight decay (adamw); 0: none", low=0, high=1)
    clip_norm: float = _value("global gradient norm; 0: not clipped", low=0, high=1_000_000)
    early_stopping: int = _value(
        "epochs without a better val_loss; 0: never stop", low=0, high=10_000
    )
    keep: str = _value("the weights in the model directory", choices=("best", "last"))
    checkpoint_steps: int = _value("steps from a checkpoint to the next", low=1, high=1_000_000_000)
    resume: bool = _value("whether an interrupted run goes on from its last checkpoint")
    jit_compile: bool = _value("XLA (slower on a CPU with the TensorFlow backend)")
    seed: int = _value("weights, dropout and shuffling", low=0, high=2**31 - 1)
    preview: PreviewConfig = field(default_factory=PreviewConfig)


@dataclass
class SampleConfig(SamplingConfig):
    """The reviews that the sample stage writes."""

    prompts: list[str] = _value("texts to go on from")
    reviews_per_prompt: int = _value("reviews for each prompt", low=1, high=10_000)


@dataclass
class EvaluateConfig(SamplingConfig):
    """What the model is compared with, and the reviews that are counted."""

    prompts: list[str] = _value("texts to go on from, in turn")
    reviews: int = _value("reviews to write and count", low=2, high=100_000)
    ngram_order: int = _value("words of the n-gram model's n-grams", low=1, high=10)


@dataclass
class GateConfig:
    """Which model is registered, and which of them takes the champion's place."""

    max_perplexity: float = _value("largest held-out perplexity; 0: off", low=0, high=1e12)
    max_copied_run: float = _value(
        "most words that all but 5% of the sampled reviews copy in a row; 0: off",
        low=0,
        high=100_000,
    )
    max_unk_share: float = _value("largest share of [UNK] among the targets; 0: off", low=0, high=1)
    min_improvement: float = _value(
        "bits per byte by which it must be better than the champion; 0: any", low=0, high=8
    )


@dataclass
class RequestConfig:
    """What one request may ask of the registered model, whose server can't stop a prediction."""

    max_prompts: int = _value("prompts", low=1, high=1_000_000)
    max_prompt_bytes: int = _value("bytes of all prompts, as UTF-8", low=1, high=100_000_000)
    # 8: what the example asks for, as which MLflow tries the model out.
    max_tokens: int = _value("tokens written after a prompt", low=8, high=100_000)
    max_total_tokens: int = _value("tokens written after all prompts", low=8, high=100_000_000)


@dataclass
class TrackingConfig:
    """Where the model goes in the MLflow registry, and what may be asked of it there."""

    model_name: str = _value("name of the registered model")
    alias: str = _value("alias that the new version takes; the gate gives @champion")
    request: RequestConfig = field(default_factory=RequestConfig)


@dataclass
class Config:
    """Every section; a stage reads only its own."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def compose(conf: Path = CONF, params: Path = PARAMS) -> Config:
    """Composes conf/ as params.yaml selects, lays its values over, and validates the whole.

    Hydra's Compose API: https://hydra.cc/docs/advanced/compose_api/.

    Args:
        conf: folder of config groups; its config.yaml names the default choices.
        params: `groups:` picks one file per group; every other key is laid over the composed
            value.  null leaves things as composed.

    Returns:
        The validated configuration.

    Raises:
        InputError: an unknown group, choice or key, a wrong type, a value out of range, or values
            that contradict each other.
    """
    overrides = _without_nulls(_read(params))
    groups = overrides.pop("groups", {})
    if not isinstance(groups, dict):
        raise InputError(f"groups in {params} is {groups!r}: expected a choice for each group")
    composed = _hydra(conf, groups)
    merged = _merge(OmegaConf.structured(Config), composed, f"{conf}/")
    merged = _merge(merged, OmegaConf.create(overrides), str(params))
    return _check(merged)


def load(path: Path = RESOLVED) -> Config:
    """Reads a resolved configuration.

    Raises:
        InputError: the file is missing or is not a valid configuration.
    """
    return _check(_merge(OmegaConf.structured(Config), OmegaConf.create(_read(path)), str(path)))


def save(config: Config, path: Path = RESOLVED) -> None:
    """Writes a resolved configuration as YAML, beside its place and then renamed."""
    head = "# Written by the compose stage from conf/ and params.yaml; edit those, not this file.\n"
    with files.replacing(path) as beside:
        beside.write_text(head + OmegaConf.to_yaml(OmegaConf.structured(config)))


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        read = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run `dvc repro` in the project's folder") from None
    except Exception as error:  # PyYAML and OmegaConf raise many kinds for a malformed file
        raise InputError(f"{path} can't be read as YAML: {error}") from None
    if not isinstance(read, DictConfig):
        raise InputError(f"{path} must hold keys and values, not a list")
    return {str(key): value for key, value in OmegaConf.to_container(read).items()}  # type: ignore[union-attr]


def _without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    pruned = {k: _without_nulls(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in pruned.items() if v is not None and v != {}}


def _hydra(conf: Path, groups: dict[str, Any]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from yaml import YAMLError

    known = sorted(folder.name for folder in conf.iterdir() if folder.is_dir())
    for group, choice in groups.items():
        if group not in known:
            raise InputError(f"unknown group groups.{group}; {_allowed(str(group), known)}")
        choices = sorted(file.stem for file in (conf / group).glob("*.yaml"))
        if choice not in choices:
            raise InputError(
                f"groups.{group} is {choice!r}, but {conf / group}/ has no such file; "
                f"{_allowed(str(choice), choices)}"
            )
    picked = [f"+{g}={c}" if g == "experiment" else f"{g}={c}" for g, c in groups.items()]
    try:
        with initialize_config_dir(config_dir=str(conf.resolve()), version_base="1.3"):
            return hydra_compose(config_name="config", overrides=picked)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise InputError(f"{conf}/ can't be composed: {error}") from None


def _merge(base: Any, over: DictConfig, source: str) -> Any:
    plain = OmegaConf.to_container(over)
    for key, value, expected in _misshapen(Config, plain, ""):
        raise InputError(f"{key} in {source} is {value!r}: expected {expected}")
    for key, text in _texts(plain, ""):
        # A resolver such as oc.env would copy secrets into resolved.yaml, which is committed.
        if "${" in _REFERENCE.sub("", text):
            raise InputError(
                f"{key} in {source} is {text!r}: of `${{...}}` only the key of another value is "
                "allowed, such as ${sequences.length}"
            )
        if re.search("[\0\ud800-\udfff]", text):
            raise InputError(f"{key} in {source} is {text!r}: it holds a NUL or half a character")
    try:
        return OmegaConf.merge(base, over)
    except ConfigKeyError as error:
        *parents, key = str(error.full_key).split(".")
        node = OmegaConf.select(base, ".".join(parents)) if parents else base
        raise InputError(
            f"unknown key {error.full_key} in {source}; {_allowed(key, sorted(map(str, node)))}"
        ) from None
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key} in {source}: {str(error).splitlines()[0]}") from None


def _misshapen(section: Any, over: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Values that OmegaConf refuses without naming their key, or takes for "as it was" (???)."""
    for item in fields(section):
        name, value = prefix + item.name, over.get(item.name)
        if value is None or (isinstance(value, str) and "${" in value):
            continue
        if value == "???":
            yield name, value, "a value"
        elif is_dataclass(item.type) and isinstance(value, dict):
            yield from _misshapen(item.type, value, f"{name}.")
        elif is_dataclass(item.type):
            yield name, value, "keys and values"
        elif item.type == list[str] and (
            not isinstance(value, list) or any(isinstance(entry, list | dict) for entry in value)
        ):
            yield name, value, "a list of texts"


def _texts(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """The texts of a configuration, each with its key."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _texts(value, f"{key}.{name}".removeprefix("."))
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)


def _allowed(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"allowed are {', '.join(known)}{hint}"


def _check(merged: Any) -> Config:
    try:
        resolved = OmegaConf.to_container(merged, resolve=True)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{error.full_key}: {reason}; set it in conf/ or params.yaml") from None
    assert isinstance(config, Config)
    for key, value, expected in _misshapen(Config, resolved, ""):  # by what ${...} stood for
        raise InputError(f"{key} is {value!r}: expected {expected}; set it in conf/ or params.yaml")
    problems = [*_ranges(config, ""), *_contradictions(config)]
    if problems:
        raise InputError("; ".join(problems))
    return config


def _ranges(section: Any, prefix: str) -> Iterator[str]:
    for item in fields(section):
        value, name, meta = getattr(section, item.name), prefix + item.name, item.metadata
        if not meta:
            yield from _ranges(value, f"{name}.")
        elif meta["choices"]:
            if value not in meta["choices"]:
                yield f"{name} is {value!r}: {_allowed(value, list(meta['choices']))}"
        elif meta["low"] is not None:
            if not meta["low"] <= value <= meta["high"]:  # NaN fails too
                yield f"{name} is {value}: allowed is {meta['low']} to {meta['high']}"
        elif isinstance(value, str | list):
            if not meta["empty"] and not value:
                yield f"{name} is empty: expected {meta['doc']}"
            if isinstance(value, list) and not all(entry.strip() for entry in value):
                yield f"{name} holds an empty entry: expected {meta['doc']}"


def _contradictions(c: Config) -> Iterator[str]:
    if c.corpus.format == "archive":
        if not re.fullmatch(r"[0-9a-f]{64}", c.corpus.sha256):
            yield f"corpus.sha256 is {c.corpus.sha256!r}: an archive needs 64 hexadecimal digits"
        if not c.corpus.folders:
            yield "corpus.folders is empty: name the folders of the archive that hold reviews"
        for folder in c.corpus.folders:
            if folder.startswith("/") or ".." in folder.split("/"):
                yield f"corpus.folders has {folder!r}: no folder of an archive lies outside of it"
    if re.match(r"\w+://[^/]*@", c.corpus.url):
        yield (
            "corpus.url holds a name or a password, and resolved.yaml with it is committed: put "
            "them into ~/.netrc"
        )
    if c.model.num_heads and c.model.embed_dim % c.model.num_heads:  # 0 is out of range
        yield (
            f"model.embed_dim is {c.model.embed_dim}, not divisible by model.num_heads, "
            f"{c.model.num_heads}"
        )
    if c.model.context_length != c.sequences.length:
        yield (
            f"model.context_length is {c.model.context_length} but sequences.length is "
            f"{c.sequences.length}: set both the same (the model trains on whole sequences, and "
            "positions past their end would never be trained)"
        )
    if 0 < c.model.vocabulary_size < c.vocabulary.max_tokens:
        yield (
            f"model.vocabulary_size is {c.model.vocabulary_size}, below vocabulary.max_tokens, "
            f"{c.vocabulary.max_tokens}: raise it, or 0 to take the vocabulary's own size"
        )
    if not c.sequences.validation_fraction and (c.train.early_stopping or c.train.keep == "best"):
        yield (
            f"train.early_stopping is {c.train.early_stopping} and train.keep is {c.train.keep}, "
            "but sequences.validation_fraction is 0: nothing is held out to tell; set it above 0, "
            "or early_stopping to 0 and keep to last"
        )
    if c.train.weight_decay and c.train.optimizer != "adamw":
        yield (
            f"train.weight_decay is {c.train.weight_decay} but train.optimizer is "
            f"{c.train.optimizer}: only adamw decays weights"
        )
    if not _NAME.fullmatch(c.tracking.model_name):
        yield (
            f"tracking.model_name is {c.tracking.model_name!r}: allowed are up to 200 letters, "
            "digits, spaces and any of `_.-`, a letter or a digit first"
        )
    if re.fullmatch(r"latest|v\d+", c.tracking.alias, re.IGNORECASE):
        yield f"tracking.alias is {c.tracking.alias!r}: MLflow reserves it, choose another"
    elif not re.fullmatch(r"[A-Za-z0-9_-]{1,200}", c.tracking.alias):
        yield (
            f"tracking.alias is {c.tracking.alias!r}: allowed are up to 200 letters, digits and "
            "any of `_-`"
        )
    if c.tracking.alias == "champion":
        yield "tracking.alias is 'champion': the gate gives that one, choose another"
    for name, sampling in (
        ("sample", c.sample),
        ("evaluate", c.evaluate),
        ("train.preview", c.train.preview),
    ):
        if sampling.top_p == 0:
            yield f"{name}.top_p is 0: allowed is above 0, to 1 (1: off)"
        if sampling.top_k > c.vocabulary.max_tokens:
            yield (
                f"{name}.top_k is {sampling.top_k}, above vocabulary.max_tokens, "
                f"{c.vocabulary.max_tokens}"
            )
