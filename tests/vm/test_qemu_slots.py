"""Images that come and go while a real kernel runs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

import anyio
import pytest

from pykata.errors import ConfigError, HostError, VMError
from pykata.guest import Bundle
from pykata.hypervisors.qemu import QEMU, slots
from pykata.spec import Disk
from tests.cancellation import cancel_everywhere
from tests.settling import settled
from tests.vm.qemu_guest import Guest, booted, inherited, initrd

Machine = Literal["microvm", "q35"]


@pytest.fixture(scope="module")
def ramdisk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initrd(tmp_path_factory.mktemp("initrd") / "initrd.cpio")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Disk]:
    """Images that differ in content and size."""
    work = tmp_path_factory.mktemp("images")
    disks = []
    for number in range(4):
        tree = work / f"tree{number}"
        tree.mkdir()
        (tree / "name").write_text(f"image {number}\n")
        (tree / "big").write_bytes(os.urandom(300_000 * (4 - number)))
        image = work / f"{number}.squashfs"
        subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)
        disks.append(Disk(f"image{number}", image))
    return disks


async def shown(guest: Guest, serial: str, at: str = "/mnt/a") -> str:
    """Mount the disk, read all of it, unmount it."""
    read = f"mount -t squashfs -o ro $(disk {serial}) {at} && cat {at}/name && cat {at}/big >/dev/null; umount {at}"
    code, said = await guest.run(read)
    assert code == 0
    return said.strip()


@pytest.mark.parametrize("machine", ["microvm", "q35"])
async def test_one_slot_after_another_image(
    machine: Machine, bundle: Bundle, ramdisk: Path, images: list[Disk]
) -> None:
    async with booted(QEMU(machine, "tcg", disk_slots=1), bundle.kernel, ramdisk) as guest:
        for number in (0, 1, 2, 1, 3, 0):
            async with guest.vm.plug(images[number]) as serial:
                assert serial == "slot0"
                assert await shown(guest, serial) == f"image {number}"
        # Nothing of them is left in QEMU.
        assert not [name for name in inherited(guest.vm.pid) if "squashfs" in name]
        # Nor a complaint of the guest's, such as reads beyond the end of an image.
        assert "error" not in guest.vm.console().lower().replace("acpi bios error", "")


async def test_all_slots_at_once(bundle: Bundle, ramdisk: Path, images: list[Disk]) -> None:
    async with booted(QEMU(accel="tcg", disk_slots=4), bundle.kernel, ramdisk) as guest, AsyncExitStack() as stack:
        plugged = [await stack.enter_async_context(guest.vm.plug(image)) for image in images]
        assert sorted(plugged) == ["slot0", "slot1", "slot2", "slot3"]
        assert [await shown(guest, serial) for serial in plugged] == [f"image {number}" for number in range(4)]


async def test_the_same_image_takes_one_slot(bundle: Bundle, ramdisk: Path, images: list[Disk]) -> None:
    async with booted(QEMU(accel="tcg", disk_slots=1), bundle.kernel, ramdisk) as guest:
        plug = guest.vm.plug
        async with AsyncExitStack() as stack:
            serials = [await stack.enter_async_context(plug(images[0])) for _ in range(3)]
            assert serials == ["slot0"] * 3
            async with plug(images[0]) as serial:
                assert await shown(guest, serial) == "image 0"
            assert await shown(guest, "slot0") == "image 0"     # three users are left
        async with plug(images[1]) as serial:
            assert await shown(guest, serial) == "image 1"


async def test_waiting_is_fair(bundle: Bundle, ramdisk: Path, images: list[Disk]) -> None:
    order: list[int] = []

    async def use(guest: Guest, number: int) -> None:
        async with guest.vm.plug(images[number]) as serial:
            assert await shown(guest, serial) == f"image {number}"
            order.append(number)

    async with booted(QEMU(accel="tcg", disk_slots=1), bundle.kernel, ramdisk) as guest:
        async with anyio.create_task_group() as tasks, guest.vm.plug(images[0]):
            for number in (3, 1, 2):
                tasks.start_soon(use, guest, number)
                await settled()
            assert order == []
        assert order == [3, 1, 2]


async def test_a_dead_machine(bundle: Bundle, ramdisk: Path, images: list[Disk]) -> None:
    """Who has a disk unplugs it, who waits for a slot and who comes later gets an error."""
    async with booted(QEMU(accel="tcg", disk_slots=1), bundle.kernel, ramdisk) as guest:
        async def wait_for_a_slot() -> None:
            with pytest.raises(VMError, match="ended while this waited"):
                async with guest.vm.plug(images[1]):
                    pass

        with anyio.fail_after(300):
            async with anyio.create_task_group() as tasks, guest.vm.plug(images[0]):
                tasks.start_soon(wait_for_a_slot)
                await settled()
                os.kill(guest.vm.pid, signal.SIGKILL)
            with pytest.raises(VMError, match="has ended, so nothing"):
                async with guest.vm.plug(images[0]):
                    pass


async def test_what_cant_be_plugged(bundle: Bundle, ramdisk: Path, images: list[Disk], tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(4097))
    async with booted(QEMU(accel="tcg", disk_slots=1), bundle.kernel, ramdisk) as guest:
        for disk, error, said in (
            (Disk("a", tmp_path / "none"), HostError, "No such file"),
            (Disk("a", images[0].path, readonly=False), ConfigError, "is writable"),
            (Disk("a", odd), ConfigError, "4097 bytes, no multiple of 4096"),
        ):
            with pytest.raises(error, match=said):
                async with guest.vm.plug(disk):
                    pass
        # A directory opens, but is no image: QEMU says so, and the slot is free again.
        with pytest.raises(VMError):
            async with guest.vm.plug(Disk("a", tmp_path)):
                pass
        async with guest.vm.plug(images[2]) as serial:
            assert await shown(guest, serial) == "image 2"


async def test_cancelled_anywhere(bundle: Bundle, ramdisk: Path, images: list[Disk]) -> None:
    """No cancellation loses the slot, and none leaves an image in it."""
    async with booted(QEMU(accel="tcg", disk_slots=1), bundle.kernel, ramdisk) as guest:
        async def plug() -> None:
            async with guest.vm.plug(images[0]) as serial:
                assert serial == "slot0"

        async def plug_when_free() -> None:
            free = asyncio.Event()

            async def occupy() -> None:
                async with guest.vm.plug(images[1]):
                    await free.wait()

            holding = asyncio.ensure_future(occupy())
            try:
                await settled()
                asyncio.get_running_loop().call_later(0.01, free.set)
                await plug()
            finally:
                free.set()
                while not holding.done():
                    with anyio.CancelScope(shield=True):
                        await asyncio.wait([holding])

        async def works(n: int, way: str) -> None:
            with anyio.fail_after(300):
                async with guest.vm.plug(images[2]) as serial:
                    assert await shown(guest, serial) == "image 2"

        assert await cancel_everywhere(plug, works) >= 2
        assert await cancel_everywhere(plug_when_free, works) >= 2


async def test_a_slot_that_nobody_leaves_is_not_waited_for_for_ever(
    bundle: Bundle, ramdisk: Path, images: list[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PATIENCE", 0.2)
    async with booted(QEMU("microvm", "tcg", disk_slots=1), bundle.kernel, ramdisk) as guest:
        async with guest.vm.plug(images[0]):
            with pytest.raises(HostError, match="all 1 disk slots"):
                async with guest.vm.plug(images[1]):
                    pass
        async with guest.vm.plug(images[1]) as serial:
            assert await shown(guest, serial) == "image 1"
    async with booted(QEMU("microvm", "tcg", disk_slots=0), bundle.kernel, ramdisk) as guest:
        with pytest.raises(ConfigError, match="no disk slot"):
            async with guest.vm.plug(images[0]):
                pass
