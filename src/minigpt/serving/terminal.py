"""Texts in a terminal or a file, for `minigpt generate`."""

import contextlib
import json
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.common import progress
from minigpt.common.errors import InputError
from minigpt.config import SamplingConfig
from minigpt.generation.prompts import encode
from minigpt.model import directory
from minigpt.serving.continuation import Continuation
from minigpt.serving.engine import Engine, Job, Row
from minigpt.serving.sources import Source
from minigpt.serving.texts import Text

SLOTS = 32  # texts that are written at the same time
EAGER_STEPS = 50  # take as long as to compile the model
AHEAD = 64  # texts that may be finished while an earlier one is written


@dataclass(frozen=True)
class Writing:
    """A text that is being written.

    Attributes:
        prompt: As it was given.
        row: Its tokens.
        text: Its pieces.
        job: The request, which tells whether the model has failed.
        changed: Released when there is more of it.
    """

    prompt: str
    row: Row
    text: Text
    job: Job
    changed: threading.Semaphore


class Writer:
    """Writes texts with one model; as `minigpt serve` does, so the same seed writes the same text.

    Args:
        source: Where the model comes from.
        sampling: How the tokens are chosen; text number i draws from the seed + i.
        texts: How many will be asked for.
    """

    def __init__(self, source: Source, sampling: SamplingConfig, texts: int) -> None:
        found = source.find()
        with tempfile.TemporaryDirectory() as folder:
            path = source.fetch(found, Path(folder))
            if path is None:
                raise InputError(f"{found.answers_as} holds no model directory")
            loaded = directory.load(path, dtype_policy="float32")
        self.model, self._sha256 = found.answers_as, loaded.sha256
        self._tokenizer, self._sampling = loaded.tokenizer, sampling
        self._context = loaded.network.config.context_length
        self._engine = Engine(
            loaded.network,
            loaded.tokenizer,
            slots=min(texts, SLOTS),
            queue=AHEAD,
            longest=sampling.max_tokens,
            eager=EAGER_STEPS,
        )

    def check(self, prompt: str, key: str) -> None:
        """Raises InputError, which names the key, if a prompt can't be continued."""
        (ids,) = encode(self._tokenizer, [prompt], key)
        if not self._engine.fits(len(ids), 1):
            raise InputError(f"{key} has {len(ids)} tokens: the model reads {self._context}")

    def start(self, prompt: str, number: int) -> Writing:
        """Begins to write text number `number` after a prompt."""
        (ids,) = encode(self._tokenizer, [prompt])
        seed = self._sampling.seed + number
        if seed >= 2**63:
            raise InputError(
                f"seed is {self._sampling.seed}: allowed is up to {2**63 - 1 - number}"
            )
        row = Row(ids, self._sampling.model_copy(update={"seed": seed}))
        changed = threading.Semaphore(0)
        job = Job([row], changed.release, as_written=True)
        self._engine.submit(job)
        text = Text(self._tokenizer, Continuation(self._tokenizer, prompt), [], echo=True)
        return Writing(prompt, row, text, job, changed)

    def pieces(self, writing: Writing) -> Iterator[str]:
        """Yields a text as it is written, its prompt first."""
        finish = None
        while not finish:
            writing.changed.acquire()
            if writing.job.failed:
                raise writing.job.failed
            finish = writing.row.finish  # before the tokens, which may become more
            yield writing.text.piece(writing.row.tokens[:], finish is not None)

    def wrote(self, line: dict[str, Any], number: int) -> bool:
        """Tells whether a line is of text number `number` of this model with these settings."""
        seed = {"seed": self._sampling.seed + number}
        settings = self._sampling.model_copy(update=seed).model_dump(mode="json")
        return (line.get("sha256"), line.get("settings")) == (self._sha256, settings)

    def line(self, writing: Writing) -> dict[str, Any]:
        """Returns a text when it is complete, with all that it takes to write it again."""
        text = "".join(self.pieces(writing))
        settings = writing.row.sampling.model_dump(mode="json")
        return {
            "prompt": writing.prompt,
            "text": text,
            "finish_reason": writing.row.finish,
            "model": self.model,
            "sha256": self._sha256,
            "settings": settings,
        }


def write(writer: Writer, prompt: str, texts: int, as_json: bool) -> None:
    """Prints texts after one prompt, the first as it is written."""
    writer.check(prompt, "the prompt")
    for number, writing in enumerate(_ahead(lambda i: writer.start(prompt, i), texts)):
        if as_json:
            print(json.dumps(writer.line(writing), ensure_ascii=False), flush=True)
            continue
        if number:
            print()
        for piece in writer.pieces(writing):
            print(piece, end="", flush=True)
        print(flush=True)


def write_file(writer: Writer, prompts: Path, texts: int, out: Path) -> None:
    """Appends texts to a file of JSON lines, and goes on where it ends.

    Args:
        writer: Writes them.
        prompts: A prompt on each line; empty lines are left out.
        texts: For each prompt.
        out: Takes a line for each text.

    Raises:
        InputError: There is no prompt, one can't be continued, `out` holds other texts, or a file
            can't be read or written.
    """
    with _told(f"--file {prompts}"):
        given = _lines(prompts)
    for number, prompt in given:
        writer.check(prompt, f"{prompts}, line {number}:")
    wanted = [prompt for _, prompt in given for _ in range(texts)]
    with _told(f"--out {out}"):
        done = _done(out)
    for number, line in enumerate(done):
        expected = wanted[number] if number < len(wanted) else None
        if line.get("prompt") != expected or not writer.wrote(line, number):
            raise InputError(
                f"{out}, line {number + 1}, is of another prompt, model or setting: give another "
                "--out, or remove the file"
            )
    left = len(wanted) - len(done)
    show = progress.bar("writing texts", "texts")
    show(len(done), len(wanted))

    def start(number: int) -> Writing:
        return writer.start(wanted[len(done) + number], len(done) + number)

    with _told(f"--out {out}"), out.open("a", encoding="utf-8") as file:
        for number, writing in enumerate(_ahead(start, left), len(done) + 1):
            file.write(json.dumps(writer.line(writing), ensure_ascii=False) + "\n")
            file.flush()
            show(number, len(wanted))


def prompt_of_a_pipe() -> str:
    """Returns what standard input holds, without its last line feed.

    Raises:
        InputError: It is a terminal, or holds something other than UTF-8.
    """
    if sys.stdin.isatty():
        raise InputError('there is no prompt: minigpt generate "this movie is"')
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt from the pipe is not UTF-8: {error}") from None


def _ahead(start: Callable[[int], Writing], count: int) -> Iterator[Writing]:
    """Yields texts in order, while the next ones are being written."""
    waiting: deque[Writing] = deque()
    for number in range(count):
        waiting.append(start(number))
        if len(waiting) == AHEAD:
            yield waiting.popleft()
    yield from waiting


@contextlib.contextmanager
def _told(option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{option}: {error.strerror}") from None


def _lines(path: Path) -> Sequence[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--file {path} is not UTF-8: {error}") from None
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"--file {path} holds no prompt: write one on each line")
    return found


def _done(out: Path) -> list[dict[str, Any]]:
    """Returns the texts that a file holds; a line that was cut off is removed."""
    if not out.exists():
        return []
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        found = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
    except ValueError as error:
        raise InputError(f"--out {out} holds something else: {error}") from None
    if not all(isinstance(line, dict) for line in found):
        raise InputError(f"--out {out} holds something else: give another file")
    if len(whole) < len(data):
        with out.open("rb+") as file:
            file.truncate(len(whole))
    return found
