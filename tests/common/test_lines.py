"""JSON lines and tables survive what a text may hold."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from minigpt.common import files

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(TEXTS))
def test_json_lines_come_back(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "texts.jsonl")
        rows = [{"text": text} for text in [*texts, "a\x85b\u2028c\u2029d\x0be"]]
        files.write_json_lines(path, rows)
        assert files.read_json_lines(path) == rows


def test_a_table_comes_back(tmp_path: Path) -> None:
    rows = [{"epoch": "1", "loss": "0.5"}, {"epoch": "2", "loss": ""}]
    files.write_csv(tmp_path / "losses.csv", ["epoch", "loss"], rows)
    assert files.read_csv(tmp_path / "losses.csv") == rows
    assert (tmp_path / "losses.csv").read_bytes() == b"epoch,loss\n1,0.5\n2,\n"
