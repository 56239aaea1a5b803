"""Checkpoints: which are kept, which are used, and what is left alone."""

from pathlib import Path

import numpy as np
import pytest
from training_data import STEPS, WORDS, restore, state

from minigpt.common.errors import InputError
from minigpt.training.checkpoints import Checkpoints, Epoch
from minigpt.training.fit import LossModel


def test_weights_that_are_no_numbers_take_no_good_checkpoints_place(
    trainer: LossModel, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)
    checkpoints.save(trainer, epoch=epoch(1))
    trainer.network.head_bias.assign(np.full(WORDS, np.nan))
    with pytest.raises(InputError, match="no longer finite after step 5 of epoch 2"):
        checkpoints.save(trainer, step=5)
    assert (checkpoints.step, len(checkpoints.epochs)) == (0, 1)
    assert names(tmp_path) == {"state.json", "after_00001_00000000.npz"}


def test_a_finished_training_is_kept_until_it_is_recorded(
    trainer: LossModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = Checkpoints(tmp_path, "a", True)
    before.save(trainer, step=STEPS)
    before.save(trainer, epoch=epoch(1))
    before.finish("the outcome")
    assert names(tmp_path) == {"state.json", "after_00001_00000000.npz"}
    # DVC was killed before it recorded the outputs: they are made again, of the same training.
    again = Checkpoints(tmp_path, "a", True, recorded="another")
    assert (again.train_id, again.epochs) == (before.train_id, [epoch(1)])
    again.finish("the outcome")
    assert Checkpoints(tmp_path, "a", True, recorded="the outcome").epochs == []
    assert not caplog.messages


def epoch(number: int, val_loss: float | None = None) -> Epoch:
    row: dict[str, float] = {"epoch": number, "loss": 1 / 3}
    return Epoch(row if val_loss is None else {**row, "val_loss": val_loss}, {"epoch": number}, [])


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.backend
def test_a_checkpoint_brings_everything_back(trainer: LossModel, tmp_path: Path) -> None:
    before = state(trainer)
    Checkpoints(tmp_path, "a", True).save(trainer, epoch=epoch(1))
    loaded = Checkpoints(tmp_path, "a", True)
    restore(trainer, [value + 1 for value in before])
    loaded.load(trainer)
    for found, value in zip(state(trainer), before, strict=True):
        np.testing.assert_array_equal(found, value)
    assert loaded.epochs == [epoch(1)]


def test_the_last_two_and_the_best_epoch_stay(trainer: LossModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)
    checkpoints.save(trainer, epoch=epoch(1, 1))
    checkpoints.save(trainer, epoch=epoch(2, 2))
    for step in (10, 20):
        checkpoints.save(trainer, step=step)
    assert names(tmp_path) == {
        "state.json",
        "after_00001_00000000.npz",
        "after_00002_00000010.npz",
        "after_00002_00000020.npz",
    }


@pytest.mark.parametrize(("identity", "resume"), [("b", True), ("a", False)])
def test_another_training_starts_afresh_and_says_so(
    trainer: LossModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    identity: str,
    resume: bool,
) -> None:
    before = Checkpoints(tmp_path, "a", True)
    before.save(trainer, epoch=epoch(1))
    after = Checkpoints(tmp_path, identity, resume)
    assert after.epochs == [] and after.train_id != before.train_id
    assert names(tmp_path) == {"state.json"}
    assert Checkpoints(tmp_path, identity, True).train_id == after.train_id
    told = ["the training starts from its beginning" in message for message in caplog.messages]
    assert told == [True] * resume  # whoever wants no checkpoint knows


def test_only_unusable_checkpoints_are_removed(trainer: LossModel, tmp_path: Path) -> None:
    before = Checkpoints(tmp_path, "a", True)
    before.save(trainer, epoch=epoch(1))
    (tmp_path / "after_00002_00000000.npz.tmp").write_bytes(b"half")
    (tmp_path / "after_00002_00000000.npz").write_bytes(b"written, but not listed")
    (tmp_path / "notes.txt").write_text("somebody's own", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    after = Checkpoints(tmp_path, "a", True)
    assert after.epochs == [epoch(1)]
    kept = {"state.json", "after_00001_00000000.npz", "notes.txt", "folder"}
    assert names(tmp_path) == kept


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_of_a_spoilt_checkpoint_the_one_before_is_used(
    trainer: LossModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = Checkpoints(tmp_path, "a", True)
    before.save(trainer, epoch=epoch(1))
    before.save(trainer, step=5)
    before.save(trainer, epoch=epoch(2))
    spoil(tmp_path / "after_00002_00000000.npz")
    after = Checkpoints(tmp_path, "a", True)
    assert (after.epochs, after.step, after.train_id) == ([epoch(1)], 5, before.train_id)
    assert caplog.messages == [f"{tmp_path / 'after_00002_00000000.npz'} is missing or was altered"]
    spoil(tmp_path / "after_00001_00000005.npz")
    (tmp_path / "state.json").write_text((tmp_path / "state.json").read_text()[:-9])
    assert Checkpoints(tmp_path, "a", True).epochs == []
    assert "are damaged" in caplog.messages[-1]


def test_a_best_epoch_that_was_spoilt_is_an_error(trainer: LossModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "a", True)
    for number, val_loss in enumerate((1, 2, 3), start=1):
        checkpoints.save(trainer, epoch=epoch(number, val_loss))
    spoil(tmp_path / "after_00001_00000000.npz")
    with pytest.raises(InputError, match=r"epoch 1 .* altered"):
        checkpoints.load(trainer, 1)
