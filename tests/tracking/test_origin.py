"""What is logged is what the files were made with, whatever resolved.yaml says since."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tracked import (
    CONFIG,
    changed,
    client,
    held,
    runs,
    write_evaluation,
    write_lock,
    write_model,
    write_run,
)

from minigpt.common.errors import InputError
from minigpt.config import Config
from minigpt.data.tokenizer import WordTokenizer
from minigpt.stages import train
from minigpt.tracking.mirror import Mirror

pytestmark = pytest.mark.usefixtures("clean_environment")

LATER: dict[str, dict[str, Any]] = {
    "vocabulary": {"max_tokens": 2000},
    "sequences": {"length": 32},
    "model": {"context_length": 32, "dropout": 0.5},
    "train": {"seed": 8},
}


def freeze(project: Path, **stages: dict[str, Any]) -> None:
    """Freezes stages in dvc.yaml; dvc.lock has the sections that they were run with."""
    frozen = {"stages": {name: {"frozen": True} for name in stages}}
    (project / "dvc.yaml").write_text(yaml.safe_dump(frozen))
    write_lock(project)
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    for name, sections in stages.items():
        lock["stages"].setdefault(name, {})["params"] = {"resolved.yaml": sections}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))


def sections(config: Config, *names: str) -> dict[str, Any]:
    plain = config.model_dump(mode="json")
    return {name: plain[name] for name in names}


def test_a_model_is_logged_with_its_own_settings(project: Path, caplog: Any) -> None:
    write_run(project, epochs=1, model=None)
    Mirror(project, CONFIG).send()
    write_run(project, model=write_model(project))
    mirror = Mirror(project, changed(**LATER, sample={"seed": 9}))
    for _ in range(2):
        mirror.send()

    finished, begun = runs(project)  # `sample` decides what is in the run, so there are two
    params = finished.data.params
    assert (params["train.seed"], params["model.dropout"]) == ("1", "0.0")
    assert (params["vocabulary.max_tokens"], params["sequences.length"]) == ("1000", "16")
    assert params["sample.seed"] == "9"
    (warning,) = caplog.messages
    for text in (
        "train.seed is 1 (resolved.yaml: 8)",
        "vocabulary.max_tokens is 1000 (resolved.yaml: 2000)",
        "model.dropout is 0.0 (resolved.yaml: 0.5)",
        "To make them anew: `dvc unfreeze train`, then `dvc repro`",
    ):
        assert text in warning
    assert "sample" not in warning
    assert mirror.made_with().train.seed == 1
    assert mirror.config.train.seed == 8

    # Without the change of `sample` it is the run of the training.
    Mirror(project, changed(**LATER)).send()
    assert len(runs(project)) == 2
    assert client(project).get_run(begun.info.run_id).info.status == "FINISHED"


def test_what_the_network_chooses_is_no_difference(project: Path, caplog: Any) -> None:
    write_run(project, model=write_model(project))
    Mirror(project, CONFIG).send()
    params = held(project)["params"]
    assert (params["model.vocabulary_size"], params["model.dtype_policy"]) == ("0", "auto")
    Mirror(project, changed(model={"vocabulary_size": 1000, "dtype_policy": "float32"})).send()
    assert caplog.messages == []
    assert len(runs(project)) == 1
    Mirror(project, changed(model={"dtype_policy": "mixed_bfloat16"})).send()
    (warning,) = caplog.messages
    assert 'model.dtype_policy is "float32" (resolved.yaml: "mixed_bfloat16")' in warning


def test_while_a_model_is_trained_an_older_one_says_nothing(project: Path, caplog: Any) -> None:
    write_model(project)
    for model in (None, "e" * 64):
        write_run(project, epochs=1, model=model)
        mirror = Mirror(project, changed(**LATER))
        mirror.send()
        assert mirror.made_with().train.seed == 8
    assert caplog.messages == []


def test_frozen_stages_keep_the_parameters_that_they_were_run_with(
    project: Path, caplog: Any
) -> None:
    model = write_model(project)
    write_run(project, model=model)
    write_evaluation(project, model=model)
    Mirror(project, CONFIG).send()
    stages = {
        "download": sections(CONFIG, "corpus"),
        "evaluate": sections(CONFIG, "evaluate"),
        "sample": sections(CONFIG, "sample"),
    }
    later = changed(corpus={"url": "other.jsonl"}, evaluate={"seed": 9}, sample={"top_k": 5})
    freeze(project, **stages)
    mirror = Mirror(project, later)
    mirror.send()
    (run,) = runs(project)
    assert run.data.params["corpus.url"] == "reviews.jsonl"
    assert mirror.made_with() == CONFIG
    (warning,) = caplog.messages
    assert 'corpus.url is "reviews.jsonl" (resolved.yaml: "other.jsonl")' in warning
    assert "`dvc unfreeze download evaluate sample`" in warning

    # A frozen stage whose output is of another model says nothing about this one.
    write_evaluation(project, model="e" * 64)
    assert Mirror(project, later).made_with() == changed(evaluate={"seed": 9}, sample={"top_k": 5})
    # One that is not frozen runs, now or later, with what resolved.yaml says.
    write_evaluation(project, model=model)
    (project / "dvc.yaml").unlink()
    assert Mirror(project, later).made_with() == later


def test_a_model_is_made_with_what_frozen_stages_left(
    project: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.chdir(project)
    words = WordTokenizer(("", "[UNK]", "film"), "spaced")
    manifest = {"length": 16, "policy": "windows", "validation_fraction": 0.05}
    freeze(
        project,
        vocab={**sections(CONFIG, "vocabulary"), "sequences.validation_fraction": 0.05},
        sequences=sections(CONFIG, "sequences"),
    )
    later = changed(vocabulary={"max_tokens": 2000}, sequences={"policy": "head", "shards": 2})
    assert train._made_with(later, words, manifest) == CONFIG
    write_run(project, epochs=1, model=None)
    Mirror(project, later).send()
    write_run(project, model=write_model(project))
    Mirror(project, later).send()
    (run,) = runs(project)  # the model says the same as the stages did before it was there
    assert run.data.params["vocabulary.max_tokens"] == "1000"
    for warning, stages in zip(caplog.messages, ("vocab", "train vocab"), strict=True):
        assert "vocabulary.max_tokens is 1000 (resolved.yaml: 2000)" in warning
        assert f"`dvc unfreeze {stages} sequences`" in warning

    shorter = changed(sequences={"length": 8}, model={"context_length": 8})
    with pytest.raises(InputError, match=r"sequences.length is 16.*`dvc unfreeze vocab sequences`"):
        train._made_with(shorter, words, manifest)
    (project / "dvc.yaml").unlink()  # not frozen, but not run either
    with pytest.raises(InputError, match=r"data/sequences was made with .*policy=windows, but"):
        train._made_with(later, words, manifest)
    with pytest.raises(InputError, match=r"data/tokenizer was made with vocabulary.style=publish"):
        train._made_with(CONFIG, WordTokenizer(words.tokens, "published"), manifest)


def test_unknown_words_are_told_before_the_training(caplog: Any) -> None:
    words = WordTokenizer(("", "[UNK]", "film"), "spaced")
    limited = changed(gate={"max_unk_share": 0.2})
    for unknown in (2, 3):
        train._warn_of_unknown_words(limited, words, {"unknown_targets": unknown, "targets": 10})
    (warning,) = caplog.messages
    assert "the gate will refuse this model" in warning and "unk_share is 0.3" in warning
    assert "add more texts" in warning
    train._warn_of_unknown_words(CONFIG, words, {"unknown_targets": 0, "targets": 0})
    assert len(caplog.messages) == 1


def test_a_stopped_training_is_told_what_becomes_of_its_checkpoint(monkeypatch: Any) -> None:
    copy = Path("/home/anna/gpt/.dvc/tmp/exps/tmpa1b2c3")
    assert train._way_on(copy) == "`dvc repro` resumes from it"  # whoever works there by hand
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-dawn")
    assert "trains from the start" in train._way_on(copy)
    assert train._way_on(copy.parents[3]) == "`dvc repro` resumes from it"


def test_sections_that_other_code_wrote_are_named(project: Path, caplog: Any) -> None:
    freeze(project, download={"corpus": {"shape": "square"}})
    write_run(project, model=write_model(project))
    Mirror(project, CONFIG).send()
    (warning,) = caplog.messages
    assert "unknown key corpus.shape in dvc.lock" in warning
