"""Where a model comes from: a model directory, or a version in the registry."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from minigpt.common.errors import InputError

_URI = re.compile(r"models:/+(?P<name>[^/@]+)(?:/(?P<number>\d+)|(?P<alias>@[A-Za-z0-9_-]+))")
CHAMPION = "@champion"


@dataclass(frozen=True)
class Found:
    """What a source holds at the moment.

    Attributes:
        answers_as: The name of the model in answers.
        version: Its number in the registry.
        figures: The figures it was registered with.
        created_s: When it was made, in Unix seconds.
    """

    answers_as: str
    version: str | None = None
    figures: dict[str, float] = field(default_factory=dict, compare=False)
    created_s: int = field(default=0, compare=False)


class Source(Protocol):
    """Where the versions of a model come from.

    Attributes:
        id: The name by which a request chooses the model.
        alias: The alias that is followed, with its @; None: nothing is followed.
    """

    id: str
    alias: str | None

    def find(self) -> Found:
        """Returns what there is now."""

    def fetch(self, found: Found, folder: Path) -> Path | None:
        """Returns its model directory, or None if it holds none; `folder` may take a copy."""


class Folder:
    """A model directory."""

    alias: str | None = None

    def __init__(self, path: Path) -> None:
        self.path, self.id = path, path.resolve().name

    def find(self) -> Found:
        """Returns what there is, without looking into it."""
        if not self.path.is_dir():
            raise InputError(
                f"--model {self.path}: there is no such folder; allowed are a model directory, "
                "models:/NAME/NUMBER and models:/NAME@ALIAS"
            )
        return Found(self.id, created_s=int(self.path.stat().st_mtime))

    def fetch(self, found: Found, folder: Path) -> Path:
        """Returns the folder itself."""
        return self.path


class Registry:
    """A version of a registered model, or an alias that is followed.

    Args:
        uri: The address of the store.
        name: The name of the registered model.
        wanted: A number, or an alias after an @.
    """

    def __init__(self, uri: str, name: str, wanted: str) -> None:
        self._uri, self._name, self._wanted = uri, name, wanted
        self.alias = wanted if wanted.startswith("@") else None
        rest = "" if wanted == CHAMPION else wanted if self.alias else f"/{wanted}"
        self.id = f"{name}{rest}"

    def find(self) -> Found:
        """Asks the registry; raises InputError where it can't be asked, or has none."""
        from minigpt.tracking import registry

        version = registry.find(self._uri, self._name, self._wanted)
        answers_as = f"{self._name}/{version.number}"
        return Found(answers_as, version.number, version.figures, version.created_s)

    def fetch(self, found: Found, folder: Path) -> Path | None:
        """Downloads the files of the version, and runs none of them."""
        from minigpt.tracking import registry

        assert found.version
        return registry.fetch(self._uri, self._name, found.version, folder)


def source(model: str | None, name: str, root: Path) -> Source:
    """Returns the source that `--model` names.

    Args:
        model: A folder, or models:/NAME/NUMBER, or models:/NAME@ALIAS; None: the champion.
        name: The registered model of the configuration.
        root: The project's folder.
    """
    if model is not None and not model.startswith("models:"):
        return Folder(Path(model))
    given = _URI.fullmatch(model or f"models:/{name}{CHAMPION}")
    if not given:
        raise InputError(
            f"--model {model}: allowed are a model directory, models:/NAME/NUMBER and "
            "models:/NAME@ALIAS"
        )
    from minigpt.tracking import store

    uri = store.tracking_uri(root)
    return Registry(uri, given["name"], given["number"] or given["alias"])
