"""What Keras and TensorFlow will find in the environment."""

import os

import pytest

from minigpt.common import backend

NAMES = ("KERAS_BACKEND", backend.ONEDNN)


@pytest.mark.parametrize(
    ("machine", "given", "chosen"),
    [
        ("x86_64", (None, None), ("tensorflow", "1")),
        ("aarch64", (None, None), ("tensorflow", None)),
        ("x86_64", ("jax", "0"), ("jax", "0")),
    ],
)
def test_what_is_set_stays(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    given: tuple[str | None, ...],
    chosen: tuple[str | None, ...],
) -> None:
    monkeypatch.setattr(backend.platform, "machine", lambda: machine)
    for name, value in zip(NAMES, given, strict=True):
        monkeypatch.setenv(name, value or "")  # so that it is undone
        if value is None:
            monkeypatch.delenv(name)
    backend.choose()
    assert tuple(map(os.environ.get, NAMES)) == chosen
