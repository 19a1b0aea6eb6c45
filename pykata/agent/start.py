"""The message that starts a process, encoded without the generic encoder: for a small command that takes longer than
all else the host does."""

from __future__ import annotations

from collections.abc import Iterable

from pykata.agent.stream import varint
from pykata.agent.v1 import Process, RunRequest, Start


def encoded_start(start: Start) -> bytes:
    """``bytes(RunRequest(start=start))``."""
    process = start.process
    if start.create is not None or process is None:
        return bytes(RunRequest(start=start))
    return _bytes(1, b"".join((
        _text(1, start.container_id),
        _bytes(2, encoded_process(process)),
        _number(4, start.window),
        _number(5, start.detached),
        _number(6, start.log),
        _number(7, start.stdin_closed),
        _number(8, start.last),
        _number(9, start.collected),
        _number(10, start.bulk),
        _number(11, start.lingers),
    )))  # fmt: skip


def encoded_process(process: Process) -> bytes:
    """``bytes(process)``."""
    return b"".join((
        _text(1, process.id),
        _texts(2, process.args),
        _texts(3, process.env),
        _text(4, process.cwd),
        _text(5, process.user),
        b"".join(_bytes(6, bytes(limit)) for limit in process.rlimits),
        b"" if process.terminal is None else _bytes(7, bytes(process.terminal)),
        _number(16, process.tool),
    ))  # fmt: skip


def _bytes(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode()) if text else b""


def _texts(field: int, texts: Iterable[str]) -> bytes:
    return b"".join(_bytes(field, text.encode()) for text in texts)


def _number(field: int, number: int) -> bytes:
    """A number that isn't negative, or a flag; 0 is what is meant where nothing is said."""
    return varint(field << 3) + varint(number) if number else b""
