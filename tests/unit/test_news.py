"""The start and the end of a command are decoded as the generic decoder would."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from pykata.agent.news import news
from pykata.agent.typed import decoded
from pykata.agent.v1 import Ended, Exited, RunResponse, Started

small = st.integers(0, 2**28 - 1)


@given(small)
def test_starts_are_known(pid: int) -> None:
    said = RunResponse(started=Started(pid=pid))
    assert news(bytes(said)) == said


@given(small, small, st.booleans(), small)
def test_ends_are_known(code: int, signal: int, oom_killed: bool, oom_kills: int) -> None:
    said = RunResponse(exited=Exited(exit_code=code, signal=signal, oom_killed=oom_killed, oom_kills=oom_kills))
    assert news(bytes(said)) == said


def _whole(tag: bytes, fields: bytes) -> bytes:
    return tag + bytes((len(fields),)) + fields


@given(st.binary(max_size=20) | st.builds(_whole, st.sampled_from((b"\x0a", b"\x22")), st.binary(max_size=9)))
def test_nothing_is_taken_for_something_else(data: bytes) -> None:
    known = None
    with contextlib.suppress(ValueError):
        known = decoded(RunResponse, data)
    assert news(data) in (None, known)


def test_the_rest_is_left_to_the_generic_decoder() -> None:
    for said in (
        RunResponse(started=Started(pid=-1)),
        RunResponse(exited=Exited(exit_code=2**28)),
        RunResponse(ended=Ended(stdout=True)),
        RunResponse(stdout=b"x"),
        RunResponse(),
    ):
        assert news(bytes(said)) is None
