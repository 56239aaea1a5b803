import sys
import threading
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

import minigpt
from minigpt.common.errors import InputError
from minigpt.tracking import pyfunc
from minigpt.tracking.pyfunc import ReviewWriter

SAMPLE: dict[str, Any] = {
    "prompts": ["this movie"],
    "reviews_per_prompt": 2,
    "max_tokens": 40,
    "temperature": 0.9,
    "top_k": 0,
    "top_p": 0.9,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "allow_unknown": False,
    "seed": 7,
}


LIMITS = {
    "max_prompts": 256,
    "max_prompt_bytes": 100_000,
    "max_tokens": 1000,
    "max_total_tokens": 10_000,
}
CONFIG = {"sample": SAMPLE, "tracking": {"request": LIMITS}}


class FakeGenerator:
    """Writes down how it was called."""

    def __init__(self, network: str, vocabulary: str, style: str) -> None:
        assert (network, vocabulary, style) == ("network", "vocabulary", "spaced")
        self.busy = threading.Lock()

    def __call__(self, prompts: list[str], sampling: SimpleNamespace) -> list[str]:
        assert self.busy.acquire(blocking=False), "two requests at once"
        try:
            if "" in prompts:
                raise InputError("the prompt '' is empty: write at least one word")
            self.sampling = vars(sampling)
            return [f"{prompt} and so on" for prompt in prompts]
        finally:
            self.busy.release()


@pytest.fixture
def sample() -> dict[str, Any]:
    return dict(SAMPLE)


@pytest.fixture
def writer(tmp_path: Any, monkeypatch: Any) -> ReviewWriter:
    config = {"vocabulary": {"style": "spaced"}}

    def load(directory: Any) -> SimpleNamespace:
        assert directory == tmp_path
        return SimpleNamespace(network="network", vocabulary="vocabulary", config=config)

    monkeypatch.setenv("KERAS_BACKEND", "jax")
    for name, fake in {
        "model": SimpleNamespace(load=load),
        "decoding": SimpleNamespace(Generator=FakeGenerator, Sampling=SimpleNamespace),
    }.items():
        monkeypatch.setitem(sys.modules, f"minigpt.{name}", fake)
        monkeypatch.setattr(minigpt, name, fake, raising=False)
    writer = ReviewWriter()
    writer.load_context(SimpleNamespace(artifacts={"model": str(tmp_path)}, model_config=LIMITS))
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
    assert writer.generate.sampling == {"max_tokens": 80, "temperature": 0, "seed": 2**63 - 1}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"top_q": 1}, "unknown parameter 'top_q': known are max_tokens, temperature,"),
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
        ({"max_tokens": 2.5}, "max_tokens is 2.5: a value of type long"),
        ({"max_tokens": True}, "max_tokens is True: a value of type long"),
        ({"temperature": "1"}, "temperature is '1': a value of type double"),
        ({"allow_unknown": 1}, "allow_unknown is 1: a value of type boolean"),
    ],
)
def test_settings_that_make_no_sense(writer: Any, params: Any, message: str) -> None:
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
        (["a \ud800"], "isn't valid Unicode"),
        (pd.DataFrame({"text": ["a"]}), "no column `prompt`"),
    ],
)
def test_prompts_that_make_no_sense(writer: Any, prompts: Any, message: str) -> None:
    with pytest.raises(MlflowException) as raised:
        writer.predict(None, prompts)
    assert message in raised.value.message
    assert raised.value.error_code == "INVALID_PARAMETER_VALUE"


def test_the_limits_of_a_request_are_the_configuration_s(writer: Any) -> None:
    writer.limits = {**LIMITS, "max_tokens": 5, "max_total_tokens": 9, "max_prompt_bytes": 3}
    assert writer.predict(None, ["abc"], {"max_tokens": 5}) == ["abc and so on"]
    for prompts, tokens, message in (
        (["a"], 6, "max_tokens is 6: allowed is 1 to 5"),
        (["a", "b"], 5, "2 prompts with max_tokens 5 are 10 tokens: allowed are 9"),
        (["abcd"], 5, "4 bytes: allowed are 3"),
    ):
        with pytest.raises(MlflowException, match=message):
            writer.predict(None, prompts, {"max_tokens": tokens})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "model_config lacks max_tokens"),
        ({"max_tokens": 0}, "max_tokens is 0: allowed is 8"),
        ({"max_prompts": float("inf")}, "max_prompts is inf: a value of type long"),
        ({"max_tokns": 5}, "unknown parameter 'max_tokns': known are max_prompts,"),
    ],
)
def test_limits_that_make_no_sense_are_refused_at_the_start(change: Any, message: str) -> None:
    context = SimpleNamespace(artifacts={}, model_config={**LIMITS, **change})
    with pytest.raises(MlflowException, match=message):
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


def test_the_signature_has_the_defaults_and_accepts_the_example() -> None:
    made = pyfunc.signature(CONFIG)
    assert made.inputs.input_names() == ["prompt"]
    assert {p["name"]: p["type"] for p in made.params.to_dict()} == {
        **dict.fromkeys(("max_tokens", "top_k", "seed"), "long"),
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), "double"),
        "allow_unknown": "boolean",
    }
    assert {p["name"]: p["default"] for p in made.params.to_dict()}["temperature"] == 0.9
    long = pyfunc.signature({**CONFIG, "sample": {**SAMPLE, "max_tokens": 5000}})
    assert long.params.to_dict()[0]["default"] == LIMITS["max_tokens"]
    prompts, params = pyfunc.example(["this movie"])
    assert list(prompts["prompt"]) == ["this movie"]
    assert set(params) <= set(SAMPLE)
