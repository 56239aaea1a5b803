"""The network that a configuration describes, and the model that is compiled to train it."""

import keras

from minigpt.config import Config, TrainConfig
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.network import MiniGPT
from minigpt.training import fit, optimizers


def make_network(settings: Config, tokens: int) -> MiniGPT:
    """Makes the network of a configuration, with new weights.

    Args:
        settings: The configuration.
        tokens: Entries of the tokenizer; `model.vocabulary_size` may be larger.
    """
    chosen = settings.model
    policy: str = chosen.dtype_policy
    if policy == "auto":
        policy = optimizers.choose_dtype_policy()
    size = chosen.vocabulary_size or tokens
    keras.utils.set_random_seed(settings.train.seed)
    return MiniGPT(
        chosen.model_copy(update={"dtype_policy": policy, "vocabulary_size": size}), name="minigpt"
    )


def make_trainer(
    network: MiniGPT,
    tokenizer: Tokenizer,
    train: TrainConfig,
    steps: int,
    devices: int = 1,
) -> fit.LossModel:
    """Compiles a network with its loss and optimizer, for a training.

    Args:
        network: The network.
        tokenizer: The tokenizer, whose padding, [UNK] and separator the loss tells apart.
        train: The section `train`.
        steps: Steps of an epoch.
        devices: How many share each batch.
    """
    # On JAX, Keras without jit_compile runs each operation by itself, 25 times slower.
    jit_compile = train.jit_compile or keras.backend.backend() == "jax"
    if not jit_compile:  # with XLA, TensorFlow would silently leave this out
        import tensorflow

        tensorflow.config.experimental.enable_op_determinism()
    trainer = fit.LossModel(
        network,
        padded=train.loss == "padded",
        batch_size=-(-train.batch_size // devices),
        padding=tokenizer.padding,
        unknown=tokenizer.unknown,
        separator=tokenizer.separator,
    )
    optimizer = optimizers.make(train, train.epochs * steps, network.compute_dtype)
    trainer.compile(optimizer=optimizer, jit_compile=jit_compile)
    return trainer
