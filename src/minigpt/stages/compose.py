"""Composes conf/ as params.yaml selects -> resolved.yaml."""

from minigpt import composition, config
from minigpt.common import paths


def run() -> None:
    """Composes and validates the configuration of all stages."""
    config.save(composition.compose(), paths.RESOLVED)
