"""The real server, asked by OpenAI's client and by sockets that do what clients should not."""

import concurrent.futures
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from served import Served

pytestmark = pytest.mark.slow

PROMPT = {"model": "tiny", "prompt": "this movie is"}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    address = f"http://127.0.0.1:{served.port}/v1"
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=60)


def head(length: int | str, *more: str, path: str = "/v1/completions") -> bytes:
    size = f"Content-Length: {length}" if isinstance(length, int) else length
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", size)
    return "\r\n".join([*lines, *more, "", ""]).encode()


def request(**fields: Any) -> bytes:
    body = json.dumps({**PROMPT, **fields}).encode()
    return head(len(body), "Connection: close") + body


def answer(connection: socket.socket) -> tuple[int, str]:
    """The status and the rest of an answer, up to the end of the connection."""
    with connection:
        data = b""
        while piece := connection.recv(65536):
            data += piece
    status = int(data.split(b" ", 2)[1]) if data else 0
    return status, data.partition(b"\r\n\r\n")[2].decode()


def test_a_completion_as_openai_s_client_gets_it(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    made = client.completions.create(**PROMPT, max_tokens=12, seed=7, n=2, logprobs=3)
    assert [choice.index for choice in made.choices] == [0, 1]
    assert {choice.finish_reason for choice in made.choices} == {"length"}
    first, second = made.choices
    assert first.text != second.text and first.text.startswith(" ")
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (3, 24)
    listed = first.logprobs
    assert len(listed.tokens) == len(listed.top_logprobs) == len(listed.text_offset) == 12
    for token, own, top in zip(
        listed.tokens, listed.token_logprobs, listed.top_logprobs, strict=True
    ):
        assert top[token] == own and 3 <= len(top) <= 4 and own < 0
    alone = client.completions.create(**PROMPT, max_tokens=12, seed=8)
    assert alone.choices[0].text == second.text  # row i draws from seed + i
    assert alone.model == "tiny" and alone.system_fingerprint
    echoed = client.completions.create(**PROMPT, max_tokens=12, seed=8, echo=True)
    assert echoed.choices[0].text == "This movie is" + second.text
    scored = client.completions.create(**PROMPT, max_tokens=2, seed=8, echo=True, logprobs=1)
    listed = scored.choices[0].logprobs
    assert listed.tokens[:3] == ["this", "movie", "is"] and listed.text_offset[:3] == [0, 4, 10]
    assert listed.token_logprobs[0] is None and listed.top_logprobs[0] is None
    assert all(own < 0 for own in listed.token_logprobs[1:]) and len(listed.tokens) == 5


@pytest.mark.parametrize("more", [{}, {"stop": ["w1"]}, {"logprobs": 2, "echo": True}])
def test_a_stream_joined_is_the_answer_without(client: openai.OpenAI, more: Any) -> None:
    asked = {**PROMPT, "max_tokens": 40, "seed": 3, "n": 3, **more}
    whole = client.completions.create(**asked)
    texts, ends, offsets, usage = {}, {}, {}, None
    events = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for event in events:
        usage = event.usage
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends[choice.index] = choice.finish_reason
            if choice.logprobs:
                offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage and len(events) > 3
    if "logprobs" in more:
        expected = {choice.index: choice.logprobs.text_offset for choice in whole.choices}
        assert offsets == expected
    if "stop" in more:
        assert "w1" not in "".join(texts.values()) and "stop" in ends.values()


def test_errors_as_openai_s_client_tells_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**PROMPT, top_p=2)
    assert raised.value.param == "top_p" and "above 0 to 1" in raised.value.message
    with pytest.raises(openai.BadRequestError, match=r"unknown key top_q.*did you mean top_p"):
        client.completions.create(**PROMPT, extra_body={"top_q": 1})
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt", prompt="a")
    assert missing.value.code == "model_not_found" and "there are: tiny" in missing.value.message
    for prompt in ("", "zzz"):
        with pytest.raises(openai.BadRequestError) as unknown:
            client.completions.create(model="tiny", prompt=prompt)
        assert unknown.value.param == "prompt"


def test_pages_and_routes(served: Served, client: openai.OpenAI) -> None:
    status, page = served.get("/v1/nothing")
    assert status == 404 and json.loads(page)["error"]["type"] == "invalid_request_error"
    assert served.get("/v1/completions")[0] == 405
    with connect(served) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert connection.recv(12).endswith(b"403")
    client.completions.create(**PROMPT, max_tokens=2)
    for metric in ("requests_total", "tokens_total", "request_seconds_count", "step_texts_sum"):
        assert served.metric(f"minigpt_{metric}") > 0


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (head(5), 408),  # and no body
        (head(2) + b"{}", 400),
        (head(0).replace(b"application/json", b"text/plain"), 415),
        (head(200_000_000), 413),
        (head("Transfer-Encoding: chunked") + b"20000\r\n" + b" " * 0x20000, 413),
        (head(90_000) + b"[" * 90_000, 400),
        (head(70_000) + b'{"a": ' * 10_000 + b" " * 10_000, 400),
        (b"GET / HTT", 0),  # half a request
        (b"nonsense\r\n\r\n", 400),
    ],
)
def test_requests_that_are_none(served: Served, sent: bytes, status: int) -> None:
    began = time.monotonic()
    connection = connect(served)
    connection.sendall(sent)
    assert answer(connection)[0] == status
    assert time.monotonic() - began < 20
    assert served.get("/health")[0] == 200


def test_a_body_of_200_mb_is_refused_before_it_is_read(served: Served) -> None:
    with connect(served) as connection:
        connection.sendall(head(200_000_000))
        piece, sent = b" " * 1_000_000, 0
        try:
            while sent < 200_000_000:
                connection.sendall(piece)
                sent += len(piece)
        except OSError:
            pass  # the server need not take what it has refused
        assert connection.recv(12).endswith(b"413")


def test_a_client_that_goes_away_frees_its_slots(served: Served, client: Any) -> None:
    for fields in ({"stream": True}, {"stream": False}):
        before = served.metric("minigpt_disconnected_total")
        connections = [connect(served) for _ in range(8)]
        for connection in connections:
            connection.sendall(request(max_tokens=100_000, **fields))
        if fields["stream"]:
            assert all(connection.recv(12).endswith(b"200") for connection in connections)
        for connection in connections:
            connection.close()
        began = time.monotonic()
        client.completions.create(**PROMPT, max_tokens=2)
        assert time.monotonic() - began < 10
        served.wait(lambda: served.metric("minigpt_disconnected_total") == before + 8)  # noqa: B023
    _status, said = served.get("/metrics")
    assert 'minigpt_requests_total{model="tiny",status="499"} 16.0' in said


def test_a_client_that_takes_nothing_keeps_no_slot(served: Served) -> None:
    before = served.metric('minigpt_requests_total{model="tiny",status="499"}')
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(request(max_tokens=50_000, stream=True, n=8, logprobs=20))
        counted = 'minigpt_requests_total{model="tiny",status="499"}'
        served.wait(lambda: served.metric(counted) == before + 1)


def test_a_hundred_clients_at_once(served: Served) -> None:
    idle = [connect(served) for _ in range(100)]

    def ask(seed: int) -> str:
        connection = connect(served)
        connection.sendall(request(max_tokens=20, seed=seed % 10))
        status, body = answer(connection)
        assert status == 200
        return str(json.loads(body)["choices"][0]["text"])

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        texts = list(pool.map(ask, range(100)))
    assert all(texts[seed] == texts[seed % 10] for seed in range(100))
    assert len(set(texts)) == 10
    for connection in idle:
        connection.close()


def test_too_many_requests_are_told_to_come_again(served: Served) -> None:
    connections = []
    try:
        for _ in range(130):  # 8 run, 100 wait
            connection = connect(served)
            connection.sendall(request(max_tokens=100_000))
            connections.append(connection)
        served.wait(lambda: served.metric("minigpt_waiting_requests") == 100)
        refused = connect(served)
        refused.sendall(request(max_tokens=1))
        status, body = answer(refused)
        assert status == 429 and json.loads(body)["error"]["code"] == "queue_full"
    finally:
        for connection in connections:
            connection.close()
    served.wait(lambda: served.metric("minigpt_waiting_requests") == 0)


def test_ctrl_c_ends_a_server_that_loads(model_directory: Path, tmp_path: Path) -> None:
    """Python would abort the process, whose other thread is in TensorFlow."""
    loading = Served(tmp_path, "--model", str(model_directory))
    time.sleep(1)  # it compiles
    loading.process.send_signal(signal.SIGINT)
    assert loading.process.wait(60) == 0


def events(connection: socket.socket) -> Iterator[bytes]:
    while piece := connection.recv(65536):
        yield piece


def test_sigterm_finishes_what_runs(served: Served, client: Any) -> None:
    """The last test: the server is gone afterwards."""
    connection = connect(served)
    connection.sendall(request(max_tokens=600, stream=True))
    assert connection.recv(12).endswith(b"200")
    served.process.send_signal(signal.SIGTERM)
    with connection:
        received = b"".join(events(connection))
    assert b'"finish_reason":"length"' in received and b"[DONE]" in received
    assert served.process.wait(60) == 0
    assert "stopped" in served.log[-1]
