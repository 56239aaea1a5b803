"""Several devices and processes train what one trains, whoever is stopped, killed or replaced."""

import errno
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from minigpt.common.errors import InputError
from minigpt.config import SequencesConfig
from minigpt.data import cutting, shards
from minigpt.data.tokenizer import WordTokenizer
from minigpt.training import launch, parallel

WORKER = Path(__file__).with_name("workers.py")
WORDS = WordTokenizer(("", "[UNK]", *"abcdefghijklmnopqr"), "spaced")
WIDTHS = {"embed_dim": 16, "num_blocks": 1, "num_heads": 2, "key_dim": 8, "feed_forward_dim": 16}
SIZES = {"vocabulary_size": len(WORDS), "context_length": 8, **WIDTHS}
# Neither 4 devices nor 2 processes divide a batch or the split.
PLAN = {
    "model": {**SIZES, "dropout": 0.1, "cutoff": 3, "tail_dim": 4, "dtype_policy": "float32"},
    "train": {"batch_size": 9, "epochs": 3, "learning_rate": 0.5, "backend": "jax"},
}
STOPPED_S = 20  # in which all processes have ended after one of them has; stated in docs/scale.md


class Ended(NamedTuple):
    """How a process ended: its exit code, what it printed, and how long after the first."""

    code: int
    printed: str
    after_s: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences, and an undisturbed training by one device named `one`."""
    folder = tmp_path_factory.mktemp("parallel")
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 9, 116)
    reviews = cutting.Encoded(
        pa.array([str(number) for number in range(116)]),
        rng.integers(2, len(WORDS), lengths.sum()).astype("int32"),
        np.append(0, np.cumsum(lengths)),
        np.arange(116) < 19,
    )
    config = SequencesConfig(policy="head", length=8, validation_fraction=0.2, shards=3)
    shards.write(folder / "sequences", [reviews], config=config, tokenizer=WORDS)
    assert_ended([0], train(folder, "one"))
    return folder


def train(
    folder: Path, name: str, processes: int = 1, devices: int = 1, **happens: Any
) -> list[Ended]:
    """Trains to the end, or until something happens to the process `rank`."""
    (folder / f"{name}.json").write_text(json.dumps({**PLAN, "checkpoints": name, **happens}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for rank in range(processes):
        env = os.environ | {
            "KERAS_BACKEND": "jax",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        if processes > 1:
            env |= parallel.Place(rank, processes, address).environment()
        log = (folder / f"{name}-{rank}.log").open("w+")
        command = [sys.executable, str(WORKER), str(folder), name]
        running.append((subprocess.Popen(command, env=env, stdout=log, stderr=log), log))
    ended: dict[int, float] = {}
    deadline = time.monotonic() + 1200
    while len(ended) < processes and time.monotonic() < deadline:
        time.sleep(0.1)
        for rank, (process, _) in enumerate(running):
            if rank not in ended and process.poll() is not None:
                ended[rank] = time.monotonic()
    for process, _ in running:
        process.kill()
    first = min(ended.values(), default=0)
    found = []
    for rank, (process, log) in enumerate(running):
        log.seek(0)
        found.append(Ended(process.wait(), log.read(), ended.get(rank, deadline) - first))
        log.close()
    return found


def assert_ended(codes: list[int], found: list[Ended]) -> None:
    assert [end.code for end in found] == codes, "\n".join(end.printed for end in found)


def assert_same(folder: Path, name: str) -> None:
    """Compares a training with that of one device: the losses, each step and the weights."""
    one, other = (
        json.loads((folder / which / "state.json").read_text()) for which in ("one", name)
    )
    for expected, found in zip(one["epochs"], other["epochs"], strict=True):
        assert found["row"] == pytest.approx(expected["row"], abs=1e-5)
    assert len(one["logged"]) >= 30
    np.testing.assert_allclose(other["logged"], one["logged"], rtol=1e-6, atol=1e-5)
    with np.load(folder / "one.npz") as expected, np.load(folder / f"{name}.npz") as found:
        for array in expected.files:
            np.testing.assert_allclose(found[array], expected[array], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 1)])
def test_any_number_trains_the_same(folder: Path, processes: int, devices: int) -> None:
    name = f"{processes}x{devices}"
    assert_ended([0] * processes, train(folder, name, processes, devices))
    assert_same(folder, name)


@pytest.mark.slow
def test_a_training_goes_on_with_another_number(folder: Path) -> None:
    def leg(processes: int, devices: int, what: str, rank: int, step: int) -> list[Ended]:
        return train(folder, "legs", processes, devices, happens=what, rank=rank, step=step)

    def reached() -> tuple[int, int]:
        newest = json.loads((folder / "legs/state.json").read_text())["files"][-1]
        return newest["epochs"], newest["step"]

    # A signal at one process stops all, with a checkpoint of that step.
    assert_ended([130], leg(1, 4, "SIGTERM", rank=0, step=3))
    assert reached() == (0, 3)
    ends = leg(2, 1, "SIGTERM", rank=1, step=6)
    assert_ended([130, 130], ends)
    assert max(end.after_s for end in ends) < STOPPED_S
    assert reached() == (0, 9)
    # A process is killed: the others end and say so, and the last checkpoint counts.
    *others, killed = leg(4, 1, "SIGKILL", rank=3, step=8)
    assert killed.code == -9
    for end in others:
        assert end.code == 2 and "has lost another one" in end.printed, end.printed
        assert end.after_s < STOPPED_S
    assert reached() == (1, 4)
    # A loss that is no number at one process is none at any.
    for end in leg(2, 1, "NaN", rank=1, step=0):
        assert end.code == 2 and "the loss is nan at step 5 of epoch 2" in end.printed
    assert reached() == (1, 4)

    assert_ended([0], train(folder, "legs"))
    assert_same(folder, "legs")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not there: `make ray`")
def test_workers_of_ray_train_the_same_though_one_is_killed(folder: Path) -> None:
    killed, diverges = {"happens": "SIGKILL", "step": 8}, {"happens": "NaN", "step": 0}
    plans: dict[str, dict[str, Any]] = {
        "ray": {"checkpoints": "ray"},
        "killed": {"checkpoints": "ray", "rank": 1, **killed},
        "NaN": {"checkpoints": "NaN", "rank": 1, **diverges},
    }
    for name, plan in plans.items():
        (folder / f"{name}.json").write_text(json.dumps({**PLAN, **plan}))
    code = [WORKER.parent, Path(parallel.__file__).parents[2]]
    done = subprocess.run(
        [sys.executable, str(WORKER.with_name("ray_workers.py"))],
        cwd=folder,
        env=os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": os.pathsep.join(map(str, code))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert "worker 1 of 2 was lost" in done.stdout, done.stdout
    assert_same(folder, "ray")
    # What is no accident is not tried again.
    assert done.returncode == 2 and "the loss is nan at step 1 of epoch 1" in done.stdout


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"JOB_ADDRESSES": "node"}, "JOB_ADDRESSES is 'node': it must be host:port of process 0"),
        ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES is 'two': it must be a number"),
        ({"PROCESS_ID": ""}, "PROCESS_ID is '': it must be a number"),
        ({"PROCESS_ID": "2"}, "PROCESS_ID is 2: it must be below .*NUM_PROCESSES, 2"),
    ],
)
def test_a_place_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], complaint: str
) -> None:
    place = {"JOB_ADDRESSES": "node-0:29400,node-1:29400", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
    for name, value in place.items():
        monkeypatch.setenv(f"KERAS_DISTRIBUTION_{name}", value)
    assert parallel.named() == (1, 2, "node-0:29400")
    for name, value in changed.items():
        monkeypatch.setenv(f"KERAS_DISTRIBUTION_{name}", value)
    with pytest.raises(InputError, match=complaint):
        parallel.named()


def test_only_jax_trains_with_several_processes() -> None:
    with pytest.raises(InputError, match=r"NUM_PROCESSES is 2, but train.backend is 'tensorflow'"):
        parallel.join(parallel.Place(0, 2, "127.0.0.1:29400"))
    assert parallel.join(None) == parallel.join(parallel.Place(0, 1, "")) == (0, 1, 1)


def test_no_process_is_left_if_another_can_t_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, ended = [], []

    class Other:
        def __init__(self, place: parallel.Place, *_: Any) -> None:
            if place.rank == 2:
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
            started.append(self)

        def end(self, deadline: float) -> None:
            ended.append(self)

    monkeypatch.setattr(launch, "_Other", Other)
    with pytest.raises(BlockingIOError), launch.launched(3, [], tmp_path):
        pass
    assert len(started) == 1 and ended == started


@pytest.mark.slow
def test_a_process_that_can_t_start_is_named(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from minigpt.training import launch
broken = sys.executable, "-c", "exit('it is broken')"
with launch.launched(2, broken, pathlib.Path(sys.argv[1])):
    pass
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    env = os.environ | {"KERAS_BACKEND": "jax"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "error: train: process 1 of the 2 that train together ended with 1" in ended.stderr
    assert "it is broken); `dvc repro` resumes" in ended.stderr
