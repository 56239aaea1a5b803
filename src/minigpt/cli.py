"""The command `minigpt`: moves the alias @champion by hand, lists who moved it, and searches."""

import argparse
import logging
import os
import sys
from pathlib import Path

from minigpt import config
from minigpt.common.errors import InputError

COLUMNS = ("time", "version", "from", "how", "who", "reason")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: those of the command line, where they are not given.

    Returns:
        The exit code: 2 for what can't be done.
    """
    given = _parser().parse_args(arguments)
    try:
        if given.command == "search":
            print(_search(given))
            return 0
        name = given.model or config.load().tracking.model_name
        print(_run(name, given))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(name: str, given: argparse.Namespace) -> str:
    # MLflow reads these while it is imported, which takes seconds: not for --help.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from minigpt.tracking import champion, mirror

    uri = mirror.tracking_uri(Path.cwd())
    if given.command == "history":
        return _table(name, *champion.state(uri, name))
    if given.command == "promote":
        now, before = given.version, champion.promote(uri, name, given.version, reason=given.reason)
    else:
        now, before = champion.rollback(uri, name, reason=given.reason)
    return f"version {now} of {name} is @champion; before it was {_version(before)}"


def _search(given: argparse.Namespace) -> str:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from minigpt.retraining.search import search
    except ModuleNotFoundError as error:
        raise InputError(f"{error}; install it: pip install -e .[search]") from None
    return search(Path.cwd(), given.space, given.name, given.trials, given.set_param)


def _table(name: str, now: str | None, entries: list[dict[str, str | None]]) -> str:
    rows = [COLUMNS, *(tuple(entry[key] or "-" for key in COLUMNS) for entry in entries[::-1])]
    rows = [(row[0][:19].replace("T", " "), *row[1:]) for row in rows]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]] + [0]
    lines = ["  ".join(map(str.ljust, row, widths)) for row in rows]
    return "\n".join([f"@champion of {name} is {_version(now)}", *(lines if entries else [])])


def _version(number: str | None) -> str:
    return f"version {number}" if number else "no version"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("minigpt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    promote = commands.add_parser("promote", help="make a version the champion")
    promote.add_argument("version", metavar="VERSION", help="its number in the registry")
    rollback = commands.add_parser("rollback", help="make the champion before this one it again")
    history = commands.add_parser("history", help="list the moves, the newest first (times in UTC)")
    search = commands.add_parser("search", help="a Bayesian search over the configuration")
    search.add_argument("name", metavar="NAME", help="the same name goes on with the same search")
    search.add_argument("--trials", type=int, default=20, help="in all (default: 20)")
    search.add_argument(
        "--space", type=Path, default=config.CONF / "search.yaml", help="what to vary"
    )
    search.add_argument(
        "-S", "--set-param", action="append", default=[], help="a setting of every trial"
    )
    for command in (promote, rollback):
        command.add_argument("--reason", required=True, help="why; it is kept in the history")
    for command in (promote, rollback, history):
        command.add_argument(
            "--model", help="name of the registered model (default: that of resolved.yaml)"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
