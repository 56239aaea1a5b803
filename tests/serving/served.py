"""A server in a process of its own."""

import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 120


class Served:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "minigpt.cli", "serve", "--port", "0", *arguments]
        pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}
        env = {**os.environ, "KERAS_BACKEND": "tensorflow", **environment}
        self.process = subprocess.Popen(command, cwd=folder, env=env, **pipes)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        found = self.wait(lambda: re.search(r"http://\S+:(\d+)", "".join(self.log)))
        self.port = int(found[1])

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)

    def wait(self, until: Callable[[], Any]) -> Any:
        """Waits for something that is true."""
        end = time.monotonic() + PATIENCE_S
        while not (found := until()):
            if time.monotonic() > end or self.process.poll() is not None:
                self.process.kill()
                raise AssertionError("".join(self.log))
            time.sleep(0.05)
        return found

    def get(self, path: str) -> tuple[int, str]:
        """Returns the status and the body of an answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Returns the sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)
