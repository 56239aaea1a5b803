"""The registered model: prompts in, reviews out.  MLflow runs this file to load it.

See https://mlflow.org/docs/latest/ml/model/models-from-code/.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from minigpt.common import backend
from minigpt.common.errors import InputError
from minigpt.config import RequestConfig, SamplingConfig

NEW_TOKENS = 80  # where predict is called without MLflow's wrapper and its defaults

SETTINGS = {field.name: field for field in fields(SamplingConfig)}
LIMITS = {field.name: field for field in fields(RequestConfig)}
TYPES = {int: "long", float: "double", bool: "boolean"}


def signature(config: Mapping[str, Any]) -> ModelSignature:
    """The model's signature: a column `prompt` in, texts out, the sampler's settings beside.

    Args:
        config: the resolved configuration; its section `sample` has the defaults, and
            `tracking.request` the limits.
    """
    defaults = {name: config["sample"][name] for name in SETTINGS}
    most = config["tracking"]["request"]["max_tokens"]
    defaults["max_tokens"] = min(defaults["max_tokens"], most)
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
        """Loads the model directory; without KERAS_BACKEND, on TensorFlow.

        Args:
            context: MLflow's, with the artifact `model`, and the limits of a request as its
                model_config.
        """
        self.limits = _checked(context.model_config or {}, LIMITS)
        if missing := LIMITS.keys() - self.limits:
            raise _refused(f"model_config lacks {', '.join(sorted(missing))}")
        backend.choose()
        from minigpt.generation import decoding
        from minigpt.model import directory

        loaded = directory.load(Path(context.artifacts["model"]))
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
        prompts = _prompts(model_input, self.limits)
        settings = {"max_tokens": NEW_TOKENS, **_checked(params or {}, SETTINGS)}
        each, limits = settings["max_tokens"], self.limits
        if each > limits["max_tokens"]:
            raise _refused(f"max_tokens is {each}: allowed is 1 to {limits['max_tokens']}")
        if (tokens := each * len(prompts)) > limits["max_total_tokens"]:
            raise _refused(
                f"{len(prompts)} prompts with max_tokens {each} are {tokens} tokens: allowed are "
                f"{limits['max_total_tokens']} in one request"
            )
        try:
            with self.one_at_a_time:
                return self.generate(prompts, self.sampling(**settings))
        except InputError as error:
            raise _refused(str(error)) from None


def _prompts(given: Any, limits: Mapping[str, int]) -> list[str]:
    if isinstance(given, pd.DataFrame):
        if "prompt" not in given.columns:
            raise _refused("the input has no column `prompt`")
        given = given["prompt"]
    if not isinstance(given, str | list | tuple | pd.Series):
        raise _refused(f"the input is of type {type(given).__name__}: a list of texts is expected")
    prompts = [given] if isinstance(given, str) else list(given)
    if not 1 <= len(prompts) <= limits["max_prompts"]:
        raise _refused(
            f"{len(prompts)} prompts in one request: allowed are 1 to {limits['max_prompts']}"
        )
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise _refused(
                f"prompt {number} is of type {type(prompt).__name__}: a text is expected"
            )
    try:
        size = sum(len(prompt.encode()) for prompt in prompts)
    except UnicodeEncodeError:
        raise _refused("a prompt isn't valid Unicode") from None
    if size > limits["max_prompt_bytes"]:
        raise _refused(
            f"the prompts have {size} bytes: allowed are {limits['max_prompt_bytes']} in one "
            "request"
        )
    return prompts


def _checked(values: Mapping[str, Any], known: Mapping[str, "Field[Any]"]) -> dict[str, Any]:
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise _refused(f"unknown parameter {name!r}: known are {', '.join(known)}")
        kind, meta = known[name].type, known[name].metadata
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):  # type: ignore[arg-type]
            raise _refused(f"{name} is {value!r}: a value of type {TYPES[kind]} is expected")  # type: ignore[index]
        low, high = meta["low"], meta["high"]
        # NaN fails too; nothing would be left to choose from with a top_p of 0.
        if low is not None and (not low <= value <= high or (name, value) == ("top_p", 0)):
            above = "above " if name == "top_p" else ""
            raise _refused(f"{name} is {value}: allowed is {above}{low} to {high}")
    return given


def _refused(reason: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(reason)


set_model(ReviewWriter())
