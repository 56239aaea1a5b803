"""Workers of Ray that are lost again and again end a training."""

import importlib.util
import signal
from collections.abc import Iterator

import pytest

from minigpt.common.errors import InputError
from minigpt.config import EngineConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is absent: make ray"),
]


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back the handlers of signals, which `train.run` replaces."""
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in found.items():
        signal.signal(number, handler)


def test_three_losses_in_a_row_without_a_checkpoint_end_the_training(
    handlers: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from minigpt.engine import train

    died = WorkerHealthCheckFailedError("a worker died", RuntimeError("killed by SIGKILL"))
    failures: list[Exception] = []

    def attempt(*arguments: object) -> None:
        failures.append(failure)
        raise WorkerGroupError("failed", {1: failure})

    monkeypatch.setattr(train, "_attempt", attempt)
    failure: Exception = died
    with pytest.raises(InputError, match="lost 3 times in a row without a new checkpoint"):
        # The second loss comes after a new checkpoint; the third one after it is the last.
        train.run(EngineConfig(kind="ray", workers=2), print, lambda: len(failures) > 1)
    assert len(failures) == 4
    assert caplog.messages.count("worker 1 of 2 was lost: killed by SIGKILL") == 4

    # What is raised is reported as it is, with its traceback.
    failure = KeyError("a fault of the code")
    with pytest.raises(WorkerGroupError):
        train.run(EngineConfig(kind="ray", workers=2), print, lambda: None)
    assert len(failures) == 4 + 3
