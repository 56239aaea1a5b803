"""The alias @champion of a registered model: who moved it, when and why.

The history is kept in MLflow, where every machine sees it: one tag of the registered model for each
move, under a key of its own, so that no entry can overwrite another.

An alias is one version at any time, so two moves at once leave one champion. On a sqlite file a
lock makes one follow the other. A server offers no way to compare and set: the later write wins,
both moves have their entry, and whoever finds another champion after their own write is told so.
"""

import getpass
import json
import os
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from mlflow.exceptions import MlflowException

from minigpt.common.errors import InputError
from minigpt.common.redaction import redact
from minigpt.tracking.store import lock, open_store

ALIAS = "champion"
ENTRY = "minigpt.champion."
LONGEST_REASON = 1000  # characters; MLflow's column for the whole entry has 5000


class State(NamedTuple):
    """The champion and its history.

    Attributes:
        version: Of the champion; None if there is none.
        history: The moves, the oldest first. Each has time (UTC), version, from (None if there was
            no champion), how (gate, promote or rollback), who (the user on that machine) and
            reason.
    """

    version: str | None
    history: list[dict[str, str | None]]

    def before_the_gate(self, version: str) -> str | None:
        """Returns the champion that a version was compared with, if the gate's record is lost.

        A registration that was interrupted may have made the version the champion since, with or
        without the entry of that move.
        """
        if self.version != version:
            return self.version
        last = self.history[-1] if self.history else {}
        if last.get("version") == version:
            return last["from"] if last["how"] == "gate" else version
        line = _line(self.history)
        return line[-1] if line else None


def state(uri: str, name: str) -> State:
    """Reads the champion of a registered model and the moves of the alias.

    Raises:
        InputError: MLflow has no such registered model, or can't be used.
    """
    with open_store(uri) as client:
        try:
            model = client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = ", ".join(found.name for found in client.search_registered_models()) or "none"
            raise InputError(
                f"MLflow at {redact(uri)} has no registered model {name!r}; there are: {known}"
            ) from None
    keys = sorted(key for key in model.tags if key.startswith(ENTRY))
    version = model.aliases.get(ALIAS)
    return State(version and str(version), [json.loads(model.tags[key]) for key in keys])


def move(uri: str, name: str, version: str, *, how: str, reason: str, expected: str | None) -> bool:
    """Makes a version the champion if the champion is still the expected one.

    If the version is the champion already, it only adds the entry that an interrupted move left
    out.

    Args:
        uri: The address of the store.
        name: Of the registered model.
        version: The new champion.
        how: gate, promote or rollback.
        reason: For the history.
        expected: The champion when the decision was made; None if there was none.

    Returns:
        Whether the version is the champion now; if not, nothing was changed.

    Raises:
        InputError: The reason is empty or too long, MLflow can't be used, or another move came in
            between on a server.
    """
    reason = " ".join(reason.split())
    if not 0 < len(reason) <= LONGEST_REASON:
        raise InputError(
            f"the reason has {len(reason)} characters: 1 to {LONGEST_REASON} are allowed; say why"
        )
    with lock(uri), open_store(uri) as client:
        before, entries = state(uri, name)
        if before != expected:
            return False
        if before == version:
            line = _line(entries)
            if line and line[-1] == version:
                return True
            before = line[-1] if line else None
        else:
            client.set_registered_model_alias(name, ALIAS, version)
        # After the alias: a rollback must not lead to a version that never was the champion.
        time = datetime.now(UTC).isoformat(timespec="microseconds")
        entry = {"time": time, "version": version, "from": before, "how": how, "who": _user()}
        key = f"{ENTRY}{time.removesuffix('+00:00')}.{uuid.uuid4().hex[:8]}"
        text = json.dumps({**entry, "reason": reason}, ensure_ascii=False)
        client.set_registered_model_tag(name, key, text)
        after = state(uri, name).version
    if after != version:
        raise InputError(
            f"version {version} was the champion only for a moment: version {after} was promoted "
            "at the same time; see `minigpt history`"
        )
    return True


def promote(uri: str, name: str, version: str, *, reason: str) -> str | None:
    """Makes a version the champion by hand.

    Returns:
        The champion before; None if there was none.

    Raises:
        InputError: There is no such version, it is the champion already, or `move` fails.
    """
    before, known = state(uri, name).version, _versions(uri, name)
    if version not in known:
        there = ", ".join(sorted(known, key=int)) or "none"
        raise InputError(f"{name} has no version {version}; there are: {there}")
    if version == before:
        raise InputError(f"version {version} of {name} is the champion already")
    _move_by_hand(uri, name, version, how="promote", reason=reason, expected=before)
    return before


def rollback(uri: str, name: str, *, reason: str) -> tuple[str, str | None]:
    """Makes the previous champion the champion again.

    A second rollback goes one champion further back, not forth again. Versions that were deleted
    since are skipped.

    Returns:
        The new champion, and the one before.

    Raises:
        InputError: The history has no previous champion, or `move` fails.
    """
    before, history = state(uri, name)
    there = _versions(uri, name) - {before}
    earlier = [version for version in _line(history) if version in there]
    if not earlier:
        now = f"version {before}" if before else "none"
        raise InputError(f"{name} has no champion to go back to (now: {now}); `minigpt history`")
    _move_by_hand(uri, name, earlier[-1], how="rollback", reason=reason, expected=before)
    return earlier[-1], before


def _move_by_hand(uri: str, name: str, version: str, **how: Any) -> None:
    if not move(uri, name, version, **how):
        raise InputError(
            f"the champion of {name} was moved at the same time, to version "
            f"{state(uri, name).version}; see `minigpt history`, then decide again"
        )


def _versions(uri: str, name: str) -> set[str]:
    with open_store(uri) as client:
        return {str(found.version) for found in client.search_model_versions(f"name = '{name}'")}


def _line(entries: Sequence[dict[str, str | None]]) -> list[str]:
    """Returns the champions in order, without those that a rollback took back."""
    line: list[str] = []
    for entry in entries:
        if entry["from"] and line[-1:] != [entry["from"]]:
            line.append(entry["from"])  # the alias was moved by other means
        while entry["how"] == "rollback" and line and line[-1] != entry["version"]:
            line.pop()
        if line[-1:] != [entry["version"]]:
            line.append(str(entry["version"]))
    return line


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())
