"""The host's side of user-mode networking: what it makes, what goes wrong, and that nothing of it stays."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from attrs import evolve

from pykata import (
    ConfigError,
    NetworkError,
    NotPermittedError,
    PortInUseError,
    ToolMissingError,
    ToolTooOldError,
    UserNetwork,
)
from pykata.net import netns, rootless
from pykata.net.base import Wanted
from pykata.net.policy.rules import policy_of
from pykata.net.ports import parse_ports
from pykata.net.working import working
from pykata.spec import Nic

HOLDING = """
import asyncio, os, sys
from pathlib import Path
from pykata.net.base import Wanted
from pykata.net.user import UserNetwork

async def main():
    async with UserNetwork().attach(Path(sys.argv[1]), Wanted()):
        with open("/proc/self/task/%d/children" % os.getpid()) as file:
            print(file.read(), flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def attach(tmp_path: Path, network: UserNetwork) -> None:
    async with network.attach(tmp_path, Wanted()) as attachment:
        assert attachment.devices
        assert attachment.interfaces


async def test_many_at_once(tmp_path: Path) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(attach, tmp_path, UserNetwork(ipv6=True))


async def test_what_works_is_found_by_doing_it(tmp_path: Path) -> None:
    found = await working(tmp_path)
    assert found.lacks["none"] == found.lacks["user"] == found.lacks["tcfilter"] == ""
    assert found.via == "slirp4netns"


async def test_whether_a_guest_may_ping_is_said(tmp_path: Path) -> None:
    setting = Path("/proc/sys/net/ipv4/ping_group_range")
    async with netns.made() as made:
        with netns.inside(made):
            for groups, said in (("1 0", "sysctl -w net.ipv4.ping_group_range="), ("0 2147483647", "")):
                setting.write_text(groups)  # noqa: ASYNC240 - of this thread's namespace
                lacks = (await working(tmp_path)).lacks["ping with user"]
                assert said in lacks
                assert bool(lacks) == bool(said)


async def test_a_program_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_SLIRP4NETNS", program(tmp_path / "slirp4netns", "echo no way >&2; exit 3"))
    with pytest.raises(NetworkError, match="slirp4netns exited with code 3: no way"):
        await attach(tmp_path, UserNetwork())


async def test_a_program_that_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_SLIRP4NETNS", program(tmp_path / "slirp4netns", "exec sleep 3600"))
    monkeypatch.setattr(rootless, "PATIENCE", 0.2)
    with pytest.raises(NetworkError, match="slirp4netns made no interface"):
        await attach(tmp_path, UserNetwork())


async def test_cancelled_while_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = tmp_path / "began"
    os.mkfifo(began)
    script = f"echo > {began}; exec sleep 3600"
    monkeypatch.setenv("PYKATA_SLIRP4NETNS", program(tmp_path / "slirp4netns", script))
    async with anyio.create_task_group() as group:
        group.start_soon(attach, tmp_path, UserNetwork())
        await anyio.to_thread.run_sync(began.read_bytes)
        group.cancel_scope.cancel()


async def test_programs_that_are_missing_or_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_SLIRP4NETNS", "/nowhere/slirp4netns")
    with pytest.raises(ToolMissingError, match="PYKATA_SLIRP4NETNS='/nowhere/slirp4netns'"):
        await attach(tmp_path, UserNetwork(via="slirp4netns"))
    for said in ("passt unknown version", "passt 0.0~git20230309.7c7625d-1", ""):
        monkeypatch.setenv("PYKATA_PASTA", program(tmp_path / "pasta", f"echo '{said}'"))
        with pytest.raises(ToolTooOldError, match=f"{tmp_path}/pasta is too old"):
            await attach(tmp_path, UserNetwork(via="passt"))


async def test_where_nothing_is_installed_it_is_left_to_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("PYKATA_SLIRP4NETNS", "PYKATA_PASTA"):
        monkeypatch.setenv(name, "/nowhere/program")
    async with UserNetwork().attach(tmp_path, Wanted(ports=parse_ports([80]))) as attachment:
        assert attachment.via == ("qemu",)
        (port,) = attachment.published
        assert port.host
        (nic,) = attachment.devices
        assert isinstance(nic, Nic)
        assert nic.backend["hostfwd"] == [{"str": f"tcp:127.0.0.1:{port.host}-10.0.2.15:80"}]
        assert "slirp4netns" in caplog.text
        with socket.create_server(("127.0.0.1", port.host)):
            pass        # QEMU can listen there, which sets SO_REUSEADDR as this does, and nobody who doesn't
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port.host))


async def test_what_qemu_cannot_do_is_no_reason_to_do_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYKATA_SLIRP4NETNS", "PYKATA_PASTA"):
        monkeypatch.setenv(name, "/nowhere/program")
    for network, wanted, what in (
        (UserNetwork(), Wanted(policy=policy_of(["192.0.2.1"], (), None)), "enforce allow"),
        (UserNetwork(ipv6=True), Wanted(), "IPv6"),
        (UserNetwork(), Wanted(ports=parse_ports(["80/udp"])), "UDP"),
        (UserNetwork(), Wanted(ports=parse_ports(["[::1]:0:80"])), "IPv6"),
    ):
        with pytest.raises(ToolMissingError, match="neither slirp4netns nor passt"):
            async with network.attach(tmp_path, wanted):
                pass
        with pytest.raises(ConfigError, match=f"via='qemu' can't .*{what}"):
            async with evolve(network, via="qemu").attach(tmp_path, wanted):
                pass


async def test_qemu_has_no_right_to_ports_of_roots(tmp_path: Path) -> None:
    with pytest.raises(NotPermittedError, match="QEMU has no privileges"):
        async with UserNetwork(via="qemu").attach(tmp_path, Wanted(ports=parse_ports(["1023:80"]))):
            pass


async def test_a_port_in_use_is_no_reason_to_leave_it_to_qemu(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        for via in ("auto", "qemu"):
            with pytest.raises(PortInUseError, match=str(number)):
                async with UserNetwork(via=via).attach(tmp_path, Wanted(ports=parse_ports([f"{number}:80"]))):
                    pass


FORBIDDEN = """
import asyncio, sys
from pathlib import Path
from pykata.net.base import Wanted
from pykata.net.user import UserNetwork

async def main():
    async with UserNetwork().attach(Path(sys.argv[1]), Wanted()) as attachment:
        print(*attachment.via)
    async with UserNetwork(via="slirp4netns").attach(Path(sys.argv[1]), Wanted()):
        pass

asyncio.run(main())
"""
NONE_BELOW = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


def test_where_namespaces_are_forbidden_it_is_left_to_qemu(tmp_path: Path) -> None:
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", NONE_BELOW, "sh", sys.executable, "-c", FORBIDDEN]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout == "qemu\n"
    assert "unshare user: No space left on device" in done.stderr


def test_all_of_it_ends_with_a_program_that_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout:
        children = [int(each) for each in holder.stdout.readline().split()]
        assert len(children) == 1
        pidfds = [os.pidfd_open(each) for each in (*children, *grandchildren(children[0]))]
        assert len(pidfds) == 3     # the program, the namespace's process, and the one that is shown
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 120)[0]
        os.close(pidfd)


def grandchildren(pid: int) -> list[int]:
    found = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(each for one in found for each in grandchildren(one))]
