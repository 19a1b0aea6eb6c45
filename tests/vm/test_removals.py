"""Containers that are taken down while nobody waits for it, in a real guest."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from pykata import QEMU, DiskImage, Sandbox, Template, removals
from pykata.agent.v1 import Process, Start
from pykata.guest import Bundle
from pykata.requests import WINDOW
from tests.vm.conftest import BUSYBOX

LOUD = "setsid sh -c 'while :; do :; done' < /dev/null > /dev/null 2>&1 &"
"""Leaves something behind that nothing of the command's own tells of."""


@pytest.fixture(autouse=True)
def for_ever(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes that nobody needs."""
    monkeypatch.setattr(removals, "LINGER", 1e6)


async def there(sb: Sandbox) -> set[str]:
    """The containers in the guest, but for those that wait for a command."""
    running = sb._open
    return set((await running.agent.stats()).containers) - set(running.containers)


async def test_what_a_command_did_is_known_before_its_container_is_gone() -> None:
    async with Sandbox(isolation="emulated", template="off") as sb:
        assert (await sb.run(BUSYBOX, ["echo", "well"])).stdout == "well\n"
        assert len(await there(sb)) == 1
        assert (await sb.stats()).containers == {}
        assert await there(sb) == set()
        async with sb.process(BUSYBOX, ["echo", "up"]) as process:
            assert await process.wait() == 0
        (first,) = await there(sb)
        await sb.run(BUSYBOX, ["true"])
        assert first not in await there(sb)


async def test_ahead_of_http2_too() -> None:
    async with Template(BUSYBOX, isolation="emulated", spares=0) as template:
        async with template.sandbox() as sb:
            assert (await sb.run(BUSYBOX, ["echo", "well"])).stdout == "well\n"
            assert len(await there(sb)) == 1
            assert (await sb.run(BUSYBOX, ["echo", "again"])).stdout == "again\n"
            await sb._open.settled()
            assert await there(sb) == set()
        async with template.sandbox() as sb:
            await sb.run(BUSYBOX, ["true"])     # and left as it is


async def test_its_memory_is_free_for_the_next() -> None:
    async with Sandbox(isolation="emulated", template="off", disk="200M") as sb:
        fill = "dd if=/dev/zero of=/large bs=1M count=130 2> /dev/null"
        for _ in range(2):
            await sb.shell(BUSYBOX, fill, check=True)
        async with sb.container(BUSYBOX) as container:
            await container.shell(fill, check=True)
            await container.files.remove("/large")
            await sb.shell(BUSYBOX, fill, check=True)
            await container.shell(fill, check=True)


async def test_its_disk_slot_is_free_for_another_image(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "note").write_text("none of busybox\n")
    async with Sandbox(QEMU(disk_slots=1), isolation="emulated", template="off") as sb:
        for _ in range(2):
            assert (await sb.run(BUSYBOX, ["echo", "one"])).stdout == "one\n"
            assert (await sb.run(f"dir:{root}", ["/none"])).exit_code == 127


async def test_what_a_command_leaves_running_is_killed_at_once() -> None:
    async with Sandbox(isolation="emulated", template="off") as sb:
        await sb.shell(BUSYBOX, LOUD, check=True)
        with anyio.fail_after(300):
            while await there(sb):
                await anyio.lowlevel.checkpoint()


async def test_a_fork_and_a_pause_find_it_gone() -> None:
    async with Sandbox(isolation="emulated") as sb:
        await sb.run(BUSYBOX, ["true"])
        (child,) = await sb.fork()
        async with child:
            assert await there(child) == set()
            assert (await child.run(BUSYBOX, ["echo", "child"])).stdout == "child\n"
        await sb.run(BUSYBOX, ["true"])
        await sb.pause()
        await sb.resume()
        assert await there(sb) == set()


async def test_what_a_command_wrote_to_a_disk_is_there(tmp_path: Path) -> None:
    volume = DiskImage(tmp_path / "disk.img", size="32M")
    async with Sandbox(isolation="emulated", volumes={"/v": volume}) as sb:
        await sb.shell(BUSYBOX, "echo kept > /v/file", check=True)
        assert await there(sb) == set()


async def test_who_resets_the_call_has_it_removed() -> None:
    async with Sandbox(isolation="emulated", template="off") as sb, sb.container(BUSYBOX) as container:
        start = Start(container_id=container.id, process=Process(id="p", args=["true"]), window=WINDOW, last=True,
                      stdin_closed=True, lingers=True)
        async with sb._open.agent.run(start) as command:
            async for _ in command:
                pass
            assert container.id in (await sb._open.agent.stats()).containers
        with anyio.fail_after(300):
            while container.id in (await sb._open.agent.stats()).containers:
                await anyio.lowlevel.checkpoint()
