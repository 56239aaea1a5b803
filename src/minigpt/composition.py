"""Composes the configuration: conf/ as params.yaml selects, with the other values laid over."""

import re
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from pydantic import ValidationError

from minigpt import config
from minigpt.common.errors import InputError
from minigpt.common.validation import Loc, describe, named, one_of, refusal, shown
from minigpt.config import CONF, PARAMS, Config

_REFERENCE = re.compile(r"\$\{([a-z0-9_.]+)\}")  # ${section.key}


def compose(conf: Path = CONF, params: Path = PARAMS) -> Config:
    """Composes conf/ as params.yaml selects, lays its values over, and validates the whole.

    Args:
        conf: The folder of config groups; its config.yaml names the default choices.
        params: `groups:` picks one file per group; every other key is laid over the composed
            value. null leaves things as composed.

    Raises:
        InputError: An unknown group, choice or key, a wrong type, a value out of range, or values
            that contradict each other; the message lists all of them.
    """
    given = _without_nulls(config.read(params))
    if not conf.is_dir():
        raise InputError(f"{conf}/ is missing; run `dvc repro` in the project's folder")
    picked, problems = _picked(conf, given.pop("groups", {}), params)
    wrong_choice = bool(problems)
    laid_over = _laid_over(_laid_over(_defaults(), _hydra(conf, picked)), given)
    unresolved: dict[Loc, str] = {}
    values = _resolved(laid_over, laid_over, (), unresolved)

    def file(loc: Loc) -> str:
        return str(params) if _holds(given, loc) else f"{conf}/"

    problems += [f"{named(loc)} in {file(loc)} {text}" for loc, text in unresolved.items()]
    try:
        composed = Config.model_validate(values)
        if not problems:
            return composed
    except ValidationError as error:
        for each in error.errors(include_url=False):
            loc, kind = each["loc"], each["type"]
            if wrong_choice and kind == "value_error" and len(loc) < 2:
                continue  # a section's contradiction, which the right choice may resolve
            if loc not in unresolved:
                problems.append(describe(Config, each, file=file(loc)))
    raise refusal(problems)


def _without_nulls(tree: dict[Any, Any]) -> dict[Any, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


def _picked(conf: Path, groups: Any, params: Path) -> tuple[list[str], list[str]]:
    """Returns Hydra's overrides for the choices, and what is wrong with the other choices."""
    if not isinstance(groups, dict):
        return [], [f"groups in {params} is {shown(groups)}: allowed is a choice per group"]
    known = sorted(folder.name for folder in conf.iterdir() if folder.is_dir())
    picked, problems = [], []
    for group, choice in groups.items():
        name = f"{named(('groups', str(group)))} in {params}"
        if group not in known:
            problems.append(f"unknown group {name}: {one_of(group, known)}")
            continue
        choices = sorted(file.stem for file in (conf / group).glob("*.yaml"))
        if choice in choices:
            picked.append(f"{'+' if group == 'experiment' else ''}{group}={choice}")
        else:
            problems.append(f"{name} is {shown(choice)}: {one_of(choice, choices)}")
    return picked, problems


def _hydra(conf: Path, picked: list[str]) -> Any:
    """Composes with Hydra (https://hydra.cc/docs/advanced/compose_api/)."""
    try:
        with initialize_config_dir(config_dir=str(conf.resolve()), version_base="1.3"):
            return OmegaConf.to_container(hydra_compose(config_name="config", overrides=picked))
    except (HydraException, *config.MALFORMED) as error:
        raise InputError(f"{conf}/ can't be composed: {error}") from None


def _defaults() -> dict[str, Any]:
    """Returns the defaults of the fields, since a reference may name a key that no file states."""
    sections: Any = Config.model_fields
    return {
        name: field.annotation.model_construct().model_dump() for name, field in sections.items()
    }


def _laid_over(base: dict[Any, Any], over: dict[Any, Any]) -> dict[Any, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _laid_over(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _holds(tree: Any, loc: Loc) -> bool:
    """Tells whether a value, or the list that it is an entry of, stands in a tree."""
    for key in loc:
        if not isinstance(tree, dict):
            return True
        if key not in tree:
            return False
        tree = tree[key]
    return True


def _resolved(value: Any, tree: dict[Any, Any], loc: Loc, problems: dict[Loc, str]) -> Any:
    """Returns a value with each ${section.key} replaced by the value of that key.

    Args:
        value: A part of the tree.
        tree: All sections.
        loc: The place of the value.
        problems: Takes what can't be resolved, by its place.
    """
    if isinstance(value, dict):
        return {key: _resolved(each, tree, (*loc, key), problems) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each, tree, (*loc, at), problems) for at, each in enumerate(value)]
    try:
        return _referred(value, tree)
    except ValueError as error:
        problems[loc] = f"is {shown(value)}: {error}"
        return value


def _referred(value: Any, tree: dict[Any, Any]) -> Any:
    """Follows references to their value.

    OmegaConf's own resolvers are not used: one such as oc.env would copy secrets into
    resolved.yaml, which is committed.
    """
    seen: list[str] = []
    while isinstance(value, str) and "${" in value:
        reference = _REFERENCE.fullmatch(value)
        if not reference:
            raise ValueError(
                "of `${...}` only the key of another value is allowed, such as ${sequences.length}"
            )
        key = reference[1]
        if key in seen:
            raise ValueError(f"{key} leads back to itself")
        seen.append(key)
        value = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise ValueError(f"{key} has no value")
    if value == "???":
        raise ValueError("allowed is a value")
    if seen and "${" in str(value):
        raise ValueError(f"{seen[-1]} holds references itself")
    return value
