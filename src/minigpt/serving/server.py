"""Runs the server: the socket, the signals, and what is safe to offer whom."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt.common.errors import InputError
from minigpt.config import RequestConfig, ServingConfig
from minigpt.serving import app, sources
from minigpt.serving.metrics import Metrics
from minigpt.serving.models import Models

log = logging.getLogger(__name__)

KEY = "MINIGPT_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY = ("", "0.0.0.0", "::")


def serve(
    models: Sequence[sources.Source],
    host: str,
    port: int,
    allowed_hosts: Sequence[str],
    config: ServingConfig,
    limits: RequestConfig,
) -> int:
    """Serves models until SIGINT or SIGTERM, and then finishes the requests that it has.

    Args:
        models: Where they come from.
        host: The address to listen on.
        port: 0: any free one.
        allowed_hosts: Names, beside its own, under which the server may be asked.
        config: The limits of the server.
        limits: What a request may ask for.

    Returns:
        The exit code.

    Raises:
        InputError: The address can't be used, or others could reach it without a key; two models
            have one id; a model can't be loaded.
    """
    key = os.environ.get(KEY, "").strip()  # as the header is
    if host not in LOOPBACK and not key:
        raise InputError(
            f"--host {host}: others could reach the server without a key; set {KEY}, or leave out "
            "--host and put a proxy in front (docs/serve.md)"
        )
    ids = [source.id for source in models]
    for each in ids:
        if ids.count(each) > 1:
            raise InputError(f"two models are called {each}: rename a folder")
    for source in models:
        if isinstance(source, sources.Folder):
            source.find()  # a mistyped folder is told before anything is loaded
    made = _socket(host, port)
    problems: list[Exception] = []

    def failed(error: Exception) -> None:
        problems.append(error)
        server.should_exit = True

    metrics = Metrics()
    served = app.make(
        Models(models, config, limits, metrics),
        metrics,
        config,
        hosts=_hosts(host, allowed_hosts),
        key=key,
        failed=failed,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            served,
            http=_protocol(config.slow_s),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=config.max_connections,
            timeout_graceful_shutdown=config.drain_s,
        )
    )
    address = made.getsockname()
    name = f"[{address[0]}]" if ":" in address[0] else address[0]
    log.info("http://%s:%d answers once the models are loaded; Ctrl-C stops it", name, address[1])
    # Uvicorn raises the signal again at its end, which would end the process as a failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: None)
    with made:
        server.run(sockets=[made])
    if problems:
        raise problems[0]
    log.info("stopped")
    return 0


def _hosts(host: str, allowed: Sequence[str]) -> set[str]:
    """Returns what the Host header may say; an IPv6 address stands in brackets there."""
    names = {name.lower() for name in (*LOOPBACK, host, *allowed) if name not in ANY}
    return {f"[{name}]" if ":" in name else name for name in names}


def _socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen()
    except (OSError, OverflowError) as error:
        made.close()
        wrong = error.strerror if isinstance(error, OSError) else "a port is a number up to 65535"
        raise InputError(
            f"--host {host} --port {port}: {wrong}; choose another with --port"
        ) from None
    return made


def _protocol(slow_s: float) -> type[H11Protocol]:
    """Returns uvicorn's protocol, with a limit on the time that the head of a request takes."""

    class Protocol(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._late:
                self._late.cancel()

        def _watch(self) -> None:
            """Starts the clock while no request is being answered, and stops it meanwhile."""
            if self.cycle is not None and not self.cycle.response_complete:
                if self._late:
                    self._late.cancel()
                    self._late = None
            elif self._late is None:
                self._late = self.loop.call_later(slow_s, self._close)

        def _close(self) -> None:
            self._late = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Protocol
