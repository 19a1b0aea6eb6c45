"""Decoding of messages that nobody vouches for.

betterproto2 takes any value for any field: a length-delimited field that stands where a number belongs becomes bytes,
say. What an agent sends is therefore held against the types of its fields.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from betterproto2 import Message

_Kind = TypeVar("_Kind", bound=Message)
Check = Callable[[object], bool]


def decoded(kind: type[_Kind], data: bytes) -> _Kind:
    """A message of this kind. Raises ValueError for bytes that are none, and nothing else."""
    try:
        message = kind.parse(data)
    except Exception as exc:  # the decoder's errors aren't one family
        raise ValueError("can't be decoded") from exc
    if not well_typed(message):
        raise ValueError("has a value of another type")
    return message


def well_typed(message: Message) -> bool:
    """Whether each field has a value of its type."""
    return all(check(getattr(message, name)) for name, check in _checks(type(message)))


@cache
def _checks(kind: type[Message]) -> tuple[tuple[str, Check], ...]:
    # The annotations are text, in terms of the module that they are in.
    hints = typing.get_type_hints(kind, globalns=vars(sys.modules[kind.__module__]))
    return tuple((name, _check(hint)) for name, hint in hints.items())


def _check(hint: Any) -> Check:
    """What tells whether a value is of a type. Made once: to look at a type takes longer than to look at a value."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        some = tuple(_check(each) for each in args if each is not types.NoneType)
        nothing = types.NoneType in args
        return lambda value: nothing if value is None else any(check(value) for check in some)
    inner = tuple(map(_check, args))
    if origin is list:
        return lambda value: isinstance(value, list) and all(map(inner[0], value))
    if origin is dict:
        return lambda value: isinstance(value, dict) and all(
            inner[0](key) and inner[1](each) for key, each in value.items()
        )
    if issubclass(hint, Message):
        return lambda value: isinstance(value, hint) and well_typed(value)
    # An enumeration's field has any number: newer agents know more of them.
    plain = int if issubclass(hint, int) else hint
    return lambda value: isinstance(value, plain)
