"""How the stage `train` ends in Ray's workers."""

import threading
from typing import Any

import pytest

from minigpt.stages import train
from minigpt.training.checkpoints import DivergedError
from minigpt.training.parallel import World


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DivergedError("the loss is nan")])
def test_the_first_worker_alone_tells_ray_what_ends_all(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Ray kills all workers once one has failed, and the first one has to end its MLflow run."""

    def work(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(train, "work", work)
    monkeypatch.setattr(train.parallel, "join", lambda place: World(1, 2, 2))
    train.work_for_ray(None, threading.Event())
    monkeypatch.setattr(train.parallel, "join", lambda place: World(0, 2, 2))
    with pytest.raises(type(error)):
        train.work_for_ray(None, threading.Event())
