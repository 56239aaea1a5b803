"""Strictly typed settings, and messages that say what is wrong with a value and what is allowed."""

import difflib
from collections.abc import Iterable
from typing import Any, Literal, TypeGuard, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from minigpt.common.errors import InputError
from minigpt.common.redaction import redact

Loc = tuple[int | str, ...]  # the keys, and positions in lists, that lead to a value

_MOST_TOLD = 50  # problems in one message
_OUT_OF_RANGE = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
}


class Section(BaseModel):
    """Settings that are immutable and strictly typed; unknown keys are refused."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


S = TypeVar("S", bound=Section)


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Tells whether the type of a field is a section of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def validate(section: type[S], values: Any, prefix: str = "", file: str = "") -> S:
    """Validates the values of a section.

    Args:
        section: The section's type.
        values: A dict with the value of each key; keys with a default may be left out.
        prefix: Where the section stands, such as "model"; messages put it before each key.
        file: The file that holds the values; messages put it after each key.

    Raises:
        InputError: The message lists all problems.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise refusal([describe(section, each, prefix, file) for each in found]) from None


def refusal(problems: list[str]) -> InputError:
    """Returns one error that lists problems, each on a line."""
    left = len(problems) - _MOST_TOLD
    return InputError("\n".join(problems[:_MOST_TOLD] + [f"and {left} more"] * (left > 0)))


def describe(section: type[Section], error: ErrorDetails, prefix: str = "", file: str = "") -> str:
    """Says which value is wrong and what is allowed.

    Args:
        section: What was validated.
        error: One of pydantic's errors.
        prefix: Where the section stands.
        file: The file that holds the value.
    """
    loc, kind, value = error["loc"], error["type"], error["input"]
    name = named(loc, prefix)
    place = f"{name} in {file}" if file else name
    if kind in ("extra_forbidden", "invalid_key"):
        parent = _field(section, loc[:-1]).annotation
        assert is_section(parent)
        return f"unknown key {place}: {one_of(loc[-1], parent.model_fields)}"
    field = _field(section, loc)
    if kind == "value_error" and is_section(field.annotation):
        # A section's own validator: each line starts with a key and says what it contradicts.
        lines = str(error["ctx"]["error"]).split("\n")
        return "\n".join(f"{name}.{line}".removeprefix(".") for line in lines)
    if get_origin(field.annotation) is Literal:
        told = one_of(value, get_args(field.annotation))
    else:
        told = f"allowed is {_range(field) if kind in _OUT_OF_RANGE else allowed(field)}"
    return f"{place} is {'missing' if kind == 'missing' else shown(value)}: {told}"


def _field(section: type[Section], loc: Loc) -> FieldInfo:
    """Returns the field that a value belongs to, or the entry of a list or of a dict."""
    field = FieldInfo.from_annotation(section)
    for part in loc:
        if is_section(field.annotation):
            field = field.annotation.model_fields[str(part)]
        else:
            field = FieldInfo.from_annotation(get_args(field.annotation)[-1])
    return field


def allowed(field: FieldInfo) -> str:
    """Says which values a field takes; a text in its Annotated is the answer."""
    kind = field.annotation
    for text in field.metadata:
        if isinstance(text, str):
            return text
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if get_origin(kind) is list:
        filled = ", not empty" if field.metadata else ""
        return f"a list{filled}; an entry is {allowed(FieldInfo.from_annotation(*get_args(kind)))}"
    if kind is str:
        return "a text"
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return f"a {'whole ' if kind is int else ''}number, {_range(field)}"
    return "keys and values"


def _range(field: FieldInfo) -> str:
    words = {"ge": "{}", "gt": "above {}", "le": "to {}", "lt": "to below {}"}
    return " ".join(
        word.format(getattr(limit, name))
        for name, word in words.items()
        for limit in field.metadata
        if hasattr(limit, name)
    )


def one_of(value: Any, known: Iterable[str]) -> str:
    """Lists what is known, with the one that was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(value[:100], known, n=1) if isinstance(value, str) else []
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"allowed are {', '.join(known)}{hint}"


def named(loc: Loc, prefix: str = "") -> str:
    """Returns a value's full name, such as sample.prompts[1]."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc]
    name = "".join(parts)
    return (prefix + _cut(name if name.isprintable() else repr(name)[1:-1])).removeprefix(".")


def shown(value: Any) -> str:
    """Returns a value as a message shows it: in short, and without the passwords of URLs."""
    try:
        return _cut(redact(repr(value)[:2_000]))
    except ValueError:  # Python writes no numbers of more than some 4,300 digits
        return "a number of thousands of digits"


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
