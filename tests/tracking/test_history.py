"""The chain of the champion's moves, without a store."""

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from minigpt.tracking import history
from minigpt.tracking.history import Entry, line, made, read


def entry(key: str, after: str | None, move: str, how: str = "promote", **other: Any) -> Entry:
    """An entry by a short key, and a move such as 2>3."""
    before, version = move.split(">")
    told = {"who": "anna", "time": "2026-01-01T00:00:00+00:00", "reason": "better"}
    links = {"after": after and history.TAG + after, "settled": True}
    values = {"version": version, "before": before or None, "how": how, **told, **links, **other}
    return Entry(key=history.TAG + key, **values)


def keys(entries: list[Entry], champion: str | None = None) -> str:
    """The chain that is read from entries, as one text of their keys."""
    tags = {each.key: each.text() for each in entries}
    return "".join(each.key.removeprefix(history.TAG) for each in read(tags, champion))


def test_an_entry_comes_back_as_it_was() -> None:
    old, new = entry("a", None, ">1"), history.new("2", "1", "gate", "“ödd”", [])
    following = history.new("3", "2", "rollback", "worse", [old, new])
    assert following.after == new.key and not following.settled
    tags = {each.key: each.text() for each in (old, new, following)}
    assert set(read(tags, "3")) == {old, new, following}
    assert history.settled(new).settled
    assert new.shown().keys() == {"time", "version", "from", "how", "who", "reason"}


def test_neither_keys_nor_times_order_the_chain() -> None:
    for names in itertools.permutations("abcd"):
        first, second, third, fourth = names
        entries = [
            entry(first, None, ">1", time="2026-09-09"),
            entry(second, first, "1>2"),
            entry(third, second, "2>3", time="1970"),
            entry(fourth, third, "3>2", "rollback"),
        ]
        assert keys(entries) == "".join(names)


def test_entries_of_the_earlier_form_come_first() -> None:
    tags = {}
    for number, move in enumerate([">1", "1>2", "2>3"]):
        values = entry("x", None, move).shown()
        tags[f"{history.TAG}2026-01-0{number + 1}T00:00:00.aa"] = json.dumps(values)
    chain = read(tags, "3")
    assert [each.version for each in chain] == ["1", "2", "3"]
    assert made(chain, "7") == chain
    new = history.new("2", "3", "rollback", "worse", chain)
    chain = read({**tags, new.key: new.text()}, "2")
    assert [each.version for each in chain] == ["1", "2", "3", "2"]
    assert line(chain, "2") == ["1", "2"]


def test_of_two_that_follow_the_same_entry_the_later_is_the_one_that_counts() -> None:
    start, left, right = entry("a", None, ">1"), entry("b", "a", "1>2"), entry("c", "a", "1>3")
    assert keys([start, left, right], "3") == "abc"
    assert keys([start, left, right], "2") == "acb"
    assert keys([start, left, right, entry("d", "b", "2>4")], "3") == "acbd"
    both = [start, left, right, entry("d", "b", "2>4"), entry("e", "c", "3>5")]
    assert keys(both, "5") == "abdce"


def test_a_gap_a_circle_and_a_second_beginning() -> None:
    a, b, c = entry("a", None, ">1"), entry("b", "a", "1>2"), entry("c", "b", "2>3")
    d = entry("d", "c", "3>4")
    assert keys([b, c, d], "4") == "bcd"
    assert keys([a, c, d], "4") == "acd"
    assert keys([a, b, d], "4") == "abd"
    circle = [entry("x", "y", "1>2"), entry("y", "x", "2>1")]
    assert keys([*circle, a, b], "2") == "ab"
    assert keys([a, b, entry("e", None, ">3")], "2") == "eab"


def test_what_was_not_made_and_what_was() -> None:
    start = entry("a", None, ">1")
    intended = entry("b", "a", "1>2", settled=False)
    assert made([start, intended], "1") == [start]
    assert made([start, intended], "2") == [start, intended]
    after = entry("c", "b", "2>3")
    assert made([start, intended, after], "3") == [start, intended, after]
    after = entry("c", "b", "1>3")
    assert made([start, intended, after], "3") == [start, after]
    assert made([], None) == []


def test_the_line_leaves_out_what_was_taken_back_or_never_made() -> None:
    start, better = entry("a", None, ">1"), entry("b", "a", "1>2")
    back = entry("c", "b", "2>1", "rollback", settled=False)
    assert line([start, better], "2") == ["1", "2"]
    for champion in ("1", "2", "7"):  # made, not made, not known
        assert line([start, better, back], champion) == ["1"]
    never = entry("c", "b", "2>3", settled=False)
    then = entry("d", "c", "2>4")
    assert line([start, better, never, then], "4") == ["1", "2", "4"]
    by_hand = entry("c", "b", "7>8")
    assert line([start, better, by_hand], "8") == ["1", "2", "7", "8"]


KEYS = st.sampled_from([f"{history.TAG}{name}" for name in "abcdef"])
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | KEYS
NAMES = ["after", "version", "from", "how", "who", "time", "reason", "settled", "key", "more"]
VALUES = st.dictionaries(st.sampled_from(NAMES), LEAVES) | LEAVES | st.lists(LEAVES)
LIKELY = st.fixed_dictionaries(
    {name: st.sampled_from("1234") for name in ("version", "who", "time", "reason")}
    | {"how": st.sampled_from(["gate", "promote", "rollback"]), "from": st.none() | st.just("2")}
    | {"settled": st.booleans(), "after": st.none() | KEYS}
)


@given(st.dictionaries(KEYS, (VALUES | LIKELY).map(json.dumps) | st.text()), st.sampled_from("123"))
def test_no_tags_break_it(tags: dict[str, str], champion: str) -> None:
    chain = read(tags, champion)
    assert len({each.key for each in chain}) == len(chain)
    assert set(line(chain, champion)) <= {each.version for each in chain} | {"2"}
    assert all(each.version for each in made(chain, champion))
