"""Volumes: what is refused at the door, where they are in the guest, and what QEMU is told of them."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata import (
    Bind,
    ConfigError,
    DiskImage,
    FsspecVolume,
    HostError,
    Named,
    Sandbox,
    Template,
    Tmpfs,
    ToolFailedError,
    ToolTooOldError,
    VolumeInUseError,
    list_volumes,
    remove_volume,
)
from pykata.fs.virtiofs import _kind_of, options, served
from pykata.host import run_tool
from pykata.hypervisors.qemu import QEMU
from pykata.hypervisors.qemu.command import Descriptors, command
from pykata.images.superblock import block_size
from pykata.lost import ended_with
from pykata.spec import (
    MIB,
    PMEM_UNIT,
    VOLUMES,
    Attachment,
    Disk,
    Mount,
    NineP,
    Pmem,
    Security,
    SerialTransport,
    Shared,
    VhostFs,
    VMSpec,
)
from pykata.testing import FakeFs, FakeHypervisor, fake_bundle
from pykata.volumes import check_volumes
from pykata.volumes.attached import places
from pykata.volumes.disk import disk


def test_a_path_is_a_volume_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    assert check_volumes({"/data//x/": "data"}) == {"/data/x": Bind(tmp_path / "data", readonly=False, via="virtiofs")}


def test_one_below_another_comes_after_it(tmp_path: Path) -> None:
    volumes = check_volumes({"/a/b": Tmpfs("1M"), "/a": str(tmp_path), "/c": Bind(tmp_path, readonly=True)})
    assert [place.destination for place in places(volumes)] == ["/a", "/a/b", "/c"]
    assert [place.source for place in places(volumes)] == [
        f"{VOLUMES}/fs-auto/0", f"{VOLUMES}/tmpfs1", f"{VOLUMES}/fs-auto/2",
    ]  # fmt: skip
    assert [place.readonly for place in places(volumes)] == [False, False, True]


@pytest.mark.parametrize(("volumes", "said"), [
    (["/a"], "is not a mapping"),
    ({"data": "."}, r"'data' that is no absolute path"),
    ({"": "."}, "no absolute path"),
    ({"/a\0": "."}, "no absolute path"),
    ({"/a/../proc": "."}, r"with '\.\.' in it"),
    ({"/" + "x/" * 1000: "."}, "of 2000 characters"), ({"/" + "x" * 256: "."}, "a name of more than 255 bytes"),
    ({"/a\udcff": "."}, "is not text in UTF-8"),
    ({"/": "."}, "over what belongs"), ({"//": "."}, "over what belongs"), ({"/./": "."}, "over what belongs"),
    ({"/proc": "."}, "over what belongs"), ({"/proc/self": "."}, "over what belongs"),
    ({"/sys/": "."}, "over what belongs"), ({"//dev/shm": "."}, "over what belongs"),
    ({"/a": "/nowhere/at/all"}, r"volumes\['/a'\]: there is no '/nowhere/at/all' \(make it first"),
    ({"/a": "/dev/null"}, "neither a directory nor a file"),
    ({"/a/": __file__}, "is a file, and the place ends in"),
    ({"/a": None}, "is no volume"), ({"/a": 3}, "is no volume"), ({"/a": ""}, "is not a path"),
    ({"/a": "x\0y"}, "is not a path"), ({"/a": "/\ud800"}, "is not a path"),
    ({"/a": "/" + "x" * 256}, r"volumes\['/a'\]: can't look at '/x+': File name too long .correct the path"),
    ({"/a": DiskImage("/" + "x" * 256, size="8M")}, "can't look at '/x+': File name too long"),
    ({"/a": __file__ + "/x"}, "there is no "),
    ({"/a": DiskImage("/nowhere")}, "there is no '/nowhere' .size= makes it"),
    ({"/a": DiskImage("/nowhere/at", size="8M")}, "there is no '/nowhere/at'"),
    ({"/a": DiskImage("/nowhere", size="8M", readonly=True)}, "there is no '/nowhere'"),
    ({"/a": DiskImage("/dev/null")}, "neither a file nor a block device"),
    ({"/a": DiskImage("/")}, "neither a file nor a block device .a directory is a Bind"),
    ({"/a": DiskImage(__file__, readonly=True, device="pmem")}, "bytes, no multiple of 2 MiB .*truncate --size=%2M"),
    ({"/a": ".", "/a/": "."}, "has a place twice"),
    ({f"/{n}": "." for n in range(65)}, "has 65 volumes"),
])  # fmt: skip
def test_what_cant_be_a_volume(volumes: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sandbox(FakeHypervisor(), FakeFs(), volumes=volumes)


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Tmpfs("many"), "size='many'"), (lambda: Tmpfs("1B"), "leaves nothing"),
    (lambda: Tmpfs("999999999T"), "size='999999999T' is not a size"),
    (lambda: Tmpfs("1M", files=2**31 + 1), "is not a number of files .* to 2147483648"),
    (lambda: Bind(".", readonly=None), "readonly=None is neither"),  # type: ignore[arg-type]
    (lambda: Named("n", readonly="no"), "readonly='no' is neither"),  # type: ignore[arg-type]
    (lambda: FsspecVolume(fsspec.filesystem("memory"), buffer=0), "buffer=0 leaves nothing"),
    (lambda: Tmpfs("1M", files=0), "files=0"), (lambda: Tmpfs("1M", files=True), "files=True"),
    (lambda: Bind(".", cache="sometimes"), "cache='sometimes' is unknown"),  # type: ignore[arg-type]
    (lambda: DiskImage("x", size="1M"), "too small for a filesystem"),
    (lambda: DiskImage("x", size="8M", files=0), "files=0"),
    (lambda: DiskImage("x", device="pmem"), "device='pmem' is for raw disks that are only read"),
    (lambda: DiskImage("x", readonly=True, format="qcow2", device="pmem"), "device='pmem' is for raw disks"),
    (lambda: DiskImage("x", device="nvme"), "device='nvme' is unknown"),  # type: ignore[arg-type]
    (lambda: Bind(".", via="nfs"), "via='nfs' is unknown"),  # type: ignore[arg-type]
    (lambda: Bind(3), "3 is not a path"),
    (lambda: Bind(".", size="1G"), r"size='1G'.*no limit .*Named\('NAME', size=, files=\)"),  # type: ignore[arg-type]
    (lambda: FsspecVolume(fsspec.filesystem("memory"), files=0), "files=0"),
    (lambda: FsspecVolume(fsspec.filesystem("memory"), size="1K"), "size='1K' leaves nothing"),
    (lambda: Bind(".", files=7), r"files=7"),  # type: ignore[arg-type]
    (lambda: Bind(".", via="9p", security="mapped"), "security='mapped' is unknown"),  # type: ignore[arg-type]
    (lambda: Bind(".", via="9p", security="passthrough"), "the VMM would need the right to give files away"),  # type: ignore[arg-type]
    (lambda: Bind(".", security="mapped-xattr"), "security='mapped-xattr' is for 9p, and via='auto'"),
    (lambda: Named("n", via="virtiofs", security="mapped-file"), "is for 9p, and via='virtiofs'"),
])  # fmt: skip
def test_values_that_cant_be(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read everything, so that is what is faked.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="may not be read by uid"):
        check_volumes({"/a": tmp_path})


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cant_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def stat(path: Path, **more: Any) -> os.stat_result:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "stat", stat)
    why = rf"can't look at '.*/x': {os.strerror(number)}"
    for volume in (Bind(tmp_path / "x"), DiskImage(tmp_path / "x"), DiskImage(tmp_path / "x", size="8M")):
        with pytest.raises(ConfigError, match=why) as caught:
            check_volumes({"/a": volume})
        assert ("let into the directories" in str(caught.value)) == (number == errno.EACCES)


def test_a_place_below_a_volume_that_is_only_read(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    volumes: dict[str, Any] = {"/a": Bind(tmp_path, readonly=True), "/a/there": Tmpfs("1M"), "/a/there/x": Tmpfs("1M")}
    check_volumes(volumes)      # what is below another one is that one's affair
    why = r"volumes\['/a/b/c'\]: '/a' is read-only, and there is no '.*/b/c' to put it over .make it first"
    with pytest.raises(ConfigError, match=why):
        check_volumes(volumes | {"/a/b/c": Tmpfs("1M")})
    check_volumes({"/a": tmp_path, "/a/b/c": Tmpfs("1M"), "/ab": Bind(tmp_path, readonly=True), "/abc": Tmpfs("1M")})


def test_a_link_in_such_a_volume_leads_through_the_container(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to("/a/v1")
    (tmp_path / "loop").symlink_to("loop")
    for place in ("/a/current", "/a/current/x", "/a/loop"):     # what becomes of it only the guest's kernel knows
        check_volumes({"/a": Bind(tmp_path, readonly=True), place: Tmpfs("1M")})
    # A link that leads to the volume is this machine's.
    (tmp_path / "way").symlink_to(tmp_path / "v1")
    with pytest.raises(ConfigError, match=r"there is no '.*/way/x' to put it over"):
        check_volumes({"/a": Bind(tmp_path / "way", readonly=True), "/a/x": Tmpfs("1M")})


def test_a_hypervisor_that_cant_share(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fake can't share directories"):
        Sandbox(FakeHypervisor(), FakeFs(), volumes={"/a": tmp_path})


@given(st.dictionaries(st.text("/a.\0é", max_size=8), st.builds(Tmpfs, st.just("1M"))))
def test_any_place_is_one_in_the_container_or_refused(volumes: Any) -> None:
    try:
        checked = check_volumes(volumes)
    except ConfigError:
        return
    for place in checked:
        assert place.startswith("/")
        assert not {"", ".", ".."} & set(place.split("/")[1:])


async def test_a_machine_ends_with_what_serves_it(tmp_path: Path) -> None:
    hypervisor = FakeHypervisor()

    async def lost() -> str:
        return "virtiofsd was killed by SIGKILL"

    with fake_bundle(tmp_path):
        async with Sandbox(hypervisor, FakeFs()):
            (machine,) = hypervisor.machines
            async with ended_with(machine, [lost]):
                died = await machine.died()
    assert str(died) == "the virtual machine was ended, because virtiofsd was killed by SIGKILL"


def test_attachments_add_up() -> None:
    one = Attachment(mounts=(Mount("a", "tmpfs"),), nameservers=("192.0.2.1",))
    two = Attachment(devices=(Disk("d", Path("/d")),), mounts=(Mount("b", "tmpfs"),))
    both = one + two
    assert both.devices == two.devices
    assert [mount.source for mount in both.mounts] == ["a", "b"]
    assert both.nameservers == one.nameservers


# --- 9p ---


def test_a_filesystem_without_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(path: Path, name: str) -> bytes:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "getxattr", none)
    with pytest.raises(ConfigError, match=r"has no extended attributes \(security=\"mapped-file\" keeps them"):
        check_volumes({"/v": Bind(tmp_path, via="9p", security="mapped-xattr")})
    mapped = Bind(tmp_path, via="9p", security="mapped-file")
    assert check_volumes({"/v": mapped}) == {"/v": mapped}


def test_a_named_volume_has_its_security(tmp_path: Path) -> None:
    (volume,) = check_volumes({"/v": Named("mapped", via="9p", security="mapped-file")}).values()
    assert isinstance(volume, Bind)
    assert volume.security == "mapped-file"
    remove_volume("mapped")


def test_a_disk_has_no_security() -> None:
    with pytest.raises(ConfigError, match=r"security='mapped-file': the volume 'sized' has a size, and is a disk"):
        check_volumes({"/v": Named("sized", size="8M", via="9p", security="mapped-file")})
    assert "sized" not in list_volumes()


def test_9p_where_there_is_no_virtiofsd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_VIRTIOFSD", "/nowhere/virtiofsd")
    volumes = check_volumes({"/a": tmp_path, "/b": Bind(tmp_path, via="9p"), "/c": Bind(tmp_path, via="virtiofs")})
    assert [place.source for place in places(volumes)] == [
        f"{VOLUMES}/9p0", f"{VOLUMES}/9p1", f"{VOLUMES}/fs-auto/2",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="a file needs virtio-fs, and PYKATA_VIRTIOFSD="):
        check_volumes({"/a": __file__})
    with pytest.raises(ConfigError, match="9p shares directories only"):
        check_volumes({"/a": Bind(__file__, via="9p")})


@pytest.mark.parametrize(("readonly", "is_whole", "security"), [
    (True, False, "none"), (False, False, "mapped-xattr"), (False, True, "mapped-file"),
])  # fmt: skip
def test_what_qemu_is_told_of_9p(readonly: bool, is_whole: bool, security: Security) -> None:
    end = socket.socket.__new__(socket.socket)
    share = NineP("9p0", Path("/x,y"), readonly, is_whole=is_whole, security=security)
    spec = VMSpec(Path("k"), Path("i"), SerialTransport(end, end), devices=(share,))
    argv = command(Path("qemu"), "microvm", "tcg", spec, Descriptors((30, 31), 32, 33, directories=(60,)), slots=1,
                   reclaim=True, tsc_khz=None)
    (fsdev,) = [value for option, value in pairwise(argv) if option == "-fsdev"]
    assert fsdev.startswith(f"local,id=directory0,path=/proc/self/fd/60,security_model={security},")
    assert fsdev.endswith(",readonly=on") == readonly
    assert f",multidevs={'forbid' if is_whole else 'remap'}" in fsdev
    devices = [json.loads(value) for option, value in pairwise(argv) if option == "-device"]
    assert {"driver": "virtio-9p-device", "fsdev": "directory0", "mount_tag": "9p0"} in devices


# --- QEMU ---


def build(spec: VMSpec) -> list[str]:
    return command(Path("qemu"), "microvm", "tcg", spec, Descriptors((30, 31), 32, 33, shares=(50,)), slots=1,
                   reclaim=True, tsc_khz=None)


def test_the_memory_is_shared_with_the_daemon() -> None:
    end = socket.socket.__new__(socket.socket)
    spec = VMSpec(Path("k"), Path("i"), SerialTransport(end, end), memory=100, devices=(VhostFs("fs-auto", end),))
    argv = build(spec)
    values = [value for option, value in pairwise(argv) if option == "-object"]
    assert [json.loads(value)["size"] for value in values] == [100 * 1024 * 1024]
    assert argv[argv.index("-machine") + 1].endswith(",memory-backend=ram")
    assert "socket,id=share0,fd=50" in argv
    devices = [json.loads(value) for option, value in pairwise(argv) if option == "-device"]
    assert {"driver": "vhost-user-fs-device", "chardev": "share0", "tag": "fs-auto", "queue-size": 1024} in devices


def test_what_is_mapped_has_a_place_above_the_memory() -> None:
    end = socket.socket.__new__(socket.socket)
    files = (Pmem("disk0", Path("/x,y"), 2 * PMEM_UNIT), Pmem("disk1", Path("/z"), PMEM_UNIT))
    spec = VMSpec(Path("k"), Path("i"), SerialTransport(end, end), devices=files)
    argv = command(Path("qemu"), "q35", "tcg", spec, Descriptors((30, 31), 32, 33, mapped=(60, 61)), slots=1,
                   reclaim=True, tsc_khz=None)
    assert argv[argv.index("-m") + 1] == "256M,slots=1,maxmem=262M"
    backends = [json.loads(value) for option, value in pairwise(argv) if option == "-object"]
    assert [each["mem-path"] for each in backends] == ["/proc/self/fd/60", "/proc/self/fd/61"]
    assert all(each["readonly"] and not each["share"] for each in backends)
    devices = [json.loads(value) for option, value in pairwise(argv) if option == "-device"]
    mapped = [each["memdev"] for each in devices if each["driver"] == "virtio-pmem-pci"]
    assert mapped == ["mapped0", "mapped1"], "the guest counts them in this order"


def test_what_is_mapped_is_kept_account_of_in_the_guests_memory() -> None:
    end = socket.socket.__new__(socket.socket)

    def check(mebibytes: int) -> None:
        devices = (Pmem("disk0", Path("/x"), mebibytes * MIB),)
        QEMU(machine="q35")._check(VMSpec(Path("k"), Path("i"), SerialTransport(end, end), memory=256, devices=devices))

    check(4096)
    with pytest.raises(ConfigError, match=r"too little to map 16384 MiB .*memory=1024 or more"):
        check(16384)


@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_a_size_of_blocks_that_cant_be_is_a_number_still(kind: str) -> None:
    assert len(str(block_size(kind, b"\xff" * 4096))) < 30


def test_slots_make_room() -> None:
    end = socket.socket.__new__(socket.socket)

    def slots(machine: QEMU, shares: int) -> int:
        devices = tuple(VhostFs(str(number), end) for number in range(shares))
        return machine._slots_beside(VMSpec(Path("k"), Path("i"), SerialTransport(end, end), devices=devices))

    assert [slots(QEMU(), count) for count in range(7)] == [5, 5, 4, 3, 2, 1, 1]
    assert slots(QEMU(disk_slots=4), 3) == 4, "what was asked for stays, and the machine is refused"


# --- the daemon ---


async def test_a_daemon_that_cant_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(HostError, match=f"can't share {gone}: No such file or directory"):
        async with served("tag", (Shared("0", gone),), "auto", tmp_path):
            pass
    (tmp_path / "tag").rmdir()
    monkeypatch.setattr("pykata.host.kinds_below", lambda path: {"ext4"})       # it goes a moment later
    async with served("tag", (Shared("0", gone),), "auto", tmp_path) as attachment:
        (one,) = attachment.served
        assert await one.ended() == f"virtiofsd for {gone} exited with code 1: {gone}: No such file or directory"
    assert not (tmp_path / "tag.sock").exists()


async def test_a_long_run_directory(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 200)
    deep.mkdir()
    (tmp_path / "data").mkdir()
    async with served("tag", (Shared("0", tmp_path / "data"),), "auto", deep) as attachment:
        assert [mount.target for mount in attachment.mounts] == [f"{VOLUMES}/tag/0"]


@pytest.mark.parametrize(("names", "target"), [(["a"], "tag/0"), (["f"], "tag"), (["a", "b"], "tag")])
async def test_what_a_daemon_serves(tmp_path: Path, names: list[str], target: str) -> None:
    """A directory alone is the whole of its filesystem; a file can't be, and several lie side by side."""
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "f").touch()
    shares = [Shared(str(number), tmp_path / name) for number, name in enumerate(names)]
    async with served("tag", shares, "auto", tmp_path) as attachment:
        assert [mount.target for mount in attachment.mounts] == [f"{VOLUMES}/{target}"]


async def test_no_virtiofsd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykata import ToolMissingError

    monkeypatch.setenv("PYKATA_VIRTIOFSD", "/nowhere/virtiofsd")
    with pytest.raises(ToolMissingError, match="PYKATA_VIRTIOFSD='/nowhere/virtiofsd' is not a program"):
        async with served("tag", (Shared("0", tmp_path),), "auto", tmp_path):
            pass


@pytest.mark.parametrize(("said", "error", "why"), [
    ("virtiofsd version 5.2.0 (Debian 1:5.2)", ToolTooOldError, r"virtiofsd 5\.2 of QEMU .6\.0 or later is needed"),
    ("virtiofsd 1.3.9", ToolTooOldError, r"is virtiofsd 1\.3 .1\.4 or later is needed: apt-get install virtiofsd"),
    ("virtiofsd backend 1.0.0", ToolTooOldError, r"is virtiofsd 1\.0 "),
    ("hello", ToolFailedError, "is no virtiofsd: hello .PYKATA_VIRTIOFSD names one"),
    ("", ToolFailedError, "is no virtiofsd"),
])  # fmt: skip
async def test_a_virtiofsd_that_cant_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, error: type[Exception], why: str
) -> None:
    script(tmp_path / "virtiofsd", f"echo '{said}'")
    monkeypatch.setenv("PYKATA_VIRTIOFSD", str(tmp_path / "virtiofsd"))
    with pytest.raises(error, match=why):
        async with served("tag", (Shared("0", tmp_path),), "auto", tmp_path):
            pass


@pytest.mark.parametrize(("said", "is_qemus"), [
    ("virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright", True), ("virtiofsd version 6.0.0", True),
    ("virtiofsd 1.14.0\n", False), ("virtiofsd backend 1.4.0", False), ("virtiofsd 1.10.1", False),
])  # fmt: skip
def test_which_virtiofsd_it_is(said: str, is_qemus: bool) -> None:
    assert _kind_of(Path("/x"), said) == is_qemus


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# --- what is saved has none of the host's ---


def test_no_template_with_directories_of_the_host(tmp_path: Path) -> None:
    for volume in (tmp_path, Tmpfs("1M")):
        with pytest.raises(ConfigError, match=r"volumes: a template has none .copy files"):
            Template("builtin:busybox", volumes={"/v": volume}, isolation="emulated")
    with pytest.raises(ConfigError, match=r"fs: a template can't have files .* virtiofs shares them .fs=.block"):
        Template("builtin:busybox", fs="virtiofs", isolation="emulated")


def test_no_volumes_in_a_snapshot() -> None:
    with pytest.raises(ConfigError, match="a snapshot has none"):
        Sandbox.restore("/nowhere", volumes={"/v": Tmpfs("1M")})


# --- disks ---


@pytest.mark.parametrize("has_unnamed", [True, False])
async def test_a_disk_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_unnamed: bool
) -> None:
    seen, real = list[list[str]](), os.open

    async def looking(argv: Any, **more: Any) -> bytes:
        seen.append(os.listdir(tmp_path))
        return await run_tool(argv, **more)

    def without(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return real(path, flags, *more, **others)

    monkeypatch.setattr("pykata.volumes.disk.run_tool", looking)
    if not has_unnamed:
        monkeypatch.setattr(os, "open", without)
    volume = DiskImage(tmp_path / "data", size="8M")
    for _ in range(2):
        async with disk("disk0", volume) as attachment:
            assert attachment.mounts[0].type == "ext4"
    assert os.listdir(tmp_path) == ["data"]
    assert volume.path.stat().st_mode & 0o7777 == 0o600
    if has_unnamed and can_be_unnamed(tmp_path):
        assert seen == [[]], "who is killed now leaves nothing"
    else:
        assert [len(names) for names in seen] == [1]


def can_be_unnamed(folder: Path) -> bool:
    """Whether its filesystem has files without a name; NFS and 9p have none."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR))
    except OSError:
        return False
    return True


async def test_a_disk_behind_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    link = tmp_path / "link"
    volume = DiskImage(link, size="8M")
    why = rf"{link}.* is a link to '?{tmp_path}/disk'?, and nothing is there"
    link.symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match=why):
        check_volumes({"/d": volume})
    with pytest.raises(HostError, match=why):       # it has become one since
        async with disk("disk0", volume):
            pass
    assert os.listdir(tmp_path) == ["link"]
    async with disk("disk0", DiskImage(tmp_path / "disk", size="8M")):
        pass
    check_volumes({"/d": volume})
    async with disk("disk0", volume):
        pass


async def test_a_disk_in_two_places(tmp_path: Path) -> None:
    volume = DiskImage(tmp_path / "data", size="8M")
    (tmp_path / "link").symlink_to("data")
    async with disk("disk0", volume):
        for other in ("data", "link"):
            for readonly in (False, True):
                with pytest.raises(VolumeInUseError, match="is in use by another sandbox, or twice by this one"):
                    async with disk("disk1", DiskImage(tmp_path / other, readonly=readonly)):
                        pass
    reader = DiskImage(volume.path, readonly=True)
    async with disk("disk0", reader), disk("disk1", reader):
        pass


async def test_a_disk_that_cant_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("pykata.volumes.disk.fcntl.flock", refuse)
    with pytest.raises(HostError, match=r"can't lock the volume .*/data: No locks available"):
        async with disk("disk0", DiskImage(tmp_path / "data", size="8M")):
            pass


async def test_a_disk_that_cant_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "mkfs.ext4", "echo 'no space' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ToolFailedError, match=r"mkfs\.ext4 exited with code 1: no space"):
        async with disk("disk0", DiskImage(tmp_path / "data", size="8M")):
            pass
    assert os.listdir(tmp_path) == ["mkfs.ext4"]


# --- named ones ---


def test_named_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_STATE", str(tmp_path / "state"))
    assert list_volumes() == []
    (volume,) = check_volumes({"/a": Named("cache", readonly=True)}).values()
    assert volume == Bind(tmp_path / "state" / "volumes" / "cache", readonly=True, via="virtiofs")
    check_volumes({"/a": Named("cache"), "/b": Named("a.b-c_1")})
    assert list_volumes() == ["a.b-c_1", "cache"]
    (tmp_path / "state" / "volumes" / "cache" / "d").mkdir()
    remove_volume("cache")
    assert list_volumes() == ["a.b-c_1"]
    with pytest.raises(ConfigError, match=r"there is no volume 'cache' \(there are a\.b-c_1\)"):
        remove_volume("cache")


def test_a_named_volume_that_cant_be_made_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_STATE", str(tmp_path / "state"))
    check_volumes({"/a": Named("there")})
    (tmp_path / "state/volumes/file").touch()
    with pytest.raises(HostError, match=r"can't make the volume .*/file: File exists"):
        check_volumes({"/a": Named("file")})

    def refuse(path: Path, *more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("rename", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    (tmp_path / "state/volumes/.disks").mkdir()
    (tmp_path / "state/volumes/.disks/disk").touch()
    for volume in ("there", "disk"):
        with pytest.raises(HostError, match=f"volume '{volume}' can't be removed: Read-only file system .it is /"):
            remove_volume(volume)


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "a\0", "x" * 64, "é", 3, None])
def test_what_is_no_name(name: Any) -> None:
    with pytest.raises(ConfigError, match="is no name of a volume"):
        Named(name)
    with pytest.raises(ConfigError, match="is no name of a volume"):
        remove_volume(name)


def test_named_volumes_with_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_STATE", str(tmp_path / "state"))
    disk = tmp_path / "state" / "volumes" / ".disks" / "data"
    (volume,) = check_volumes({"/a": Named("data", size="8M", files=100)}).values()
    assert volume == DiskImage(disk, size="8M", files=100)
    assert list_volumes() == [], "it is made when it is first used"
    disk.touch()
    assert list_volumes() == ["data"]
    (volume,) = check_volumes({"/a": Named("data", readonly=True)}).values()
    assert volume == DiskImage(disk, readonly=True), "it is what it was made as"
    check_volumes({"/a": Named("other")})
    with pytest.raises(ConfigError, match="the volume 'other' has no size"):
        check_volumes({"/a": Named("other", size="8M")})
    remove_volume("data")
    assert list_volumes() == ["other"]
    with pytest.raises(ConfigError, match="files=7 without a size"):
        Named("x", files=7)


@pytest.mark.parametrize("is_qemus", [True, False])
@pytest.mark.parametrize("cache", ["auto", "always", "none"])
def test_the_sandbox_of_a_daemon_is_never_off(tmp_path: Path, cache: str, is_qemus: bool) -> None:
    said = " ".join(options(5, tmp_path, cache, is_qemus=is_qemus))
    assert "sandbox=namespace" in said
    assert "seccomp" not in said, "it is on by default"
    assert re.search("-killpriv.v2| killpriv_v2", said), "no question before each write"
    assert ("cache=never" in said) == (cache == "none" and not is_qemus)
    remote = " ".join(options(5, tmp_path, cache, is_qemus=is_qemus, kills_privileges=False))
    assert not re.search("-killpriv.v2| killpriv_v2", remote)


@pytest.mark.parametrize(("kind", "is_local"), [
    ("ext4", True), ("btrfs", True), ("overlay", True), ("fusectl", True), ("nfs", False), ("nfs4", False),
    ("cifs", False), ("smb3", False), ("9p", False), ("ceph", False), ("fuse", False), ("fuse.sshfs", False),
    ("virtiofs", False),
])  # fmt: skip
async def test_what_is_remote_takes_privileges_away_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_local: bool
) -> None:
    (tmp_path / "v").mkdir()
    script(tmp_path / "virtiofsd", """
        if [ "$1" = --version ]; then echo 'virtiofsd 1.10.1'; exit; fi
        case "$*" in *--killpriv-v2*) echo local >&2;; *) echo remote >&2;; esac; exit 3""")
    monkeypatch.setenv("PYKATA_VIRTIOFSD", str(tmp_path / "virtiofsd"))
    monkeypatch.setattr("pykata.host.kinds_below", lambda path: {"ext4", kind})
    async with served("tag", (Shared("0", tmp_path / "v"),), "auto", tmp_path) as attachment:
        (one,) = attachment.served
        assert (await one.ended()).endswith(f": {'local' if is_local else 'remote'}")
