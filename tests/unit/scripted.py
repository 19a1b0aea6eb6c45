"""A sandbox that is scripted, in the place of the real one: for tests of the command line."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Self

import anyio
import pykata_cli
import pytest
from attrs import define, field, frozen

import pykata


@frozen
class Exited:
    exit_code: int = 0
    oom_killed: bool = False


@define
class Input:
    received: bytearray = field(factory=bytearray)
    closed: anyio.Event = field(factory=anyio.Event)

    async def send(self, data: bytes) -> None:
        self.received += data

    async def aclose(self) -> None:
        self.closed.set()


@define(slots=False)
class ScriptedProcess:
    """Writes what it is told to; then it ends, or waits for a signal that ends it."""

    output: tuple[bytes, ...] = ()
    errors: tuple[bytes, ...] = ()
    exit: Exited | None = field(factory=Exited)
    failure: Exception | None = None
    echo: bool = False
    on_start: Callable[[], None] = lambda: None
    stdin: Input = field(factory=Input)
    signals: list[int] = field(factory=list)
    ended: anyio.Event = field(factory=anyio.Event)
    killed: threading.Event = field(factory=threading.Event)
    needs: int = 1
    """How many signals end it."""
    lost: pykata.ShareLostError | None = None

    def __attrs_post_init__(self) -> None:
        self.stdout, self.stderr = self._out(), self._err()

    async def _out(self) -> AsyncIterator[bytes]:
        for piece in self.output:
            yield piece
        if self.echo:
            await self.stdin.closed.wait()
            yield bytes(self.stdin.received)
        if self.exit is None:
            self.on_start()
            await self.ended.wait()

    async def _err(self) -> AsyncIterator[bytes]:
        for piece in self.errors:
            yield piece
        if self.failure is not None:
            raise self.failure

    @property
    def exited(self) -> Exited | None:
        return self.exit

    async def wait(self) -> int:
        if self.exit is None:
            await self.ended.wait()
            return 128 + self.signals[-1]
        return self.exit.exit_code

    async def send_signal(self, number: int) -> None:
        self.signals.append(number)
        if len(self.signals) >= self.needs:
            self.ended.set()

    async def kill(self) -> None:
        self.signals.append(signal.SIGKILL)
        self.ended.set()
        self.killed.set()


class ScriptedSandbox:
    """Takes the place of pykata.Sandbox."""

    process_: ScriptedProcess
    entering: Exception | None = None
    booting: Callable[[], None] | None = None
    asked: dict[str, Any]
    left: bool

    def __init__(self, **options: Any) -> None:
        ScriptedSandbox.asked = {"sandbox": options}
        ScriptedSandbox.left = False

    async def __aenter__(self) -> Self:
        if self.entering is not None:
            raise self.entering
        if ScriptedSandbox.booting is not None:
            ScriptedSandbox.booting()
            await anyio.sleep_forever()
        return self

    async def __aexit__(self, *error: object) -> None:
        ScriptedSandbox.left = True

    @asynccontextmanager
    async def process(self, image: str, cmd: list[str] | None, **options: Any) -> AsyncIterator[ScriptedProcess]:
        ScriptedSandbox.asked |= {"image": image, "cmd": cmd, "process": options}
        yield self.process_

    accel = "tcg"
    isolation = "emulated"
    timings = None
    network = pykata.RunningNetwork(ports=(pykata.Port(80, 8080), pykata.Port(53, 5353, "::1", "udp")))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedProcess]:
    def script(**options: Any) -> ScriptedProcess:
        process = ScriptedProcess(**options)
        monkeypatch.setattr(ScriptedSandbox, "process_", process, raising=False)
        return process

    monkeypatch.setattr(pykata, "Sandbox", ScriptedSandbox)
    monkeypatch.setattr(ScriptedSandbox, "entering", None)
    monkeypatch.setattr(ScriptedSandbox, "booting", None)
    script()
    return script


@pytest.fixture
def stdin() -> Iterator[Callable[[bytes], None]]:
    """Replaces the test's own stdin."""
    saved = os.dup(0)

    def feed(data: bytes) -> None:
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        os.dup2(reader, 0)
        os.close(reader)

    feed(b"")
    yield feed
    os.dup2(saved, 0)
    os.close(saved)


def run(*argv: str) -> int:
    return pykata_cli.main(["run", *argv])


Script = Callable[..., ScriptedProcess]
