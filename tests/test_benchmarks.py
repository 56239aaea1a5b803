"""The benchmarks in tiny sizes: their code runs, and both sides agree."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from minigpt.common import backend, paths
from minigpt.data.tokenizer import SPECIAL_TOKENS, WordTokenizer

SIDES = """
import time

def side(name, log):
    def call():
        with open(log, "a") as file:
            file.write(name)
        time.sleep(0.3 if name == "a" else 0)
    return call
"""


@pytest.fixture(scope="module")
def training() -> Iterator[Any]:
    """The package in tiny sizes, which it reads on import; test_seed imports it in full size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCHMARKS_TINY", "1")
        for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
            patch.delitem(sys.modules, name)
        from benchmarks import training

        assert training.script.TINY
        yield training


def test_the_table_as_text_json_and_figure(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from benchmarks import __main__ as command

    monkeypatch.setattr(training, "_multiplies_bfloat16", lambda: False)
    quick = functools.partial(training.script.compiled_model, jit_compile=False)  # XLA takes long
    monkeypatch.setattr(training.script, "compiled_model", quick)
    rows = ["bfloat16", "vocabulary", "prepare"]
    earlier = {"what": "x", "unit": "s", "peer": "", "at_least": None, "reach_for": None}
    earlier |= {"here": [1.0], "there": [], "ratio": None, "kept": 1}
    (tmp_path / "tensorflow.json").write_text(json.dumps({"cold": earlier}), encoding="utf-8")
    arguments = ["benchmarks", "--rounds", "2", "--out", str(tmp_path), "--only", *rows]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    printed = capsys.readouterr().out
    assert "| training step, bfloat16 products |  | not measured: no bfloat16 products" in printed
    found = json.loads((tmp_path / "tensorflow.json").read_text(encoding="utf-8"))
    assert set(found) == {*rows, "cold"} and found["cold"]["kept"] == 1
    assert found["vocabulary"]["facts"]["identical"] is True
    for name in rows[1:]:
        here, there = found[name]["here"], found[name]["there"]
        assert len(here) == len(there) == 2
        assert found[name]["ratio"] == pytest.approx(np.median(there) / np.median(here))
        assert f"| {found[name]['ratio']:.3g} | {found[name]['at_least']:g} |" in printed
    assert (tmp_path / "tensorflow.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_row_of_two_processes(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import __main__ as command

    arguments = ["benchmarks", "--rounds", "2", "--out", str(tmp_path), "--only", "one"]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    found = json.loads((tmp_path / "tensorflow.json").read_text(encoding="utf-8"))["one"]
    assert len(found["here"]) == len(found["there"]) == 2
    assert found["ratio"] == pytest.approx(np.median(found["there"]) / np.median(found["here"]))


def test_both_sides_of_a_step_agree(training: Any) -> None:
    facts = training.agreement(*training.batch())
    assert facts["loss_here"] == pytest.approx(facts["loss_there"], rel=1e-5)
    assert 0 < facts["gradients_differ_by"] < 1e-5


def test_both_sides_are_compared_where_relu_has_a_gradient(training: Any) -> None:
    model, (x, _) = training.script.compiled_model(), training.batch()
    dense = model.layers[2].feed_forward.layers[0]
    dense.bias.assign(training.script.bias_between_activations(model, x))
    seen: list[Any] = []
    dense.activation = lambda activations: seen.append(np.array(activations)) or activations
    model(x)
    assert abs(seen[0]).min() > 1e-3
    on = (seen[0] > 0).mean(axis=(0, 1))
    assert (on > 0.2).all() and (on < 0.8).all()  # some of each unit on either side


def test_processes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import measure

    (tmp_path / "sides.py").write_text(SIDES, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(backend.ONEDNN, "1")
    log = tmp_path / "log"
    here, there = measure.compare_processes("sides.side", ["a", str(log)], ["b", str(log)], 2)
    assert len(here) == len(there) == 2 and min(here) >= 0.3 > max(there)
    assert log.read_text(encoding="utf-8") == "ababab"
    names = [backend.ONEDNN in measure.environment([side]) for side in ("here", measure.SCRIPT)]
    assert names == [True, False]  # the script runs TensorFlow as it is shipped
    with pytest.raises(measure.NotMeasuredError, match=r"sides\.side failed"):
        measure.compare_processes("sides.side", ["a"], ["b", str(log)], 1)


def test_prefixes_are_what_the_published_sequences_cover(training: Any) -> None:
    from benchmarks import speedrun

    texts = pa.array(['Say "Hello  there".<br />It\n', "", "One", " Two words"])
    cut = speedrun.prefixes(texts, 4)
    assert cut.to_pylist() == ['Say "Hello  there"', "", "One", " Two words"]
    _, offsets = WordTokenizer(SPECIAL_TOKENS, "published").encode(cut)
    assert np.diff(offsets).tolist() == [4, 0, 1, 2]
    assert speedrun.prefixes(pa.chunked_array([texts]), 1)[0].as_py() == "Say"


@pytest.mark.slow
def test_the_speedrun_trains_until_the_recorded_best(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import measure, speedrun

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(speedrun, "ALL", 40_000)
    monkeypatch.setattr(speedrun, "PART", 30_000)
    monkeypatch.setattr(speedrun, "RECORD", tmp_path / "record.csv")
    small = ["vocabulary.max_tokens=300", "model.embed_dim=16", "model.key_dim=8"]
    small += ["model.feed_forward_dim=16", "train.warmup_steps=1"]
    monkeypatch.setattr(speedrun, "DEFAULT", ["groups.train=fast", *small])
    monkeypatch.setattr(speedrun, "PUBLISHED", [*speedrun.PUBLISHED, *small])
    options = measure.Options(measure.SAMPLE, tmp_path, rounds=2)
    scores = list(speedrun.scores(speedrun.DEFAULT, 30_000, measure.SAMPLE, parts=2))
    assert scores[0].steps < scores[1].steps
    assert scores[0].bits_per_byte > scores[1].bits_per_byte > 1
    middle = (scores[0].bits_per_byte + scores[1].bits_per_byte) / 2
    speedrun.RECORD.write_text(f"bits_per_byte,steps\n9,100\n{middle},200\n9.5,300\n")
    result = speedrun.speedrun(options)
    assert len(result.here) == len(result.there) == 2
    *before, last = result.facts["default"]
    assert last.bits_per_byte <= middle < min(before).bits_per_byte
    ours, theirs = result.facts["step_s"][0]
    assert (result.here[0], result.there[0]) == (ours * last.steps, theirs * 200)
    speedrun.RECORD.write_text("bits_per_byte,steps\n0.1,100\n")
    with pytest.raises(measure.NotMeasuredError, match=r"the default ended at .*bits_per_byte"):
        speedrun.speedrun(options)


@pytest.mark.slow
def test_a_gpu_without_tensorflow(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gpu, measure
    from minigpt.config import SequencesConfig
    from minigpt.data import cutting, shards, tokenizer

    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((measure.PROJECT / paths.RESOLVED).read_text(encoding="utf-8"))
    settings["train"] |= {"batch_size": 4, "epochs": 1, "warmup_steps": 1}
    settings["model"] |= {"embed_dim": 16, "num_heads": 2, "key_dim": 8, "feed_forward_dim": 16}
    paths.RESOLVED.write_text(yaml.safe_dump(settings), encoding="utf-8")
    words = tokenizer.WordTokenizer(("", "[UNK]", *"abcdefgh"), "spaced")
    words.save(paths.TOKENIZER)
    config = SequencesConfig(policy="head", length=8, validation_fraction=0.2, shards=1)
    ids = np.random.default_rng(0).integers(2, len(words), 40 * 9).astype("int32")
    reviews = cutting.Encoded(
        pa.array(map(str, range(40))), ids, np.arange(0, len(ids) + 1, 9), np.arange(40) < 10
    )
    shards.write(paths.SEQUENCES, [reviews], config=config, tokenizer=words)
    gpu.FOLDER.mkdir()
    gpu.pack()
    for folder in (paths.TOKENIZER, paths.SEQUENCES):
        folder.rename(tmp_path / folder.name)  # only .gpu/ is carried along
    code = "import sys; sys.modules['tensorflow'] = None; from benchmarks import gpu; gpu.main()"
    own = {"BENCHMARKS_TINY": "1", "KERAS_BACKEND": "jax", "OUT": str(tmp_path)}
    own["PYTHONPATH"] = os.pathsep.join([str(measure.PROJECT), str(measure.PROJECT / "src")])
    subprocess.run([sys.executable, "-c", code], env=os.environ | own, check=True)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert len(found["step"]["seconds"]) == len(found["one"]["tokens_per_s"]) == gpu.ROUNDS
    assert found["epoch"]["steps"] == found["epoch"]["of"] == 7
    assert 1 < found["epoch"]["val_loss"] < 4  # log(10) is a guess
