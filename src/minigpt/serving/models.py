"""The models that are served: where they come from, and how a new version takes over."""

import asyncio
import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minigpt.common.errors import InputError
from minigpt.config import RequestConfig, ServingConfig
from minigpt.data.interface import Tokenizer
from minigpt.model import directory
from minigpt.serving.engine import Engine
from minigpt.serving.metrics import Metrics
from minigpt.serving.sources import Found, Source

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 10.0
CLOSE_S = 5.0


class RefusedError(InputError):
    """What a version holds can't be served."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready.

    Attributes:
        engine: Writes its texts.
        tokenizer: Its tokenizer.
        found: Which version it is.
        sha256: The digest of its directory.
        config: Plain values of the section `model`.
    """

    engine: Engine
    tokenizer: Tokenizer
    found: Found
    sha256: str
    config: dict[str, Any]


@dataclass(eq=False)
class Model:
    """A model by its id; a new version replaces what is loaded.

    Attributes:
        source: Where its versions come from.
        loaded: What answers now; None before the first is loaded.
        refused: The version that could not be loaded, and is not tried again.
    """

    source: Source
    loaded: Loaded | None = None
    refused: Found | None = None

    @property
    def id(self) -> str:
        """What a request calls it."""
        return self.source.id


async def _apart(function: Callable[..., T], *args: Any) -> T:
    """Runs a function in a thread that does not keep the process from ending."""
    loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def done(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function(*args)
        except BaseException as raised:  # passed on to the caller
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(done, result, error)

    threading.Thread(target=run, daemon=True).start()
    found: T = await future
    return found


class Models:
    """All models of a server.

    Args:
        sources: Where they come from.
        config: How they are served.
        limits: What a request may ask for.
        metrics: Where they are counted.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: ServingConfig,
        limits: RequestConfig,
        metrics: Metrics,
    ) -> None:
        self.by_id = {source.id: Model(source) for source in sources}
        self.limits, self._config, self._metrics = limits, config, metrics

    @property
    def ready(self) -> bool:
        """Whether every model is loaded and warm."""
        return all(model.loaded for model in self.by_id.values())

    async def load(self) -> None:
        """Loads all models.

        Raises:
            InputError: One can't be loaded.
        """
        self._loop = asyncio.get_running_loop()
        for model in self.by_id.values():
            found = await _apart(model.source.find)
            self._serve(model, await _apart(self._load, model.source, found))

    async def follow(self) -> None:
        """Asks the registry now and then, and serves what it names; never ends."""
        said: dict[str, str] = {}
        while True:
            await asyncio.sleep(POLL_S)
            for model in self.by_id.values():
                if model.source.alias:
                    problem = await self._renew(model)
                    if problem and said.get(model.id) != problem:
                        log.warning("%s", problem)
                    said[model.id] = problem

    def close(self) -> None:
        """Lets the engines end."""
        for model in self.by_id.values():
            if model.loaded:
                model.loaded.engine.close()
                model.loaded.engine.join(CLOSE_S)

    async def _renew(self, model: Model) -> str:
        """Serves another version if the registry names one; returns what is in the way."""
        assert model.loaded
        now = model.loaded.found
        try:
            found = await _apart(model.source.find)
        except Exception as error:  # no registry, whatever is wrong with it, ends the server
            return f"{model.id} goes on with version {now.version}: {_told(error)}"
        if found == now or found == model.refused:
            return ""
        log.info("%s: version %s takes the place of %s", model.id, found.version, now.version)
        try:
            loaded = await _apart(self._load, model.source, found)
        except Exception as error:  # whatever is wrong with it, the old one goes on
            self._metrics.failures.labels(model.id).inc()
            if isinstance(error, RefusedError):
                model.refused = found
            return f"{model.id} goes on with version {now.version}; {found.version}: {_told(error)}"
        old, model.refused = model.loaded, None
        self._serve(model, loaded)
        old.engine.close()
        return ""

    def _serve(self, model: Model, loaded: Loaded) -> None:
        model.loaded = loaded
        found = loaded.found
        self._metrics.version.labels(model.id).info(
            {"version": found.version or "", "sha256": loaded.sha256}
        )
        self._metrics.waiting.labels(model.id).set_function(lambda: loaded.engine.waiting)
        log.info("%s: %s is ready", model.id, found.answers_as)

    def _load(self, source: Source, found: Found) -> Loaded:
        with tempfile.TemporaryDirectory() as folder:
            path = source.fetch(found, Path(folder))
            if path is None:
                raise RefusedError(f"{found.answers_as} holds no model directory")
            try:
                loaded = directory.load(path, dtype_policy="float32")
            except InputError as error:
                raise RefusedError(str(error)) from None
        engine = Engine(
            loaded.network,
            loaded.tokenizer,
            slots=self._config.slots,
            queue=self._config.queue,
            longest=self.limits.max_tokens,
            stepped=self._metrics.rows.labels(source.id).observe,
            tell=self._loop.call_soon_threadsafe,
        )
        return Loaded(engine, loaded.tokenizer, found, loaded.sha256, loaded.config["model"])


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else repr(error)
