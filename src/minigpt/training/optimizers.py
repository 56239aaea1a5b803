"""The optimizer, its learning rate schedule and the dtype policy of a training."""

import logging
from pathlib import Path
from typing import Any

import keras

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


def make(config: TrainConfig, total_steps: int) -> keras.optimizers.Optimizer:
    """Makes Adam or AdamW with a linear warm-up and a constant rate or a cosine decay to 0.

    Weight decay is decoupled (Loshchilov and Hutter, 2019) and applies to matrices only. The
    cosine decay is that of Loshchilov and Hutter (2017).

    Args:
        config: The section `train`.
        total_steps: Steps of the whole training, of which the warm-up takes at most half.
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
    optimizer = keras.optimizers.AdamW(rate, weight_decay=decay, global_clipnorm=clip)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer
