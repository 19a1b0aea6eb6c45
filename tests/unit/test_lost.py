"""A server of files that ends: the guest is told, whoever had the files hears of it, and the rest goes on."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from attrs import define, field

from pykata import AgentRefusedError, CommandFailedError, Sandbox, ShareLostError, VMDiedError, VMError
from pykata.agent.client import AgentClient
from pykata.agent.v1 import CloneRequest
from pykata.spec import Attachment, Served, VhostFs
from pykata.testing import FakeFs, FakeHypervisor, FakeProcess, fake_bundle
from pykata.testing.faults import Moment
from pykata.testing.hypervisor import FakeVM
from tests.settling import settled

BUSYBOX = "builtin:busybox"


@define(eq=False)
class Serving(FakeFs):
    """Two virtio-fs devices whose servers end when they are told to."""

    ends: dict[str, anyio.Event] = field(factory=lambda: {tag: anyio.Event() for tag in ("fs-auto", "images")})
    name = "fake"
    shared = True

    @asynccontextmanager
    async def attach(self, run_dir: Path) -> AsyncIterator[Attachment]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            yield Attachment(
                devices=tuple(VhostFs(tag, ours) for tag in self.ends),
                served=tuple(Served(tag, self.ended(tag), of_images=tag == "images") for tag in self.ends),
            )

    def ended(self, tag: str):      # type: ignore[no-untyped-def]
        async def wait() -> str:
            await self.ends[tag].wait()
            return f"virtiofsd for {tag} was killed by SIGKILL"

        return wait


class Patient:
    """A command that ends when it is told to."""

    def __init__(self) -> None:
        self.end = anyio.Event()

    async def __call__(self, process: FakeProcess) -> int:
        await process.write(b"begun\n")
        await self.end.wait()
        await process.write(b"ended\n")
        return 0


async def aborted(hypervisor: FakeHypervisor, tag: str) -> None:
    """Wait until the guest was told."""
    while tag not in hypervisor.machines[0].agent.aborted:
        await anyio.lowlevel.checkpoint()


def root(tmp_path: Path) -> str:
    (tmp_path / "root").mkdir()
    return f"dir:{tmp_path}/root"


async def test_a_volume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command, fs = Patient(), Serving()
    hypervisor = FakeHypervisor({"patient": command})
    caplog.set_level(logging.WARNING, "pykata.lost")
    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor, fs) as sb, sb.container(BUSYBOX) as container:
            async with sb.process(BUSYBOX, ["patient"]) as process:
                assert await anext(process.stdout) == b"begun\n"
                assert process.lost is None
                done = await container.run(["echo", "before"])
                assert done.ok
                assert done.error is None
                fs.ends["fs-auto"].set()
                await aborted(hypervisor, "fs-auto")
                assert "because virtiofsd for fs-auto was killed by SIGKILL" in caplog.text
                command.end.set()
                assert await process.wait() == 0
                assert process.reason == "exit"
                assert isinstance(process.lost, ShareLostError)
            done = await container.run(["echo", "what is elsewhere can still be saved"])
            assert (done.stdout, done.reason, done.exit_code) == ("what is elsewhere can still be saved\n", "exit", 0)
            assert isinstance(done.error, ShareLostError)
            assert not done.ok
            with pytest.raises(CommandFailedError, match="'echo' ended with exit code 0; files of the host are lost"):
                done.check()
            for _ in range(2):
                with pytest.raises(ShareLostError, match="virtiofsd for fs-auto was killed by SIGKILL"):
                    await sb.run(BUSYBOX, ["true"])
                with pytest.raises(ShareLostError):
                    async with sb.container(BUSYBOX):
                        raise AssertionError("there is a container")


async def test_a_sandbox_that_is_left_has_lost_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its servers end as its machine does, before all the rest is undone."""
    fs, hypervisor = Serving(), FakeHypervisor()
    caplog.set_level(logging.WARNING, "pykata.lost")
    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor, fs) as sb:
            running = sb._open
            (machine,) = hypervisor.machines
            end = machine.end

            def end_with_servers(why: VMDiedError) -> None:
                end(why)
                for ended in fs.ends.values():
                    ended.set()

            async def takes_a_while() -> None:
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()

            monkeypatch.setattr(machine, "end", end_with_servers)
            assert running.waiting is not None
            running.waiting._held.push_async_callback(takes_a_while)
    assert all(ended.is_set() for ended in fs.ends.values())
    assert not running.losses
    assert not caplog.text


async def test_no_guest_goes_on_whose_machine_has_died(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fs, hypervisor = Serving(), FakeHypervisor()
    caplog.set_level(logging.WARNING, "pykata.lost")
    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor, fs) as sb:
            hypervisor.machines[0].die()
            for ended in fs.ends.values():
                ended.set()
            while len(sb._open.losses) < len(fs.ends):
                await anyio.lowlevel.checkpoint()
    assert "goes on" not in caplog.text


async def test_root_filesystems(tmp_path: Path) -> None:
    """Those of images that are disks are none of the host's files."""
    fs, image = Serving(), root(tmp_path)
    hypervisor = FakeHypervisor()
    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor, fs) as sb, sb.container(image) as shared, sb.container(BUSYBOX) as own:
            assert (await shared.run(["echo", "x"])).ok
            fs.ends["images"].set()
            await aborted(hypervisor, "images")
            for _ in range(2):
                with pytest.raises(ShareLostError, match="virtiofsd for images was killed by SIGKILL"):
                    await shared.run(["echo", "x"])
                with pytest.raises(ShareLostError):
                    await shared.files.read_bytes("/x")
                with pytest.raises(ShareLostError):
                    await sb.run(image, ["true"])
            assert (await own.run(["echo", "x"])).check().stdout == "x\n"
            assert (await sb.run(BUSYBOX, ["echo", "y"])).check().stdout == "y\n"


async def test_both(tmp_path: Path) -> None:
    fs, hypervisor = Serving(), FakeHypervisor()
    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor, fs) as sb:
            for tag in fs.ends:
                fs.ends[tag].set()
                await aborted(hypervisor, tag)
            with pytest.raises(ShareLostError):
                await sb.run(BUSYBOX, ["true"])
            assert (await sb.stats()).memory_total


@pytest.fixture
def pausable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(vm: FakeVM) -> None:
        pass

    monkeypatch.setattr(FakeVM, "pause", nothing)
    monkeypatch.setattr(FakeVM, "resume", nothing)
    monkeypatch.setattr(AgentClient, "clone", cloned)


async def cloned(agent: AgentClient, request: CloneRequest) -> None:
    """The fake agent doesn't know it."""


async def test_in_a_pause(tmp_path: Path, pausable: None) -> None:
    """The guest is asked when it goes on, and so the sandbox does."""
    fs, hypervisor = Serving(), FakeHypervisor()
    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor, fs) as sb, sb.container(BUSYBOX) as container:
            await sb.pause()
            fs.ends["fs-auto"].set()
            await settled()
            (machine,) = hypervisor.machines
            assert not machine.agent.aborted
            await sb.resume()
            await aborted(hypervisor, "fs-auto")
            assert isinstance((await container.run(["echo", "x"])).error, ShareLostError)


async def test_a_pause_while_the_guest_is_asked(tmp_path: Path, pausable: None) -> None:
    fs, hypervisor = Serving(), FakeHypervisor()
    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor, fs) as sb, sb.container(BUSYBOX) as container:
            (machine,) = hypervisor.machines
            paused = anyio.Event()

            async def in_vain(moment: Moment) -> None:
                if moment == "AbortShare":
                    machine.agent.before_call = None
                    await sb.pause()
                    paused.set()
                    raise AgentRefusedError("AbortShare: no answer", status="DEADLINE_EXCEEDED")

            machine.agent.before_call = in_vain
            fs.ends["fs-auto"].set()
            await paused.wait()
            await settled()
            assert not machine.agent.aborted
            await sb.resume()
            await aborted(hypervisor, "fs-auto")
            assert (await container.run(["echo", "x"])).exit_code == 0


async def test_a_machine_that_ends_in_a_pause(tmp_path: Path, pausable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hypervisor = FakeHypervisor()

    async def closed(vm: FakeVM) -> None:
        vm.end(VMDiedError("the virtual machine was killed"))
        raise VMError("the control channel is closed")

    monkeypatch.setattr(FakeVM, "resume", closed)
    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor) as sb:
            await sb.pause()
            with pytest.raises(VMDiedError, match="was killed"):
                await sb.resume()


async def test_a_guest_that_cant_go_on_without(tmp_path: Path) -> None:
    """An older one doesn't know the call."""
    command, fs = Patient(), Serving()

    async def refuse(moment: Moment) -> None:
        if moment == "AbortShare":
            raise AgentRefusedError("AbortShare: no such method", status="UNIMPLEMENTED")

    hypervisor = FakeHypervisor({"patient": command})
    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor, fs) as sb:
            (machine,) = hypervisor.machines
            machine.agent.before_call = refuse
            done = await sb.run(BUSYBOX, ["patient"], on_stdout=lambda _: fs.ends["fs-auto"].set())
            assert (done.reason, done.stdout) == ("vm_died", "begun\n")
            why = "the virtual machine was ended, because virtiofsd for fs-auto was killed by SIGKILL"
            assert str(done.error) == why
            with pytest.raises(VMDiedError, match=why):
                await sb.run(BUSYBOX, ["true"])
