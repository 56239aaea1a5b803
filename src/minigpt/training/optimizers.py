"""The optimizer, its learning rate schedule and the dtype policy of a training."""

import logging
from pathlib import Path
from typing import Any

import keras
from keras import ops

from minigpt.config import TrainConfig

log = logging.getLogger(__name__)

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # in /proc/cpuinfo


def choose_dtype_policy(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the faster dtype policy for this machine (measured in benchmarks/README.md).

    Args:
        cpuinfo: Linux's description of the processor; other systems have none.

    Returns:
        "mixed_bfloat16" for the TensorFlow backend on a processor that multiplies in bfloat16,
        otherwise "float32".
    """
    if keras.backend.backend() != "tensorflow" or not cpuinfo.exists():
        return "float32"
    flags = set(cpuinfo.read_text(encoding="utf-8").split())
    return "mixed_bfloat16" if flags & BFLOAT16_FLAGS else "float32"


class Muon(keras.optimizers.Muon):
    """Keras's Muon, with TensorFlow's fused operation for the variables that Adam updates.

    Keras's Adam is some ten operations that each pass over all parameters.

    Args:
        products: The dtype of the Newton-Schulz iteration's products; Jordan et al. take bfloat16.
        *args: As for Keras's.
        **kwargs: As for Keras's.
    """

    def __init__(self, *args: Any, products: str = "float32", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.products = products

    def zeropower_via_newtonschulz5(self, x: Any, steps: int) -> Any:
        """Returns the nearest orthogonal matrix, about."""
        found = super().zeropower_via_newtonschulz5(ops.cast(x, self.products), steps)
        return ops.cast(found, x.dtype)

    def _adamw_update_step(
        self, gradient: Any, variable: Any, learning_rate: Any, m: Any, v: Any
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            super()._adamw_update_step(gradient, variable, learning_rate, m, v)
            return
        import tensorflow as tf

        step = tf.cast(self.iterations + 1, "float32")
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=m.value.handle,
            v=v.value.handle,
            beta1_power=tf.pow(self.adam_beta_1, step),
            beta2_power=tf.pow(self.adam_beta_2, step),
            lr=learning_rate,
            beta1=self.adam_beta_1,
            beta2=self.adam_beta_2,
            epsilon=self.epsilon,
            grad=tf.convert_to_tensor(gradient),
        )


def make(
    config: TrainConfig, total_steps: int, products: str = "float32"
) -> keras.optimizers.Optimizer:
    """Makes an optimizer with a linear warm-up and a constant rate or a cosine decay to 0.

    Weight decay is decoupled (Loshchilov and Hutter, 2019) and applies to matrices only. The
    cosine decay is that of Loshchilov and Hutter (2017). Muon (Jordan et al., 2024,
    https://kellerjordan.github.io/posts/muon/) orthogonalises the updates of the blocks' matrices,
    scaled as by Liu et al. (2025, https://arxiv.org/abs/2502.16982); tables, head, biases and norms
    have Adam.

    Args:
        config: The section `train`.
        total_steps: Steps of the whole training, of which the warm-up takes at most half.
        products: The dtype of the network's products, which Muon's have too.
    """
    warmup = min(config.warmup_steps, total_steps // 2)
    if warmup < config.warmup_steps:
        log.info(
            "train.warmup_steps is %s, but the whole training has %s steps: the warm-up takes %s",
            config.warmup_steps,
            total_steps,
            warmup,
        )
    rate: Any = config.learning_rate
    if warmup or config.decay == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else rate,
            decay_steps=total_steps - warmup,
            # The decay ends at alpha times the peak: 1 keeps the rate constant after the warm-up.
            alpha=0.0 if config.decay == "cosine" else 1.0,
            warmup_target=rate if warmup else None,
            warmup_steps=warmup,
        )
    clip = config.clip_norm or None
    if config.optimizer == "adam":
        return keras.optimizers.Adam(rate, global_clipnorm=clip)
    decay = config.weight_decay
    if config.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(rate, weight_decay=decay, global_clipnorm=clip)
    else:
        optimizer = Muon(
            rate,
            products=products,
            # Both follow one schedule, whose rate is Adam's.
            rms_rate=0.2 * config.matrix_rate / config.learning_rate,
            exclude_layers=["head_kernel", "tail_"],
            weight_decay=decay or None,
            adam_weight_decay=decay or None,
            global_clipnorm=clip,
        )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer
