"""The engine of a model: requests share its slots, in a thread of its own."""

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.config import SamplingConfig
from minigpt.data.interface import Tokenizer
from minigpt.generation.sampling import uniforms
from minigpt.model.network import MiniGPT
from minigpt.serving.slots import STEPS, Slots, Written

log = logging.getLogger(__name__)

TURN = 128  # tokens of a text until another request that waits may take its slot
CALL_S = 0.05  # longest call of several steps: newcomers and readers wait for its end

# A token's own log-probability, and the candidates for its place with theirs.
Logprobs = tuple[float | None, list[tuple[int, float]]]


class FullError(Exception):
    """Too many requests wait."""


class ClosedError(Exception):
    """The engine takes no more requests."""


@dataclass(eq=False)
class Row:
    """A text of a request.

    Attributes:
        prompt: Token ids, at least one.
        sampling: How the tokens are chosen; the seed is the row's own.
        listed: How many candidates of each token are kept; None: no log-probabilities are.
        tokens: The new ones so far.
        logprobs: The log-probabilities of each new token.
        scored: Those of the prompt's tokens, without the separator before it. A token that the
            model can't predict, since nothing stands before it, has None of its own. Rows of one
            prompt share the list, which is empty until the prompt is read; None: not asked for.
        finish: Why it ended, "stop" or "length"; None before.
    """

    prompt: npt.NDArray[np.int32]
    sampling: SamplingConfig
    listed: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    scored: list[Logprobs] | None = None
    finish: str | None = None
    _numbers: Any = None
    _kept: Any = None  # the slot's content while another text has it
    _since: int = 0  # tokens when it last took a slot
    _left: int = 0  # tokens that may be written


@dataclass(eq=False)
class Job:
    """A request: its rows, and what to call when they have changed.

    Attributes:
        rows: The texts.
        wake: Called when a row of it has ended, and when it has failed; with `as_written` also when
            there are more tokens.
        as_written: Whether the caller looks at tokens before their row has ended.
        failed: What went wrong in the engine.
    """

    rows: Sequence[Row]
    wake: Callable[[], None]
    as_written: bool = False
    failed: BaseException | None = None
    _waiting: deque[Row] = field(default_factory=deque)
    _running: int = 0
    _turn: int = 0  # of the last slot that it was given


class Engine:
    """Writes the texts of many requests with one model.

    Args:
        network: The model.
        tokenizer: The model's.
        slots: Texts that are written at the same time.
        queue: Requests that may wait.
        longest: The most new tokens of a text.
        eager: Steps before the model is compiled; 0: it is compiled before the first request.
        stepped: Called with the number of texts that take part in the next steps.
        tell: Calls the function that wakes the requests. One call wakes all of them, because an
            event loop that is called for each one keeps the engine from the interpreter's lock.
    """

    def __init__(
        self,
        network: MiniGPT,
        tokenizer: Tokenizer,
        *,
        slots: int,
        queue: int,
        longest: int,
        eager: int = 0,
        stepped: Callable[[int], None] = lambda rows: None,
        tell: Callable[[Callable[[], None]], Any] = lambda wake: wake(),
    ) -> None:
        self._slots = Slots(network, tokenizer, slots, longest, eager)
        if not eager:
            self._slots.warm()
        self._queue, self._stepped, self._tell = queue, stepped, tell
        self._separator = tokenizer.separator
        self._running: list[tuple[Job, Row] | None] = [None] * slots
        self._jobs: list[Job] = []  # that have rows waiting
        self._turns = itertools.count(1)
        self._step_s = CALL_S  # that the last step took
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of requests without a slot."""
        return sum(not job._running for job in self._jobs)

    def fits(self, prompt: int, asked: int) -> int:
        """Returns how many of the asked tokens can be written after a prompt of so many."""
        return self._slots.fits(prompt, asked)

    def submit(self, job: Job) -> None:
        """Takes a request.

        Raises:
            FullError: Too many requests wait.
            ClosedError: The engine was closed.
        """
        for row in job.rows:
            row._left = self.fits(len(row.prompt), row.sampling.max_tokens)
            row._numbers = uniforms(row.sampling, 0, row._left)
        with self._changed:
            if self._closing:
                raise ClosedError
            if self.waiting >= self._queue:
                raise FullError
            job._waiting.extend(job.rows)
            job._turn = next(self._turns)
            self._jobs.append(job)
            self._changed.notify()

    def cancel(self, job: Job, row: Row | None = None) -> None:
        """Frees the slots of a request, or of one of its rows, before the next steps."""
        with self._changed:
            for each in [row] if row else job.rows:
                each.finish = each.finish or "stop"
            job._waiting = deque(each for each in job._waiting if each.finish is None)
            if not job._waiting and job in self._jobs:
                self._jobs.remove(job)

    def close(self) -> None:
        """Finishes the requests that it has, and ends."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Waits for the end after `close`."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._drop_finished()
                while not self._jobs and not any(self._running):
                    if self._closing:
                        return
                    self._changed.wait()
                taken = self._give_slots()
            try:
                self._enter(taken)
                self._write()
            except BaseException as error:
                log.exception("writing failed")
                self._fail(error)

    def _drop_finished(self) -> None:
        for slot, held in enumerate(self._running):
            if held and held[1].finish:
                held[0]._running -= 1
                self._running[slot] = None

    def _give_slots(self) -> list[int]:
        """Gives free slots to rows that wait, and takes some back from those that had a turn.

        The request with the fewest slots comes first, and of equals the one that was given its
        last slot longest ago.
        """
        taken = []
        while self._jobs:
            job = min(self._jobs, key=lambda job: (job._running, job._turn))
            slot = self._free_slot(job)
            if slot is None:
                break
            row = job._waiting.popleft()
            if not job._waiting:
                self._jobs.remove(job)
            job._running += 1
            job._turn, row._since = next(self._turns), len(row.tokens)
            self._running[slot] = job, row
            taken.append(slot)
        return taken

    def _free_slot(self, wanting: Job) -> int | None:
        if None in self._running:
            return self._running.index(None)
        if wanting._running:
            return None

        def had(slot: int) -> tuple[int, int]:
            job, row = self._running[slot]  # type: ignore[misc]
            return job._running, len(row.tokens) - row._since

        slot = max(range(len(self._running)), key=had)
        job, row = self._running[slot]  # type: ignore[misc]
        if had(slot)[1] < TURN:
            return None
        row._kept = self._slots.take(slot)
        job._running -= 1
        job._waiting.appendleft(row)
        if job not in self._jobs:
            self._jobs.append(job)
        return slot

    def _enter(self, taken: list[int]) -> None:
        """Reads the prompts of the rows that were given slots; others go on where they were."""
        newcomers = []
        for slot in taken:
            _, row = self._running[slot]  # type: ignore[misc]
            separated = int(row.prompt[0] == self._separator)
            if row.scored is not None and len(row.scored) < len(row.prompt) - separated:
                row.scored += self._scored(row)[separated:]
            if row._kept is None:
                newcomers.append((slot, row.prompt, row.sampling))
            else:
                self._slots.put(slot, row._kept, row.sampling)
                row._kept = None
        if newcomers:
            self._slots.read(newcomers)

    def _scored(self, row: Row) -> list[Logprobs]:
        found = _logprobs(self._slots.score(row.prompt), 0, row.listed or 0)
        unread: list[Logprobs] = [(None, [])] * (len(row.prompt) - len(found))
        return [*unread, *found]

    def _write(self) -> None:
        """Writes tokens of all texts, as many as take `CALL_S`."""
        running = [held if held and not held[1].finish else None for held in self._running]
        while running and not running[-1]:
            running.pop()
        rows = [held[1] for held in running if held]
        if not rows:
            return
        steps = max(1, min(STEPS, int(CALL_S / self._step_s)))
        steps = min(steps, max(row._left - len(row.tokens) for row in rows))
        numbers = [
            held and held[1]._numbers[(done := len(held[1].tokens)) : done + steps]
            for held in running
        ]
        listed = any(row.listed is not None for row in rows)
        self._stepped(len(rows))
        began = time.perf_counter()
        written = self._slots.write(numbers, steps, listed)
        self._step_s = (time.perf_counter() - began) / steps
        told = []
        for slot, held in enumerate(running):
            if held:
                job, row = held
                if self._add(row, written, slot) or job.as_written:
                    told.append(job)
        self._wake(told)

    def _add(self, row: Row, written: Written, slot: int) -> bool:
        """Adds what was written of a row, and returns whether it has ended."""
        tokens = written.tokens[slot, : row._left - len(row.tokens)].tolist()
        finish = "length" if len(row.tokens) + len(tokens) == row._left else None
        if self._separator in tokens:
            tokens, finish = tokens[: tokens.index(self._separator)], "stop"
        if row.listed is not None:
            row.logprobs += _logprobs(written, slot, row.listed)[: len(tokens)]
        row.tokens += tokens
        row.finish = row.finish or finish
        return row.finish is not None

    def _wake(self, jobs: Iterable[Job]) -> None:
        """Tells each of them once."""
        told = dict.fromkeys(jobs)

        def wake() -> None:
            for job in told:
                job.wake()

        if told:
            self._tell(wake)

    def _fail(self, error: BaseException) -> None:
        """Ends all requests; the next ones may succeed."""
        with self._changed:
            jobs = {id(held[0]): held[0] for held in self._running if held}
            jobs |= {id(job): job for job in self._jobs}
            self._running = [None] * len(self._running)
            self._jobs.clear()
        for job in jobs.values():
            job.failed = error
            job._waiting.clear()
        self._wake(jobs.values())


def _logprobs(written: Written, slot: int, listed: int) -> list[Logprobs]:
    """Returns those of the tokens of a slot, with so many candidates."""
    own = written.own[slot].tolist()
    candidates = written.candidates[slot, :, :listed].tolist()
    logprobs = written.logprobs[slot, :, :listed].tolist()
    return [
        (value, [pair for pair in zip(*each, strict=True) if pair[1] > -math.inf])
        for value, *each in zip(own, candidates, logprobs, strict=True)
    ]
