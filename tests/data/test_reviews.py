"""The white space of a corpus."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig
from minigpt.data import own_files, reviews, text

PIECES = st.sampled_from(
    ["<br />", "<BR />", "<br", "/>", "<br/>", "A", "b", ".", "<", "\x1c", "\xa0", *" \t\n\v\f\r"]
)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(PIECES, max_size=12).map("".join))
@example("<br\n/>")
@example("<br<br /> />")
def test_collapsing_changes_no_token(raw: str) -> None:
    collapsed = reviews.collapse(raw)
    for style in ("published", "spaced"):
        before, after = text.tokenise(pa.array([raw, collapsed]), style).to_pylist()
        assert before == after
    assert reviews.collapse(collapsed) == collapsed
    assert not re.search(r"[\t\n\v\f\r]|^ | $|<br />", collapsed, re.IGNORECASE)
    assert "  " not in re.sub("<br  />", "", collapsed, flags=re.IGNORECASE)


def test_collapsing_keeps_case_and_other_white_space() -> None:
    raw = " One.<br /><BR />Two\r\n\tTHREE\xa0 É\x1c "
    assert reviews.collapse(raw) == "One. Two THREE\xa0 É\x1c"


@pytest.mark.parametrize(
    ("white_space", "expected"),
    [("keep", " A  b<br />\n\tc\n"), ("collapse", "A b c")],
)
def test_a_corpus_says_what_becomes_of_white_space(
    white_space: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"text": " A  b<br />\n\tc\n"}))
    config = CorpusConfig.model_validate(
        {"format": "files", "url": str(path), "white_space": white_space}
    )
    assert next(own_files.read(str(path), config))["text"].to_pylist() == [expected]


def test_a_review_of_line_breaks_is_empty() -> None:
    config = CorpusConfig(format="files", url="mine", white_space="collapse")
    with pytest.raises(InputError, match="is empty"):
        reviews.decode_review(b"<br /> <br />", "review 'x'", config)
