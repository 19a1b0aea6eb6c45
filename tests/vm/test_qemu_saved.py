"""Machines that go on from where another one was saved, with a real kernel in them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from pykata.errors import VMError
from pykata.guest import Bundle
from pykata.hypervisors.qemu import QEMU
from pykata.spec import Disk, SavedVM, VMSpec
from pykata.transport import connect
from tests.vm.qemu_guest import Guest, booted, initrd

Machine = Literal["microvm", "q35"]
NOWHERE = Path("/nonexistent")


@pytest.fixture(scope="module")
def ramdisk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initrd(tmp_path_factory.mktemp("initrd") / "initrd.cpio")


@pytest.fixture
def image(tmp_path: Path) -> Disk:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "name").write_text("the image\n")
    (tree / "big").write_bytes(os.urandom(3_000_000))
    path = tmp_path / "image.squashfs"
    subprocess.run(["mksquashfs", tree, path, "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)
    return Disk("image", path)


@asynccontextmanager
async def restored(qemu: QEMU, saved: SavedVM) -> AsyncIterator[Guest]:
    """A machine that goes on from a saved one."""
    async with qemu.transport(NOWHERE) as transport:
        spec = VMSpec(NOWHERE, NOWHERE, transport, memory=128, saved=saved)
        async with qemu.boot(spec, NOWHERE) as vm:
            yield Guest(vm, await connect(transport))


@pytest.mark.parametrize("machine", ["microvm", "q35"])
async def test_two_go_on_and_so_does_the_first(machine: Machine, bundle: Bundle, ramdisk: Path) -> None:
    qemu = QEMU(machine, "tcg")
    async with booted(qemu, bundle.kernel, ramdisk) as parent:
        await parent.run("x=before; mkdir /tmp; echo old > /tmp/file")
        async with parent.vm.saved() as saved, AsyncExitStack() as stack:
            children = [await stack.enter_async_context(restored(qemu, saved)) for _ in range(2)]
            for number, guest in enumerate([parent, *children]):
                assert await guest.run(f"echo $x; cat /tmp/file; echo {number} > /tmp/file") == (0, "before\nold\n")
            for number, guest in enumerate([parent, *children]):
                assert await guest.run("cat /tmp/file") == (0, f"{number}\n")


async def test_one_that_went_on_can_be_saved_in_turn(bundle: Bundle, ramdisk: Path) -> None:
    qemu = QEMU(accel="tcg")
    async with AsyncExitStack() as stack:
        guest = await stack.enter_async_context(booted(qemu, bundle.kernel, ramdisk))
        await guest.run("mkdir /tmp; for i in $(seq 100); do echo $i$i$i$i > /tmp/$i; done")
        for generation in range(3):
            saved = await stack.enter_async_context(guest.vm.saved())
            guest = await stack.enter_async_context(restored(qemu, saved))
            assert await guest.run(f"echo {generation} > /tmp/{generation}") == (0, "")
        assert await guest.run("cat /tmp/0 /tmp/1 /tmp/2 /tmp/77; ls /tmp | wc -l") == (0, "0\n1\n2\n77777777\n101\n")


async def test_what_is_in_a_slot_stays_there(bundle: Bundle, ramdisk: Path, image: Disk) -> None:
    qemu = QEMU(accel="tcg", disk_slots=2)
    async with booted(qemu, bundle.kernel, ramdisk) as parent, AsyncExitStack() as stack:
        async with parent.vm.plug(image) as serial:
            assert await parent.run(f"mount -t squashfs -o ro $(disk {serial}) /mnt/a") == (0, "")
            child = await stack.enter_async_context(
                restored(qemu, await stack.enter_async_context(parent.vm.saved()))
            )
            await parent.run("umount /mnt/a")
        read = "cat /mnt/a/name; md5sum < /mnt/a/big > /dev/null"
        assert await child.run(read) == (0, "the image\n")
        async with child.vm.plug(image) as again:
            assert again == serial
        assert await child.run(f"umount /mnt/a; mount -t squashfs -o ro $(disk {serial}) /mnt/a; {read}") == (
            0, "the image\n"
        )  # fmt: skip


async def test_nobody_can_write_to_what_is_shared(bundle: Bundle, ramdisk: Path) -> None:
    async with booted(QEMU(accel="tcg"), bundle.kernel, ramdisk) as parent, parent.vm.saved() as saved:
        again = os.open(f"/proc/self/fd/{saved.memory}", os.O_RDWR)     # as QEMU opens it
        try:
            with pytest.raises(PermissionError):
                os.pwrite(again, b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(again, 0)
        finally:
            os.close(again)


async def test_a_paused_guest_stands_still(bundle: Bundle, ramdisk: Path) -> None:
    async with booted(QEMU(accel="tcg"), bundle.kernel, ramdisk) as guest:
        await guest.vm.pause()
        guest.stream.send(b"echo late\n")
        async with guest.vm.saved() as saved:       # which doesn't make it run
            assert saved.devices
        with pytest.raises(BlockingIOError):
            guest.stream.recv(1)
        await guest.vm.resume()
        assert (await guest.run("true"))[1].startswith("late\n")


async def test_a_state_that_is_none_ends_the_machine(bundle: Bundle, ramdisk: Path) -> None:
    qemu = QEMU(accel="tcg")
    async with booted(qemu, bundle.kernel, ramdisk) as parent, parent.vm.saved() as saved:
        damaged = SavedVM(saved.file, b"nothing of QEMU's")
        async with qemu.transport(NOWHERE) as transport:
            spec = VMSpec(NOWHERE, NOWHERE, transport, memory=128, saved=damaged)
            with pytest.raises(VMError, match=r"QEMU .*(exited with code 1|was killed)"):
                async with qemu.boot(spec, NOWHERE) as vm:
                    raise await vm.died()
