"""A tiny model on disk, and servers of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served
from tracked import changed

from minigpt import config
from minigpt.data.tokenizer import WordTokenizer

WORDS = WordTokenizer(("", "[UNK]", "this", "movie", "is", *(f"w{i}" for i in range(50))), "spaced")


@pytest.fixture(scope="session")
def make_directory(make_network: Any) -> Callable[[Path, int], Path]:
    """Writes the model directory of a tiny network, whose seed decides its weights."""

    def make(path: Path, seed: int = 0) -> Path:
        from minigpt.model import directory

        plain = changed(vocabulary={"max_tokens": len(WORDS)}).model_dump(mode="json")
        sections = {name: plain[name] for name in set(directory.SECTIONS) - {"model"}}
        network = make_network(seed, num_blocks=1, positions="rotary")
        directory.save(path, network, WORDS, sections)
        return path

    return make


@pytest.fixture(scope="session")
def model_directory(make_directory: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = make_directory(tmp_path_factory.mktemp("models") / "tiny")
    return path


@pytest.fixture(scope="module")
def served(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that is warm, with small limits."""
    folder = tmp_path_factory.mktemp("served")
    limits = {"max_prompts": 50, "max_prompt_bytes": 10_000, "max_tokens": 100_000}
    limits["max_total_tokens"] = 10**7
    config.save(
        changed(
            tracking={"request": limits},
            serving={"slots": 8, "queue": 100, "slow_s": 3, "max_body_bytes": 100_000},
        ),
        folder / "resolved.yaml",
    )
    made = Served(folder, "--model", str(model_directory))
    assert made.get("/health")[0] == 503  # at once, and until the model is warm
    made.wait(lambda: made.get("/health")[0] == 200)
    yield made
    made.process.kill()
    made.process.wait()
