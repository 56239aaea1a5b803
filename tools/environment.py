"""Makes .venv from requirements.lock; `make setup` runs this file with the Python to use.

`make ray` runs it with another lock file, whose packages are added.

Everything that is missing is named before anything is installed. The standard library is all there
is at this point.
"""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
VENV = PROJECT / ".venv"
PYTHON = str(VENV / "bin" / "python")
PIP = [PYTHON, "-m", "pip", "--disable-pip-version-check"]
PIP_INSTALL = [*PIP, "install", "--quiet"]
UV_ITSELF = ["--only-binary=:all:", "--require-hashes", "-r", "requirements-uv.lock"]
LOCKED = ["--require-hashes", "-r"]
LOCK = "requirements.lock"
THIS_PROJECT = ["--no-deps", "--no-build-isolation", "-e", "."]
DISK_BYTES = 4_500_000_000
# uv reads none of pip's settings. These are handed over under uv's names, with uv's separator.
UV_SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "proxy": ("ALL_PROXY", " "),
}


def main(added: Sequence[str] = ()) -> int:
    """Makes the environment, or adds the packages of other lock files to it.

    Returns:
        The exit code: 2 when something is missing.
    """
    for lock in added:
        print(f"Adding the packages of {lock} to .venv", flush=True)
        if not _install_with_uv(lock) and not _run([*PIP_INSTALL, *LOCKED, lock]):
            return 2
    if added:
        return 0
    problems = list(missing())
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    print("Installing the locked packages into .venv (4 GB)", flush=True)
    if _make_venv() and _run([*PIP_INSTALL, *UV_ITSELF]) and _install_with_uv(LOCK):
        return 0
    print("uv can't install here (see above): pip does it, in about 3 minutes", flush=True)
    return 0 if _install_with_pip() else 2


def missing() -> Iterator[str]:
    """Yields one line for each thing that must be put right first."""
    if not shutil.which("git"):
        yield "git is missing: DVC needs it to run and compare experiments; install git"
    else:
        command = ["git", "cat-file", "-e", "HEAD:./dvc.yaml"]
        git = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
        if git.returncode:
            reason = git.stderr.strip().splitlines()[0]
            yield (
                f"no commit of this project ({reason}): DVC runs experiments from commits; "
                "use a clone, or git init && git add . && git commit -m start"
            )
    if VENV.is_symlink():
        yield f"{VENV} is a link to {VENV.resolve()}, which would be emptied: remove the link"
    if not importlib.util.find_spec("ensurepip"):
        yield f"{sys.executable} can't make environments: install python3-venv"
    free = shutil.disk_usage(PROJECT).free
    if free < DISK_BYTES and not (VENV / ".done").exists():  # else it replaces one of its size
        yield f"{free / 1e9:.1f} GB are free on this disk: {DISK_BYTES / 1e9:.1f} GB are needed"
    unusable = {letter for letter in str(PROJECT) if letter in "#?%:{}" or not " " <= letter <= "~"}
    if refused := sorted(unusable):
        yield (
            f"the project's path {PROJECT} holds {' '.join(map(_shown, refused))}: DVC can't run "
            "experiments there; move it to a path of ASCII characters without # ? % : { }"
        )


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)


def uv_environment(listed: str) -> dict[str, str]:
    """Returns the variables that tell uv what pip's settings tell pip.

    Args:
        listed: What `pip config list` prints: lines such as `global.index-url='...'`.
    """
    found = {}
    lines = [line.partition("=") for line in listed.splitlines()]
    for section in ("global", "install", ":env:"):  # each overrides those before it
        for name, _, value in lines:
            group, _, key = name.rpartition(".")
            if group == section and key in UV_SETTINGS:
                variable, separator = UV_SETTINGS[key]
                found[variable] = separator.join(ast.literal_eval(value).split())
    return found


def _install_with_uv(lock: str) -> bool:
    if not (VENV / "bin" / "uv").exists():  # pip made this environment
        return False
    settings = subprocess.run([*PIP, "config", "list"], stdout=subprocess.PIPE, text=True)
    environment = os.environ | uv_environment(settings.stdout)
    uv = [str(VENV / "bin" / "uv"), "pip", "install", "--quiet", "--python", PYTHON]
    # Like pip: compile byte code, and take each package from whichever index has it.
    like_pip = ["--compile-bytecode", "--index-strategy", "unsafe-best-match"]
    locked = [*like_pip, *LOCKED, lock]
    return all(_run([*uv, *arguments], environment) for arguments in (locked, THIS_PROJECT))


def _install_with_pip() -> bool:
    return _make_venv() and all(
        _run([*PIP_INSTALL, *arguments]) for arguments in ([*LOCKED, LOCK], THIS_PROJECT)
    )


def _make_venv() -> bool:
    return _run([sys.executable, "-m", "venv", "--clear", str(VENV)])


def _run(command: list[str], environment: Mapping[str, str] = os.environ) -> bool:
    return not subprocess.run(command, cwd=PROJECT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
