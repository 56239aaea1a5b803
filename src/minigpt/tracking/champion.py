"""The alias @champion of a registered model: who moved it, when and why.

The history is kept in MLflow, where every machine sees it: one tag of the registered model for each
move, under a key of its own, so that no entry can overwrite another.

An alias of MLflow is one version at any time; two moves at once leave one champion.  On a sqlite
file they follow each other under a lock.  A server has nothing to compare and set with: there the
later write stands, both have their entry, and who finds another's after its own write is told so.
"""

import contextlib
import getpass
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils
from sqlalchemy.exc import SQLAlchemyError

from minigpt.common.errors import InputError
from minigpt.tracking.mirror import SQLITE, alone, redact

ALIAS = "champion"
ENTRY = "minigpt.champion."
LONGEST_REASON = 1000  # characters; MLflow's column for the whole entry has 5000


@contextlib.contextmanager
def store(uri: str) -> Iterator[MlflowClient]:
    """A client of MLflow, whose errors are told in one line.

    Raises:
        InputError: there is no store at this address, or it can't be used.
    """
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        raise InputError(
            f"there is no MLflow store at {redact(uri)}; run `dvc repro`, go to the project's "
            "folder, or set MLFLOW_TRACKING_URI"
        )
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default, 7, is 4 minutes
    utils.MAX_RETRY_COUNT = 1
    try:
        yield MlflowClient(uri)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = redact(str(error).strip().split("\n")[0])[:500]
        raise InputError(f"MLflow at {redact(uri)} can't be used: {reason}") from error


class State(NamedTuple):
    """The champion and how it came there.

    Attributes:
        version: the champion's; None where there is none.
        history: the moves, the oldest first, each with time (UTC), version, from (None: there was
            none), how (gate, promote or rollback), who (the user on that machine) and reason.
    """

    version: str | None
    history: list[dict[str, str | None]]

    def before_the_gate(self, version: str) -> str | None:
        """The champion that a version met, which the gate may have put in its place since.

        Args:
            version: of which no more is known than these moves, the last perhaps without its entry.
        """
        if self.version != version:
            return self.version
        last = self.history[-1] if self.history else {}
        if last.get("version") == version:
            return last["from"] if last["how"] == "gate" else version
        line = _line(self.history)
        return line[-1] if line else None


def state(uri: str, name: str) -> State:
    """Reads the champion of a registered model, and the moves of the alias.

    Raises:
        InputError: MLflow has no such registered model, or can't be used.
    """
    with store(uri) as client:
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
    """Makes a version the champion, if the champion is still the one that is expected.

    Where the version is the champion already, only an entry that an interrupted move left out is
    added.

    Args:
        uri: of the store.
        name: the registered model's.
        version: the new champion.
        how: gate, promote or rollback.
        reason: for the history.
        expected: the champion at the time of the decision; None: there was none.

    Returns:
        False where the champion is another by now; nothing is changed then.

    Raises:
        InputError: the reason is empty or too long, MLflow can't be used, or another move came in
            between on a server.
    """
    reason = " ".join(reason.split())
    if not 0 < len(reason) <= LONGEST_REASON:
        raise InputError(
            f"the reason has {len(reason)} characters: 1 to {LONGEST_REASON} are allowed; say why"
        )
    with alone(uri), store(uri) as client:
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
    """Makes a version the champion, by hand.

    Returns:
        The champion before; None where there was none.

    Raises:
        InputError: there is no such version, it is the champion already, or as `move` says.
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
    """Makes the champion before the present one the champion again.

    A second rollback goes one further back, not forth again.  A version that was deleted since is
    passed over.

    Returns:
        The new champion, and the one before.

    Raises:
        InputError: the history has no champion before, or as `move` says.
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
    with store(uri) as client:
        return {str(found.version) for found in client.search_model_versions(f"name = '{name}'")}


def _line(entries: Sequence[dict[str, str | None]]) -> list[str]:
    """The champions one after the other, without those that a rollback took back."""
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
