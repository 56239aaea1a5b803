"""The targets of `make fuzz` fit the code that they try."""

import contextlib
from typing import Any

import pytest
from fuzz import TARGETS
from hypothesis import HealthCheck, given, settings

from minigpt.common.errors import InputError


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_inputs(name: str) -> None:
    inputs, check = TARGETS[name]()

    @settings(
        max_examples=3,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def once(value: Any) -> None:
        with contextlib.suppress(InputError):
            check(value)

    once()
