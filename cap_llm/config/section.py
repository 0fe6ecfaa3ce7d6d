"""Sections of settings: dataclasses whose types and ranges pydantic checks.

A wrong value raises an error with the full name of its option, whether it comes from the command
line, a file, Python, or a later assignment.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import os
import reprlib
import types
from collections.abc import Callable
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Interval
from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from cap_llm.runtime.errors import UserError

T = TypeVar("T")
AtLeast0 = Annotated[int, Ge(0)]
AtLeast1 = Annotated[int, Ge(1)]
AtLeast2 = Annotated[int, Ge(2)]
Weight = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(gt=0, lt=1)]


class _Place:
    """Marks options that may name a file or directory."""


class _NotIdentity:
    """Marks the type of settings that a result does not depend on."""


NOT_IDENTITY = _NotIdentity()


def _expand_user(value: str) -> str:
    if "\0" in value:
        raise ValueError("a path must not contain a null byte")
    return os.path.expanduser(value)


def _as_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Place = Annotated[str, BeforeValidator(_as_text), AfterValidator(_expand_user), _Place]
_NAMES = {float: "a number", int: "an integer", bool: "true or false", str: "a string"}


@dataclass_transform()
def section(prefix: str, identity: bool = True) -> Callable[[type[T]], type[T]]:
    """Makes a class a section of settings.

    Args:
        prefix: what the names of its options begin with.
        identity: whether a result depends on the section; see `identity`.
    """

    def decorate(cls: type) -> type:
        cls._identity = identity
        # By default, pydantic silently ignores unknown arguments.
        config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)
        cls = dataclass(cls, config=config)
        for method in ("__init__", "__setattr__"):
            setattr(cls, method, _translate_errors(getattr(cls, method), cls, prefix))
        return cls

    return decorate


def identity(settings: object) -> dict:
    """The values that a result depends on: rerunning with others is another result.

    Sections declared `identity=False` and fields annotated `NOT_IDENTITY` are left out.
    """
    types = get_type_hints(type(settings), include_extras=True)
    values = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            if value._identity:
                values[f.name] = identity(value)
        elif NOT_IDENTITY not in getattr(types[f.name], "__metadata__", ()):
            values[f.name] = copy.deepcopy(value)
    return values


def _translate_errors(method: Callable, cls: type, prefix: str) -> Callable:
    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except ValidationError as error:
            user_error = _user_error(error.errors()[0], cls, prefix)
        raise user_error

    return wrapper


def _user_error(error: dict, cls: type, prefix: str) -> UserError:
    """Converts a pydantic error; the message begins with the option."""
    kind: Any = cls
    option = prefix
    for part in error["loc"]:
        if dataclasses.is_dataclass(kind):
            fields = get_type_hints(kind, include_extras=True)
            option = f"{option}.{part}" if option else str(part)
            if part not in fields:
                near = difflib.get_close_matches(str(part), fields, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                return UserError(f"{option} is unknown{hint}")
            kind = fields[part]
        elif get_origin(kind) in (list, dict):
            option, kind = f"{option}[{part!r}]", get_args(kind)[-1]
    if error["type"] == "value_error":
        return UserError(f"{option} is {_shown(error['input'])}: {error['ctx']['error']}")
    if error["type"] == "finite_number":
        return UserError(f"{option} is {error['input']}; it must be a finite number")
    return refused(option, error["input"], kind)


def refused(option: str, value: object, kind: Any) -> UserError:
    """The error for a value of the wrong type or out of range."""
    text = f"{option} is {_shown(value)}; it must be {describe(kind)}"
    choices = [c for k in (kind, *get_args(kind)) for c in get_args(k) if isinstance(c, str)]
    near = difflib.get_close_matches(str(value), choices, n=1)
    if get_origin(kind) is list and isinstance(value, str) and (near or not choices):
        return UserError(f'{text}; did you mean "[{near[0] if near else value}]"?')
    return UserError(text + (f"; did you mean {near[0]}?" if near else ""))


def describe(kind: Any) -> str:
    """Describes a type and its range."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(inner[0]) + "".join(map(_range, inner[1:]))
    if origin is Literal:
        return "one of " + ", ".join(inner)
    if origin is list:
        return f"a list such as [a, b] of {describe(inner[0])}"
    if origin is dict:
        return 'a mapping from unique names to numbers, such as {"*.down_proj": 0.4}'
    if origin in (types.UnionType, Union):
        return " or ".join(map(describe, inner))
    if dataclasses.is_dataclass(kind):
        return "a config section"
    return _NAMES.get(kind, "null")


def _range(limit: object) -> str:
    if not isinstance(limit, Ge | Gt | Interval):
        return ""
    low, above = getattr(limit, "ge", None), getattr(limit, "gt", None)
    high = getattr(limit, "lt", None)
    if high is not None:
        return f" in {f'({above}' if low is None else f'[{low}'}, {high})"
    return f" > {above}" if low is None else f" >= {low}"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else reprlib.repr(value)


def places(cls: type, prefix: str = "") -> list[str]:
    """The options of a section and its subsections that may name a file or directory."""
    result = []
    for name, kind in get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            result += places(kind, f"{prefix}{name}.")
        elif any(_Place in getattr(k, "__metadata__", ()) for k in (kind, *get_args(kind))):
            result.append(prefix + name)
    return result
