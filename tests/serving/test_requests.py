"""What a request may hold."""

import json
from typing import Any

import pytest

from minigpt.config import RequestConfig
from minigpt.serving.errors import RequestError
from minigpt.serving.requests import parse

LIMITS = RequestConfig(max_prompts=6, max_prompt_bytes=40, max_tokens=50, max_total_tokens=100)


def given(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


def test_the_defaults_are_openai_s() -> None:
    request = parse(given(), LIMITS)
    assert (request.prompts, request.n, request.max_tokens) == ([""], 1, 16)
    assert (request.temperature, request.top_p, request.stops) == (1, 1, [])
    assert (request.stream, request.listed, request.echo) == (False, None, False)
    assert request.seed != parse(given(), LIMITS).seed
    nothing = dict.fromkeys(("prompt", "stop", "seed", "logprobs", "logit_bias", "stream_options"))
    assert parse(given(**nothing), LIMITS).prompts == [""]


def test_every_field() -> None:
    request = parse(
        given(
            prompt=["a", "b"],
            n=2,
            max_tokens=25,
            temperature=0,
            top_p=0.5,
            top_k=3,
            min_p=0.1,
            repetition_penalty=2,
            allow_unknown=True,
            seed=2**63 - 4,
            stop="x",
            stream=True,
            stream_options={"include_usage": True},
            logprobs=0,
            echo=True,
            user="me",
            best_of=1,
            frequency_penalty=0,
            presence_penalty=0.0,
            logit_bias={},
            suffix="",
        ),
        LIMITS,
    )
    assert (request.prompts, request.stops, request.listed) == (["a", "b"], ["x"], 0)
    sampling = request.sampling(3)
    assert (sampling.seed, sampling.top_k, sampling.max_tokens) == (2**63 - 1, 3, 25)
    assert (sampling.temperature, sampling.allow_unknown) == (0, True)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"top_q": 1}, "top_q", "unknown key top_q: allowed are .* (did you mean top_p?)"),
        ({"Prompt": "a"}, "Prompt", "did you mean prompt?"),
        ({"prompt": 7}, "prompt", "prompt is 7: allowed is a text or a list of texts"),
        ({"prompt": [[1, 2]]}, "prompt", "allowed is a text or a list of texts"),
        ({"prompt": []}, "prompt", "an empty list"),
        ({"prompt": ["a"] * 7}, "prompt", "7 texts in one request: allowed are 6"),
        ({"prompt": ["a"] * 2, "n": 4}, "n", "8 texts in one request: allowed are 6"),
        ({"prompt": "ä" * 21}, "prompt", "42 bytes: allowed are 40"),
        ({"max_tokens": 51}, "max_tokens", "max_tokens is 51: allowed is 1 to 50"),
        ({"max_tokens": 34, "n": 3}, "max_tokens", "are 102: allowed are 100"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0: allowed is 1 to"),
        ({"max_tokens": 2.5}, "max_tokens", "is 2.5: allowed is a whole number"),
        ({"max_tokens": True}, "max_tokens", "is True: allowed is a whole number"),
        ({"temperature": "1"}, "temperature", "is '1': allowed is a number"),
        ({"temperature": -1}, "temperature", "is -1: allowed is 0 to 100"),
        ({"temperature": 1e-9}, "temperature", "allowed is a number, 0 or 0.001 to 100"),
        ({"top_p": 0}, "top_p", "top_p is 0: allowed is above 0 to 1"),
        ({"min_p": 2}, "min_p", "allowed is 0 to 1"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "allowed is 0 to 9223372036854775806"),
        ({"user": 5}, "user", "user is 5: allowed is a text"),
        ({"seed": 10**30}, "seed", "seed is 1000"),
        ({"logprobs": 21}, "logprobs", "is 21: allowed is 0 to 20"),
        ({"logprobs": True}, "logprobs", "allowed is a whole number"),
        ({"stop": ["a"] * 5}, "stop", "up to 4 texts"),
        ({"stop": ""}, "stop", "up to 4 texts of 1 to 200 characters"),
        ({"stop": 3}, "stop", "stop is 3: allowed is a text or a list of texts"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options", "unknown key"),
        ({"best_of": 2}, "best_of", "not supported: leave it out, or give 1"),
        ({"best_of": True}, "best_of", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
        ({"suffix": "b"}, "suffix", "not supported"),
        ({"model": 3}, "model", "model is 3"),
        ({"model": None}, "model", "model is missing: GET /v1/models lists the ids"),
    ],
)
def test_what_is_refused_names_the_field(fields: Any, param: str, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse(given(**fields), LIMITS)
    error = raised.value.content["error"]
    assert (raised.value.status, error["param"]) == (400, param)
    for part in message.split(".*"):
        assert part in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b"\xff", b'{"temperature": NaN}', b"[" * 10**6, b'{"a":' * 10**5],
)
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(RequestError, match="the body is not") as raised:
        parse(body, LIMITS)
    assert raised.value.status == 400
