"""What Keras and TensorFlow find in the environment."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.common import backend
from minigpt.common.errors import InputError


def set_environment(patch: pytest.MonkeyPatch, **values: str | None) -> None:
    for name, value in values.items():
        patch.setenv(name, value or "")  # so that it is undone
        if value is None:
            patch.delenv(name)


@pytest.mark.parametrize(
    ("machine", "given", "wanted", "chosen"),
    [
        ("x86_64", (None, None), "", ("tensorflow", "1")),
        ("aarch64", (None, None), "", ("tensorflow", None)),
        ("x86_64", ("jax", "0"), "", ("jax", "0")),
        ("x86_64", (None, "0"), "jax", ("jax", "0")),
    ],
)
def test_a_choice(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    given: tuple[str | None, str | None],
    wanted: str,
    chosen: tuple[str, str | None],
) -> None:
    monkeypatch.setattr(backend.platform, "machine", lambda: machine)
    set_environment(monkeypatch, KERAS_BACKEND=given[0], TF_ENABLE_ONEDNN_OPTS=given[1])
    backend.choose(wanted)
    assert (os.environ["KERAS_BACKEND"], os.environ.get(backend.ONEDNN)) == chosen


def test_a_backend_that_can_not_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "tensorfow")
    with pytest.raises(InputError, match="'tensorfow': allowed are tensorflow, jax, torch"):
        backend.choose()
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(InputError, match=r"dvc exp run -S train\.backend=jax"):
        backend.choose("tensorflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="jax is not installed"):
        backend.choose("jax")


def test_what_would_cut_a_training_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_MAX_STEPS_PER_EPOCH", "1")
    with pytest.raises(InputError, match="KERAS_MAX_STEPS_PER_EPOCH is set"):
        backend.pin()


def test_the_user_s_keras_settings_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "keras.json").write_text('{"floatx": "float16", "epsilon": 1e-3}', encoding="utf-8")
    code = "from minigpt.common import backend; backend.choose(); backend.pin(); import keras; "
    code += "print(keras.config.floatx(), keras.config.epsilon(), "
    code += "keras.saving.get_registered_object('minigpt>MiniGPT').__module__)"
    # The backend that Keras loads in the least time.
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # Nor does anybody have to import the network before Keras opens an exported one.
    assert done.stdout.split() == ["float32", "1e-07", "minigpt.model.network"]


def test_what_no_stage_uses_is_hidden_only_while_one_is_imported() -> None:
    code = """
import os
os.environ["KERAS_BACKEND"] = "tensorflow"
from minigpt.common.backend import without_the_unused
with without_the_unused():
    try:
        import sklearn
    except ImportError:
        print("hidden")
import sklearn
print("found")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hidden", "found"]


def test_the_processors_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.processors() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert backend.processors() == os.cpu_count()
