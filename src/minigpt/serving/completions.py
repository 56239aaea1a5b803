"""One completion: rows for the engine, and what they write as OpenAI's answer or stream."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from minigpt.common.errors import InputError
from minigpt.generation.prompts import encode
from minigpt.serving.continuation import Continuation
from minigpt.serving.engine import ClosedError, FullError, Job, Row
from minigpt.serving.errors import RequestError
from minigpt.serving.metrics import Metrics
from minigpt.serving.models import Loaded, Model
from minigpt.serving.requests import CompletionRequest
from minigpt.serving.texts import Text

log = logging.getLogger(__name__)

RETRY_S = 2  # a few of the shortest requests take so long


class Completion:
    """A request that is being answered.

    Args:
        request: What is asked for.
        model: The model that answers.
        metrics: Where it is counted.

    Raises:
        RequestError: The prompt is refused, or too many requests wait.
    """

    def __init__(self, request: CompletionRequest, model: Model, metrics: Metrics) -> None:
        self._request, self._id, self._metrics = request, model.id, metrics
        self._began, self._first = time.perf_counter(), False
        self._changed = asyncio.Event()
        as_written = request.stream or bool(request.stops)
        while True:
            assert model.loaded
            self._loaded = loaded = model.loaded
            self._rows, self._texts = _rows(request, loaded)
            self._job = Job(self._rows, self._changed.set, as_written)
            try:
                loaded.engine.submit(self._job)
                break
            except FullError:
                raise RequestError(
                    429, "too many requests wait: try again later", None, "queue_full", RETRY_S
                ) from None
            except ClosedError:
                if model.loaded is loaded:
                    raise RequestError(
                        503, "the server is shutting down", retry_after_s=RETRY_S
                    ) from None
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": loaded.found.answers_as,
            "system_fingerprint": loaded.sha256[:12],
        }

    async def whole(self) -> dict[str, Any]:
        """Returns the answer."""
        choices: list[dict[str, Any]] = []
        async for choice in self._pieces():
            choices.append(choice)
        joined = []
        for index in range(len(self._rows)):
            mine = [choice for choice in choices if choice["index"] == index]
            joined.append({**mine[-1], "text": "".join(choice["text"] for choice in mine)})
            if self._request.listed is not None:
                joined[-1]["logprobs"] = {
                    name: [entry for choice in mine for entry in choice["logprobs"][name]]
                    for name in mine[-1]["logprobs"]
                }
        return {**self._head, "choices": joined, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yields the answer as server-sent events."""
        with_usage = self._request.stream_options.include_usage
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        try:
            async for choice in self._pieces():
                yield _event({**self._head, "choices": [choice], **more})
        except RequestError as error:
            yield _event(error.content)
            return
        if with_usage:
            yield _event({**self._head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def close(self) -> None:
        """Frees the slots that the request still has."""
        self._loaded.engine.cancel(self._job)

    async def _pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Yields what is new of each row; the last of a row says why it ended."""
        left = dict(enumerate(zip(self._rows, self._texts, strict=True)))
        while left:
            await self._changed.wait()
            self._changed.clear()
            if self._job.failed:
                raise RequestError(500, "the model failed: see the server's log")
            for index, (row, text) in list(left.items()):
                finish = row.finish  # before the tokens, which may become more
                ids = row.tokens[:]
                if finish is None and not (ids and self._job.as_written):
                    continue
                if not self._first:
                    self._first = True
                    passed = time.perf_counter() - self._began
                    self._metrics.first_token.labels(self._id).observe(passed)
                piece = text.piece(ids, finish is not None)
                if text.stopped:
                    finish = "stop"
                    self._loaded.engine.cancel(self._job, row)
                if finish or piece:
                    yield self._choice(index, row, text, ids, piece, finish)
                if finish:
                    del left[index]
        self._count()

    def _choice(
        self, index: int, row: Row, text: Text, ids: list[int], piece: str, finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if row.listed is not None:
            prompt, scored = [], []
            if row.scored is not None:
                separator, scored = self._loaded.tokenizer.separator, row.scored
                prompt = [token for token in row.prompt.tolist() if token != separator]
            logprobs = text.logprobs(prompt, ids, [*scored, *row.logprobs])
        return {"index": index, "text": piece, "logprobs": logprobs, "finish_reason": finish}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(row.prompt) for row in self._rows[:: self._request.n])
        rows = zip(self._rows, self._texts, strict=True)
        written = sum(text.written(row.tokens) for row, text in rows)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }

    def _count(self) -> None:
        usage = self._usage()
        for kind in ("prompt", "completion"):
            self._metrics.tokens.labels(self._id, kind).inc(usage[f"{kind}_tokens"])
        self._metrics.latency.labels(self._id).observe(time.perf_counter() - self._began)


def _rows(request: CompletionRequest, loaded: Loaded) -> tuple[list[Row], list[Text]]:
    """Returns the rows of a request, and their texts.

    Raises:
        RequestError: A prompt can't be continued.
    """
    try:
        prompts = encode(loaded.tokenizer, request.prompts)
    except InputError as error:
        raise RequestError(400, str(error), "prompt") from None
    rows: list[Row] = []
    texts: list[Text] = []
    for given, prompt in zip(request.prompts, prompts, strict=True):
        if not loaded.engine.fits(len(prompt), 1):
            raise RequestError(
                400,
                f"a prompt has {len(prompt)} tokens: the model reads at most "
                f"{loaded.config['context_length']}",
                "prompt",
            )
        scored: list[Any] | None = [] if request.echo and request.listed is not None else None
        for _ in range(request.n):
            row = Row(prompt, request.sampling(len(rows)), request.listed, scored=scored)
            rows.append(row)
            continuation = Continuation(loaded.tokenizer, given)
            texts.append(Text(loaded.tokenizer, continuation, request.stops, request.echo))
    return rows, texts


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
