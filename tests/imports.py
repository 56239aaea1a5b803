"""Which of our own modules import which, read from their source."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
MODULES = {
    ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): file
    for file in SRC.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """Our own modules that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in MODULES}


def with_everything_imported(*modules: str, but: str = "") -> set[str]:
    """Modules and all that they import, directly or not, but through a package that is left out.

    The package itself imports the network only where Keras is loaded, for exported files.
    """
    waiting, seen = list(modules), set[str]()
    while waiting:
        module = waiting.pop()
        if module not in seen and not (but and f"{module}.".startswith(f"{but}.")):
            seen.add(module)
            waiting += imports(module) if module != "minigpt" else []
            waiting += [module.rpartition(".")[0]] if "." in module else []
    return seen
