"""Messages between a keeper and its clients: JSON objects, with descriptors, over a unix socket of packets.

A client asks ``{"id": 1, "do": "plug", ...}`` and is answered ``{"id": 1, "ok": ...}`` or ``{"id": 1, "error": ...}``;
what the keeper says unasked is ``{"event": ...}``. Both ends are processes of one user, which both check.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import anyio
from attrs import field, frozen

from pykata import errors
from pykata.errors import NotPermittedError, PykataError

PROTOCOL = 1
MAX_PACKET = 128 * 1024         # bytes; below what a socket holds by default (net.core.wmem_default)
MAX_DESCRIPTORS = 4
MAX_TEXT = 16 * 1024            # characters of each text of an error

_CARRIED = ("console", "output", "reference", "digest", "status", "name")
_UCRED = struct.Struct("iII")


@frozen
class Message:
    """What came: the object, and the descriptors that came with it, which are the receiver's to close."""

    body: Mapping[str, Any]
    descriptors: tuple[int, ...] = field(default=())

    def close(self) -> None:
        """Close the descriptors: nobody wants them."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class Wire:
    """One end of a connection. It owns the socket. One task receives; any may send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._turn = anyio.Lock()       # anyio lets one task at a time wait for a socket

    async def send(self, body: Mapping[str, object], descriptors: Sequence[int] = ()) -> None:
        """Send a message, as a whole or not at all. Raises anyio.BrokenResourceError if nobody is there any more."""
        async with self._turn:
            while not self.send_now(body, descriptors):
                await anyio.wait_writable(self._socket)

    def send_now(self, body: Mapping[str, object], descriptors: Sequence[int] = ()) -> bool:
        """Send a message unless there is no room for it at the moment."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._socket.sendmsg([json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")], rights)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise anyio.BrokenResourceError from exc
        return True

    async def receive(self) -> Message | None:
        """The next message; None when the other end has gone."""
        while True:
            try:
                return self._receive()
            except BlockingIOError:
                try:
                    await anyio.wait_readable(self._socket)
                except (anyio.ClosedResourceError, ValueError):
                    return None
            except (OSError, ValueError):
                return None

    def receive_now(self) -> Message | None:
        """A message that has come by now, if there is one. Who receives the others sees their end."""
        with suppress(OSError, ValueError):
            return self._receive()
        return None

    def _receive(self) -> Message | None:
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        data, rights, _flags, _ = self._socket.recvmsg(MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, content in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        message = Message({}, tuple(descriptors))
        try:
            body = json.loads(data) if data else None
        except ValueError:
            message.close()
            raise
        if not isinstance(body, dict):
            message.close()
            return None
        return Message(body, message.descriptors)

    def close(self) -> None:
        """End the connection. May be repeated."""
        if self._socket.fileno() >= 0:
            with suppress(RuntimeError):        # no event loop runs any more
                anyio.notify_closing(self._socket)
            self._socket.close()

    def end_of_sending(self) -> None:
        """Let the other end see the end of what it receives; it can still send."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def check_peer(self) -> None:
        """Raise NotPermittedError unless the process at the other end is of our user (unix(7), SO_PEERCRED)."""
        pid, uid, _ = _UCRED.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != os.geteuid():
            raise NotPermittedError(f"process {pid} at the other end of the socket is of uid {uid}, and not ours")


def pack_error(error: BaseException) -> dict[str, object]:
    """An error as JSON; one that isn't of ours is told as what it is."""
    if not isinstance(error, PykataError):
        return {"type": "PykataError", "message": f"the keeper failed: {type(error).__name__}: {error}"[:MAX_TEXT]}
    carried = {name: str(getattr(error, name))[-MAX_TEXT:] for name in _CARRIED if hasattr(error, name)}
    return {"type": type(error).__name__, "message": error.message[:MAX_TEXT], "hint": error.hint[:MAX_TEXT], **carried}


def unpack_error(raw: Mapping[str, Any]) -> PykataError:
    """The error that the other end packed, of the same type."""
    kind = getattr(errors, str(raw.get("type")), PykataError)
    if not (isinstance(kind, type) and issubclass(kind, PykataError)):
        kind = PykataError
    # Not by its own __init__, some of which compose the message of parts that it has already.
    error: PykataError = kind.__new__(kind)
    PykataError.__init__(error, str(raw.get("message", "")), hint=str(raw.get("hint", "")))
    for name in _CARRIED:
        if name in raw:
            setattr(error, name, str(raw[name]))
    return error
