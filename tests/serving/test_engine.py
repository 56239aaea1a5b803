"""The engine with a tiny model: who gets a slot, who loses it, and that no text notices."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from minigpt.config import SamplingConfig
from minigpt.data.tokenizer import WordTokenizer
from minigpt.serving import engine as engines
from minigpt.serving.engine import ClosedError, Engine, FullError, Job, Row

WORDS = WordTokenizer(("", "[UNK]", *(f"w{i}" for i in range(50))), "spaced")
PATIENCE_S = 30


@pytest.fixture(scope="module")
def engine(make_network: Any) -> Iterator[Engine]:
    network = make_network(num_blocks=1, positions="rotary")
    made = Engine(network, WORDS, slots=3, queue=4, longest=100_000)
    yield made
    made.close()
    made.join(PATIENCE_S)


class Request:
    """A request, and the waiting for it."""

    def __init__(
        self, engine: Engine, *lengths: int, seed: int = 1, prompt: Any = 3, **more: Any
    ) -> None:
        self.engine, self.woken = engine, threading.Semaphore(0)
        self.rows = [
            Row(
                np.arange(2, 2 + prompt, dtype="int32") if isinstance(prompt, int) else prompt,
                SamplingConfig(max_tokens=length, seed=seed + number),
                **more,
            )
            for number, length in enumerate(lengths)
        ]
        self.job = Job(self.rows, self.woken.release, as_written=True)
        engine.submit(self.job)

    def wait(self, until: Callable[[], bool] | None = None) -> "Request":
        until = until or (lambda: all(row.finish for row in self.rows))
        end = time.monotonic() + PATIENCE_S
        while not until():
            assert self.woken.acquire(timeout=max(0, end - time.monotonic())), "no token came"
        return self

    def tokens(self) -> list[list[int]]:
        return [row.tokens for row in self.rows]


def test_a_text_is_the_same_whatever_else_is_written(engine: Engine) -> None:
    alone = Request(engine, 40, 40, seed=7).wait().tokens()
    assert len(alone[0]) == 40 and alone[0] != alone[1]
    assert Request(engine, 40, seed=8).wait().tokens() == alone[1:]
    others = [Request(engine, 60, seed=9), Request(engine, 5, 25, seed=20, prompt=30)]
    mine = Request(engine, 40, 40, seed=7)
    others.append(Request(engine, 3, seed=40, prompt=1))
    assert mine.wait().tokens() == alone
    assert [row.finish for row in mine.rows] == ["length"] * 2
    for other in others:
        other.wait()


def test_the_tokens_of_a_prompt_have_log_probabilities(engine: Engine) -> None:
    (written,) = Request(engine, 5, seed=7, prompt=10, listed=2).wait().rows
    read = np.append(written.prompt, written.tokens).astype("int32")
    scored: list[Any] = []
    Request(engine, 1, 1, prompt=read, listed=2, scored=scored).wait()
    assert len(scored) == 15 and scored[0] == (None, [])
    for (own, listed), (expected, candidates) in zip(scored[10:], written.logprobs, strict=True):
        assert own == pytest.approx(expected, abs=1e-4)
        assert [token for token, _ in listed] == [token for token, _ in candidates]
    longer: list[Any] = []
    Request(engine, 1, prompt=30, listed=0, scored=longer).wait()
    assert longer[:11] == [(None, [])] * 11  # the context has 20 tokens
    assert len(longer) == 30 and all(own < 0 for own, _ in longer[11:])


def test_long_requests_starve_no_short_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "TURN", 10)
    expected = Request(engine, 50, seed=3).wait().tokens()
    long = Request(engine, *[50_000] * 5, seed=3)
    long.wait(lambda: sum(bool(row.tokens) for row in long.rows) == 3)
    short = Request(engine, 4, seed=50).wait()
    assert len(short.rows[0].tokens) == 4
    assert not any(row.finish for row in long.rows)
    long.wait(lambda: len(long.rows[0].tokens) >= 50)
    assert long.rows[0].tokens[:50] == expected[0]  # it lost its slot, and went on
    engine.cancel(long.job)


def test_more_requests_than_slots_take_turns(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "TURN", 5)
    expected = [Request(engine, 60, seed=seed).wait().tokens() for seed in range(6)]
    requests = []
    for seed in range(6):
        requests.append(Request(engine, 60, seed=seed))
        requests[-1].wait(lambda: bool(requests[-1].rows[0].tokens))
    assert [request.wait().tokens() for request in requests] == expected


def test_a_slot_is_free_at_once(engine: Engine) -> None:
    gone = Request(engine, *[100_000] * 3)
    gone.wait(lambda: all(row.tokens for row in gone.rows))
    began = time.monotonic()
    engine.cancel(gone.job)
    Request(engine, 1).wait()
    assert time.monotonic() - began < 5
    written = [len(row.tokens) for row in gone.rows]
    Request(engine, 5).wait()
    assert [len(row.tokens) for row in gone.rows] == written
    assert engine.waiting == 0


def test_the_queue_has_an_end(engine: Engine) -> None:
    running = Request(engine, *[100_000] * 3)
    running.wait(lambda: all(row.tokens for row in running.rows))
    waiting = [Request(engine, 2) for _ in range(4)]
    with pytest.raises(FullError):
        Request(engine, 2)
    engine.cancel(waiting[0].job)
    waiting[0] = Request(engine, 2)
    engine.cancel(running.job)
    for each in waiting:
        each.wait()


def test_a_failure_ends_its_requests_and_no_later_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._slots, "write", lambda *args: 1 / 0)
        broken = Request(engine, 5)
        broken.wait(lambda: broken.job.failed is not None)
    assert isinstance(broken.job.failed, ZeroDivisionError)
    Request(engine, 5).wait()


def test_closing_finishes_what_runs(make_network: Any) -> None:
    network = make_network(num_blocks=1, positions="rotary")
    made = Engine(network, WORDS, slots=1, queue=2, longest=100)
    requests = [Request(made, 30), Request(made, 3)]
    made.close()
    with pytest.raises(ClosedError):
        Request(made, 3)
    for request in requests:
        request.wait()
    made.join(PATIENCE_S)
    assert not made._thread.is_alive()
