"""The routes: completions, models, health, metrics and the page."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from minigpt.config import ServingConfig
from minigpt.serving.completions import RETRY_S, Completion
from minigpt.serving.errors import RequestError
from minigpt.serving.guard import Guard
from minigpt.serving.metrics import Metrics
from minigpt.serving.models import Model, Models
from minigpt.serving.requests import MOST_LOGPROBS, MOST_STOPS, parse

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"


class Page(StaticFiles):
    """The files of the page; a browser asks whether they have changed."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Returns a file."""
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def make(
    models: Models,
    metrics: Metrics,
    config: ServingConfig,
    *,
    hosts: Collection[str],
    key: str = "",
    failed: Callable[[Exception], None],
) -> Guard:
    """Returns the ASGI application.

    Args:
        models: What is served; they are loaded when the application starts.
        metrics: Where requests are counted.
        config: The limits of the server.
        hosts: Names that the Host header may have.
        key: The API key; nothing: none is needed.
        failed: Called if a model can't be loaded at the start.
    """

    async def load_and_follow() -> None:
        try:
            await models.load()
            await models.follow()
        except Exception as error:
            failed(error)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(load_and_follow())
        yield
        task.cancel()
        models.close()

    app = FastAPI(openapi_url=None, lifespan=lifespan)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.content, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        told = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return JSONResponse(RequestError(error.status_code, told).content, error.status_code)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return JSONResponse(RequestError(500, "see the server's log").content, 500)

    @app.get("/health")
    async def health() -> Response:
        if models.ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "loading"}, 503, {"Retry-After": str(RETRY_S)})

    @app.get("/metrics")
    async def shown_metrics() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def listed() -> Response:
        _check_ready(models)
        found = [_shown(model, models) for model in models.by_id.values()]
        return JSONResponse({"object": "list", "data": found})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        _check_ready(models)
        asked = parse(await request.body(), models.limits)
        model = models.by_id.get(asked.model)
        if model is None:
            there = ", ".join(models.by_id)
            told = f"there is no model {asked.model[:200]!r}; there are: {there}"
            raise RequestError(404, told, "model", "model_not_found")
        try:
            completion = Completion(asked, model, metrics)
        except RequestError as error:
            metrics.requests.labels(model.id, error.status).inc()
            raise
        return Answer(completion, model.id, metrics, asked.stream, config.slow_s)

    if PAGE.is_dir():
        app.mount("/page", Page(directory=PAGE))

        @app.get("/")
        async def page() -> Response:
            return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    return Guard(
        app,
        hosts=hosts,
        key=key,
        is_open=lambda path: path in ("/", "/health") or path.startswith("/page/"),
        max_body_bytes=config.max_body_bytes,
        slow_s=config.slow_s,
    )


class Answer(Response):
    """Sends a completion, and frees its slots when the client goes away or takes nothing.

    Args:
        completion: What is sent.
        model: The model's id.
        metrics: Where it is counted.
        stream: Whether it is sent as it is written.
        slow_s: Longest time for the client to take a piece.
    """

    def __init__(
        self, completion: Completion, model: str, metrics: Metrics, stream: bool, slow_s: float
    ) -> None:
        self._completion, self._model, self._metrics = completion, model, metrics
        self._stream, self._slow_s = stream, slow_s
        self.background = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        status, sending = 500, asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                status = 499  # as nginx calls it
                self._metrics.disconnected.labels(self._model).inc()
                return
            try:
                sending.result()
                status = 200
            except RequestError as error:
                status = error.status
                await JSONResponse(error.content, status)(scope, receive, send)
            except TimeoutError:  # uvicorn closes the connection
                status = 499
        finally:
            for task in (sending, gone):
                task.cancel()
            self._completion.close()
            self._metrics.requests.labels(self._model, status).inc()

    async def _send(self, send: Any) -> None:
        if not self._stream:
            content = await self._completion.whole()
            body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
            await self._start(send, b"application/json", [(b"content-length", b"%d" % len(body))])
            await self._take(send, body, False)
            return
        # Proxies that collect an answer before they pass it on are asked not to.
        more = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await self._start(send, b"text/event-stream; charset=utf-8", more)
        async for event in self._completion.events():
            await self._take(send, event.encode(), True)
        await self._take(send, b"", False)

    async def _start(self, send: Any, kind: bytes, more: list[tuple[bytes, bytes]]) -> None:
        headers = [(b"content-type", kind), *more]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _take(self, send: Any, body: bytes, more: bool) -> None:
        async with asyncio.timeout(self._slow_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_ready(models: Models) -> None:
    if not models.ready:
        raise RequestError(503, "the models are being loaded", None, "loading", RETRY_S)


def _shown(model: Model, models: Models) -> dict[str, Any]:
    loaded, limits = model.loaded, models.limits.model_dump()
    assert loaded
    return {
        "id": model.id,
        "object": "model",
        "created": loaded.found.created_s,
        "owned_by": "minigpt",
        "version": loaded.found.version,
        "alias": model.source.alias and model.source.alias[1:],
        "answers_as": loaded.found.answers_as,
        "sha256": loaded.sha256,
        "figures": loaded.found.figures,
        "context_length": loaded.config["context_length"],
        "vocabulary_size": len(loaded.tokenizer),
        "starts_empty": loaded.tokenizer.separator is not None,
        "limits": {**limits, "logprobs": MOST_LOGPROBS, "stop": MOST_STOPS},
    }
