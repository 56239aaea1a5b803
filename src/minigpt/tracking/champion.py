"""The alias @champion of a registered model: who moved it, when and why.

A move is decided, made and recorded under a lock where the store is a sqlite file. A server has no
lock, and no way to compare and set: whoever writes there reads again before and after the alias is
moved, and withdraws if somebody else came in between.
"""

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from minigpt.common.errors import InputError
from minigpt.common.redaction import redact
from minigpt.tracking import history
from minigpt.tracking.store import FAILURES, lock, open_store, reason_of, sqlite_path

T = TypeVar("T")

ALIAS = "champion"
LONGEST_REASON = 1000  # characters; MLflow's column for the whole entry has 5000
ATTEMPTS = 5
UNDER_WAY_S = 3  # how long another move on a server may take from its entry to the alias


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

        A registration that was interrupted may have made the version the champion since.
        """
        last = self.history[-1] if self.history else {}
        decided = (last.get("version"), last.get("how")) == (version, "gate")
        return last["from"] if decided and self.version == version else self.version


class _Now(NamedTuple):
    """What a store says: the champion, and all entries of the history."""

    version: str | None
    chain: Sequence[history.Entry]

    @property
    def unfinished(self) -> history.Entry | None:
        """The last entry, if its move was made and is not settled."""
        last = self.chain[-1] if self.chain else None
        return last if last and not last.settled and last.version == self.version else None


class _CrossedError(Exception):
    """Another move came in between, and nothing was changed."""


def state(uri: str, name: str) -> State:
    """Reads the champion of a registered model and the moves of the alias.

    Raises:
        InputError: MLflow has no such registered model, or can't be used.
    """
    with open_store(uri) as client:
        now = _read(client, uri, name)
    moves = history.made(now.chain, now.version)
    return State(now.version, [entry.shown() for entry in moves])


def move(uri: str, name: str, version: str, *, how: str, reason: str, expected: str | None) -> bool:
    """Makes a version the champion if the champion is still the expected one.

    If the version is the champion already, it only settles an interrupted move.

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
    reason = _checked(reason)

    def decide(client: MlflowClient, now: _Now) -> bool:
        if now.version != expected:
            return False
        if version != now.version:
            _make(client, uri, name, now, version, how, reason)
        elif now.unfinished:
            _settle(client, name, now.unfinished)
        return True

    try:
        return _in_turn(uri, name, decide)
    except _CrossedError:
        return False


def promote(uri: str, name: str, version: str, *, reason: str) -> str | None:
    """Makes a version the champion by hand.

    Returns:
        The champion before; None if there was none.

    Raises:
        InputError: There is no such version, it is the champion already, or `move` fails.
    """
    reason = _checked(reason)

    def decide(client: MlflowClient, now: _Now) -> str | None:
        known, last = _versions(client, name), now.unfinished
        if version not in known:
            there = ", ".join(sorted(known, key=int)) or "none"
            raise InputError(f"{name} has no version {version}; there are: {there}")
        if last and (last.how, last.version) == ("promote", version):
            _settle(client, name, last)
            return last.before
        if version == now.version:
            raise InputError(f"version {version} of {name} is the champion already")
        _make(client, uri, name, now, version, "promote", reason)
        return now.version

    return _by_hand(uri, name, decide)


def rollback(uri: str, name: str, *, reason: str) -> tuple[str, str | None]:
    """Makes the previous champion the champion again.

    A second rollback goes one champion further back, not forth again. Versions that were deleted
    since are skipped. A rollback that was interrupted is finished, and goes no further.

    Returns:
        The new champion, and the one before.

    Raises:
        InputError: The history has no previous champion, or `move` fails.
    """
    reason = _checked(reason)

    def decide(client: MlflowClient, now: _Now) -> tuple[str, str | None]:
        last = now.unfinished
        if last and last.how == "rollback":
            _settle(client, name, last)
            return last.version, last.before
        there = _versions(client, name) - {now.version}
        line = history.line(now.chain, now.version)
        earlier = [version for version in line if version in there]
        if not earlier:
            is_now = f"version {now.version}" if now.version else "none"
            raise InputError(
                f"{name} has no champion to go back to (now: {is_now}); `minigpt history`"
            )
        _make(client, uri, name, now, earlier[-1], "rollback", reason)
        return earlier[-1], now.version

    return _by_hand(uri, name, decide)


def _by_hand(uri: str, name: str, decide: Callable[[MlflowClient, _Now], T]) -> T:
    try:
        return _in_turn(uri, name, decide)
    except _CrossedError:
        raise InputError(
            f"the champion of {name} was moved at the same time, to version "
            f"{state(uri, name).version}; see `minigpt history`, then decide again"
        ) from None


def _in_turn(uri: str, name: str, decide: Callable[[MlflowClient, _Now], T]) -> T:
    """Decides and makes a move while no other is made.

    On a server, moves that begin at the same time all withdraw. Each is tried again a moment later,
    unless another has been made meanwhile.
    """
    with open_store(uri) as client:
        _read(client, uri, name)  # to open a store takes longer than to move an alias in it
        with lock(uri):
            first = now = _at_rest(client, uri, name)
            for _ in range(ATTEMPTS):
                with contextlib.suppress(_CrossedError):
                    return decide(client, now)
                time.sleep(random.uniform(0, UNDER_WAY_S))
                now = _at_rest(client, uri, name)
                if now.version != first.version:
                    break
    raise _CrossedError


def _read(client: MlflowClient, uri: str, name: str) -> _Now:
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(found.name for found in client.search_registered_models()) or "none"
        raise InputError(
            f"MLflow at {redact(uri)} has no registered model {name!r}; there are: {known}"
        ) from None
    version = model.aliases.get(ALIAS)
    version = version and str(version)
    return _Now(version, history.read(model.tags, version))


def _at_rest(client: MlflowClient, uri: str, name: str) -> _Now:
    """Reads the store when no move is under way.

    Under the lock none is: an entry that is not settled is of a process that ended.
    """
    now, end = _read(client, uri, name), time.monotonic() + UNDER_WAY_S
    while (
        not sqlite_path(uri)
        and now.chain
        and not now.chain[-1].settled
        and now.chain[-1].version != now.version
        and time.monotonic() < end
    ):
        time.sleep(0.2)
        now = _read(client, uri, name)
    return now


def _make(
    client: MlflowClient, uri: str, name: str, now: _Now, version: str, how: str, reason: str
) -> None:
    """Moves the alias: first the entry, then the alias, then the entry again, as settled."""
    if now.unfinished:
        _settle(client, name, now.unfinished)
    entry = history.new(version, now.version, how, reason, now.chain)
    try:
        client.set_registered_model_tag(name, entry.key, entry.text())
        again = _read(client, uri, name)
        others = {other.key for other in again.chain} - {other.key for other in now.chain}
        if again.version != now.version or others != {entry.key}:
            client.delete_registered_model_tag(name, entry.key)
            raise _CrossedError
        client.set_registered_model_alias(name, ALIAS, version)
        after = _read(client, uri, name).version
    except FAILURES as error:
        raise InputError(
            f"MLflow at {redact(uri)} failed while version {version} was made the champion: "
            f"{reason_of(uri, error)}; the same command again makes the move or finishes it"
        ) from error
    if after != version:
        raise InputError(
            f"version {version} was the champion only for a moment: version {after} was promoted "
            "at the same time; see `minigpt history`"
        )
    _settle(client, name, entry)


def _settle(client: MlflowClient, name: str, entry: history.Entry) -> None:
    """Records that a move was made. It was, so a failure is none of the move."""
    with contextlib.suppress(*FAILURES):
        client.set_registered_model_tag(name, entry.key, history.settled(entry).text())


def _versions(client: MlflowClient, name: str) -> set[str]:
    return {str(found.version) for found in client.search_model_versions(f"name = '{name}'")}


def _checked(reason: str) -> str:
    reason = redact(" ".join(reason.split()))
    if not 0 < len(reason) <= LONGEST_REASON:
        raise InputError(
            f"the reason has {len(reason)} characters: 1 to {LONGEST_REASON} are allowed; say why"
        )
    return reason
