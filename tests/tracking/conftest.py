"""What the tests of the tracking share."""

import itertools
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tracked import fake_model, write_lock

NUMBERS = itertools.count()


@pytest.fixture
def project(tmp_path: Path, empty_store: bytes) -> Path:
    """A project's folder with a dvc.lock and an empty store; its name is an awkward one."""
    root = tmp_path / "pro ject#1?50%"
    root.mkdir()
    (root / "mlflow.db").write_bytes(empty_store)
    write_lock(root)
    return root


@pytest.fixture
def model_dir(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_model(project, monkeypatch)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: bytes) -> str:
    """The address of a store with the experiment `minigpt`: to open one takes MLflow a while."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "mlflow.db").write_bytes(empty_store)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.create_experiment("minigpt", artifact_location=(folder / "mlartifacts").as_uri())
    return client.tracking_uri


@pytest.fixture
def name(store: str) -> str:
    """A registered model of the test's own in the shared store."""
    name = f"mini{next(NUMBERS)}"
    MlflowClient(store).create_registered_model(name)
    return name
