"""What a search minimizes, what it varies, and when it stops a trial: conf/search.yaml."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import optuna
from pydantic import AfterValidator, Field, model_validator

from minigpt import config
from minigpt.common.errors import InputError, missing
from minigpt.common.validation import Section, validate


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return value


def _scalar(value: Any) -> Any:
    return value if isinstance(value, bool | str) else _number(value)


def _by_text(space: dict[Any, Any]) -> dict[Any, Any]:
    if not all(isinstance(key, str) for key in space):
        raise ValueError
    return space


Number = Annotated[Any, AfterValidator(_number), "a number"]
Choice = Annotated[Any, AfterValidator(_scalar), "a number, a text, true or false"]


class Metric(Section):
    """A figure of a trial's reports; the lower the better."""

    file: config.Text
    """A report in JSON, such as reports/evaluation.json."""
    key: config.Text
    """The figure's key in it."""

    def of(self, reports: Mapping[str, Any]) -> float:
        """Returns the figure.

        Args:
            reports: What `Trial.reports` returns.

        Raises:
            InputError: There is no such number.
        """
        found = reports.get(self.file, {}).get(self.key)
        if not isinstance(found, int | float):
            raise InputError(
                f"the metric of the search: {self.file} has no number {self.key!r}; name one that "
                "it has"
            )
        return found


class Values(Section):
    """What a key of the configuration is set to: a number from low to high, or one of choices."""

    low: Number = None
    high: Number = None
    log: bool = False
    """Whether to draw evenly on a logarithmic scale."""
    choices: list[Choice] = Field(default=[])

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        is_range = {"low", "high"} <= self.model_fields_set
        if is_range == bool(self.choices) or (self.choices and len(self.model_fields_set) > 1):
            raise ValueError(
                f"low is {self.low}, high {self.high} and choices {self.choices}: give low and "
                "high (and log), or choices"
            )
        if is_range and self.low > self.high:
            raise ValueError(f"low is {self.low}, above high, {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}: with log it must be above 0")
        return self

    def suggest(self, trial: optuna.Trial, key: str) -> Any:
        """Returns the value of a key in a trial; whole numbers from and to whole numbers.

        Raises:
            InputError: Earlier trials of the study have other choices, or another kind of number.
        """
        try:
            if self.choices:
                return trial.suggest_categorical(key, self.choices)
            whole = isinstance(self.low, int) and isinstance(self.high, int)
            suggest = trial.suggest_int if whole else trial.suggest_float
            return suggest(key, self.low, self.high, log=self.log)
        except ValueError as error:
            raise InputError(
                f"space.{key} differs from that of the search's earlier trials ({error}): only low "
                "and high may change; put it back, or choose another name"
            ) from None


class Prune(Section):
    """Which trials are stopped after an epoch: those that are worse than the median of others."""

    column: str = ""
    """Of reports/losses.csv, the lower the better; nothing: no trial is stopped."""
    startup_trials: int = Field(default=5, ge=0, le=100_000)
    """Trials that run to their end first."""
    warmup_epochs: int = Field(default=0, ge=0, le=100_000)
    """Epochs after which none is stopped yet."""


class SearchConfig(Section):
    """The content of conf/search.yaml."""

    metric: Metric
    space: Annotated[
        dict[Any, Values],
        Field(min_length=1),
        AfterValidator(_by_text),
        "keys of the configuration, each with low and high (and log), or with choices",
    ]
    prune: Prune = Prune()


def read(path: Path) -> SearchConfig:
    """Reads conf/search.yaml.

    Raises:
        InputError: The file is missing, malformed, or holds values that make no sense.
    """
    if not path.is_file():
        raise missing("--space", path)
    return validate(SearchConfig, config.read(path), file=str(path))
