"""QEMUs that are newer than this machine's: those of Debian's other suites, fetched once.

What they may do differently, the tests of other files show; here these run with another QEMU.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from pykata import Bind, DiskImage, Network, Sandbox, UserNetwork, check
from pykata.hypervisors.qemu import QEMU, version
from pykata.hypervisors.qemu.vm import QemuVM
from tests.conftest import ROOT
from tests.outside import outside, serve
from tests.vm.conftest import BUSYBOX
from tests.vm.test_fork import (
    test_a_pause_stops_everything_but_the_clock as test_a_pause_stops_everything_but_the_clock,
)
from tests.vm.test_fork import test_a_snapshot_goes_on_later as test_a_snapshot_goes_on_later
from tests.vm.test_fork import test_processes_go_on_in_all as test_processes_go_on_in_all
from tests.vm.test_qemu_machine import ramdisk as ramdisk
from tests.vm.test_qemu_machine import test_boots as test_boots
from tests.vm.test_qemu_machine import test_disks_from_the_start as test_disks_from_the_start
from tests.vm.test_qemu_machine import test_freed_memory_comes_back as test_freed_memory_comes_back
from tests.vm.test_qemu_machine import test_killed as test_killed
from tests.vm.test_qemu_machine import test_more_cpus as test_more_cpus
from tests.vm.test_qemu_machine import test_panic as test_panic
from tests.vm.test_qemu_machine import test_what_qemu_has as test_what_qemu_has
from tests.vm.test_qemu_saved import image as image
from tests.vm.test_qemu_saved import (
    test_one_that_went_on_can_be_saved_in_turn as test_one_that_went_on_can_be_saved_in_turn,
)
from tests.vm.test_qemu_saved import test_two_go_on_and_so_does_the_first as test_two_go_on_and_so_does_the_first
from tests.vm.test_qemu_saved import test_what_is_in_a_slot_stays_there as test_what_is_in_a_slot_stays_there
from tests.vm.test_qemu_slots import images as images
from tests.vm.test_qemu_slots import test_one_slot_after_another_image as test_one_slot_after_another_image
from tests.vm.test_templates import empty as empty
from tests.vm.test_templates import (
    test_the_first_command_takes_the_container_that_waits as test_the_first_command_takes_the_container_that_waits,
)
from tests.vm.test_templates import (
    test_the_first_is_booted_and_the_others_are_not as test_the_first_is_booted_and_the_others_are_not,
)
from tests.vm.test_volumes import test_9p as test_9p
from tests.vm.test_volumes import test_directories_files_and_memory as test_directories_files_and_memory

Machine = Literal["microvm", "q35"]

pytestmark = pytest.mark.slow


@contextmanager
def readable() -> Iterator[Path]:
    """Where programs can be put that any user may execute: what root starts QEMU as is nobody."""
    folder = ROOT / "build"
    if all(parent.stat().st_mode & stat.S_IXOTH for parent in ROOT.parents) and ROOT.stat().st_mode & stat.S_IXOTH:
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="pykata-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["trixie", "trixie-backports"], autouse=True)
def newer(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The QEMU that all tests of this file use, by way of the environment."""
    with readable() as folder, pytest.MonkeyPatch.context() as patch:
        place = folder / f"qemu-{request.param}"
        subprocess.run([ROOT / "scripts" / "fetch-qemu", place, request.param], check=True)
        patch.setenv("PYKATA_QEMU", str(place / "qemu-system-x86_64"))
        yield place / "qemu-system-x86_64"


def complaints(sb: Sandbox) -> str:
    """What QEMU has written to its stderr: it tells there what it is going to do without in a later version."""
    vm = sb._open.vm
    assert isinstance(vm, QemuVM)
    return vm.complaints()


async def test_the_check_finds_it_and_it_works(newer: Path) -> None:
    assert await version.of_binary(newer) >= (10, 0)
    report = await check(QEMU(accel="tcg"))
    assert report.ok, report
    (found,) = [item.detail for item in report.items if item.name == "hypervisor"]
    assert str(newer) in found


@pytest.mark.parametrize("machine", ["microvm", "q35"])
async def test_nothing_that_we_ask_of_it_is_on_its_way_out(machine: Machine, tmp_path: Path) -> None:
    for name in ("virtiofs", "9p"):
        (tmp_path / name).mkdir()
    volumes: dict[str, Any] = {f"/{via}": Bind(tmp_path / via, via=via) for via in ("virtiofs", "9p")}
    volumes["/disk"] = DiskImage(tmp_path / "disk", size="16M")
    network = UserNetwork(via="qemu")
    qemu = QEMU(machine, accel="tcg")
    async with Sandbox(qemu, isolation="emulated", volumes=volumes, network=network, template="off") as sb:
        script = "for d in virtiofs 9p disk; do echo $d > /$d/file && cat /$d/file; done"
        assert (await sb.shell(BUSYBOX, script, check=True)).stdout.split() == ["virtiofs", "9p", "disk"]
        assert complaints(sb) == ""
    async with Sandbox(qemu, isolation="emulated", template="off") as parent, (await parent.fork(1))[0] as child:
        assert (await child.run(BUSYBOX, ["echo", "child"])).stdout == "child\n"
        assert (complaints(parent), complaints(child)) == ("", "")


@pytest.mark.parametrize("via", ["qemu", "slirp4netns"])
async def test_user_network(via: Literal["qemu", "slirp4netns"]) -> None:
    network = Network(UserNetwork(via=via))
    async with outside() as beyond, beyond.tcp(serve, 8000), Sandbox(isolation="emulated", network=network) as sb:
        done = await sb.shell(BUSYBOX, f"echo hi | nc {beyond.address} 8000", timeout=600)
    assert done.stdout == "hello from outside\n"
