"""Strictly typed settings, and messages that say what is wrong with a value and what is allowed."""

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Literal, TypeGuard, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from minigpt.common.errors import InputError
from minigpt.common.redaction import redact

Loc = tuple[int | str, ...]  # the keys, and positions in lists, that lead to a value

# The types of errors of our own; their messages are whole sentences without the subject.
PROBLEM = "problem"
CONTRADICTION = "contradiction"

_MOST_TOLD = 50  # problems in one message
_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than_equal", "finite_number"}


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


def cross_check(check: Callable[[Any], Iterator[tuple[str, str]]]) -> Any:
    """Makes a validator of a method that compares values of several keys.

    The method runs even where other values are wrong, but ends as soon as it reads one of those.

    Args:
        check: Yields the key and the problem of each contradiction.
    """

    def run(cls: type[Section], values: Any, handler: Callable[[Any], Any]) -> Any:
        errors: list[InitErrorDetails] = []
        try:
            section = sound = handler(values)
        except ValidationError as error:
            if not isinstance(values, dict):
                raise
            found = error.errors(include_url=False)
            errors = [_raised_again(each) for each in found]
            sound = _sound(cls, values, [e["loc"] for e in found if e["type"] != CONTRADICTION])
        try:
            for key, text in check(sound):
                kind = PydanticCustomError(CONTRADICTION, "{text}", {"text": text})
                errors.append(InitErrorDetails(type=kind, loc=tuple(key.split(".")), input=None))
        except AttributeError:  # the method reads a value that is wrong
            if not errors:
                raise
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return section

    return model_validator(mode="wrap")(classmethod(run))  # type: ignore[arg-type]


def _raised_again(error: ErrorDetails) -> InitErrorDetails:
    kind: Any = error["type"]
    if kind in (PROBLEM, CONTRADICTION, "value_error"):
        kind = PydanticCustomError(kind, "{text}", {"text": error["msg"]})
    context = error.get("ctx", {})
    return InitErrorDetails(type=kind, loc=error["loc"], input=error["input"], ctx=context)


def _sound(section: type[Section], values: dict[str, Any], wrong: Iterable[Loc]) -> Any:
    """Returns the values that are not wrong, as attributes."""
    sound = SimpleNamespace()
    for name, field in section.model_fields.items():
        inner = [loc[1:] for loc in wrong if loc[:1] == (name,)]
        value = values.get(name, field.get_default(call_default_factory=True))
        if is_section(field.annotation) and isinstance(value, dict) and () not in inner:
            setattr(sound, name, _sound(field.annotation, value, inner))
        elif not inner:
            setattr(sound, name, value)
    return sound


def validate(section: type[S], values: Mapping[str, Any], prefix: str = "") -> S:
    """Validates the values of one section.

    Args:
        section: The section's type.
        values: The value of each key; keys with a default may be left out.
        prefix: Where the section stands, such as "model"; messages put it before each key.

    Raises:
        InputError: The message lists all problems.
    """
    try:
        return section.model_validate(dict(values) if isinstance(values, Mapping) else values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        start = (prefix,) if prefix else ()
        raise refusal(describe(section, each, start=start) for each in found) from None


def refusal(problems: Iterable[str]) -> InputError:
    """Returns one error that lists problems, each on a line."""
    told = list(itertools.islice(problems, _MOST_TOLD + 1))
    told[_MOST_TOLD:] = ["and more"] * (len(told) > _MOST_TOLD)
    return InputError("\n".join(told))


def describe(
    section: type[Section], error: ErrorDetails, *, start: Loc = (), source: str = ""
) -> str:
    """Says which value is wrong and what is allowed.

    Args:
        section: What was validated.
        error: One of pydantic's errors.
        start: Where the section stands.
        source: The file that holds the value, or nothing where that is not known.
    """
    loc, kind, value = error["loc"], error["type"], error["input"]
    if kind == "invalid_key":  # a key that is no text
        loc = (*loc[:-1], str(loc[-1]))
    name = " in ".join(filter(None, [named((*start, *loc)) or "the whole", source]))
    annotation, metadata = _at(section, loc)
    if kind in (PROBLEM, CONTRADICTION):
        return f"{name} {error['msg']}"
    if kind in ("extra_forbidden", "invalid_key"):
        parent, _ = _at(section, loc[:-1])
        return f"unknown key {name}: {one_of(loc[-1], parent.model_fields)}"
    if kind == "missing":
        return f"{name} is missing: allowed is {allowed(annotation, metadata)}"
    if get_origin(annotation) is Literal:
        return f"{name} is {shown(value)}: {one_of(value, get_args(annotation))}"
    text = _range(metadata) if kind in _OUT_OF_RANGE else allowed(annotation, metadata)
    return f"{name} is {shown(value)}: allowed is {text}"


def _at(section: type[Section], loc: Loc) -> tuple[Any, list[Any]]:
    """Returns the type and the constraints of a value."""
    annotation: Any = section
    metadata: list[Any] = []
    for part in loc:
        if is_section(annotation):
            field = annotation.model_fields.get(str(part))
            annotation, metadata = (field.annotation, field.metadata) if field else (None, [])
        elif get_origin(annotation) is list:  # list[Annotated[...]]
            annotation, *metadata = get_args(get_args(annotation)[0])
        else:
            annotation, metadata = None, []
    return annotation, metadata


def allowed(annotation: Any, metadata: Iterable[Any]) -> str:
    """Says which values a field takes.

    Args:
        annotation: The field's type.
        metadata: Its constraints; a string among them is the answer.
    """
    metadata = list(metadata)
    for text in metadata:
        if isinstance(text, str):
            return text
    if get_origin(annotation) is Literal:
        return ", ".join(get_args(annotation))
    if get_origin(annotation) is list:
        entry, *constraints = get_args(get_args(annotation)[0])
        filled = ", not empty" if any(hasattr(each, "min_length") for each in metadata) else ""
        return f"a list{filled}; an entry is {allowed(entry, constraints)}"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return f"a {'whole ' if annotation is int else ''}number, {_range(metadata)}"
    return "keys and values"


def _range(metadata: Iterable[Any]) -> str:
    limits = {
        name: f"{limit:g}" if isinstance(limit, float) else str(limit)
        for each in metadata
        for name in ("ge", "gt", "le")
        if (limit := getattr(each, name, None)) is not None
    }
    low = limits["ge"] if "ge" in limits else f"above {limits['gt']}"
    return f"{low} to {limits['le']}"


def one_of(value: Any, known: Iterable[str]) -> str:
    """Lists what is known, with the one that was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(value[:100], known, n=1) if isinstance(value, str) else []
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"allowed are {', '.join(known)}{hint}"


def named(loc: Loc) -> str:
    """Returns a value's full name, such as sample.prompts[1]."""
    parts = [
        f"[{part}]" if isinstance(part, int) and at else f".{part}" for at, part in enumerate(loc)
    ]
    name = "".join(parts).removeprefix(".")
    return _cut(name if name.isprintable() else repr(name)[1:-1])


def shown(value: Any) -> str:
    """Returns a value as a message shows it: in short, and without the passwords of URLs."""
    try:
        return _cut(redact(repr(value)[:2_000]))
    except ValueError:  # Python writes no numbers of more than some 4,300 digits
        return "a number of thousands of digits"


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
