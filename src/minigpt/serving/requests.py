"""The request of OpenAI's completions, and what may be asked for.

https://platform.openai.com/docs/api-reference/completions/create
"""

import secrets
from typing import Any

from pydantic import Field, ValidationError
from pydantic_core import from_json

from minigpt.common.validation import Section, describe, shown
from minigpt.config import RequestConfig, SamplingConfig
from minigpt.serving.errors import RequestError

MOST_LOGPROBS = 20
MOST_STOPS = 4
LONGEST_STOP = 200  # characters
# Fields that OpenAI documents and this server does not have, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "suffix": ("",),
}


class StreamOptions(Section):
    """What a stream holds beside its pieces."""

    include_usage: bool = False
    """Whether the last event has the usage."""


class CompletionRequest(SamplingConfig):
    """The fields of a request that are not null."""

    model: str
    """The id of a model."""
    prompt: str | list[str] = ""
    """A text, or several."""
    n: int = Field(default=1, ge=1, le=1_000_000)
    """Texts for each prompt."""
    max_tokens: int = Field(default=16, ge=1, le=100_000)
    """Tokens written after a prompt."""
    stop: str | list[str] = Field(default=[])
    """Texts that end a text, and are not part of it."""
    stream: bool = False
    """Whether the texts are sent as they are written."""
    stream_options: StreamOptions = StreamOptions()
    """What the stream holds beside."""
    logprobs: int = Field(default=-1, ge=0, le=MOST_LOGPROBS)
    """Candidates to list for each token; absent: no log-probabilities."""
    echo: bool = False
    """Whether a text begins with its prompt."""
    user: str = ""
    """Who asks; it is ignored."""

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def listed(self) -> int | None:
        """The candidates to list for each token; None: no log-probabilities."""
        return self.logprobs if "logprobs" in self.model_fields_set else None

    def sampling(self, row: int) -> SamplingConfig:
        """Returns the sampler's settings of a row, which draws from a seed of its own."""
        names = set(SamplingConfig.model_fields)
        return SamplingConfig(**{**self.model_dump(include=names), "seed": self.seed + row})


def parse(body: bytes, limits: RequestConfig) -> CompletionRequest:
    """Reads a request.

    Args:
        body: JSON.
        limits: What a request may ask for.

    Raises:
        RequestError: The request is not valid or asks for too much; it names the field.
    """
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(given, dict):
        raise RequestError(400, "the body is not a JSON object")
    given = {name: value for name, value in given.items() if value is not None}
    for name, neutral in NEUTRAL.items():
        value = given.pop(name, neutral[0])
        if not any(type(value) is type(each) and value == each for each in neutral):
            told = f"{name} is not supported: leave it out, or give {neutral[0]!r}"
            raise _refused(name, told)
    given.setdefault("seed", secrets.randbelow(2**53))
    try:
        request = CompletionRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _refused(str(first["loc"][0]), _told(first)) from None
    _limit(request, limits)
    return request


def _told(error: Any) -> str:
    """Says what is wrong with a field that takes a text or a list of texts, or with any other."""
    name = str(error["loc"][0])
    if name in ("prompt", "stop"):
        return f"{name} is {shown(error['input'])}: allowed is a text or a list of texts"
    if name == "model" and error["type"] == "missing":
        return "model is missing: GET /v1/models lists the ids"
    return describe(CompletionRequest, error)


def _limit(request: CompletionRequest, limits: RequestConfig) -> None:
    texts = len(request.prompts) * request.n
    tokens = texts * request.max_tokens
    if request.seed + texts > 2**63:
        raise _refused("seed", f"seed is {request.seed}: allowed is 0 to {2**63 - texts}")
    if not request.prompts:
        raise _refused("prompt", "prompt is an empty list: give at least one text")
    if texts > limits.max_prompts:
        name = "prompt" if len(request.prompts) > limits.max_prompts else "n"
        raise _refused(name, f"{texts} texts in one request: allowed are {limits.max_prompts}")
    if request.max_tokens > limits.max_tokens:
        told = f"max_tokens is {request.max_tokens}: allowed is 1 to {limits.max_tokens}"
        raise _refused("max_tokens", told)
    if tokens > limits.max_total_tokens:
        told = f"{texts} texts of {request.max_tokens} tokens are {tokens}: allowed are "
        raise _refused("max_tokens", f"{told}{limits.max_total_tokens} in one request")
    try:
        size = sum(len(prompt.encode()) for prompt in request.prompts)
    except UnicodeEncodeError:
        raise _refused("prompt", "a prompt is not valid Unicode") from None
    if size > limits.max_prompt_bytes:
        told = f"the prompts have {size} bytes: allowed are {limits.max_prompt_bytes}"
        raise _refused("prompt", told)
    if len(request.stops) > MOST_STOPS or not all(
        0 < len(stop) <= LONGEST_STOP for stop in request.stops
    ):
        told = f"stop takes up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters"
        raise _refused("stop", told)
    if request.stream_options.include_usage and not request.stream:
        raise _refused("stream_options", "stream_options are allowed only with stream: true")


def _refused(name: str, message: str) -> RequestError:
    return RequestError(400, message, name)
