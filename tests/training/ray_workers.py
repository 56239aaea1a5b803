"""Trainings by two workers of Ray, in the working directory.

killed.json says what happens to the first ones, ray.json how that training goes on, and NaN.json
how another one diverges.
"""

import sys
import threading
from pathlib import Path

import ray_workers  # itself, under the name by which Ray's workers import it

from minigpt.common import backend
from minigpt.common.errors import InputError
from minigpt.config import EngineConfig
from minigpt.engine import cluster

CHECKPOINTS = Path("ray")


def work(place: object, asked: threading.Event) -> None:
    """Trains as one of the workers, of which one is killed the first time."""
    _train(place, "ray" if CHECKPOINTS.exists() else "killed")


def diverge(place: object, asked: threading.Event) -> None:
    """Trains as one of the workers until the loss is no number."""
    _train(place, "NaN")


def _train(place: object, name: str) -> None:
    import workers

    from minigpt.training import parallel

    assert isinstance(place, parallel.Place)
    workers.train(parallel.join(place), Path.cwd(), name)


def main() -> int:
    """Starts Ray and the workers."""
    backend.choose("jax")
    engine = EngineConfig(kind="ray", workers=2)
    try:
        with cluster.connected(engine):
            from minigpt.engine import train

            train.run(engine, ray_workers.work, lambda: sorted(map(str, CHECKPOINTS.glob("*.npz"))))
            train.run(engine, ray_workers.diverge, lambda: None)
    except InputError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
