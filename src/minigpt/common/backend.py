"""What Keras and TensorFlow read from the environment while they are imported."""

import contextlib
import os
import platform
import sys
from collections.abc import Iterator

ONEDNN = "TF_ENABLE_ONEDNN_OPTS"


def choose() -> None:
    """Chooses the backend and its kernels for this machine, before Keras is imported.

    TensorFlow, unless KERAS_BACKEND names another; and oneDNN's matrix products, unless
    TF_ENABLE_ONEDNN_OPTS is set.  TensorFlow itself leaves oneDNN off on a processor without
    AVX-512, where a training step takes a quarter less time with it (benchmarks/README.md).
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if platform.machine() == "x86_64":  # not measured on others
        os.environ.setdefault(ONEDNN, "1")


@contextlib.contextmanager
def without_the_unused() -> Iterator[None]:
    """Keras and TensorFlow import these too where they are installed, for parts that no stage uses.

    They take a quarter of the time of loading a stage (9.1 s with them, 6.7 without), and 180 MB.
    """
    unused = {"PIL", "jax", "matplotlib", "sklearn"} - {os.environ["KERAS_BACKEND"]}
    unused -= sys.modules.keys()
    sys.modules.update(dict.fromkeys(unused))  # type: ignore[arg-type] # None: not to be found
    try:
        yield
    finally:
        for name in unused:
            del sys.modules[name]
