"""The configuration: a pydantic model for each section, validated before anything runs.

Hydra composes conf/, params.yaml is laid over it, and the `compose` stage writes the result to
resolved.yaml, where every stage reads its own section. A field states its range, its documentation
and, where there is a neutral value, its default. A value that switches something off is 0: in
params.yaml null means "as composed".
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from minigpt.common import files, paths, validation
from minigpt.common.errors import InputError
from minigpt.common.validation import Loc, Section, cross_check, is_section, named, shown, validate

__all__ = ["validate"]  # beside what is defined here

CONF = Path("conf")
PARAMS = Path("params.yaml")

_Layers = list[tuple[str, dict[str, Any]]]  # the name of a file or a folder, and what it holds

_REFERENCE = re.compile(r"(?<!\\)\$\{([a-z0-9_.]+)\}")  # ${section.key}, not \${section.key}


def _without_password(url: str) -> str:
    if re.match(r"\w+://[^/]*@", url):
        raise PydanticCustomError(
            validation.PROBLEM,
            "holds a name or a password: put them into ~/.netrc, since resolved.yaml is committed",
        )
    return url


def _inside(folder: str) -> str:
    if folder.startswith("/") or ".." in folder.split("/"):
        raise ValueError
    return folder


def _not_reserved(alias: str) -> str:
    if re.fullmatch(r"latest|v\d+|champion", alias, re.IGNORECASE):
        raise ValueError
    return alias


# Types of fields; a text in Annotated is what error messages and the documentation say of it.
_FILLED = Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")
Text = Annotated[str, _FILLED, "a text, not blank, in valid Unicode and without NUL"]
Url = Annotated[
    str, _FILLED, AfterValidator(_without_password), "http(s)://, file:// or a path, without NUL"
]
Folder = Annotated[str, _FILLED, AfterValidator(_inside), "a folder inside the archive"]
Sha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$"), "64 hexadecimal digits, or nothing"]
Name = Annotated[
    str,
    Field(pattern="^[A-Za-z0-9][A-Za-z0-9 _.-]{0,199}$"),  # no path, no part of a query
    "up to 200 letters, digits, spaces and any of `_.-`, a letter or a digit first",
]
Alias = Annotated[
    str,
    Field(pattern="^[A-Za-z0-9_-]{1,200}$"),
    AfterValidator(_not_reserved),
    "up to 200 letters, digits and any of `_-`, but not what MLflow reserves (latest, v1) nor "
    "champion, which the gate gives",
]
Width = Annotated[int, Field(ge=1, le=65_536)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(ge=0, le=1)]


class CorpusConfig(Section):
    """Where the reviews come from."""

    format: Literal["archive", "files"]
    """An archive in the layout of IMDB's, or files of your own."""
    url: Url
    """The archive; or, for your own files, a folder of .txt files, a .jsonl or a .parquet."""
    sha256: Sha256 = ""
    """Checksum of the archive."""
    folders: list[Folder] = Field(default=[])
    """Folders of the archive that hold the reviews."""
    text_column: Text = "text"
    """Column of a .jsonl or .parquet that holds the text."""
    undecodable: Literal["fail", "replace"] = "fail"
    """What to do with bytes that are not UTF-8."""
    max_bytes: int = Field(default=2 * 10**9, ge=1, le=10**15)
    """Most bytes of the unpacked archive, or of the texts in your files."""
    max_members: Count = 1_000_000
    """Most members of the archive, or reviews."""
    max_ratio: float = Field(default=100.0, ge=1, le=100_000)
    """Most bytes that one byte of the archive may unpack to."""

    @cross_check
    def _archive_has_a_checksum(self) -> Iterator[tuple[str, str]]:
        if self.format == "archive" and not self.sha256:
            yield "sha256", "is '': an archive needs 64 hexadecimal digits"

    @cross_check
    def _archive_has_folders(self) -> Iterator[tuple[str, str]]:
        if self.format == "archive" and not self.folders:
            yield "folders", "is empty: name the folders of the archive that hold the reviews"


class VocabularyConfig(Section):
    """How text becomes tokens."""

    style: Literal["published", "spaced"]
    """Where spaces are added: before each punctuation character (published), or on both sides."""
    max_tokens: int = Field(ge=3, le=10_000_000)
    """Most entries, padding and [UNK] included."""


class SequencesConfig(Section):
    """How reviews become training sequences."""

    policy: Literal["head", "windows"]
    """Head: the first tokens of a review; windows: all of its tokens."""
    length: Width
    """Targets in a sequence, which holds one token more."""
    validation_fraction: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the reviews that is held out; 0: none."""
    shards: int = Field(default=8, ge=1, le=10_000)
    """TFRecord files of the training split."""


class ModelConfig(Section):
    """The network."""

    vocabulary_size: int = Field(default=0, ge=0, le=10_000_000)
    """Rows of the head; 0: as many as the vocabulary has entries."""
    context_length: Width
    """Positions, in tokens."""
    embed_dim: Width
    """Width of a token's embedding."""
    num_blocks: int = Field(ge=1, le=1_000)
    """Transformer blocks."""
    num_heads: int = Field(ge=1, le=1_024)
    """Attention heads."""
    key_dim: Width
    """Width of one head's keys, queries and values."""
    feed_forward_dim: int = Field(ge=1, le=1_048_576)
    """Hidden width of a block's feed-forward network."""
    dropout: float = Field(default=0.0, ge=0, le=0.99)
    """Share dropped after attention and feed-forward."""
    tied_embeddings: bool = False
    """Whether the head reuses the token embeddings."""
    dtype_policy: Literal["auto", "float32", "mixed_bfloat16"] = "auto"
    """Keras dtype policy; auto: mixed_bfloat16 where the processor multiplies in bfloat16."""

    @cross_check
    def _heads_divide_the_width(self) -> Iterator[tuple[str, str]]:
        if self.embed_dim % self.num_heads:
            text = f"is {self.embed_dim}, not divisible by model.num_heads, {self.num_heads}"
            yield "embed_dim", text


class TrainConfig(Section):
    """How the network is trained."""

    epochs: int = Field(ge=1, le=100_000)
    """Passes over the training sequences."""
    batch_size: int = Field(ge=1, le=1_000_000)
    """Sequences in a step."""
    loss: Literal["tokens", "padded"] = "tokens"
    """Tokens: mean over the real tokens; padded: over the padding too, as published."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Keras optimizer."""
    learning_rate: float = Field(ge=1e-12, le=1_000)
    """Peak learning rate."""
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    """Steps of linear warm-up; 0: none."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate from the warm-up to the last step."""
    weight_decay: Share = 0.0
    """Decoupled weight decay, for adamw; 0: none."""
    clip_norm: float = Field(default=0.0, ge=0, le=1_000_000)
    """Largest global gradient norm; 0: any."""
    early_stopping: int = Field(default=0, ge=0, le=10_000)
    """Epochs without a better val_loss; 0: never stop."""
    keep: Literal["best", "last"] = "last"
    """Epoch whose weights the model directory gets."""
    jit_compile: bool = False
    """Whether to compile with XLA, which is slower on a CPU with the TensorFlow backend."""
    seed: int = Field(default=1, ge=0, le=2**31 - 1)
    """Seed of weights, dropout and shuffling."""

    @cross_check
    def _only_adamw_decays(self) -> Iterator[tuple[str, str]]:
        decay, optimizer = self.weight_decay, self.optimizer
        if decay and optimizer != "adamw":
            text = f"is {decay} but train.optimizer is {optimizer}: only adamw decays weights"
            yield "weight_decay", text


class SamplingConfig(Section):
    """How the next token is chosen."""

    max_tokens: int = Field(ge=1, le=100_000)
    """Tokens written after a prompt."""
    temperature: float = Field(default=1.0, ge=0, le=100)
    """Divides the logits; 0: the most probable token."""
    top_k: int = Field(default=0, ge=0, le=10_000_000)
    """Keep the k most probable tokens; 0: all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the most probable tokens up to this total probability; 1: all."""
    min_p: Share = 0.0
    """Keep tokens with at least this share of the top token's probability; 0: all."""
    repetition_penalty: float = Field(default=1.0, ge=1, le=100)
    """Divides the logits of tokens that occurred before; 1: off."""
    allow_unknown: bool = False
    """Whether [UNK] may be written."""
    seed: int = Field(default=1, ge=0, le=2**63 - 1)
    """Equal seeds write equal texts."""

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0 or self.top_k == 1


class PreviewConfig(SamplingConfig):
    """The texts that are logged after each epoch. They change no weights."""

    prompts: list[Text] = Field(min_length=1)
    """A text is written for each."""


class CheckpointingConfig(Section):
    """How an interrupted training goes on. This changes no weights."""

    steps: Count = 200
    """Steps from one checkpoint to the next."""
    resume: bool = True
    """Whether to go on from the last checkpoint."""


class LoggingConfig(Section):
    """What is logged within an epoch. This changes no weights."""

    steps: Count = 50
    """Steps from one point of the training loss and the learning rate to the next."""


class EvaluateConfig(SamplingConfig):
    """The texts that are sampled and counted, and the baseline."""

    prompts: list[Text] = Field(min_length=1)
    """Texts to continue, in turn, until there are enough reviews."""
    reviews: int = Field(ge=2, le=100_000)
    """Reviews to write and count."""
    ngram_order: int = Field(ge=1, le=10)
    """Words in an n-gram of the baseline."""


class SampleConfig(SamplingConfig):
    """The reviews that the sample stage writes."""

    prompts: list[Text] = Field(min_length=1)
    """Texts to continue."""
    reviews_per_prompt: int = Field(default=1, ge=1, le=10_000)
    """Reviews written for each prompt."""


class GateConfig(Section):
    """Which model is registered, and which one replaces the champion."""

    max_perplexity: float = Field(default=0.0, ge=0, le=1e12)
    """Largest held-out perplexity; 0: any."""
    max_copied_run: float = Field(default=0.0, ge=0, le=100_000)
    """Most words in a row that all but 5% of the sampled reviews copy; 0: any."""
    max_unk_share: Share = 0.0
    """Largest share of [UNK] among the held-out targets; 0: any."""
    min_improvement: float = Field(default=0.0, ge=0, le=8)
    """Bits per byte by which a model must be better than the champion; 0: any."""


class RequestConfig(Section):
    """What one request may ask of the registered model, whose server can't stop a prediction."""

    max_prompts: int = Field(ge=1, le=1_000_000)
    """Most prompts."""
    max_prompt_bytes: int = Field(ge=1, le=10**8)
    """Most bytes of all prompts, as UTF-8."""
    # MLflow tries a model out with the input example, which asks for 8 tokens.
    max_tokens: int = Field(ge=8, le=100_000)
    """Most tokens written after a prompt."""
    max_total_tokens: int = Field(ge=8, le=10**8)
    """Most tokens written after all prompts together."""


class TrackingConfig(Section):
    """The model's place in the MLflow registry, and what may be asked of it there."""

    model_name: Name
    """Name of the registered model."""
    alias: Alias
    """Alias that a new version takes."""
    request: RequestConfig


class Config(Section):
    """All sections; a stage reads only its own."""

    corpus: CorpusConfig
    vocabulary: VocabularyConfig
    sequences: SequencesConfig
    model: ModelConfig
    train: TrainConfig
    preview: PreviewConfig
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluate: EvaluateConfig
    sample: SampleConfig
    gate: GateConfig = GateConfig()
    tracking: TrackingConfig

    @cross_check
    def _context_fits_the_sequences(self) -> Iterator[tuple[str, str]]:
        context, length = self.model.context_length, self.sequences.length
        if context != length:
            yield (
                "model.context_length",
                f"is {context} but sequences.length is {length}: set both the same (the model "
                "trains on whole sequences, and never on positions past their end)",
            )

    @cross_check
    def _head_holds_the_vocabulary(self) -> Iterator[tuple[str, str]]:
        rows, entries = self.model.vocabulary_size, self.vocabulary.max_tokens
        if 0 < rows < entries:
            yield (
                "model.vocabulary_size",
                f"is {rows}, below vocabulary.max_tokens, {entries}: raise it, or set 0 to take "
                "the vocabulary's own size",
            )

    @cross_check
    def _held_out_reviews_decide(self) -> Iterator[tuple[str, str]]:
        patience, keep = self.train.early_stopping, self.train.keep
        if not self.sequences.validation_fraction and (patience or keep == "best"):
            yield (
                "train.early_stopping",
                f"is {patience} and train.keep is {keep}, but sequences.validation_fraction is 0: "
                "no reviews are held out to decide by; set it above 0, or set early_stopping to 0 "
                "and keep to last",
            )

    @cross_check
    def _top_k_is_within_the_vocabulary(self) -> Iterator[tuple[str, str]]:
        most = self.vocabulary.max_tokens
        for name in ("preview", "evaluate", "sample"):
            top_k = getattr(getattr(self, name, None), "top_k", 0)
            if top_k > most:
                yield f"{name}.top_k", f"is {top_k}, above vocabulary.max_tokens, {most}"


def compose(conf: Path = CONF, params: Path = PARAMS) -> Config:
    """Composes conf/ as params.yaml selects, lays its values over, and validates the whole.

    Hydra's Compose API: https://hydra.cc/docs/advanced/compose_api/.

    Args:
        conf: The folder of config groups; its config.yaml names the default choices.
        params: `groups:` picks one file per group; every other key is laid over the composed
            value. null leaves things as composed.

    Raises:
        InputError: An unknown group, choice or key, a wrong type, a value out of range, or values
            that contradict each other; the message lists all of them.
    """
    given = _without_nulls(_read(params))
    if not conf.is_dir():
        raise InputError(f"{conf}/ is missing; run `dvc repro` in the project's folder")
    problems: list[str] = []
    picked = _picked(conf, given.pop("groups", {}), params, problems)
    return _checked([(f"{conf}/", _hydra(conf, picked)), (str(params), given)], problems)


def load(path: Path = paths.RESOLVED) -> Config:
    """Reads a resolved configuration.

    Raises:
        InputError: The file is missing or is not a valid configuration.
    """
    return _checked([(str(path), _read(path))], [])


def save(config: Config, path: Path = paths.RESOLVED) -> None:
    """Writes a resolved configuration as YAML, in the order of the fields."""
    head = "# Written by the compose stage from conf/ and params.yaml; edit those, not this file.\n"
    plain = config.model_dump(mode="json")
    text = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    files.write_text(path, head + text)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that the reader would take for a number, or would break at a rare newline."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    rare = re.search(r"[\x85\u2028\u2029]|^[-+.\d_eE]+$", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if rare else None)


_Dumper.add_representer(str, _text_node)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run `dvc repro` in the project's folder") from None
    with _malformed(f"{path} can't be read as YAML"):
        read = OmegaConf.load(io.StringIO(raw.decode("utf-8")))
    if not isinstance(read, DictConfig):
        raise InputError(f"{path} must hold keys and values, not a list")
    return _plain(read)


@contextlib.contextmanager
def _malformed(problem: str, *more: type[Exception]) -> Iterator[None]:
    """Turns what PyYAML and OmegaConf raise for a bad file, and more, into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # OmegaConf's own, for a file that holds one value, has none
            raise
        raise InputError(f"{problem}: {error}") from None
    except (
        *more,
        yaml.YAMLError,
        OmegaConfBaseException,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(f"{problem}: {error}") from None


def _plain(tree: DictConfig) -> dict[str, Any]:
    """Returns a configuration as plain containers, with its interpolations as they stand."""
    plain: Any = OmegaConf.to_container(tree)
    return plain


def _without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


def _picked(conf: Path, groups: Any, params: Path, problems: list[str]) -> list[str]:
    """Returns Hydra's overrides for the choices; adds what is wrong to the problems."""
    if not isinstance(groups, dict):
        problems.append(f"groups in {params} is {shown(groups)}: allowed is a choice per group")
        return []
    known = sorted(folder.name for folder in conf.iterdir() if folder.is_dir())
    picked = []
    for group, choice in groups.items():
        name = f"{named(('groups', str(group)))} in {params}"
        if group not in known:
            problems.append(f"unknown group {name}: {validation.one_of(group, known)}")
            continue
        choices = sorted(file.stem for file in (conf / group).glob("*.yaml"))
        if choice in choices:
            picked.append(f"{'+' if group == 'experiment' else ''}{group}={choice}")
        else:
            problems.append(f"{name} is {shown(choice)}: {validation.one_of(choice, choices)}")
    return picked


def _hydra(conf: Path, picked: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    with (
        _malformed(f"{conf}/ can't be composed", HydraException),
        initialize_config_dir(config_dir=str(conf.resolve()), version_base="1.3"),
    ):
        return _plain(hydra_compose(config_name="config", overrides=picked))


def _checked(layers: _Layers, problems: list[str]) -> Config:
    """Lays the layers over the defaults and validates the result.

    Args:
        layers: The later ones win.
        problems: What is wrong with the choice of the layers. If something is, contradictions
            are not reported: the right choice may resolve them.
    """
    tree = _defaults(Config)
    for _, values in layers:
        tree = _laid_over(tree, values)
    unresolved: dict[Loc, str] = {}
    found = []
    try:
        config = Config.model_validate(_resolved(tree, tree, (), unresolved))
        if not problems and not unresolved:
            return config
    except ValidationError as error:
        found = error.errors(include_url=False)

    def told() -> Iterator[str]:
        yield from problems
        for loc, text in unresolved.items():
            yield f"{named(loc)} in {_source(loc, layers)} {text}"
        for each in found:
            loc, kind = each["loc"], each["type"]
            if any(loc[: len(known)] == known for known in unresolved):
                continue
            if not problems or kind != validation.CONTRADICTION:
                missing = kind == "missing"
                source = _source(loc[:-1], layers[:1]) if missing else _source(loc, layers)
                yield validation.describe(Config, each, source=source)

    raise validation.refusal(told())


def _defaults(section: type[Section]) -> dict[str, Any]:
    return {
        name: _defaults(field.annotation) if is_section(field.annotation) else field.get_default()
        for name, field in section.model_fields.items()
        if is_section(field.annotation) or not field.is_required()
    }


def _laid_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _laid_over(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _resolved(
    value: Any, tree: dict[str, Any], loc: Loc, problems: dict[Loc, str], via: Loc = ()
) -> Any:
    """Returns a value with each ${section.key} replaced by what stands there.

    OmegaConf's own resolvers are not used: one such as oc.env would copy secrets into
    resolved.yaml, which is committed.

    Args:
        value: A part of the tree.
        tree: All sections.
        loc: The place of the value.
        problems: Takes what can't be resolved, by its place.
        via: The keys that led here.
    """

    def inner(key: int | str, value: Any) -> Any:
        return _resolved(value, tree, loc if via else (*loc, key), problems, via)

    if isinstance(value, dict):
        return {key: inner(key, each) for key, each in value.items()}
    if isinstance(value, list):
        return [inner(at, each) for at, each in enumerate(value)]
    if not isinstance(value, str):
        return value

    def referred(match: re.Match[str]) -> Any:
        found: Any = tree
        for part in match[1].split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None:
            problems[loc] = f"is {shown(value)}: {match[1]} has no value"
        elif match[1] in via or len(via) == 10:
            problems[loc] = f"is {shown(value)}: {match[1]} leads back to itself"
        else:
            return _resolved(found, tree, loc, problems, (*via, match[1]))
        return match[0]

    if value == "???":
        problems[loc] = "is '???': allowed is a value"
    elif "${" in _REFERENCE.sub("", value):
        problems[loc] = (
            f"is {shown(value)}: of `${{...}}` only the key of another value is allowed, such as "
            "${sequences.length}"
        )
    elif whole := _REFERENCE.fullmatch(value):
        return referred(whole)
    else:
        return _REFERENCE.sub(lambda match: str(referred(match)), value)
    return value


def _source(loc: Loc, layers: _Layers) -> str:
    """Returns the name of the last layer that holds a value, or nothing where none does."""
    for source, found in reversed(layers):
        for part in loc:
            if not isinstance(found, dict):  # the value is part of a list or of a reference
                return source
            if part not in found:
                break
            found = found[part]
        else:
            return source
    return ""


def documentation() -> str:
    """Returns docs/configuration.md: what each key takes, its default and its meaning."""
    parts = [_INTRODUCTION]
    for name, field in Config.model_fields.items():
        assert is_section(field.annotation)
        rows = [*_rows(name, field.annotation, f"set in `conf/{name}/`")]
        head = ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
        parts.append(
            "\n".join([f"## {name}", "", field.annotation.__doc__ or "", "", *head, *rows])
        )
    return "\n\n".join(parts) + "\n"


def _rows(prefix: str, section: type[Section], chosen: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from _rows(f"{prefix}.{name}", field.annotation, chosen)
        else:
            default = chosen if field.is_required() else f"`{json.dumps(field.default)}`"
            told = validation.allowed(field.annotation, field.metadata)
            yield f"| `{prefix}.{name}` | {told} | {default} | {field.description} |"


_INTRODUCTION = """\
# Configuration

This page is generated from [config.py](../src/minigpt/config.py) by
`python -m minigpt.config > docs/configuration.md`.

The stage `compose` puts the configuration together and writes it to `resolved.yaml`:

1. A key starts with its default in the tables below.
2. A file of `conf/<group>/` states what differs. `conf/config.yaml` names the file of each group,
   `groups:` in `params.yaml` picks another, and `groups.experiment` picks a set of differences.
3. Every other key of `params.yaml` is laid over that; null leaves it as composed.

Types are strict: `"3"` is no number, and `1` is not true. A value may be the value of another key,
such as `${sequences.length}`; nothing else is interpolated. A value that switches something off
is 0. All problems are reported at once, and no stage runs before they are solved."""


if __name__ == "__main__":
    sys.stdout.write(documentation())
