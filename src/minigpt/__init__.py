"""A DVC pipeline that trains, compares and ships the Keras miniature GPT."""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NETWORK = "minigpt.model.network"


class _KerasFinder(PathFinder):
    """Imports the network right after Keras, so that Keras can open an exported .keras file.

    Keras builds only classes that are registered with it, and it imports no module but its own to
    find them. To import Keras here would cost every command some seconds.
    """

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, path, target) if fullname == "keras" else None
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_both(module: ModuleType) -> None:
                load(module)
                importlib.import_module(_NETWORK)

            spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec


if "keras" in sys.modules:
    importlib.import_module(_NETWORK)
else:
    sys.meta_path.insert(0, _KerasFinder)
