"""The model card: what a version is, where it comes from, how good it is and how to use it."""

from collections.abc import Iterator, Mapping
from typing import Any

from minigpt.common.redaction import redact
from minigpt.config import Config
from minigpt.evaluation import pages
from minigpt.tracking.markdown import escape, table

FIGURES = {
    "bits_per_byte": "bits per byte",
    "loss": "nats per token",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "unk_share": "share of [UNK]",
}
COLUMNS = {"unigram": "unigram", "kneser_ney": "Kneser-Ney"}


def model_card(
    config: Config,
    *,
    version: str | None,
    run: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    provenance: Mapping[str, str],
    prompt: str,
) -> str:
    """Returns the card in Markdown; MLflow shows it as the version's description.

    Args:
        config: The resolved configuration.
        version: The number of the version; None for a model that the gate refused.
        run: The content of reports/run.json.
        evaluation: The content of reports/evaluation.json.
        provenance: The result of `Mirror.provenance`.
        prompt: One that the model knows, for the example.
    """
    name = config.tracking.model_name
    title = f"{name}, version {version}" if version else f"{name}, not registered"
    return "\n".join(
        [
            f"# {escape(title)}\n",
            f"{_description(config, run)}\n",
            "## Where it comes from\n",
            table(("", ""), _origin(config, run, provenance)),
            "## How good it is\n",
            *_figures(evaluation),
            *(_use(f"models:/{name}/{version}", prompt) if version else ()),
        ]
    )


def _description(config: Config, run: Mapping[str, Any]) -> str:
    model, facts = config.model, run["settings"]
    blocks = "one transformer block" if model.num_blocks == 1 else f"{model.num_blocks} blocks"
    return (
        f"A miniature GPT that continues a text token by token: {blocks} with {model.num_heads} "
        f"attention heads, embeddings of {model.embed_dim}, a context of {model.context_length} "
        f"tokens and {facts['parameters']:,} parameters."
    )


def _origin(
    config: Config, run: Mapping[str, Any], provenance: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    train, facts = config.train, run["settings"]
    yield "commit", provenance.get("commit", "unknown")
    yield "corpus", redact(config.corpus.url)
    for path, digest in provenance.items():
        if path != "commit":
            yield path, f"md5 {digest} (DVC)"
    yield "vocabulary", f"up to {config.vocabulary.max_tokens:,} tokens, {config.vocabulary.style}"
    yield (
        "training",
        f"{len(run['epochs'])} epochs of batches of {train.batch_size}, {train.optimizer} at "
        f"{train.learning_rate:g} ({train.decay}), dropout {config.model.dropout:g}, "
        f"{facts['dtype_policy']}, seed {train.seed}, {train.keep} epoch kept",
    )
    yield "libraries", f"Keras {facts['keras']} on {facts['backend']}"
    yield "training id", run["train_id"]


def _figures(evaluation: Mapping[str, Any]) -> Iterator[str]:
    held_out, samples = evaluation["held_out"], evaluation["samples"]
    if held_out["reviews"]:
        yield f"On {held_out['reviews']:,} held-out reviews ({held_out['targets']:,} tokens):\n"
        sides = {"": evaluation, **{name: evaluation.get(name, {}) for name in COLUMNS}}
        rows = [
            (label, *(f"{side[key]:.4f}" if key in side else "-" for side in sides.values()))
            for key, label in FIGURES.items()
            if key in evaluation
        ]
        yield table(("", "this model", *COLUMNS.values()), rows)
    else:
        yield "No reviews were held out, so no loss was measured.\n"
    yield (
        f"Of {samples['reviews']:,} texts that it wrote, 95% copy at most "
        f"{samples['copied_run_p95']:g} words in a row from a training review.\n"
    )
    yield pages.sampled(evaluation)


def _use(uri: str, prompt: str) -> Iterator[str]:
    yield "## How to use it\n"
    yield (
        "```python\n"
        "import mlflow, pandas\n"
        f"model = mlflow.pyfunc.load_model({uri!r})\n"
        f"print(model.predict(pandas.DataFrame({{'prompt': [{prompt!r}]}})))\n"
        "```\n"
    )
    yield f"Or over HTTP: `mlflow models serve -m '{uri}' --env-manager local --port 5001`\n"
