"""The host's side of user-mode networking: what it makes, what goes wrong, and that nothing of it stays."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from pykata import NetworkError, ToolMissingError, ToolTooOldError, UserNetwork
from pykata.net import rootless
from pykata.net.base import Wanted
from pykata.net.working import working

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
    assert found["none"] == found["user"] == found["tcfilter"] == ""


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
        assert select.select([pidfd], [], [], 20)[0]
        os.close(pidfd)


def grandchildren(pid: int) -> list[int]:
    found = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(each for one in found for each in grandchildren(one))]
