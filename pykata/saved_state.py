"""What ``state.json`` of a saved guest may say. The directory may have come from elsewhere, and its hash with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[object], bool]

MOST = 2**48        # bytes of memory; more than any machine has, and less than where arithmetic ends


def checked(state: object) -> dict[str, Any]:
    """The same, if each part of it is of its kind. Raises ValueError that names the first that isn't."""
    if not _has(_STATE)(state):
        raise ValueError(f"state.json has no {_wrong(state)}")
    assert isinstance(state, dict)
    if any(end > state["size"] for _, end in state["runs"]):
        raise ValueError("state.json has memory beyond its size")
    return state


def _wrong(state: object) -> str:
    if not isinstance(state, dict):
        return "fields"
    return f"valid {', '.join(name for name, check in _STATE.items() if not check(state.get(name)))}"


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _text(value: object) -> bool:
    return isinstance(value, str)


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _texts(value: object) -> bool:
    """By names."""
    return isinstance(value, dict) and all(map(_text, value.values()))


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _has(fields: Mapping[str, Check]) -> Check:
    """An object with these fields; others are somebody else's to refuse."""
    return lambda value: isinstance(value, dict) and all(check(value.get(name)) for name, check in fields.items())


def _run(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]


_CONFIG = {
    "entrypoint": _list(_text), "cmd": _list(_text), "env": _texts, "user": _text, "workdir": _text, "labels": _texts,
    "stop_signal": _text,
}  # fmt: skip
_CONTAINER = {
    "id": _text, "reference": _text, "digest": _text, "architecture": _text, "config": _has(_CONFIG), "disk": _number,
    "fresh": _maybe(_flag), "rehearsal": _maybe(_flag),
}  # fmt: skip
_DISK = {"number": _number, "format": _text, "size": _number, "sha256": _text}
_STATE: Mapping[str, Check] = {
    "identity": _texts, "size": _number, "runs": _list(_run), "memory": _text, "devices": _text,
    "disks": _list(_has(_DISK)), "greeting": _text, "parked": _flag, "memory_limit": _number, "main": _text,
    "idle": _maybe(_flag), "containers": _list(_has(_CONTAINER)), "next_number": _number,
}  # fmt: skip
