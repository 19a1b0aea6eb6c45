"""The host's end of the stream to the agent. The real vsock is tested where there is one: in the nested machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata import transport
from pykata.errors import HostError
from pykata.spec import VsockTransport
from tests.cancellation import cancel_everywhere


class Listener(socket.socket):
    """A listener whose callers come from the addresses that it is told."""

    cids: Iterator[int]

    def accept(self) -> tuple[socket.socket, Any]:
        stream, _ = super().accept()
        return stream, (next(self.cids), 1024)


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener(socket.AF_UNIX) as listener:
        listener.bind("")       # an abstract name of the kernel's choice, unix(7)
        listener.listen()
        listener.setblocking(False)
        yield listener


async def test_serial() -> None:
    with transport.serial() as both:
        assert await transport.connect(both) is both.host
        assert both.host.gettimeout() == 0
        assert not both.host.get_inheritable()
        assert not both.vmm.get_inheritable()
        both.vmm.send(b"hello")
        assert both.host.recv(9) == b"hello"
        both.vmm.close()
        assert both.host.recv(9) == b""
    assert both.host.fileno() == -1


async def test_vsock_takes_its_own_guest_only(listener: Listener) -> None:
    listener.cids = iter((5, 2, 7))
    name = listener.getsockname()
    with (
        socket.socket(socket.AF_UNIX) as stranger,
        socket.socket(socket.AF_UNIX) as another,
        socket.socket(socket.AF_UNIX) as guest,
    ):
        for dialling in (stranger, another, guest):
            dialling.connect(name)
        with anyio.fail_after(300), FileIO("/dev/null") as device:
            stream = await transport.connect(VsockTransport(listener, port=1, cid=7, device=device))
        with stream:
            assert stream.gettimeout() == 0
            guest.send(b"hello")
            assert stream.recv(9) == b"hello"
        assert stranger.recv(9) == another.recv(9) == b""
    assert listener.fileno() == -1      # nobody else can come


async def test_cancelled_while_nobody_dials(listener: Listener) -> None:
    async def gave_up() -> None:
        with anyio.move_on_after(0.01), FileIO("/dev/null") as device:
            await transport.connect(VsockTransport(listener, port=1, cid=7, device=device))

    async def nothing(n: int, way: str) -> None:
        pass

    assert await cancel_everywhere(gave_up, nothing) >= 1


def test_no_vsock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "VHOST_VSOCK", str(tmp_path / "none"))
    assert not transport.vsock_available()
    with pytest.raises(HostError, match=r"can't open .*/none: No such file.*modprobe"), transport.vsock():
        pass
