"""Errors the user can fix."""

import os
from pathlib import Path


class InputError(Exception):
    """Bad input or configuration; its message says what is wrong, where, and what to do next.

    Commands and stages print the message without a traceback and exit with code 2.
    """


def missing(key: str, path: Path) -> InputError:
    """Returns the error for a path in the configuration that does not exist.

    Args:
        key: The key of the configuration that names the path.
        path: The path as it stands there.
    """
    message = f"{key}: there is no such file or folder: {path}"
    if os.environ.get("DVC_EXP_NAME") and not path.is_absolute():
        message += (
            ". Experiments run in a copy of the project that holds only tracked files: `dvc add` "
            "it, or give an absolute path"
        )
    return InputError(message + ".")
