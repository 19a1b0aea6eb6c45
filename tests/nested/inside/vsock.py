"""Run by pytest inside the nested machine: the agent over vsock, and who else can't use it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

import anyio
import pytest

import pykata
from pykata import QEMU, Sandbox, transport
from pykata.guest import find_bundle
from pykata.spec import VMSpec, VsockTransport
from tests.nested.inside.probe import dialler

pytestmark = pytest.mark.slow

Machine = Literal["microvm", "q35"]
MACHINES: tuple[Machine, ...] = ("microvm", "q35")
LOCAL = 1               # VMADDR_CID_LOCAL, vsock(7): this very machine
HOST = 2                # VMADDR_CID_HOST
REFUSED = {errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT}


def vsock(machine: Machine = "microvm") -> Sandbox:
    return Sandbox(QEMU(machine=machine, agent="vsock"))


def vsock_sockets() -> Iterator[socket.socket]:
    """Those that this process has open."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
        except OSError:             # it was the listing's own
            continue
        with socket.socket(fileno=os.dup(int(name))) as found:
            if found.family == socket.AF_VSOCK:
                yield found


def peers() -> set[int]:
    """The CIDs that this process is connected to."""
    found = set()
    for one in vsock_sockets():
        try:
            found.add(one.getpeername()[0])
        except OSError:             # it listens
            continue
    return found


def argv_of(sandbox: Sandbox) -> list[str]:
    """QEMU's command line."""
    return Path(f"/proc/{sandbox._open.vm.pid}/cmdline").read_bytes().decode().split("\0")


def cid_of(sandbox: Sandbox) -> int:
    """The guest's address."""
    devices = [json.loads(value) for option, value in itertools.pairwise(argv_of(sandbox)) if option == "-device"]
    (cid,) = [device["guest-cid"] for device in devices if "guest-cid" in device]
    return int(cid)


def port_of(sandbox: Sandbox) -> int:
    """Where the agent dialled."""
    (append,) = [value for option, value in itertools.pairwise(argv_of(sandbox)) if option == "-append"]
    (port,) = [word.partition("=")[2] for word in append.split() if word.startswith("pykata.vsock=")]
    return int(port)


@pytest.mark.parametrize("machine", MACHINES)
async def test_the_agent_is_reached_over_vsock(machine: Machine) -> None:
    data = os.urandom(3_000_000)
    async with vsock(machine) as sb:
        assert sb.accel == "kvm"
        assert peers() == {cid_of(sb)}
        done = await sb.run("builtin:busybox", ["sh", "-c", "echo err >&2; cat; exit 7"], input=data)
        assert (done.exit_code, done.stderr_bytes) == (7, b"err\n")
        assert done.stdout_bytes == data
    assert not list(vsock_sockets())


async def test_several_at_once() -> None:
    async with AsyncExitStack() as stack:
        sandboxes = [await stack.enter_async_context(vsock()) for _ in range(3)]
        cids = {cid_of(sb) for sb in sandboxes}
        assert len(cids) == 3
        assert min(cids) > HOST
        assert peers() == cids
        for number, sb in enumerate(sandboxes):
            done = await sb.run("builtin:busybox", ["sh", "-c", f"echo {number}; cat /proc/sys/kernel/hostname"])
            assert done.stdout.splitlines() == [str(number), sb.options.hostname]


async def test_a_cid_is_free_again() -> None:
    async with vsock() as sb:
        cid = cid_of(sb)
        assert not reservable(cid)
    assert reservable(cid)


def reservable(cid: int) -> bool:
    device = os.open(transport.VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, transport.SET_GUEST_CID, struct.pack("Q", cid))
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise
        return False
    else:
        return True
    finally:
        os.close(device)


async def test_a_vmm_that_is_killed_ends_the_command() -> None:
    async with vsock() as sb, sb.process("builtin:busybox", ["sh", "-c", "echo ready; sleep 1000"]) as process:
        assert await anext(process.stdout) == b"ready\n"
        os.kill(sb._open.vm.pid, signal.SIGKILL)
        with pytest.raises(pykata.VMDiedError, match="SIGKILL"):
            await process.wait()


async def test_a_guest_that_dies_before_its_agent_dials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = find_bundle()
    bundle = tmp_path / "bundle"
    await anyio.to_thread.run_sync(shutil.copytree, whole.path, bundle)
    (bundle / whole.initrd.name).write_bytes(bytes(whole.initrd.stat().st_size))      # the kernel finds no init
    monkeypatch.setenv("PYKATA_BUNDLE", str(bundle))
    with pytest.raises(pykata.BootError, match="panicked") as raised:
        async with Sandbox(QEMU(agent="vsock"), boot_timeout=600):
            pass
    assert not isinstance(raised.value, pykata.BootTimeoutError)
    assert not list(vsock_sockets())


async def test_a_guest_that_is_frozen_can_be_left() -> None:
    async with vsock() as sb:
        os.kill(sb._open.vm.pid, signal.SIGSTOP)
    assert not list(vsock_sockets())


# --- others ---


def test_the_dialler_dials(tmp_path: Path) -> None:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        port = listener.getsockname()[1]
        assert dialled_here(port, tmp_path) == errno.ECONNRESET
        listener.listen()
        assert dialled_here(port, tmp_path) == 0


def dialled_here(port: int, folder: Path) -> int:
    program = folder / "dial"
    program.write_bytes(dialler(LOCAL, port))
    program.chmod(0o700)
    return subprocess.run([program], check=False).returncode


async def test_a_container_reaches_neither_the_listener_nor_the_agent() -> None:
    async with vsock() as sb:
        port = port_of(sb)
        for cid in (HOST, LOCAL, cid_of(sb)):
            dial = "cat > /dial && chmod 755 /dial && exec /dial"
            done = await sb.run("builtin:busybox", ["sh", "-c", dial], input=dialler(cid, port))
            assert (done.reason, done.stderr) == ("exit", "")
            assert done.exit_code in REFUSED, f"vsock:{cid}:{port}: {errno.errorcode.get(done.exit_code or 0)}"


async def test_nobody_can_dial_once_the_agent_has(tmp_path: Path) -> None:
    async with vsock() as sb:
        assert await anyio.to_thread.run_sync(dialled_here, port_of(sb), tmp_path) == errno.ECONNRESET


async def test_a_local_process_is_turned_away() -> None:
    with transport.vsock() as ours, socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as stranger:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transport.connect, ours)
            await anyio.to_thread.run_sync(stranger.connect, (LOCAL, ours.port))
            assert await anyio.to_thread.run_sync(stranger.recv, 1) == b""
            tasks.cancel_scope.cancel()


async def test_another_guest_is_turned_away(tmp_path: Path) -> None:
    hypervisor, bundle = QEMU(agent="vsock"), find_bundle()

    def spec(through: VsockTransport) -> VMSpec:
        return VMSpec(kernel=bundle.kernel, initrd=bundle.initrd, transport=through)

    async with AsyncExitStack() as stack:
        ours = stack.enter_context(transport.vsock())
        other = stack.enter_context(transport.vsock())
        # The other guest is told to dial our port.
        stranger = VsockTransport(listener=ours.listener, port=ours.port, cid=other.cid, device=other.device)
        await stack.enter_async_context(hypervisor.boot(spec(stranger), tmp_path))
        first = await accepted(ours.listener)
        assert first == other.cid
        # It dials again and again, as our own guest boots.
        await stack.enter_async_context(hypervisor.boot(spec(ours), tmp_path))
        with await transport.connect(ours) as stream:
            assert stream.getpeername()[0] == ours.cid


async def accepted(listener: socket.socket) -> int:
    """Accept one connection, close it; whose it was."""
    await anyio.wait_readable(listener)
    stream, (cid, _) = listener.accept()
    stream.close()
    return int(cid)
