"""The work of the stages `vocab` and `sequences` in tasks of Ray, each on some row groups.

The functions are those of the stages, and so are the bytes, whatever the number of tasks. These are
plain tasks instead of a Ray Dataset, since row groups have numbers: results come in their order,
and a shard knows which of them it needs. A task that is lost with its worker runs again.
"""

import contextlib
import itertools
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from minigpt.common import backend, files, progress
from minigpt.common.errors import InputError
from minigpt.config import EngineConfig, SequencesConfig
from minigpt.data import corpus, cutting, shards, stored, subsampling, tokenizer
from minigpt.data.sequences import SPLITS
from minigpt.data.tokenizer import Tokenizer, WordTokenizer
from minigpt.engine import cluster
from minigpt.evaluation import charges
from minigpt.evaluation.events import GAPS, Events, first_gaps

_MOST_GROUPS = 32  # in a task, which is what the loss of a worker costs: 0.4 GB of IMDB's reviews
_TASKS_A_WORKER = 4  # at least, where there are enough row groups, so that all workers end together
_MERGED = 8  # results that are added up at once

Reference = Any  # of what a task returns, wherever it is


class Reviews:
    """The table of reviews, which tasks of Ray read; `cluster.connected` comes before.

    Neither this process nor a task holds more than a few row groups, and what is counted in them.
    """

    def __init__(
        self, path: Path, fraction: float, engine: EngineConfig, blocks: int | None = None
    ) -> None:
        """Divides the row groups into blocks.

        Args:
            path: What `corpus.write_reviews` or `corpus.write_shards` wrote, in a folder that all
                machines see. Tasks read only the shards that they need.
            fraction: The share that is held out; see `corpus.is_validation`.
            engine: The section `engine`; `workers` tasks run at a time.
            blocks: Tasks in a pass over the reviews; None: as many as suit the workers.

        Raises:
            InputError: The file is missing or damaged.
        """
        import ray

        self._path, self._fraction, self._task = path, fraction, ray.remote(_call)
        self._workers, self._cpus = engine.workers, engine.cpus_per_worker
        self._storage = engine.storage
        groups = range(corpus.row_groups(path))
        size = min(_MOST_GROUPS, len(groups) // (_TASKS_A_WORKER * self._workers))
        size = max(1, -(-len(groups) // blocks) if blocks else size)
        self._blocks = [groups[start : start + size] for start in groups[::size]]

    def sample(self, most_bytes: int) -> list[str]:
        """Returns the texts of what `subsampling.sample` draws, of so many bytes."""
        drawn = self._pass("vocab: sample", _draw, self._fraction, most_bytes)
        batches = (batch for part in drawn for batch in part.to_batches())
        return subsampling.cut(subsampling.draw(batches, most_bytes).reviews, most_bytes)

    def count(self, style: str, most: int) -> tuple[pa.Table, tokenizer.Totals]:
        """Counts tokens as `tokenizer.count` does.

        Each task gives as many parts as there are workers, by a hash of the token, so that no
        process adds up the counts of all tokens.

        Returns:
            The first rows of that table, and the totals of all rows.

        Raises:
            InputError: There is no token at all.
        """
        seen = list[int]()

        def tables() -> Iterator[list[Reference]]:
            parts = self._workers
            for first, *others in self._references(
                "vocab: counted", _tally, self._fraction, style, parts, returns=parts + 1
            ):
                seen.append(_get(first))
                yield others

        ranked = [self._start(_rank, part, most)[0] for part in self._merge(_add_tables, tables())]
        first_rows, sums = zip(*map(_get, ranked), strict=True)
        found = tokenizer.Totals(*map(sum, zip(*sums, strict=True)))
        tokenizer.check(sum(seen), found)
        return tokenizer.in_order(pa.concat_tables(first_rows)).slice(0, most), found

    def unknown(self, words: Tokenizer) -> tuple[int, int]:
        """Returns what `tokenizer.unknown` does of the held-out reviews."""
        counts = list(self._pass("vocab: held out", _unknown, self._fraction, _put(words)))
        return sum(count[0] for count in counts), sum(count[1] for count in counts)

    def write_sequences(
        self, directory: Path, config: SequencesConfig, encoder: Tokenizer
    ) -> dict[str, Any]:
        """Writes what `shards.write` does, and returns the manifest.

        A first pass counts, so that each shard has its place. Then a task writes each shard, and
        encodes again what it needs. With `engine.storage` it goes there, under its SHA-256, and the
        manifest names its address.

        Args:
            directory: Where to write, in a folder that all machines see.
            config: The section `sequences`.
            encoder: The tokenizer.

        Raises:
            InputError: A split that the configuration asks for has no targets, or the storage can't
                be reached.
        """
        if self._storage:
            _get(self._start(stored.check, self._storage)[0])
        closed, words = encoder.separator is not None, _put(encoder)
        counts, gaps = [], dict[str, None]()
        for numbers, some in self._pass("sequences: counted", _count, config, words):
            counts += numbers
            gaps |= dict.fromkeys(some)
        text = None
        if config.has_text:
            text = self._text(encoder, words, list(gaps)[:GAPS])._asdict()
        splits: dict[str, dict[str, Any]] = {}
        planned = []
        for split in SPLITS:
            reviews, sizes = np.array([count[split] for count in counts], np.int64).T
            splits[split] = dict.fromkeys(shards.COUNTED, 0) | {"reviews": int(reviews.sum())}
            splits[split]["shards"] = []
            planned += cutting.plan(split, sizes, config, closed)
        with files.replacing(directory) as fresh:
            fresh.mkdir()
            bar = progress.bar("sequences", "shards")
            written = self._finished(_write, planned, fresh, self._storage, config, words)
            for done, (shard, refs) in enumerate(zip(planned, written, strict=True), 1):
                entry, numbers = _get(refs[0])
                splits[shard.split]["shards"].append(entry)
                for name, number in numbers.items():
                    splits[shard.split][name] += number
                bar(done, len(planned))
            return shards.finish(fresh, splits, config=config, tokenizer=encoder, text=text)

    def _text(self, encoder: Tokenizer, words: Reference, gaps: list[str]) -> charges.TextTotals:
        events = None
        if isinstance(encoder, WordTokenizer):
            given = self._references("sequences: charges", _events, self._fraction, words, gaps)
            (events,) = self._merge(_add_events, given)
        (learned,) = self._start(charges.Charges, words, events)
        parts = self._pass("sequences: held out", _charge, self._fraction, learned)
        return charges.total(itertools.chain.from_iterable(parts))

    def _pass(self, what: str, function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        """Yields what a function returns of each block, in their order."""
        return (_get(refs[0]) for refs in self._references(what, function, *arguments))

    def _references(
        self, what: str, function: Callable[..., Any], *arguments: Any, returns: int = 1
    ) -> Iterator[list[Reference]]:
        """Calls `function(path, block, *arguments)` for each block, and shows progress."""
        bar = progress.bar(what, "row groups")
        calls = self._finished(function, self._blocks, *arguments, returns=returns)
        for block, refs in zip(self._blocks, calls, strict=True):
            bar(block.stop, self._blocks[-1].stop)
            yield refs

    def _finished(
        self, function: Callable[..., Any], items: Sequence[Any], *arguments: Any, returns: int = 1
    ) -> Iterator[list[Reference]]:
        """Calls `function(path, item, *arguments)` in a task for each item.

        Yields:
            References to what each finished task returned, in the order of the items. Results that
            wait for an earlier one are few too.
        """
        import ray

        coming, waiting, busy = iter(items), deque[list[Reference]](), list[Reference]()
        while True:
            few = self._workers - len(busy), 4 * self._workers - len(waiting)
            for item in itertools.islice(coming, min(few)):
                waiting.append(self._start(function, self._path, item, *arguments, returns=returns))
                busy.append(waiting[-1][0])
            if not waiting:
                return
            _, busy = ray.wait(busy, fetch_local=False)
            while waiting and waiting[0][0] not in busy:
                yield waiting.popleft()

    def _merge(
        self, function: Callable[..., Any], given: Iterable[list[Reference]]
    ) -> list[Reference]:
        """Adds up results part by part, in tasks, as they come.

        Args:
            function: Adds up any number of results of a part.
            given: The parts of each result.

        Returns:
            The sum of each part.
        """
        import ray

        given, sums = iter(given), list[list[Reference]]()
        while some := list(itertools.islice(given, _MERGED)):
            if sums:  # no more results than these wait for sums
                ray.wait(sums[0], num_returns=len(sums[0]), fetch_local=False)
            parts = zip(*sums, *some, strict=True)
            sums = [[self._start(function, *part)[0] for part in parts]]
        return sums[0]

    def _start(
        self, function: Callable[..., Any], *arguments: Any, returns: int = 1
    ) -> list[Reference]:
        """Starts a task; returns references to what it will return."""
        task = self._task.options(num_cpus=self._cpus, num_returns=returns)
        where = Path.cwd(), cluster.environment()
        started = task.remote(function, self._cpus, *where, *arguments)
        return [started] if returns == 1 else started


def _put(value: Any) -> Reference:
    import ray

    return ray.put(value)


def _get(reference: Reference) -> Any:
    """Returns what a task returned, or raises what it raised, as a call would.

    Raises:
        InputError: The task was lost too often.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        raise cause from None
    except ray.exceptions.RayError as error:
        raise InputError(
            f"Ray lost a task again and again: {error}\nIf memory ran out, lower engine.workers or "
            "raise engine.cpus_per_worker, so that fewer tasks share a machine; then run this again"
        ) from error


def _call(
    function: Callable[..., Any],
    cpus: int,
    folder: Path,
    environment: dict[str, str],
    *arguments: Any,
) -> Any:
    """Calls a function in a worker as in the process that connected to Ray."""
    cluster.enter(folder, environment)
    pa.set_cpu_count(cpus)
    return function(*arguments)


def _draw(path: Path, block: range, fraction: float, most_bytes: int) -> pa.Table:
    return subsampling.sample(path, fraction, most_bytes, groups=block).reviews


def _tally(path: Path, block: range, fraction: float, style: str, parts: int) -> list[Any]:
    texts = corpus.texts(path, fraction, groups=block)
    seen, table = tokenizer.tally(texts, style)
    hashes = map(zlib.crc32, table["token"].cast(pa.binary()).to_pylist())
    part_of = np.fromiter(hashes, np.uint32, len(table)) % parts
    return [seen, *(table.filter(pa.array(part_of == part)) for part in range(parts))]


def _add_tables(*tables: pa.Table) -> pa.Table:
    return tokenizer.added(tables)


def _rank(counts: pa.Table, most: int) -> tuple[pa.Table, tokenizer.Totals]:
    return tokenizer.in_order(counts).slice(0, most), tokenizer.totals(counts)


def _unknown(path: Path, block: range, fraction: float, words: Tokenizer) -> tuple[int, int]:
    return tokenizer.unknown(words, corpus.texts(path, fraction, held_out=True, groups=block))


def _count(
    path: Path, block: range, config: SequencesConfig, words: Tokenizer
) -> tuple[list[dict[str, tuple[int, int]]], list[str]]:
    """Returns what `cutting.count` does of each row group, and the first white space of all."""
    counts, gaps, fraction = [], dict[str, None](), config.validation_fraction
    for batch in corpus.read_batches(path, ["id", "text"], block):
        (encoded,) = cutting.encode([batch], words, fraction)
        counts.append(cutting.count(encoded, config, words.separator is not None))
        if config.has_text and isinstance(words, WordTokenizer) and len(gaps) < GAPS:
            learned = batch["text"].filter(pa.array(~encoded.held_out))
            gaps |= dict.fromkeys(first_gaps([learned], words))
    assert len(counts) == len(block)  # `plan` numbers row groups
    return counts, list(gaps)


def _write(
    path: Path,
    shard: cutting.Shard,
    folder: Path,
    storage: str,
    config: SequencesConfig,
    words: Tokenizer,
) -> tuple[dict[str, Any], dict[str, int]]:
    backend.choose()
    backend.import_tensorflow()
    batches = corpus.read_batches(path, ["id", "text"], range(*shard.batches))
    encoded = cutting.encode(batches, words, config.validation_fraction)
    with contextlib.ExitStack() as stack:
        if storage:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minigpt-")))
        entry, counts = shards.write_shard(folder, shard, encoded, config=config, tokenizer=words)
        if storage:
            entry["address"] = stored.put(folder / shard.name, storage, entry["sha256"])
        return entry, counts


def _events(
    path: Path, block: range, fraction: float, words: WordTokenizer, gaps: list[str]
) -> Events:
    events = Events(words, gaps)
    events.count(corpus.texts(path, fraction, groups=block))
    return events


def _add_events(first: Events, *others: Events) -> Events:
    for other in others:
        first.add(other)
    return first


def _charge(
    path: Path, block: range, fraction: float, learned: charges.Charges
) -> list[charges.TextTotals]:
    held_out = corpus.texts(path, fraction, held_out=True, groups=block)
    return [charges.charge(texts, learned) for texts in held_out]
