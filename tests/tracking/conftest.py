"""What the tests of the tracking share."""

from pathlib import Path

import pytest
from tracked import fake_model, write_lock


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
