"""The moves of the alias @champion, as a chain: each entry names the one before it.

An entry is a tag of the registered model under a key of its own, so no entry overwrites another. It
is written before the alias is moved, and settled afterwards. No clock orders the entries.
"""

import getpass
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

TAG = "minigpt.champion."


@dataclass(frozen=True)
class Entry:
    """A move of the alias.

    Attributes:
        key: Of its tag.
        after: The key of the entry before; None for the first.
        version: The new champion.
        before: The champion before; None if there was none.
        how: gate, promote or rollback.
        who: The user on that machine.
        time: In UTC, for people.
        reason: For people.
        settled: Whether the alias is known to have been moved.
    """

    key: str
    after: str | None
    version: str
    before: str | None
    how: str
    who: str
    time: str
    reason: str
    settled: bool

    def shown(self) -> dict[str, str | None]:
        """Returns what people read of it."""
        return {
            "time": self.time,
            "version": self.version,
            "from": self.before,
            "how": self.how,
            "who": self.who,
            "reason": self.reason,
        }

    def text(self) -> str:
        """Returns the value of its tag."""
        links = {"after": self.after, "settled": self.settled}
        return json.dumps({**self.shown(), **links}, ensure_ascii=False)


def new(version: str, before: str | None, how: str, reason: str, chain: Sequence[Entry]) -> Entry:
    """Returns the entry of a move that follows a chain and is yet to be made."""
    time = datetime.now(UTC).isoformat(timespec="microseconds")
    return Entry(
        key=f"{TAG}{time.removesuffix('+00:00')}.{uuid.uuid4().hex[:8]}",
        after=chain[-1].key if chain else None,
        version=version,
        before=before,
        how=how,
        who=_user(),
        time=time,
        reason=reason,
        settled=False,
    )


def settled(entry: Entry) -> Entry:
    """Returns the entry of a move that was made."""
    return replace(entry, settled=True)


def read(tags: Mapping[str, str], champion: str | None) -> list[Entry]:
    """Returns the entries among the tags of a registered model, the first move first.

    Tags of other forms are ignored. Where a server let two moves follow the same entry, the later
    is the one that others follow, or that the alias shows.

    Args:
        tags: Of the registered model.
        champion: The version that has the alias.
    """
    found = _parsed(tags)
    followed = {entry.after for entry in found.values()}
    lines = [_back(entry, found) for entry in found.values() if entry.key not in followed]
    lines.sort(key=lambda line: (len(line), line[-1].version == champion, line[-1].key))
    chain: list[Entry] = []
    for line in reversed(lines):
        placed = {entry.key for entry in chain}
        aside = [entry for entry in line if entry.key not in placed]
        if len(aside) < len(line):
            at = chain.index(line[-len(aside) - 1]) + 1
        else:  # a first move, or one whose predecessor somebody has deleted
            at = 0 if line[0].after is None else len(chain)
        chain[at:at] = aside
    return chain


def made(chain: Sequence[Entry], champion: str | None) -> list[Entry]:
    """Returns the entries whose move was made, as they say or as what follows shows."""
    then = [*(entry.before for entry in chain[1:]), champion]
    both = zip(chain, then, strict=True) if chain else ()
    return [entry for entry, version in both if entry.settled or entry.version == version]


def line(chain: Sequence[Entry], champion: str | None) -> list[str]:
    """Returns the champions in order, without those that a rollback took back.

    A rollback counts even if it is not known to have been made: whoever wanted it found the version
    before it bad.
    """
    versions: list[str] = []
    known = made(chain, champion)
    for entry in chain:
        if entry.how != "rollback" and entry not in known:
            continue
        if entry.before and versions[-1:] != [entry.before]:
            versions.append(entry.before)  # the alias was moved by other means
        while entry.how == "rollback" and versions and versions[-1] != entry.version:
            versions.pop()
        if versions[-1:] != [entry.version]:
            versions.append(entry.version)
    return versions


def _parsed(tags: Mapping[str, str]) -> dict[str, Entry]:
    """Returns the entries by key.

    An entry without `after` is of an earlier form, in which the time in the keys gave the order.
    """
    found: dict[str, Entry] = {}
    last = None
    for key in sorted(key for key in tags if key.startswith(TAG)):
        try:
            values = json.loads(tags[key])
        except (ValueError, RecursionError):
            continue
        if not isinstance(values, dict):
            continue
        older = "after" not in values
        links: dict[str, Any] = {"after": last, "settled": True} if older else {}
        told = {"before" if name == "from" else name: each for name, each in values.items()}
        if entry := _entry({**told, **links, "key": key}):
            found[key] = entry
            last = key if older else last
    return found


def _entry(values: dict[str, Any]) -> Entry | None:
    """Returns the entry with these values, or None if they are none of ours."""
    try:
        entry = Entry(**values)
    except TypeError:
        return None
    texts = (entry.version, entry.how, entry.who, entry.time, entry.reason)
    links = (entry.after, entry.before)
    sound = (
        all(isinstance(value, str) for value in texts)
        and all(value is None or isinstance(value, str) for value in links)
        and isinstance(entry.settled, bool)
    )
    return entry if sound else None


def _back(entry: Entry, found: Mapping[str, Entry]) -> list[Entry]:
    """Returns the entries that lead to one, in order, and the entry itself."""
    way = [entry]
    while (before := found.get(way[-1].after or "")) and before not in way:
        way.append(before)
    return way[::-1]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())
