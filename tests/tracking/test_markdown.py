import html
import re

from minigpt.tracking import markdown


def test_nothing_that_a_model_writes_ends_a_cell() -> None:
    wild = "a | b\n<b>x</b> `code` @someone [link](http://x) #1"
    shown = markdown.table(["text"], [[wild]])
    row = shown.splitlines()[2]
    assert len(shown.splitlines()) == 3
    assert row.count("|") == 2
    for character in "<`@[#":
        assert character not in row.replace("&#", "")
    assert "&&#" not in row and "someone" in row
    # GitHub looks for names and numbers where the escapes are gone.
    assert not re.search(r"@\w|#\d|GH-\d", html.unescape(markdown.escape("@a #1 GH-2 a@b.c")))
