"""The registered model: prompts in, reviews out.  MLflow runs this file to load it.

See https://mlflow.org/docs/latest/ml/model/models-from-code/.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from minigpt.config import SamplingConfig
from minigpt.errors import InputError

# Bounds of one request: MLflow's server can't stop a prediction whose client has gone.
MAX_NEW_TOKENS = 1000
MAX_PROMPTS = 256
MAX_PROMPT_BYTES = 100_000

NEW_TOKENS = 80  # where predict is called without MLflow's wrapper and its defaults

SETTINGS = {field.name: field for field in fields(SamplingConfig)}
TYPES = {int: "long", float: "double", bool: "boolean"}


def signature(config: Mapping[str, Any]) -> ModelSignature:
    """The model's signature: a column `prompt` in, texts out, the sampler's settings beside.

    Args:
        config: the resolved configuration; its section `sample` has the defaults.
    """
    defaults = {name: config["sample"][name] for name in SETTINGS}
    defaults["max_tokens"] = min(defaults["max_tokens"], MAX_NEW_TOKENS)
    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema(
            [
                ParamSpec(name, TYPES[SETTINGS[name].type], default)  # type: ignore[index]
                for name, default in defaults.items()
            ]
        ),
    )


def example(prompts: Sequence[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """An input example of few tokens, as MLflow tries it out when the model is logged."""
    return pd.DataFrame({"prompt": list(prompts)}), {"max_tokens": 8}


class ReviewWriter(PythonModel):
    """Writes reviews that go on from prompts."""

    def load_context(self, context: Any) -> None:
        """Loads the model directory; without KERAS_BACKEND, on TensorFlow."""
        os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # before keras is imported
        from minigpt import decoding, model

        loaded = model.load(Path(context.artifacts["model"]))
        style = loaded.config["vocabulary"]["style"]
        self.generate = decoding.Generator(loaded.network, loaded.vocabulary, style)
        self.sampling = decoding.Sampling
        self.one_at_a_time = threading.Lock()  # the server predicts in threads

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Generates one text for each prompt.

        Args:
            context: MLflow's, not used.
            model_input: a column `prompt` (or a list or a Series of prompts).
            params: the sampler's settings; MLflow fills in the signature's defaults.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE, for prompts or settings that make no sense
                or ask for more than the server gives at once.
        """
        prompts = _prompts(model_input)
        settings = {"max_tokens": NEW_TOKENS, **_checked(params or {})}
        try:
            with self.one_at_a_time:
                return self.generate(prompts, self.sampling(**settings))
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def _prompts(given: Any) -> list[str]:
    if isinstance(given, pd.DataFrame):
        if "prompt" not in given.columns:
            raise MlflowException.invalid_parameter_value("the input has no column `prompt`")
        given = given["prompt"]
    prompts = [given] if isinstance(given, str) else list(given)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise MlflowException.invalid_parameter_value(
            f"{len(prompts)} prompts in one request: allowed are 1 to {MAX_PROMPTS}"
        )
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise MlflowException.invalid_parameter_value(
                f"prompt {number} is of type {type(prompt).__name__}: a text is expected"
            )
    try:
        size = sum(len(prompt.encode()) for prompt in prompts)
    except UnicodeEncodeError:
        raise MlflowException.invalid_parameter_value("a prompt isn't valid Unicode") from None
    if size > MAX_PROMPT_BYTES:
        raise MlflowException.invalid_parameter_value(
            f"the prompts have {size} bytes: allowed are {MAX_PROMPT_BYTES} in one request"
        )
    return prompts


def _checked(params: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in params.items() if value is not None}
    for name, value in given.items():
        if name not in SETTINGS:
            raise MlflowException.invalid_parameter_value(
                f"unknown parameter {name!r}: known are {', '.join(SETTINGS)}"
            )
        kind, (low, high) = SETTINGS[name].type, _range(name)
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):  # type: ignore[arg-type]
            raise MlflowException.invalid_parameter_value(
                f"{name} is {value!r}: a value of type {TYPES[kind]} is expected"  # type: ignore[index]
            )
        # NaN fails too; nothing would be left to choose from with a top_p of 0.
        if low is not None and (not low <= value <= high or (name, value) == ("top_p", 0)):
            raise MlflowException.invalid_parameter_value(
                f"{name} is {value}: allowed is {'above ' * (name == 'top_p')}{low} to {high}"
            )
    return given


def _range(name: str) -> tuple[Any, Any]:
    meta = SETTINGS[name].metadata
    return meta["low"], MAX_NEW_TOKENS if name == "max_tokens" else meta["high"]


set_model(ReviewWriter())
