"""The way between QEMU and a userspace switch: what is passed on, and what goes wrong."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from pykata import ConfigError, NetworkError, NotPermittedError, VhostUser
from pykata.net.base import Wanted
from pykata.net.vhost_proxy import LONGEST
from pykata.spec import VhostNet


@asynccontextmanager
async def between(tmp_path: Path, **options: str) -> AsyncIterator[tuple[socket.socket, socket.socket, object]]:
    """The ends of a switch and of a VMM, and what waits for the switch's."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "switch"))
        listener.listen()
        async with VhostUser(tmp_path / "switch", **options).attach(tmp_path, Wanted()) as attachment:  # type: ignore[arg-type]
            switch, _ = listener.accept()
            (nic,) = attachment.devices
            assert isinstance(nic, VhostNet)
            with switch, socket.socket(socket.AF_UNIX) as vmm:
                vmm.connect(f"/proc/self/fd/{nic.place}")
                for each in (switch, vmm):
                    each.setblocking(False)
                yield switch, vmm, attachment.lost[0]


def message(payload: bytes) -> bytes:
    return struct.pack("=III", 1, 1, len(payload)) + payload


async def taken(end: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """So many bytes, and the descriptors that came with the first of them."""
    await anyio.wait_readable(end)
    data, descriptors, _, _ = socket.recv_fds(end, size, 8)
    while len(data) < size:
        await anyio.wait_readable(end)
        data += end.recv(size - len(data))
    return data, list(descriptors)


async def test_descriptors_come_with_the_message_that_they_are_of(tmp_path: Path) -> None:
    async with between(tmp_path) as (switch, vmm, _):
        for source, target in ((vmm, switch), (switch, vmm)):
            plain, laden = message(b"plain"), message(bytes(2000))
            read, write = os.pipe()
            source.send(plain)
            socket.send_fds(source, [laden[:700]], [read, write])
            source.send(laden[700:] + plain)
            assert await taken(target, len(plain)) == (plain, [])
            data, descriptors = await taken(target, len(laden))
            assert data == laden
            assert [os.fstat(each).st_ino for each in descriptors] == [os.fstat(read).st_ino] * 2
            assert await taken(target, len(plain)) == (plain, [])
            for each in (read, write, *descriptors):
                os.close(each)


async def test_a_switch_that_leaves_is_told_of(tmp_path: Path) -> None:
    async with between(tmp_path) as (switch, vmm, lost):
        switch.close()
        assert await lost() == f"the switch at {tmp_path}/switch closed its connection"     # type: ignore[operator]
        await anyio.wait_readable(vmm)
        assert vmm.recv(1) == b""


async def test_a_vmm_that_leaves_is_no_fault_of_the_switch(tmp_path: Path) -> None:
    async with between(tmp_path) as (switch, vmm, lost):
        vmm.close()
        await anyio.wait_readable(switch)
        assert switch.recv(1) == b""
        with anyio.move_on_after(0.05) as waiting:
            await lost()        # type: ignore[operator]
        assert waiting.cancelled_caught


@pytest.mark.parametrize("garbage", [struct.pack("=III", 1, 1, LONGEST + 1), b"\0" * 5])
async def test_what_is_no_message_ends_it(tmp_path: Path, garbage: bytes) -> None:
    async with between(tmp_path) as (switch, vmm, lost):
        switch.send(garbage)
        switch.shutdown(socket.SHUT_WR)
        said = await lost()     # type: ignore[operator]
        what = f"a message of {LONGEST + 1} bytes" if len(garbage) == 12 else "half a message"
        assert said == f"the switch at {tmp_path}/switch broke the protocol: {what}"
        await anyio.wait_readable(vmm)
        assert vmm.recv(1) == b""


async def test_left_before_the_vmm_comes(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "switch"))
        listener.listen()
        async with VhostUser(tmp_path / "switch").attach(tmp_path, Wanted()):
            assert (tmp_path / "switch.sock").exists()
    assert not (tmp_path / "switch.sock").exists()


async def test_switches_that_cannot_be_reached(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    for name, what in (("none", "there is no socket"), ("file", "is no socket"), ("dead", "no switch listens")):
        with pytest.raises(NetworkError, match=what):
            async with VhostUser(tmp_path / name).attach(tmp_path, Wanted()):
                pass


async def test_a_socket_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(NotPermittedError, match="may not be opened"):
        async with VhostUser("/nowhere/switch").attach(tmp_path, Wanted()):
            pass


@pytest.mark.parametrize("options", [
    {"socket": ""}, {"socket": 5}, {"mac": "01:00:00:00:00:01"}, {"mac": "x"}, {"queues": 0}, {"queues": True},
    {"queues": 9}, {"mtu": -1}, {"addresses": "10.0.0.1/24"}, {"addresses": ["x"]}, {"gateway": "x"},
])  # fmt: skip
def test_what_cannot_be_right_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        VhostUser(**{"socket": "/run/switch", **options})     # type: ignore[arg-type]
