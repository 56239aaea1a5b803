"""The command `minigpt`: texts, a server, the champion, retraining, searching, exporting."""

import argparse
import atexit
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from minigpt import config
from minigpt.common import backend, paths
from minigpt.common.errors import InputError
from minigpt.common.validation import allowed

NEW_TOKENS = 80  # without a project whose configuration says how many
COLUMNS = ("time", "version", "from", "how", "who", "reason")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: None: those of the command line; the process then ends here.

    Returns:
        The exit code: 2 for what the user has to fix.
    """
    code = _run(arguments)
    if arguments is not None:
        return code
    # Python would unwind a thread that is still in TensorFlow, which aborts the process.
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):  # of `| head`
        sys.stdout.flush()
    os._exit(code)


def _run(arguments: list[str] | None) -> int:
    given = _parser().parse_args(arguments)
    # Libraries read their settings while they are imported, so each command imports its own.
    backend.quiet()
    try:
        code: int = given.run(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nerror: {given.command}: interrupted", file=sys.stderr)
        return 130
    return code


def _promote(given: argparse.Namespace) -> int:
    from minigpt.tracking import champion

    name, uri = _model(given)
    before = champion.promote(uri, name, given.version, reason=given.reason)
    return _moved(name, given.version, before)


def _rollback(given: argparse.Namespace) -> int:
    from minigpt.tracking import champion

    name, uri = _model(given)
    return _moved(name, *champion.rollback(uri, name, reason=given.reason))


def _history(given: argparse.Namespace) -> int:
    from minigpt.tracking import champion

    name, uri = _model(given)
    now, entries = champion.state(uri, name)
    print(f"@champion of {name} is {_version(now)}")
    if entries:
        rows = [COLUMNS, *(tuple(entry[key] or "-" for key in COLUMNS) for entry in entries[::-1])]
        rows = [(row[0][:19].replace("T", " "), *row[1:]) for row in rows]
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]] + [0]
        print("\n".join("  ".join(map(str.ljust, row, widths)) for row in rows))
    return 0


def _search(given: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        from minigpt.retraining.search import search
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise InputError(f"{error}; install it: pip install -e .[search]") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = search(
        Path.cwd(),
        given.space,
        given.name,
        trials=given.trials,
        jobs=given.jobs,
        fixed=given.set_param,
    )
    print(found)
    return 0


def _retrain(given: argparse.Namespace) -> int:
    backend.choose()
    from minigpt.retraining import run

    return run.main()


def _generate(given: argparse.Namespace) -> int:
    backend.choose()
    with backend.importing("error: generate: interrupted"):
        from minigpt.serving import sources, terminal

    everything, name = _project()
    values = everything.sample.model_dump() if everything else {"max_tokens": NEW_TOKENS}
    wanted = {name: getattr(given, name) for name in config.SamplingConfig.model_fields}
    values |= {name: value for name, value in wanted.items() if value is not None}
    sampling = config.validate(
        config.SamplingConfig, {name: values[name] for name in wanted if name in values}
    )
    if (given.file is None) != (given.out is None):
        raise InputError("--file and --out go together")
    if given.file and given.prompt is not None:
        raise InputError("give either a prompt or --file")
    if given.n < 1:
        raise InputError(f"-n is {given.n}: allowed is 1 or more")
    if given.file is None and given.prompt is None:
        given.prompt = terminal.prompt_of_a_pipe()
    source = sources.source(given.model, name, Path.cwd())
    writer = terminal.Writer(source, sampling, terminal.SLOTS if given.file else given.n)
    with contextlib.suppress(BrokenPipeError):  # of `| head`
        if given.file:
            terminal.write_file(writer, given.file, given.n, given.out)
        else:
            terminal.write(writer, given.prompt, given.n, given.json)
    return 0


def _serve(given: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    backend.choose()
    with backend.importing("error: serve: interrupted"):
        from minigpt.serving import server, sources

    everything, name = _project()
    return server.serve(
        [sources.source(model, name, Path.cwd()) for model in given.model or [None]],
        given.host,
        given.port,
        given.allow_host,
        everything.serving if everything else config.ServingConfig(),
        everything.tracking.request if everything else config.RequestConfig(),
    )


def _export(given: argparse.Namespace) -> int:
    backend.choose()
    with backend.importing("error: export: interrupted"):
        from minigpt.model import directory

    out = given.out or given.folder.with_name(f"{given.folder.resolve().name}.keras")
    try:
        directory.export(given.folder, out)
    except directory.OlderFormat as error:
        raise InputError(
            f"{error}: `dvc repro` trains a new model, and `minigpt promote` makes a version the "
            "champion that the gate can't compare"
        ) from None
    print(f"{out}: open it with keras.saving.load_model after `import minigpt`")
    return 0


def _project() -> tuple[config.Config | None, str]:
    """The configuration, if there is a project here, and the name of the registered model."""
    if not paths.RESOLVED.exists():
        return None, "minigpt"
    everything = config.load()
    return everything, everything.tracking.model_name


def _model(given: argparse.Namespace) -> tuple[str, str]:
    """The name of the registered model, and the store's address."""
    from minigpt.tracking import store

    return given.model or config.load().tracking.model_name, store.tracking_uri(Path.cwd())


def _moved(name: str, now: str, before: str | None) -> int:
    print(f"version {now} of {name} is @champion; before it was {_version(before)}")
    return 0


def _version(number: str | None) -> str:
    return f"version {number}" if number else "no version"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("minigpt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    promote = commands.add_parser("promote", help="make a version the champion")
    promote.add_argument("version", metavar="VERSION", help="its number in the registry")
    promote.set_defaults(run=_promote)
    rollback = commands.add_parser("rollback", help="make the previous champion the champion again")
    rollback.set_defaults(run=_rollback)
    history = commands.add_parser("history", help="list the moves, the newest first (times in UTC)")
    history.set_defaults(run=_history)
    for command in (promote, rollback):
        command.add_argument("--reason", required=True, help="why; it is kept in the history")
    for command in (promote, rollback, history):
        command.add_argument(
            "--model", help="name of the registered model (default: that of resolved.yaml)"
        )

    search = commands.add_parser("search", help="a Bayesian search over the configuration")
    search.add_argument("name", metavar="NAME", help="the same name continues the same search")
    search.add_argument("--trials", type=int, default=20, help="in all (default: 20)")
    search.add_argument("--jobs", type=int, default=1, help="trials at once here (default: 1)")
    search.add_argument(
        "--space", type=Path, default=config.CONF / "search.yaml", help="what to vary"
    )
    search.add_argument(
        "-S", "--set-param", action="append", default=[], help="a setting of every trial"
    )
    search.set_defaults(run=_search)

    retrain = commands.add_parser("retrain", help="pull, reproduce, report and push, as CI does")
    retrain.set_defaults(run=_retrain)

    generate = commands.add_parser("generate", help="write texts to the terminal, or to a file")
    generate.add_argument("prompt", nargs="?", help="default: what is piped in")
    generate.add_argument(
        "--model",
        metavar="MODEL",
        help="a model directory, models:/NAME/NUMBER or models:/NAME@ALIAS (default: the champion)",
    )
    generate.add_argument("--file", type=Path, help="a prompt on each line")
    generate.add_argument("--out", type=Path, help="JSON lines, which texts are appended to")
    generate.add_argument("-n", type=int, default=1, help="texts for each prompt (default: 1)")
    generate.add_argument("--json", action="store_true", help="print JSON lines")
    for name, field in config.SamplingConfig.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            generate.add_argument(option, action="store_true", default=None, help=field.description)
        else:
            kind: Any = field.annotation
            told = f"{field.description} ({allowed(field)})"
            generate.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=told)
    generate.set_defaults(run=_generate)

    serve = commands.add_parser("serve", help="serve models over HTTP, as OpenAI's completions")
    serve.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="a model directory, models:/NAME/NUMBER or models:/NAME@ALIAS, which is followed; "
        "may repeat (default: the champion)",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which a proxy asks; may repeat",
    )
    serve.set_defaults(run=_serve)

    export = commands.add_parser("export", help="write a model directory as a .keras file")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="such as model/")
    export.add_argument("--out", metavar="FILE", type=Path, help="default: FOLDER.keras")
    export.set_defaults(run=_export)
    return parser


if __name__ == "__main__":
    sys.exit(main())
