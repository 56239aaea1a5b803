"""Fixtures of the numerical tests and of MLflow's; Keras is imported only where it is used."""

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minigpt.common import backend

NUMBERS = itertools.count()

backend.choose()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# Compiling takes JAX longer than running anything as small as what the tests run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the pipeline's tests first, so that one worker of several makes the pipeline they copy.

    The others begin with tests that need none, and wait for nothing.
    """
    items.sort(key=lambda item: "pipeline" not in item.keywords)


@pytest.fixture(scope="session")
def gradients() -> Callable[..., list[np.ndarray]]:
    """Computes the gradients of a scalar function of arrays, in float32, on any backend."""
    import keras
    from keras import ops

    def gradients(function: Callable[..., Any], *arrays: Any) -> list[np.ndarray]:
        tensors = [ops.convert_to_tensor(array) for array in arrays]
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = function(*tensors)
            zero = tf.UnconnectedGradients.ZERO
            found = tape.gradient(value, tensors, unconnected_gradients=zero)
            found = [tf.convert_to_tensor(gradient) for gradient in found]
        elif keras.backend.backend() == "jax":
            import jax

            every = tuple(range(len(tensors)))
            found = jax.jit(jax.grad(function, argnums=every))(*tensors)
        else:
            import torch

            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
            found = torch.autograd.grad(function(*tensors), tensors, materialize_grads=True)
        return [ops.convert_to_numpy(ops.cast(gradient, "float32")) for gradient in found]

    return gradients


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Any]:
    """Compiles a function as a whole on JAX, which otherwise compiles each operation alone."""
    import keras

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        if keras.backend.backend() != "jax":
            return function
        import jax

        return jax.jit(function)

    return compiled


@pytest.fixture(scope="session")
def make_network() -> Callable[..., Any]:
    """Makes a tiny MiniGPT whose weights are random, and large enough to spread the logits."""
    from minigpt.config import ModelConfig
    from minigpt.model.network import MiniGPT

    def make(seed: int = 0, dtype: str = "float32", **changes: Any) -> MiniGPT:
        settings = {
            "vocabulary_size": 60,
            "context_length": 20,
            "embed_dim": 16,
            "num_blocks": 2,
            "num_heads": 2,
            "key_dim": 8,
            "feed_forward_dim": 24,
            "dropout": 0.1,
            "tied_embeddings": False,
            "dtype_policy": dtype,
        }
        network = MiniGPT(ModelConfig(**{**settings, **changes}))
        rng = np.random.default_rng(seed)
        for weight in network.trainable_variables:
            around = 1 if weight.name == "gamma" else 0
            weight.assign(rng.normal(around, 0.5, weight.shape))
        return network

    return make


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No settings of MLflow and DVC from outside, and none left behind."""
    import mlflow

    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DVC_")):
            monkeypatch.delenv(name)
    # Set and deleted, so that what the tracker and MLflow set themselves is undone too.
    for name in ("TRACKING_URI", "HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")
        monkeypatch.delenv(f"MLFLOW_{name}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "WARNING")  # as the stages do
    yield
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A new database of MLflow, to copy: it takes seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{path}")
    return path.read_bytes()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: bytes) -> str:
    """The address of a store with the experiment `minigpt`: to open one takes MLflow a while."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "mlflow.db").write_bytes(empty_store)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.create_experiment("minigpt", artifact_location=(folder / "mlartifacts").as_uri())
    return str(client.tracking_uri)


@pytest.fixture
def name(store: str) -> str:
    """A registered model of the test's own in the shared store."""
    from mlflow import MlflowClient

    name = f"mini{next(NUMBERS)}"
    MlflowClient(store).create_registered_model(name)
    return name
