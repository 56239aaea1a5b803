"""What every request passes first: the host, the key, and the size of the body."""

import asyncio
import hmac
from collections.abc import Callable, Collection
from typing import Any

from fastapi.responses import JSONResponse

from minigpt.serving.errors import RequestError

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


class Guard:
    """Refuses requests before anything reads them, and adds the headers of every answer.

    Args:
        app: The ASGI application behind it.
        hosts: Names that the Host header may have, without a port. A page of another site whose
            name was made to lead here (DNS rebinding) has another.
        key: What `Authorization: Bearer` must hold; nothing: no key is needed.
        is_open: Tells whether a path needs no key.
        max_body_bytes: Most bytes of a body.
        slow_s: Longest time in which a body arrives.
    """

    def __init__(
        self,
        app: Any,
        *,
        hosts: Collection[str],
        key: str,
        is_open: Callable[[str], bool],
        max_body_bytes: int,
        slow_s: float,
    ) -> None:
        self._app, self._hosts, self._key = app, hosts, key.encode()
        self._is_open, self._most, self._slow_s = is_open, max_body_bytes, slow_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one request (https://asgi.readthedocs.io/en/latest/specs/www.html)."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_RAW_HEADERS]
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except RequestError as error:
            response = JSONResponse(error.content, error.status, error.headers)
            return await response(scope, receive, answer)
        if body is None:
            return None
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def received() -> Any:
            return given.pop() if given else await receive()

        return await self._app(scope, received, answer)

    def _check(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if name not in self._hosts:
            told = (
                f"the host {name[:200]!r} is not allowed: start the server with --allow-host NAME"
            )
            raise RequestError(403, told)
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
        if self._key and not known and not self._is_open(scope["path"]):
            told = "the key is missing or wrong: send the header Authorization: Bearer KEY"
            raise RequestError(401, told, code="invalid_api_key")

    async def _body(self, scope: Any, receive: Any) -> bytes | None:
        """Returns the body, or None where the client has gone."""
        headers = dict(scope["headers"])
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b""
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":  # another site's form can't send this type
            raise RequestError(415, "send the header Content-Type: application/json")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._slow_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._most:
                        raise self._too_large()
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive in {self._slow_s:g} s") from None
        return bytes(body)

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body is too large: allowed are {self._most} bytes")
