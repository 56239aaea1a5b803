"""`minigpt generate` with a tiny model."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minigpt import cli
from minigpt.config import SamplingConfig
from minigpt.generation.decoding import Generator
from minigpt.model import directory
from minigpt.serving import terminal
from minigpt.serving.sources import Folder

OPTIONS = ("--max-tokens", "12", "--top-p", "0.9", "--seed", "3")


@pytest.fixture
def generate(model_directory: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> Any:
    """Runs the command in an empty folder; returns the exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def generate(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["generate", "--model", str(model_directory), *arguments])
        except SystemExit as error:
            code = int(str(error.code))
        return code, *capsys.readouterr()

    return generate


def expected(model_directory: Path, prompt: str, seed: int, **settings: Any) -> str:
    """What the generator writes alone."""
    loaded = directory.load(model_directory)
    sampling = SamplingConfig(**{"max_tokens": 12, "top_p": 0.9, **settings}, seed=seed)
    return Generator(loaded.network, loaded.tokenizer)([prompt], sampling)[0]


def test_texts_in_the_terminal(generate: Any, model_directory: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(terminal, "EAGER_STEPS", 6)  # the rest of a text is compiled
    texts = [expected(model_directory, "this movie", seed) for seed in (3, 4)]
    assert generate("this movie", *OPTIONS, "-n", "2") == (0, "\n\n".join(texts) + "\n", "")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(
        buffer=io.BytesIO(b"this movie\n"), isatty=lambda: False
    ))  # fmt: skip
    code, printed, _ = generate(*OPTIONS, "--json")
    line = json.loads(printed)
    assert (code, line["text"], line["prompt"]) == (0, texts[0], "this movie")
    assert (line["finish_reason"], line["model"]) == ("length", "tiny")
    assert SamplingConfig(**line["settings"]) == SamplingConfig(max_tokens=12, top_p=0.9, seed=3)


def test_a_file_of_prompts_goes_on_where_it_ends(
    generate: Any, model_directory: Path, make_directory: Any, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    prompts.write_text("this movie\r\n\nw1 w2\nis ä\n", encoding="utf-8-sig")
    arguments = ("--file", str(prompts), "--out", str(out), *OPTIONS, "-n", "2")
    assert generate(*arguments)[:2] == (0, "")
    whole = out.read_bytes()
    lines = [json.loads(line) for line in whole.decode().splitlines()]
    assert [line["prompt"] for line in lines] == ["this movie"] * 2 + ["w1 w2"] * 2 + ["is ä"] * 2
    assert [line["settings"]["seed"] for line in lines] == list(range(3, 9))
    assert lines[2]["text"] == expected(model_directory, "w1 w2", 5)
    out.write_bytes(whole[: len(whole) // 2])  # cut off within a line
    assert generate(*arguments)[0] == 0
    assert out.read_bytes() == whole
    other = str(make_directory(tmp_path / "tiny", 1))  # trained anew, say
    for changed in (("--top-k", "2"), ("--model", other)):
        code, _, said = generate(*arguments, *changed)
        assert code == 2 and "line 1, is of another prompt, model or setting" in said
    prompts.write_text("this movie\nzzz\n", encoding="utf-8")
    code, _, said = generate(*arguments)
    assert code == 2 and f"{prompts}, line 2: 'zzz' has no word that the model knows" in said
    assert out.read_bytes() == whole
    prompts.write_text("this movie", encoding="utf-8")
    for nowhere in (tmp_path, tmp_path / "no" / "folder"):
        code, _, said = generate("--file", str(prompts), "--out", str(nowhere), *OPTIONS)
        assert code == 2 and said.startswith(f"error: --out {nowhere}: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("caf\udce9",), "the prompt is not valid Unicode"),
        (("a", "--top-p", "0"), "top_p is 0.0: allowed is above 0 to 1"),
        (("a", "--top-p", "x"), "argument --top-p: invalid float value"),
        (("a", "--max-tokens", "0"), "max_tokens is 0: allowed is 1 to 100000"),
        (("a", "-n", "0"), "-n is 0: allowed is 1 or more"),
        (("a", "--file", "f"), "--file and --out go together"),
        (("a", "--file", "f", "--out", "o"), "give either a prompt or --file"),
        (("a", "--model", "nowhere"), "--model nowhere: there is no such folder"),
        (("a", "--model", "models:/x"), "--model models:/x: allowed are a model directory"),
    ],
)
def test_what_is_refused(generate: Any, arguments: Any, says: str) -> None:
    code, printed, said = generate(*arguments)
    assert (code, printed) == (2, "") and says in said


def test_ctrl_c_ends_a_command_at_any_moment(generate: Any, monkeypatch: Any) -> None:
    def interrupted(*given: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(directory, "load", interrupted)
    assert generate("a") == (130, "", "\nerror: generate: interrupted\n")


def test_every_setting_is_an_option(generate: Any) -> None:
    code, printed, _ = generate("--help")
    assert code == 0
    for name in SamplingConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in printed
    assert "above 0 to 1" in " ".join(printed.split())


def test_what_is_refused_before_a_text_is_written(model_directory: Path, capsys: Any) -> None:
    writer = terminal.Writer(Folder(model_directory), SamplingConfig(max_tokens=2), 1)
    for prompt, says in (("", "the prompt '' is empty"), ("zzz", "has no word that the model")):
        with pytest.raises(Exception, match=says):
            terminal.write(writer, prompt, 1, False)
    assert capsys.readouterr().out == ""
