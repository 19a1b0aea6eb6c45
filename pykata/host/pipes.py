"""Our ends of a process's pipes."""

from __future__ import annotations

import os
from typing import IO

import anyio
from anyio.abc import AsyncResource, ByteReceiveStream, ByteSendStream


class _Pipe(AsyncResource):
    """Closing it tells whoever waits for it."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        os.set_blocking(pipe.fileno(), False)

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        if not self._pipe.closed:
            anyio.notify_closing(self._pipe.fileno())
            self._pipe.close()


class PipeReader(_Pipe, ByteReceiveStream):
    """Our end of a pipe that the process writes to. Reads what is asked for and no more, so it has backpressure."""

    def fileno(self) -> int:
        """For an event loop that watches it."""
        return self._pipe.fileno()

    def receive_nowait(self, max_bytes: int = 65536) -> bytes:
        """What is there; nothing at the end. Raises BlockingIOError and other OSErrors."""
        if self._pipe.closed:
            raise anyio.ClosedResourceError
        return os.read(self._pipe.fileno(), max_bytes)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        while True:
            try:
                data = self.receive_nowait(max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self._pipe.fileno())
                continue
            if not data:
                raise anyio.EndOfStream
            await anyio.lowlevel.checkpoint()
            return data

    async def receive_into(self, space: memoryview) -> int:
        """Fill all of ``space``, or less at the end; how much."""
        have = 0
        while have < len(space):
            if self._pipe.closed:
                raise anyio.ClosedResourceError
            try:
                size = os.readv(self._pipe.fileno(), [space[have:]])
            except BlockingIOError:
                await anyio.wait_readable(self._pipe.fileno())
                continue
            if not size:
                break
            have += size
        await anyio.lowlevel.checkpoint()
        return have


class PipeWriter(_Pipe, ByteSendStream):
    """Our end of the pipe that the process reads from."""

    async def send(self, item: bytes) -> None:
        view = memoryview(item)
        while view:
            if self._pipe.closed:
                raise anyio.ClosedResourceError
            try:
                view = view[os.write(self._pipe.fileno(), view):]
            except BlockingIOError:
                await anyio.wait_writable(self._pipe.fileno())
            except BrokenPipeError as exc:
                raise anyio.BrokenResourceError from exc
        await anyio.lowlevel.checkpoint()
