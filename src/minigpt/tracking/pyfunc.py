"""The registered model: prompts in, reviews out. MLflow runs this file to load it.

See https://mlflow.org/docs/latest/ml/model/models-from-code/.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from minigpt import config
from minigpt.common import backend
from minigpt.common.errors import InputError

NEW_TOKENS = 80  # if predict is called without MLflow's wrapper, which fills in the defaults
TYPES = {int: "long", float: "double", bool: "boolean"}


def signature(everything: config.Config) -> ModelSignature:
    """Returns the signature: a column `prompt` in, texts out, the sampler's settings beside.

    Args:
        everything: The resolved configuration. Its section `sample` has the defaults, and
            `tracking.request` the limits.
    """
    defaults = everything.sample.model_dump(include=set(config.SamplingConfig.model_fields))
    defaults["max_tokens"] = min(defaults["max_tokens"], everything.tracking.request.max_tokens)
    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema(
            [ParamSpec(name, TYPES[type(value)], value) for name, value in defaults.items()]
        ),
    )


def example(prompts: Sequence[str]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Returns an input of a few tokens, with which MLflow tries the model out as it is logged."""
    return pd.DataFrame({"prompt": list(prompts)}), {"max_tokens": 8}


class ReviewWriter(PythonModel):
    """Continues prompts as reviews."""

    def load_context(self, context: Any) -> None:
        """Loads the model directory, on TensorFlow unless KERAS_BACKEND names another backend.

        Args:
            context: MLflow's. The artifact `model` is the model directory, and `model_config`
                holds the limits of a request.

        Raises:
            InputError: The limits or the model directory are not valid.
        """
        self.limits = config.validate(
            config.RequestConfig, context.model_config or {}, "model_config"
        )
        backend.choose()
        from minigpt.generation import decoding
        from minigpt.model import directory

        loaded = directory.load(Path(context.artifacts["model"]))
        self.generator = decoding.Generator(loaded.network, loaded.tokenizer)
        self.one_at_a_time = threading.Lock()  # the server predicts in threads

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Generates one text for each prompt.

        Args:
            context: MLflow's, not used.
            model_input: A column `prompt` (or a list or a Series of prompts).
            params: The sampler's settings; MLflow fills in the signature's defaults.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE, if prompts or settings are not valid or
                exceed the limits.
        """
        try:
            prompts = _prompts(model_input, self.limits)
            sampling = _sampling(params or {}, len(prompts), self.limits)
            with self.one_at_a_time:
                return self.generator(prompts, sampling)
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def predict_stream(
        self, context: Any, model_input: Any, params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """Generates one text, piece by piece; joined, they are what `predict` returns.

        Args:
            context: MLflow's, not used.
            model_input: A text, or a dict with the key `prompt`, as MLflow passes one row on.
            params: The sampler's settings; MLflow fills in the signature's defaults.

        Yields:
            The text from its beginning on, the prompt included.

        Raises:
            MlflowException: As for `predict`.
        """
        given = model_input.get("prompt") if isinstance(model_input, dict) else model_input
        try:
            prompts = _prompts([given], self.limits)
            sampling = _sampling(params or {}, 1, self.limits)
            sent, text = 0, ""
            texts = self.generator.stream(prompts, sampling)
            while True:
                with self.one_at_a_time:  # not while the caller has a piece: it may drop the rest
                    more = next(texts, None)
                if more is None:
                    break
                (text,) = more
                end = self.generator.tokenizer.settled(text)
                yield text[sent:end]
                sent = max(sent, end)
            yield text[sent:]
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def _sampling(
    params: Mapping[str, Any], prompts: int, limits: config.RequestConfig
) -> config.SamplingConfig:
    given = {name: value for name, value in params.items() if value is not None}
    sampling = config.validate(config.SamplingConfig, {"max_tokens": NEW_TOKENS, **given})
    each = sampling.max_tokens
    if each > limits.max_tokens:
        raise InputError(f"max_tokens is {each}: allowed is 1 to {limits.max_tokens}")
    if (tokens := each * prompts) > limits.max_total_tokens:
        raise InputError(
            f"{prompts} prompts with max_tokens {each} are {tokens} tokens: allowed are "
            f"{limits.max_total_tokens} in one request"
        )
    return sampling


def _prompts(given: Any, limits: config.RequestConfig) -> list[str]:
    if isinstance(given, pd.DataFrame):
        if "prompt" not in given.columns:
            raise InputError("the input has no column `prompt`")
        given = given["prompt"]
    if not isinstance(given, str | list | tuple | pd.Series):
        raise InputError(f"the input is of type {type(given).__name__}: allowed is a list of texts")
    prompts = [given] if isinstance(given, str) else list(given)
    if not 1 <= len(prompts) <= limits.max_prompts:
        raise InputError(
            f"{len(prompts)} prompts in one request: allowed are 1 to {limits.max_prompts}"
        )
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {number} is of type {type(prompt).__name__}: allowed is text")
    try:
        size = sum(len(prompt.encode()) for prompt in prompts)
    except UnicodeEncodeError:
        raise InputError("a prompt is not valid Unicode") from None
    if size > limits.max_prompt_bytes:
        raise InputError(
            f"the prompts have {size} bytes: allowed are {limits.max_prompt_bytes} in one request"
        )
    return prompts


set_model(ReviewWriter())
