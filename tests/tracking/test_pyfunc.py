"""The registered model without MLflow's wrapper; test_registry.py has it with the wrapper."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from tracked import CONFIG, SAMPLING, changed

from minigpt.common.errors import InputError
from minigpt.config import RequestConfig
from minigpt.data.tokenizer import WordTokenizer
from minigpt.tracking import pyfunc
from minigpt.tracking.pyfunc import ReviewWriter

LIMITS = {
    "max_prompts": 256,
    "max_prompt_bytes": 100_000,
    "max_tokens": 1000,
    "max_total_tokens": 10_000,
}


class FakeGenerator:
    """Keeps how it was called."""

    def __init__(self) -> None:
        self.busy = threading.Lock()

    def __call__(self, prompts: list[str], sampling: Any) -> list[str]:
        assert self.busy.acquire(blocking=False), "two requests at once"
        try:
            if "" in prompts:
                raise InputError("the prompt '' is empty: write at least one word")
            self.sampling = sampling
            return [f"{prompt} and so on" for prompt in prompts]
        finally:
            self.busy.release()


@pytest.fixture
def writer(model_dir: Path, monkeypatch: Any) -> ReviewWriter:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    writer = ReviewWriter()
    writer.load_context(SimpleNamespace(artifacts={"model": str(model_dir)}, model_config=LIMITS))
    writer.generator = FakeGenerator()
    return writer


@pytest.mark.parametrize(
    "prompts",
    [
        pd.DataFrame({"id": [1, 2], "prompt": ["a", "ä b"]}),
        pd.Series(["a", "ä b"]),
        ["a", "ä b"],
    ],
)
def test_prompts_in_texts_out(writer: Any, prompts: Any) -> None:
    assert writer.predict(None, prompts) == ["a and so on", "ä b and so on"]


def test_settings_of_a_request(writer: Any) -> None:
    writer.predict(None, ["a"], {"temperature": 0, "seed": 2**63 - 1, "top_k": None})
    given = writer.generator.sampling
    assert (given.max_tokens, given.temperature, given.seed) == (80, 0, 2**63 - 1)
    assert (given.top_k, given.top_p) == (0, 1)  # the neutral defaults


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"top_q": 1}, "unknown key top_q: allowed are max_tokens, temperature,"),
        ({"temperature": float("nan")}, "temperature is nan: allowed is 0 to 100"),
        ({"temperature": float("inf")}, "temperature is inf: allowed"),
        ({"temperature": -0.1}, "temperature is -0.1: allowed"),
        ({"top_p": 0.0}, "top_p is 0.0: allowed is above 0 to 1"),
        ({"min_p": 1.1}, "min_p is 1.1: allowed is 0 to 1"),
        ({"top_k": -1}, "top_k is -1: allowed"),
        ({"repetition_penalty": 0.5}, "repetition_penalty is 0.5: allowed"),
        ({"max_tokens": 0}, "max_tokens is 0: allowed is 1 to 1000"),
        ({"max_tokens": 1001}, "max_tokens is 1001: allowed is 1 to 1000"),
        ({"max_tokens": 10**9}, "max_tokens is 1000000000: allowed is 1 to 1"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_p": float("-inf")}, "top_p is -inf: allowed"),
        ({"seed": -1}, "seed is -1: allowed"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5: allowed is a whole number"),
        ({"max_tokens": True}, "max_tokens is True: allowed is a whole number"),
        ({"temperature": "1"}, "temperature is '1': allowed is a number"),
        ({"allow_unknown": 1}, "allow_unknown is 1: allowed is true or false"),
    ],
)
def test_settings_that_are_not_allowed(writer: Any, params: Any, message: str) -> None:
    with pytest.raises(MlflowException) as raised:
        writer.predict(None, ["a"], params)
    assert message in raised.value.message
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "0 prompts in one request: allowed are 1 to 256"),
        (["a"] * 257, "257 prompts in one request"),
        (["a"] * 126, "126 prompts with max_tokens 80 are 10080 tokens: allowed are 10000 in one"),
        (["ä" * 50_000, "b"], "100001 bytes: allowed are 100000"),
        ([""], "the prompt '' is empty"),
        (None, "the input is of type NoneType"),
        (7, "the input is of type int"),
        ({"a": "b"}, "the input is of type dict"),
        (
            pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]),
            "the input is of type DataFrame",
        ),
        ([None], "prompt 1 is of type NoneType"),
        ([["a"]], "prompt 1 is of type list"),
        (["a \ud800"], "is not valid Unicode"),
        (pd.DataFrame({"text": ["a"]}), "no column `prompt`"),
    ],
)
def test_prompts_that_are_not_allowed(writer: Any, prompts: Any, message: str) -> None:
    with pytest.raises(MlflowException) as raised:
        writer.predict(None, prompts)
    assert message in raised.value.message
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"


def test_the_limits_of_a_request_are_configured(writer: Any) -> None:
    limits = {**LIMITS, "max_tokens": 8, "max_total_tokens": 15, "max_prompt_bytes": 3}
    writer.limits = RequestConfig(**limits)
    assert writer.predict(None, ["abc"], {"max_tokens": 8}) == ["abc and so on"]
    for prompts, tokens, message in (
        (["a"], 9, "max_tokens is 9: allowed is 1 to 8"),
        (["a", "b"], 8, "2 prompts with max_tokens 8 are 16 tokens: allowed are 15"),
        (["abcd"], 8, "4 bytes: allowed are 3"),
    ):
        with pytest.raises(MlflowException, match=message):
            writer.predict(None, prompts, {"max_tokens": tokens})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "model_config.max_tokens is None: allowed is"),
        ({"max_tokens": 0}, "model_config.max_tokens is 0: allowed is 8"),
        ({"max_prompts": float("inf")}, "max_prompts is inf: allowed is a whole number"),
        ({"max_tokns": 5}, "unknown key model_config.max_tokns: allowed are max_prompts,"),
    ],
)
def test_limits_that_are_not_allowed_stop_the_start(change: Any, message: str) -> None:
    context = SimpleNamespace(artifacts={}, model_config={**LIMITS, **change})
    with pytest.raises(InputError, match=message):
        ReviewWriter().load_context(context)


def test_requests_wait_for_each_other(writer: Any) -> None:
    texts: list[Any] = []
    threads = [
        threading.Thread(target=lambda: texts.extend(writer.predict(None, ["a"])))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["a and so on"] * 20


def test_a_text_streams_in_pieces(writer: Any) -> None:
    texts = [
        'A "film',
        'A "film that is',
        'A "film that is good" and so',
        'A "film that is good" x',
    ]
    writer.generator.stream = lambda prompts, sampling: ([text] for text in texts)
    writer.generator.tokenizer = WordTokenizer(("", "[UNK]"), "words")
    for given in ("a", {"prompt": "a"}):
        pieces = list(writer.predict_stream(None, given, {"max_tokens": 4}))
        assert "".join(pieces) == texts[-1]
        assert sum(map(bool, pieces)) > 2
    for wrong in ({"text": "a"}, 7):
        with pytest.raises(MlflowException, match="prompt 1 is of type"):
            list(writer.predict_stream(None, wrong))
    with pytest.raises(MlflowException, match="max_tokens is 0"):
        list(writer.predict_stream(None, "a", {"max_tokens": 0}))
    begun = writer.predict_stream(None, "a")
    next(begun)
    assert writer.one_at_a_time.acquire(blocking=False)  # others are served meanwhile


def test_the_signature_has_the_defaults_and_accepts_the_example() -> None:
    made = pyfunc.signature(CONFIG)
    assert made.inputs.input_names() == ["prompt"]
    params = {param["name"]: param for param in made.params.to_dict()}
    assert {name: param["type"] for name, param in params.items()} == {
        **dict.fromkeys(("max_tokens", "top_k", "seed"), "long"),
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), "double"),
        "allow_unknown": "boolean",
    }
    assert SAMPLING.items() <= {name: param["default"] for name, param in params.items()}.items()
    long = pyfunc.signature(changed(sample={"max_tokens": 5000}))
    assert long.params.to_dict()[0]["default"] == CONFIG.tracking.request.max_tokens
    prompts, given = pyfunc.example(["this movie"])
    assert list(prompts["prompt"]) == ["this movie"]
    assert set(given) <= set(params)
