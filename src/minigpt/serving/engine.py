"""The engine of a model: requests share its slots, one step at a time, in a thread of its own."""

import itertools
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.config import SamplingConfig
from minigpt.data.interface import Tokenizer
from minigpt.generation.sampling import uniforms
from minigpt.model.network import MiniGPT
from minigpt.serving.slots import Slots, Written

log = logging.getLogger(__name__)

TURN = 128  # tokens of a text until another request that waits may take its slot


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
        listed: Candidates whose log-probabilities are kept; None: none at all.
        tokens: The new ones so far.
        logprobs: Of each new token its own, and those of the candidates by their ids.
        finish: Why it ended, "stop" or "length"; None before.
    """

    prompt: npt.NDArray[np.int32]
    sampling: SamplingConfig
    listed: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    finish: str | None = None
    _numbers: Any = None
    _kept: Any = None  # the slot's content while another text has it
    _since: int = 0  # tokens when it last took a slot
    _left: int = 0  # tokens that may be written


@dataclass(eq=False)
class Job:
    """A request: its rows, and whom to tell.

    Attributes:
        rows: The texts.
        wake: Called after a step in which a row of it ended, and when it failed, with True; with
            `each_token` after every step, else with False.
        each_token: Whether the caller looks at every token.
        failed: What went wrong in the engine.
    """

    rows: Sequence[Row]
    wake: Callable[[bool], None]
    each_token: bool = False
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
        longest: The most tokens of a text.
        eager: Steps until the model is compiled; 0: it is before the first request.
        stepped: Called after each step with the number of texts that it wrote a token of.
        tell: Calls the function that wakes the requests; once a step, since an event loop that is
            told of each one keeps the engine from the interpreter's lock.
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
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The requests that have no slot."""
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
        """Frees the slots of a request, or of one of its rows, before the next step."""
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
                self._step()
            except BaseException as error:
                log.exception("a step failed")
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
            if row._kept is None:
                newcomers.append((slot, row.prompt, row.sampling))
            else:
                self._slots.put(slot, row._kept, row.sampling)
                row._kept = None
        if newcomers:
            self._slots.read(newcomers)

    def _step(self) -> None:
        running = [held if held and not held[1].finish else None for held in self._running]
        while running and not running[-1]:
            running.pop()
        if not running:
            return
        numbers = [held and held[1]._numbers[len(held[1].tokens)] for held in running]
        listed = any(held and held[1].listed is not None for held in running)
        written = self._slots.step(numbers, listed)
        self._stepped(sum(held is not None for held in running))
        ended: dict[Job, bool] = {}
        for slot, held in enumerate(running):
            if held:
                job, row = held
                ended[job] = self._add(row, written, slot) or ended.get(job, False)
        self._wake({job: has for job, has in ended.items() if has or job.each_token})

    def _add(self, row: Row, written: Written, slot: int) -> bool:
        """Adds a token to a row, and returns whether it was the last one."""
        token = int(written.tokens[slot])
        if token == self._separator:
            row.finish = row.finish or "stop"
            return True
        if row.listed is not None:
            candidates = zip(
                written.candidates[slot, : row.listed].tolist(),
                written.logprobs[slot, : row.listed].tolist(),
                strict=True,
            )
            found = [(token, value) for token, value in candidates if value > -math.inf]
            row.logprobs.append((float(written.own[slot]), found))
        row.tokens.append(token)
        if len(row.tokens) == row._left:
            row.finish = row.finish or "length"
        return row.finish is not None

    def _wake(self, ended: Mapping[Job, bool]) -> None:
        def wake() -> None:
            for job, has_ended in ended.items():
                job.wake(has_ended)

        if ended:
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
        self._wake(dict.fromkeys(jobs.values(), True))
