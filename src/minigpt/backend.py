"""What Keras and TensorFlow read from the environment while they are imported."""

import os
import platform

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
