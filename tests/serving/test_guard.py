"""Who may ask, from where, and how much."""

import asyncio
import json
from typing import Any

import pytest

from minigpt.serving.guard import Guard

HOST = (b"host", b"127.0.0.1:8000")
JSON = (b"content-type", b"application/json; charset=utf-8")


def ask(
    path: str = "/v1/models",
    *headers: tuple[bytes, bytes],
    method: str = "GET",
    body: tuple[bytes, ...] = (b"",),
    key: str = "",
) -> tuple[int, dict[str, str], Any]:
    """The status, the headers and the content of an answer; the application returns the body."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        given = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(len(given)).encode()})

    guard = Guard(
        app,
        hosts={"127.0.0.1", "[::1]", "mini.example"},
        key=key,
        is_open=lambda path: path == "/health",
        max_body_bytes=10,
        slow_s=0.05,
    )
    parts, sent = list(body), []

    async def receive() -> Any:
        if not parts:
            await asyncio.sleep(10)
        return {"type": "http.request", "body": parts.pop(0), "more_body": parts != []}

    async def send(message: Any) -> None:
        sent.append(message)

    given = headers if any(name == b"host" for name, _ in headers) else (HOST, *headers)
    scope = {"type": "http", "method": method, "path": path, "headers": list(given)}
    asyncio.run(guard(scope, receive, send))
    names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], names, json.loads(sent[1]["body"])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1", 200),
        (b"127.0.0.1:9", 200),
        (b"[::1]:8000", 200),
        (b"[::1]", 200),
        (b"MINI.example:443", 200),
        (b"evil.example", 403),
        (b"127.0.0.1.evil.example:8000", 403),
        (b"", 403),
    ],
)
def test_the_host_must_be_known(host: bytes, status: int) -> None:
    assert ask("/v1/models", (b"host", host))[0] == status


def test_the_key_is_needed_but_for_health() -> None:
    for headers, status in (
        ((), 401),
        (((b"authorization", b"Bearer wrong"),), 401),
        (((b"authorization", b"Basic secret"),), 401),
        (((b"authorization", b"Bearer \xff"),), 401),
        (((b"authorization", b"bearer secret"),), 200),
    ):
        assert ask("/v1/models", *headers, key="secret")[0] == status
        assert ask("/health", *headers, key="secret")[0] == 200
    status, names, content = ask(key="secret")
    assert names["www-authenticate"] == "Bearer"
    assert content["error"]["code"] == "invalid_api_key"


def test_the_body_is_measured_before_it_is_read() -> None:
    def post(*body: bytes, **headers: bytes) -> tuple[int, Any]:
        more = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
        status, _, content = ask("/", JSON, *more, method="POST", body=body)
        return status, content

    assert post(b"12345", b"67890") == (200, 10)
    assert post(b"12345", b"678901")[0] == 413
    assert post(content_length=b"11")[0] == 413
    assert post(content_length=b"9" * 40)[0] == 413
    assert ask("/", method="POST", body=(b"{}",))[0] == 415


def test_a_body_that_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, content = ask("/", JSON, method="POST", body=())
    assert status == 408 and "did not arrive in 0.05 s" in content["error"]["message"]


def test_every_answer_has_the_headers_of_a_safe_page() -> None:
    for path in ("/health", "/v1/models"):
        _, names, _ = ask(path, key="secret")
        assert names["content-security-policy"].startswith("default-src 'self';")
        assert names["x-content-type-options"] == "nosniff"
