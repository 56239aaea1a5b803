"""How an answer ends is counted."""

import asyncio
from typing import Any

import pytest

from minigpt.serving.app import Answer
from minigpt.serving.errors import RequestError
from minigpt.serving.metrics import Metrics


class Fails:
    """A completion that can't be written."""

    closed = False

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def whole(self) -> Any:
        raise self.error

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("error", [ValueError("a bug"), RequestError(500, "the model failed")])
def test_an_answer_that_fails_is_not_counted_as_200(error: Exception) -> None:
    completion, metrics = Fails(error), Metrics()

    async def receive() -> Any:
        await asyncio.sleep(10)

    async def send(message: Any) -> None:
        pass

    answer = Answer(completion, "m", metrics, False, 1)  # type: ignore[arg-type]
    if isinstance(error, RequestError):
        asyncio.run(answer({"type": "http"}, receive, send))
    else:  # the application answers it
        with pytest.raises(ValueError, match="a bug"):
            asyncio.run(answer({"type": "http"}, receive, send))
    assert completion.closed
    assert 'minigpt_requests_total{model="m",status="500"} 1.0' in metrics.page().decode()
