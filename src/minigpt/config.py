"""The configuration: a pydantic model for each section, validated before anything runs.

The `compose` stage puts it together from conf/ and params.yaml and writes resolved.yaml, where
every stage reads its own section. A field states its range, its documentation and, where there is a
neutral value, its default. A value that switches something off is 0: in params.yaml null means "as
composed".
"""

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, model_validator

from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.common.redaction import holds_secret
from minigpt.common.validation import Section, allowed, is_section, validate

__all__ = ["validate"]  # beside what is defined here

CONF = Path("conf")
PARAMS = Path("params.yaml")

# Prompts for movie reviews. A corpus of the user's own may not know them.
DEFAULT_PROMPTS = ("this movie is", "the acting was", "i loved", "what a waste of")
LEAST_TEMPERATURE = 0.001  # smaller ones overflow the logits in float32

# What PyYAML and OmegaConf raise for a text that is no valid YAML.
MALFORMED = (
    yaml.YAMLError,
    OmegaConfBaseException,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


def _without_secret(url: str) -> str:
    if holds_secret(url):
        raise ValueError
    return url


def _seen_by_all(url: str) -> str:
    if url.lower().startswith("memory:"):
        raise ValueError
    return _without_secret(url)


def _inside(folder: str) -> str:
    if folder.startswith("/") or ".." in folder.split("/"):
        raise ValueError
    return folder


def _holds_in_float32(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError
    return temperature


def _not_reserved(alias: str) -> str:
    if re.fullmatch(r"latest|v\d+|champion", alias, re.IGNORECASE):
        raise ValueError
    return alias


# Types of fields; a text in Annotated is what error messages and the documentation say of it.
_FILLED = Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")
Text = Annotated[str, _FILLED, "a text, not blank, in valid Unicode and without NUL"]
Prompt = Annotated[
    str,
    Field(pattern=r"^[^\x00]*$"),
    "a text in valid Unicode and without NUL; empty: a review from its beginning",
]
Url = Annotated[
    str,
    _FILLED,
    AfterValidator(_without_secret),
    "http(s)://, file://, another address that fsspec knows, or a path, without NUL, and without a "
    "name, password or token: put them into ~/.netrc or MINIGPT_CORPUS_URL, since resolved.yaml is "
    "committed",
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
Temperature = Annotated[
    float,
    Field(ge=0, le=100),
    AfterValidator(_holds_in_float32),
    "a number, 0 or 0.001 to 100",
]
Address = Annotated[
    str,
    Field(pattern=r"^([A-Za-z0-9_.-]+:\d{1,5})?$"),
    "host:port, or nothing",
]
Storage = Annotated[
    str,
    Field(pattern=r"^([^\s\x00][^\x00]*)?$"),
    AfterValidator(_seen_by_all),
    "a folder that all machines see, another address that fsspec knows, such as s3://bucket/shards "
    "(without a name, password or token, since resolved.yaml is committed), or nothing",
]
Width = Annotated[int, Field(ge=1, le=65_536)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(ge=0, le=1)]


class CorpusConfig(Section):
    """Where the reviews come from."""

    format: Literal["archive", "files"]
    """An archive in the layout of IMDB's, or files of your own."""
    url: Url
    """The archive; or your .jsonl, .csv (.gz too) or .parquet, or a folder of these or of .txt."""
    sha256: Sha256 = ""
    """Checksum of the archive."""
    folders: list[Folder] = Field(default=[])
    """Folders of the archive that hold the reviews."""
    text_column: Text = "text"
    """Column of a .jsonl, .csv or .parquet that holds the text."""
    undecodable: Literal["fail", "replace"] = "fail"
    """What to do with bytes that are not UTF-8."""
    white_space: Literal["collapse", "keep"] = "keep"
    """Collapse: `<br />` and each run of ASCII white space become one space; keep: as it is."""
    max_bytes: int = Field(default=2 * 10**9, ge=1, le=10**15)
    """Most bytes of the unpacked archive, or of the texts in your files."""
    max_members: Count = 1_000_000
    """Most members of the archive, or reviews."""
    max_ratio: float = Field(default=100.0, ge=1, le=100_000)
    """Most bytes that one byte of the archive may unpack to."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        problems = []
        if self.format == "archive" and not self.sha256:
            problems.append("sha256 is '': an archive needs 64 hexadecimal digits")
        if self.format == "archive" and not self.folders:
            problems.append("folders is empty: name the folders of the archive that hold reviews")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class VocabularyConfig(Section):
    """How text becomes tokens."""

    style: Literal["published", "spaced", "words", "bpe"]
    """Words of any script, spaced: of ASCII, published: as the script; bpe: parts of words."""
    max_tokens: int = Field(ge=3, le=10_000_000)
    """Most entries, special ones included; bpe: at least 257."""
    min_count: int = Field(default=1, ge=1, le=1_000_000)
    """Occurrences that a word needs; from 2 on, a small corpus has [UNK] to learn from too."""
    sample_bytes: int = Field(default=10**7, ge=1, le=10**9)
    """Bytes of the training texts that bpe learns from."""

    @model_validator(mode="after")
    def _bytes_fit(self) -> Self:
        if self.style == "bpe" and self.max_tokens < 257:
            raise ValueError(
                f"max_tokens is {self.max_tokens}: vocabulary.style bpe needs at least 257, for "
                "256 bytes and the separator"
            )
        return self


class SequencesConfig(Section):
    """How reviews become training sequences."""

    policy: Literal["head", "windows", "packed"]
    """Head: the first tokens of a review; windows: all; packed: reviews in a row, no padding."""
    length: Width
    """Targets in a sequence, which holds one token more."""
    validation_fraction: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the reviews that is held out; 0: none."""
    shards: int = Field(default=8, ge=1, le=10_000)
    """TFRecord files of the training split."""

    @property
    def has_text(self) -> bool:
        """Whether the validation split has its whole text, which gives bits per byte a meaning."""
        return self.policy != "head" and self.validation_fraction > 0


class ModelConfig(Section):
    """The network."""

    vocabulary_size: int = Field(default=0, ge=0, le=10_000_000)
    """Rows of the head; 0: as many as the vocabulary has entries."""
    context_length: Width
    """Tokens that a position sees, itself included."""
    positions: Literal["learned", "rotary"] = "learned"
    """Learned: a text ends at the context; rotary: the context is a window that slides."""
    token_shift: bool = False
    """Whether the embedding of the token before, times learned factors, is added to a token's."""
    embed_dim: Width
    """Width of a token's embedding."""
    num_blocks: int = Field(ge=1, le=1_000)
    """Transformer blocks."""
    num_heads: int = Field(ge=1, le=1_024)
    """Attention heads."""
    key_dim: Width
    """Width of one head's keys, queries and values."""
    kernels: Literal["heads", "matrices"] = "heads"
    """Shape of attention's kernels: with the heads apart (as published), or matrices for Muon."""
    feed_forward_dim: int = Field(ge=1, le=1_048_576)
    """Hidden width of a block's feed-forward network."""
    dropout: float = Field(default=0.0, ge=0, le=0.99)
    """Share dropped after attention and feed-forward."""
    tied_embeddings: bool = False
    """Whether the head reuses the token embeddings."""
    cutoff: int = Field(default=0, ge=0, le=10_000_000)
    """Frequent tokens; those from here on are the tail of an adaptive softmax; 0: no tail."""
    tail_dim: Width = 128
    """Width of a token of the tail, in the embeddings and in the head."""
    dtype_policy: Literal["auto", "float32", "mixed_bfloat16"] = "auto"
    """Keras dtype policy; auto: mixed_bfloat16 where the processor multiplies in bfloat16."""

    @model_validator(mode="after")
    def _widths_can_be_divided(self) -> Self:
        width, heads = self.embed_dim, self.num_heads
        problems = []
        if width % heads:
            problems.append(f"embed_dim is {width}, not divisible by model.num_heads, {heads}")
        if self.positions == "rotary" and self.key_dim % 2:
            problems.append(
                f"key_dim is {self.key_dim}: rotary positions need an even number (model.positions)"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class TrainConfig(Section):
    """How the network is trained."""

    epochs: int = Field(ge=1, le=100_000)
    """Passes over the training sequences."""
    batch_size: int = Field(ge=1, le=1_000_000)
    """Sequences in a step."""
    loss: Literal["tokens", "padded"] = "tokens"
    """Tokens: mean over the real tokens; padded: over the padding too, as published."""
    optimizer: Literal["adam", "adamw", "muon"] = "adam"
    """Keras optimizer; muon: Muon for the blocks' matrices, Adam for everything else."""
    learning_rate: float = Field(ge=1e-12, le=1_000)
    """Peak learning rate."""
    matrix_rate: float = Field(default=0.01, ge=1e-12, le=1_000)
    """Peak learning rate of Muon; it follows the schedule of learning_rate."""
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    """Steps of linear warm-up; 0: none."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate from the warm-up to the last step."""
    weight_decay: Share = 0.0
    """Decoupled weight decay, for adamw and muon; 0: none."""
    clip_norm: float = Field(default=0.0, ge=0, le=1_000_000)
    """Largest global gradient norm; 0: any."""
    early_stopping: int = Field(default=0, ge=0, le=10_000)
    """Epochs without a better val_loss; 0: never stop."""
    keep: Literal["best", "last"] = "last"
    """Epoch whose weights the model directory gets."""
    backend: Literal["tensorflow", "jax"] = "tensorflow"
    """Keras backend of the training; JAX is always compiled."""
    jit_compile: bool = False
    """Whether to compile with XLA, which is slower on a CPU with the TensorFlow backend."""
    seed: int = Field(default=1, ge=0, le=2**31 - 1)
    """Seed of weights, dropout and shuffling."""

    @model_validator(mode="after")
    def _adam_decays_nothing(self) -> Self:
        decay, optimizer = self.weight_decay, self.optimizer
        if decay and optimizer == "adam":
            raise ValueError(
                f"weight_decay is {decay} but train.optimizer is {optimizer}: only adamw and muon "
                "decay weights"
            )
        return self


class SamplingConfig(Section):
    """How the next token is chosen."""

    max_tokens: int = Field(ge=1, le=100_000)
    """Most tokens written after a prompt."""
    temperature: Temperature = 1.0
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


class PreviewConfig(SamplingConfig):
    """The texts that are logged after each epoch. They change no weights."""

    prompts: list[Prompt] = Field(default=list(DEFAULT_PROMPTS[:1]), min_length=1)
    """A text is written for each."""


class CheckpointingConfig(Section):
    """How an interrupted training resumes. This changes no weights."""

    steps: Count = 200
    """Steps from one checkpoint to the next."""
    resume: bool = True
    """Whether to resume from the last checkpoint."""


class LoggingConfig(Section):
    """What is logged within an epoch. This changes no weights."""

    steps: Count = 50
    """Steps from one point of the training loss and the learning rate to the next."""


class EvaluateConfig(SamplingConfig):
    """The texts that are sampled and counted, and the baseline."""

    prompts: list[Prompt] = Field(default=list(DEFAULT_PROMPTS), min_length=1)
    """Texts to continue, in turn, until there are enough reviews."""
    reviews: int = Field(ge=2, le=100_000)
    """Reviews to write and count."""
    ngram_order: int = Field(ge=1, le=10)
    """Words in an n-gram of the baseline."""
    sample_bytes: int = Field(default=10**8, ge=1, le=10**10)
    """Bytes of the training texts that figures are compared with, and of the held-out ones."""


class SampleConfig(SamplingConfig):
    """The reviews that the sample stage writes."""

    prompts: list[Prompt] = Field(default=list(DEFAULT_PROMPTS), min_length=1)
    """Texts to continue."""
    reviews_per_prompt: int = Field(default=1, ge=1, le=10_000)
    """Reviews written for each prompt."""


class GateConfig(Section):
    """Which model is registered, and which one replaces the champion."""

    max_perplexity: float = Field(default=0.0, ge=0, le=10**12)
    """Largest held-out perplexity; 0: any."""
    max_copied_run: float = Field(default=0.0, ge=0, le=100_000)
    """Most words in a row that all but 5% of the sampled reviews copy; 0: any."""
    max_unk_share: Share = 0.0
    """Largest share of [UNK] among the held-out targets; 0: any."""
    min_improvement: float = Field(default=0.0, ge=0, le=8)
    """Bits per byte by which a model must be better than the champion; 0: any."""
    promote: Literal["workspace", "always"] = "workspace"
    """Workspace: a better model of an experiment in a copy waits for `minigpt promote`."""


class RequestConfig(Section):
    """What one request may ask of a model that is served, by MLflow or by `minigpt serve`."""

    max_prompts: int = Field(default=256, ge=1, le=1_000_000)
    """Most prompts, each counted as often as a text is written for it."""
    max_prompt_bytes: int = Field(default=100_000, ge=1, le=10**8)
    """Most bytes of all prompts, as UTF-8."""
    # MLflow tries a model out with the input example, which asks for 8 tokens.
    max_tokens: int = Field(default=1_000, ge=8, le=100_000)
    """Most tokens written after a prompt."""
    max_total_tokens: int = Field(default=10_000, ge=8, le=10**8)
    """Most tokens written after all prompts together."""


class TrackingConfig(Section):
    """The model's place in the MLflow registry, and what may be asked of it there."""

    model_name: Name
    """Name of the registered model."""
    alias: Alias
    """Alias that a new version takes."""
    request: RequestConfig = RequestConfig()


class EngineConfig(Section):
    """What vocab, sequences and train are spread over. This changes no bytes."""

    kind: Literal["local", "ray"] = "local"
    """Local: this machine, without an engine; ray: Ray runs vocab, sequences and train."""
    workers: int = Field(default=1, ge=1, le=10_000)
    """Processes that train together; each takes its rows of every batch."""
    address: Address = ""
    """Ray's head; nothing: each stage starts Ray here, on loopback."""
    storage: Storage = ""
    """Where shards of the reviews and the sequences are written; nothing: in data/."""
    cpus_per_worker: int = Field(default=1, ge=1, le=1_024)
    """Processors that Ray reserves for a worker."""
    use_gpu: bool = False
    """Whether Ray gives each worker a GPU."""

    @model_validator(mode="after")
    def _only_ray_has_resources(self) -> Self:
        if self.kind == "ray":
            return self
        given = [
            f"{name} is {value!r} but engine.kind is local: only Ray takes it; choose "
            "groups.engine=ray"
            for name in ("address", "storage", "cpus_per_worker", "use_gpu")
            if (value := getattr(self, name)) != EngineConfig.model_fields[name].default
        ]
        if given:
            raise ValueError("\n".join(given))
        return self


class ServingConfig(Section):
    """How `minigpt serve` serves; `tracking.request` limits what a request asks for."""

    slots: int = Field(default=32, ge=1, le=1_024)
    """Texts that a model writes at the same time; further ones wait."""
    queue: int = Field(default=64, ge=1, le=100_000)
    """Requests that wait for a model; further ones are refused (429)."""
    max_body_bytes: int = Field(default=1_000_000, ge=1_000, le=10**9)
    """Most bytes of a request."""
    max_connections: int = Field(default=1_000, ge=1, le=1_000_000)
    """Connections that are open at the same time; further ones are refused (503)."""
    slow_s: int = Field(default=10, ge=1, le=3_600)
    """Longest time for a request to arrive, and for a client to take a piece of an answer."""
    drain_s: int = Field(default=30, ge=0, le=3_600)
    """Longest time that requests get to finish when the server is asked to stop."""


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
    engine: EngineConfig = EngineConfig()
    serving: ServingConfig = ServingConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = []
        context, length = self.model.context_length, self.sequences.length
        if context != length:
            problems.append(
                f"model.context_length is {context} but sequences.length is {length}: set both "
                "the same (the model trains on whole sequences, and never on positions past their "
                "end)"
            )
        style, policy = self.vocabulary.style, self.sequences.policy
        if style == "bpe" and policy != "packed":
            problems.append(
                f"vocabulary.style is bpe but sequences.policy is {policy}: bpe has no token to "
                "fill short sequences with; choose packed"
            )
        rows, entries = self.model.vocabulary_size, self.vocabulary.max_tokens
        if 0 < rows < entries:
            problems.append(
                f"model.vocabulary_size is {rows}, below vocabulary.max_tokens, {entries}: raise "
                "it, or set 0 to take the vocabulary's own size"
            )
        if self.train.optimizer == "muon" and self.model.kernels != "matrices":
            problems.append(
                f"train.optimizer is muon but model.kernels is {self.model.kernels}: Muon is for "
                "matrices; set model.kernels to matrices, or train.optimizer to adamw"
            )
        engine, backend = self.engine, self.train.backend
        if backend != "jax" and (engine.kind == "ray" or engine.workers > 1):
            problems.append(
                f"train.backend is {backend} but engine.kind is {engine.kind} and engine.workers "
                f"is {engine.workers}: only the JAX backend trains in several processes; set "
                "train.backend to jax, or choose groups.engine=local with engine.workers 1"
            )
        patience, keep = self.train.early_stopping, self.train.keep
        if not self.sequences.validation_fraction and (patience or keep == "best"):
            problems.append(
                f"train.early_stopping is {patience} and train.keep is {keep}, but "
                "sequences.validation_fraction is 0: no reviews are held out to decide by; set it "
                "above 0, or set early_stopping to 0 and keep to last"
            )
        for name in ("preview", "evaluate", "sample"):
            top_k = getattr(self, name).top_k
            if top_k > entries:
                problems.append(f"{name}.top_k is {top_k}, above vocabulary.max_tokens, {entries}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def load(path: Path = paths.RESOLVED) -> Config:
    """Reads a resolved configuration.

    Raises:
        InputError: The file is missing or is not a valid configuration.
    """
    return validate(Config, read(path), file=str(path))


def read(path: Path) -> dict[Any, Any]:
    """Reads a YAML file of keys and values, with its interpolations as they stand.

    Raises:
        InputError: The file is missing or malformed.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run `dvc repro` in the project's folder") from None
    try:
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(raw.decode("utf-8"))))
    except MALFORMED as error:
        raise InputError(f"{path} can't be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold keys and values, not a list")
    return content


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
            yield f"| `{prefix}.{name}` | {allowed(field)} | {default} | {field.description} |"


_INTRODUCTION = """\
# Configuration

This page is generated from [config.py](../src/minigpt/config.py) by
`python -m minigpt.config > docs/configuration.md`. [configure.md](configure.md) says how to change
a value, and which value wins."""


if __name__ == "__main__":
    sys.stdout.write(documentation())
