"""conf/ and params.yaml -> resolved.yaml."""

from minigpt import config
from minigpt.stages import paths


def run() -> None:
    """Composes and validates the configuration of all stages."""
    config.save(config.compose(), paths.RESOLVED)
