"""Decoding of messages that nobody vouches for.

betterproto2 takes any value for any field: a length-delimited field that stands where a number belongs becomes bytes,
say. What an agent sends is therefore held against the types of its fields.
"""

from __future__ import annotations

import sys
import types
import typing
from functools import cache
from typing import Any, TypeVar

from betterproto2 import Message

_Kind = TypeVar("_Kind", bound=Message)


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
    return all(_fits(getattr(message, name), hint) for name, hint in _hints(type(message)).items())


@cache
def _hints(kind: type[Message]) -> dict[str, Any]:
    # The annotations are text, in terms of the module that they are in.
    return typing.get_type_hints(kind, globalns=vars(sys.modules[kind.__module__]))


def _fits(value: object, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return any(_fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0]) and _fits(each, inner[1]) for key, each in value.items()
        )
    if issubclass(hint, Message):
        return isinstance(value, hint) and well_typed(value)
    # An enumeration's field has any number: newer agents know more of them.
    return isinstance(value, int if issubclass(hint, int) else hint)
