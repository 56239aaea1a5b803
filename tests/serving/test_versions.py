"""A version of the registered model, loaded where there is nothing but what it lists."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tracked import CONFIG

from minigpt.tracking import version

pytestmark = pytest.mark.slow

# Modules of installed packages that the requirements don't lead to are refused, as in an
# environment without them.
ALONE = """
import importlib.metadata, json, re, sys
from pathlib import Path
from packaging.requirements import Requirement

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

folder = Path(sys.argv[1])
waiting = (folder / "requirements.txt").read_text().split()
listed = set()
while waiting:
    name = plain(Requirement(waiting.pop()).name)
    if name in listed:
        continue
    listed.add(name)
    try:
        needed = map(Requirement, importlib.metadata.requires(name) or [])
    except importlib.metadata.PackageNotFoundError:
        continue
    waiting += [str(each) for each in needed
                if each.marker is None or each.marker.evaluate({"extra": ""})]
packages = importlib.metadata.packages_distributions()

class Nothing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        owners = {plain(owner) for owner in packages.get(top, [])} - {"minigpt"}
        if owners and not owners & listed:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)

sys.meta_path.insert(0, Nothing)
try:
    import hydra
except ModuleNotFoundError:
    pass
import mlflow
model = mlflow.pyfunc.load_model(str(folder))
import minigpt
text = model.predict([{"prompt": "this movie"}], params={"max_tokens": 5})[0]
pieces = list(model.predict_stream({"prompt": "this movie"}, params={"max_tokens": 5}))
print(json.dumps([minigpt.__file__, "hydra" in sys.modules, text, pieces]))
"""


def test_a_version_needs_only_what_it_lists(model_directory: Path, tmp_path: Path) -> None:
    from minigpt.model import directory

    folder = tmp_path / "version"
    version.build(folder, model_directory, directory.digest(model_directory), ["this"], CONFIG)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    code, has_more, text, pieces = json.loads(done.stdout.splitlines()[-1])
    assert Path(code).is_relative_to(folder) and not has_more
    assert text.startswith("This movie ") and len(pieces) > 1 and "".join(pieces) == text
