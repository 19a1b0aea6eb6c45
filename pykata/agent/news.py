"""The two answers that each command has, decoded without the generic decoder: that takes longer than all else the host
does when a small command has ended."""

from __future__ import annotations

from pykata.agent.v1 import Exited, RunResponse, Started

STARTED_TAG, EXITED_TAG = 0x0A, 0x22    # fields 1 and 4 of a RunResponse, length-delimited
LONGEST_NUMBER = 4              # bytes; a number that is negative has more


def news(data: bytes) -> RunResponse | None:
    """The start or the end of a command, as agents write them; None: it is something else, or written otherwise."""
    if len(data) < 2 or data[0] not in (STARTED_TAG, EXITED_TAG) or data[1] != len(data) - 2:
        return None
    numbers = _numbers(data, 2)
    if numbers is None:
        return None
    if data[0] == STARTED_TAG:
        pid = numbers.pop(1, 0)
        return None if numbers else RunResponse(started=Started(pid=pid))
    code, signal, oom_killed, oom_kills = (numbers.pop(field, 0) for field in (1, 2, 3, 4))
    if numbers or oom_killed > 1:
        return None
    exited = Exited(exit_code=code, signal=signal, oom_killed=bool(oom_killed), oom_kills=oom_kills)
    return RunResponse(exited=exited)


def _numbers(data: bytes, at: int) -> dict[int, int] | None:
    """Numbers by field, from there to the end; None: there is something else among them."""
    found: dict[int, int] = {}
    while at < len(data):
        key = data[at]
        value, size = 0, 0
        while True:
            at, size = at + 1, size + 1
            if key > 0x7F or key & 7 or at == len(data) or size > LONGEST_NUMBER:
                return None
            value |= (data[at] & 0x7F) << 7 * (size - 1)
            if data[at] < 0x80:
                break
        found[key >> 3] = value
        at += 1
    return found
