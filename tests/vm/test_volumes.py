"""Directories and files of the host in a guest, and what a guest can't do with them."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest

from pykata import (
    AgentRefusedError,
    Bind,
    ConfigError,
    DiskImage,
    HostError,
    ImageNotFoundError,
    ImageVolume,
    Named,
    Sandbox,
    Tmpfs,
    VolumeInUseError,
    remove_volume,
)

BUSYBOX = "builtin:busybox"


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


def known_daemons() -> list[str]:
    """Each virtiofsd of this host: QEMU's, the one written in Rust, and the one that the environment names."""
    places = (os.environ.get("PYKATA_VIRTIOFSD"), "/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
    return sorted({os.path.realpath(path) for path in places if path and os.access(path, os.X_OK)})


def daemons() -> list[int]:
    """The processes of each virtiofsd of this test."""
    return [
        int(path.name) for path in Path("/proc").glob("[0-9]*")
        if any(f"{option}={os.environ['PYKATA_RUN']}/".encode() in _read(path / "cmdline")
               for option in ("source", "--shared-dir"))
        and b"virtiofsd\0" in _read(path / "cmdline").replace(b"virtiofsd -", b"virtiofsd\0")
    ]  # fmt: skip


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def test_directories_files_and_memory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x").write_text("from the host\n")
    (tmp_path / "one").write_text("one file\n")
    (tmp_path / "other").write_text("not shared\n")
    volumes: dict[str, Any] = {
        "/data": tmp_path / "data", "/in": Bind(tmp_path / "in", readonly=True), "/etc/one.conf": tmp_path / "one",
        "/data/scratch": Tmpfs("1M", files=20),
    }  # fmt: skip
    async with Sandbox(isolation="emulated", volumes=volumes) as sb:
        script = "cat /in/x /etc/one.conf; echo made > /data/made; echo more >> /etc/one.conf; echo s > /data/scratch/s"
        assert (await sb.run(BUSYBOX, sh(script), check=True)).stdout == "from the host\none file\n"
        assert (tmp_path / "data" / "made").read_text() == "made\n"
        assert (tmp_path / "data" / "made").stat().st_uid == os.geteuid()
        assert (tmp_path / "one").read_text() == "one file\nmore\n"
        # Another container has the same volumes; what the host changes is seen by who opens a file then.
        (tmp_path / "in" / "y").write_text("later\n")
        done = await sb.run(BUSYBOX, sh("cat /in/y /data/scratch/s; ls /etc/one.conf/.. 2>&1"))
        assert done.stdout.startswith("later\ns\n")
        assert "other" not in done.stdout
        readonly = await sb.run(BUSYBOX, sh("echo x > /in/x; rm /in/x; mkdir /in/d; chmod 777 /in; touch /in/x"))
        assert readonly.stderr.count("Read-only file system") == 5
        full = await sb.run(BUSYBOX, sh("cd /data/scratch; dd if=/dev/zero of=big bs=64k count=17; rm big; "
                                        "for i in $(seq 20); do touch $i || break; done"))
        assert full.stderr.count("No space left on device") == 2
    assert (tmp_path / "in" / "x").read_text() == "from the host\n"
    assert not list((tmp_path / "data" / "scratch").iterdir()), "only the place for it was made"


async def test_a_device_in_a_volume_is_none(tmp_path: Path) -> None:
    os.mknod(tmp_path / "null", 0o20666, os.makedev(1, 3))
    setuid = tmp_path / "setuid"
    async with Sandbox(isolation="emulated", volumes={"/v": tmp_path, "/t": Tmpfs("4M")}) as sb:
        done = await sb.run(BUSYBOX, sh(
            "echo x > /v/null; mknod /t/null c 1 3 && echo x > /t/null; mknod /v/own c 1 3; "
            "cp /bin/busybox /t/id; chmod 4755 /t/id; cp /bin/busybox /v/setuid; chmod 4755 /v/setuid; chmod 755 /v; "
            "for p in /t/id /v/setuid; do su -s /bin/sh nobody -c 'exec -a id '$p' -u'; done; "
            "grep -cE '^[^ ]+ /(v|t) [a-z]+ rw,nosuid,nodev' /proc/mounts"))  # fmt: skip
    assert done.stderr.count("Permission denied") == 2, done
    assert "mknod: /v/own: Operation not permitted" in done.stderr
    assert done.stdout.split() == ["65534", "65534", "2"] or done.stdout.split()[-1] == "2", done
    assert "0" not in done.stdout.split()
    setuid.unlink()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("cache", ["auto", "always", "none"])
async def test_who_writes_to_a_setuid_file_takes_that_away(tmp_path: Path, cache: Any, beside: bool) -> None:
    for name in ("v", "w"):
        (tmp_path / name).mkdir(mode=0o755)
    volumes = {"/v": Bind(tmp_path / "v", cache=cache)}
    if beside:          # each is a filesystem of its own within another one then
        volumes["/w"] = Bind(tmp_path / "w", cache=cache)
    async with Sandbox(isolation="emulated", volumes=volumes) as sb:
        done = await sb.run(BUSYBOX, sh(
            "cd /v; for f in appended cut; do echo old > $f; chmod 6777 $f; stat -c %a $f; done; "
            "su -s /bin/sh nobody -c 'echo new >> appended; : > cut'; stat -c %a appended cut"))  # fmt: skip
        assert done.stdout.split() == ["6777", "6777", "777", "777"], done
    assert [(tmp_path / "v" / name).stat().st_mode & 0o7777 for name in ("appended", "cut")] == [0o777, 0o777]
    assert (tmp_path / "v" / "appended").read_text() == "old\nnew\n"


@pytest.mark.parametrize("via", ["virtiofs", "9p"])
async def test_links_lead_nowhere_else(tmp_path: Path, via: Literal["virtiofs", "9p"]) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret of the host\n")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "by-host").symlink_to(secret)
    (shared / "up").symlink_to("../secret")
    async with Sandbox(isolation="emulated", volumes={"/v": Bind(shared, via=via)}) as sb:
        script = f"cd /v; ln -s {secret} by-guest; ln -s /proc/1/root{secret} magic; ln -s ../../../..{secret} far; " \
                 "for f in by-host up by-guest magic far ../secret; do cat $f; done; cat /v/../../secret"
        done = await sb.run(BUSYBOX, sh(script))
    assert done.stdout == ""
    assert done.stderr.count("can't open") == 7, done
    assert (shared / "by-guest").is_symlink()


async def test_9p(tmp_path: Path) -> None:
    for name in ("data", "in"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "x").write_text("from the host\n")
    os.chown(tmp_path / "data", 4711, 4712)
    volumes = {"/data": Bind(tmp_path / "data", via="9p"), "/in": Bind(tmp_path / "in", readonly=True, via="9p")}
    async with Sandbox(isolation="emulated", volumes=volumes) as sb:
        script = "cat /in/x; echo made > /data/made; echo x > /in/x; rm /in/x; mknod /data/n c 1 3"
        done = await sb.run(BUSYBOX, sh(script))
    assert done.stdout == "from the host\n"
    assert done.stderr.count("Read-only file system") == 2
    assert done.stderr.count("Operation not permitted") == 1
    made = (tmp_path / "data" / "made").stat()
    assert (made.st_uid, made.st_gid, made.st_size) == (4711, 4712, 5), "what is made belongs to the directory's owner"
    assert (tmp_path / "in" / "x").read_text() == "from the host\n"


@pytest.mark.parametrize("security", ["mapped-xattr", "mapped-file"])
async def test_9p_that_keeps_what_a_guest_says_of_its_files(tmp_path: Path, security: Any) -> None:
    shared, secret = tmp_path / "v", tmp_path / "secret"
    shared.mkdir()
    secret.write_text("secret of the host\n")
    (shared / "by-host").symlink_to(secret)
    (shared / "old").write_text("made here\n")
    for path in (shared, shared / "old"):       # what is somebody else's stays as it is, whatever a guest has there
        os.chown(path, 4711, 4712)
    volumes = {"/v": Bind(shared, via="9p", security=security)}
    make = "mkdir d; echo made > d/f; chown 1000:1001 d/f; chmod 4751 d/f; mkfifo p; mknod c c 1 3; " \
           f"ln -s d/f l; ln -s {secret} far; echo x > c; cat far by-host; chmod 600 old"
    show = "stat -c '%n %u:%g %a %F' d/f p l; stat -c '%a %F' old; stat -c '%n %t:%T %F' c; readlink l; cat l old; " \
           "ls -A"
    async with Sandbox(isolation="emulated", volumes=volumes) as sb:
        done = await sb.run(BUSYBOX, sh(f"cd /v; {make}"))
        assert done.stdout == ""
        assert "can't create c: Permission denied" in done.stderr, "a device is none"
    async with Sandbox(isolation="emulated", volumes=volumes) as sb:
        done = await sb.run(BUSYBOX, sh(f"cd /v; {show}"), check=True)
    assert done.stdout.splitlines() == [
        "d/f 1000:1001 4751 regular file", "p 0:0 644 fifo", "l 0:0 777 symbolic link", "600 regular file",
        "c 1:3 character special file", "d/f", "made", "made here", "by-host", "c", "d", "far", "l", "old", "p",
    ]  # fmt: skip
    for path in (shared / "d/f", shared / "p", shared / "c", shared / "l", shared / "far"):
        found = path.lstat()
        assert stat.S_ISREG(found.st_mode), "on this machine it is a plain file"
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (4711, 4712, 0o600), path


async def test_9p_of_two_filesystems(tmp_path: Path) -> None:
    """Their inode numbers may be the same, and a guest must not take one file for another."""
    (tmp_path / "v/below").mkdir(parents=True)
    await anyio.run_process(["mount", "-t", "tmpfs", "below", str(tmp_path / "v/below")])
    try:
        (tmp_path / "v/below/f").write_text("of a tmpfs\n")
        (tmp_path / "v/f").write_text("of a disk\n")
        async with Sandbox(isolation="emulated", volumes={"/v": Bind(tmp_path / "v", via="9p")}) as sb:
            done = await sb.run(BUSYBOX, sh("cat /v/f /v/below/f; stat -c %d:%i /v/f /v/below/f"), check=True)
    finally:
        await anyio.run_process(["umount", str(tmp_path / "v/below")])
    first, second, *numbers = done.stdout.splitlines()
    assert (first, second) == ("of a disk", "of a tmpfs")
    assert numbers[0] != numbers[1]


async def test_what_the_image_has_at_the_place_of_a_volume_is_of_the_same_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine\n")
    for volumes, why in (
        ({"/bin/busybox": tmp_path}, "mount a directory over a file: /bin/busybox: ENOTDIR"),
        ({"/etc": tmp_path / "file"}, "mount a file over a directory: /etc: EISDIR"),
    ):
        async with Sandbox(isolation="emulated", volumes=volumes) as sb:
            with pytest.raises(AgentRefusedError, match=why):
                await sb.run(BUSYBOX, ["true"])


async def test_links_of_an_image_lead_no_volume_over_the_kernels_files(tmp_path: Path) -> None:
    root, shared = tmp_path / "root", tmp_path / "v"
    (root / "bin").mkdir(parents=True)
    shared.mkdir()
    (shared / "f").write_text("mine\n")
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin")
    for link, target in {"p": "/proc", "s": "sys/kernel", "g": "/sys/fs/cgroup", "development": "/srv"}.items():
        (root / link).symlink_to(target)
    for place in ("/p", "/p/self", "/s", "/g"):
        async with Sandbox(isolation="emulated", volumes={place: shared}) as sb:
            with pytest.raises(AgentRefusedError, match=f"mount over the kernel's files: {place}: EPERM"):
                await sb.run(f"dir:{root}", ["/bin/busybox", "true"])
    async with Sandbox(isolation="emulated", volumes={"/development": shared}) as sb:
        done = await sb.run(f"dir:{root}", ["/bin/busybox", "cat", "/srv/f"], check=True)
        assert done.stdout == "mine\n", "a name that only begins like theirs may be a link"


@pytest.mark.parametrize("daemon", known_daemons())
async def test_names_that_mean_something_to_who_reads_options(
    tmp_path: Path, daemon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a,b=c:d\\e,no_xattr \"f\" 'g'"
    (odd / "v").mkdir(parents=True)
    (odd / "v/f").write_text("mine\n")
    (odd / "run").mkdir(mode=0o700)
    monkeypatch.setenv("PYKATA_RUN", str(odd / "run"))
    monkeypatch.setenv("PYKATA_VIRTIOFSD", daemon)
    place = "/a,b=c:d\\e"
    disk = DiskImage(odd / "disk,x", size="8M")
    volumes: dict[str, Any] = {"/v": odd / "v", place: Bind(odd / "v", via="9p"), "/d": disk}
    async with Sandbox(isolation="emulated", volumes=volumes, fs="virtiofs") as sb:
        done = await sb.run(BUSYBOX, ["sh", "-c", 'cat /v/f "$1/f"; echo x > /d/x; cat /d/x', "sh", place], check=True)
    assert done.stdout == "mine\nmine\nx\n"


@pytest.mark.parametrize("via", ["virtiofs", "9p"])
async def test_a_directory_that_went_before_the_start(tmp_path: Path, via: Any) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    sandbox = Sandbox(isolation="emulated", volumes={"/v": Bind(gone, via=via)})
    gone.rmdir()
    with pytest.raises(HostError, match=r"can't share .*/gone: No such file or directory"):
        async with sandbox:
            pass


async def test_a_disk_that_went_before_the_start(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.write_bytes(bytes(4096))
    sandbox = Sandbox(isolation="emulated", volumes={"/v": DiskImage(gone)})
    gone.unlink()
    with pytest.raises(HostError, match=r"the volume .*/gone isn't there any more"):
        async with sandbox:
            pass


async def test_caches(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("f\n")
    volumes: dict[str, Any] = {f"/{cache}": Bind(tmp_path, cache=cache) for cache in ("auto", "always", "none")}
    async with Sandbox(isolation="emulated", volumes=volumes) as sb:
        assert (await sb.run(BUSYBOX, sh("cat /auto/f /always/f /none/f"), check=True)).stdout == "f\n" * 3


# How many seconds of the guest's a name, a size or a time may be old; the content of what is opened never is.
SEEN_AFTER = {("virtiofs", "auto"): 1, ("virtiofs", "none"): 0, ("9p", "auto"): 0, ("9p", "none"): 0}


@pytest.mark.parametrize(("via", "cache"), SEEN_AFTER)
async def test_what_the_host_changes_is_seen(tmp_path: Path, via: Any, cache: Any) -> None:
    for name in ("content", "size", "removed", "mode"):
        (tmp_path / name).write_text("before\n")
    async with (
        Sandbox(isolation="emulated", volumes={"/v": Bind(tmp_path, via=via, cache=cache)}) as sb,
        sb.container(BUSYBOX) as container,
    ):
        first = await container.run(sh("cd /v; cat *; stat -c %a mode"), check=True)
        assert first.stdout.split() == ["before"] * 4 + ["644"]
        (tmp_path / "content").write_text("behind\n")       # as long as it was
        (tmp_path / "size").write_text("it is longer now\n")
        (tmp_path / "removed").unlink()
        (tmp_path / "mode").chmod(0o600)
        (tmp_path / "added").write_text("new\n")
        pause = SEEN_AFTER[via, cache]
        look = f"cd /v; cat content; sleep {pause}; echo *; cat added size; cat removed; stat -c %a mode"
        done = await container.run(sh(look))
    assert done.stdout == "behind\nadded content mode size\nnew\nit is longer now\n600\n"
    assert "removed" in done.stderr


@pytest.mark.parametrize("via", ["virtiofs", "9p"])
async def test_what_the_host_changes_may_not_be_seen(tmp_path: Path, via: Any) -> None:
    """With cache="always" a guest sees what it hasn't looked at, and has no need to look at it again."""
    (tmp_path / "seen").write_text("before\n")
    async with (
        Sandbox(isolation="emulated", volumes={"/v": Bind(tmp_path, via=via, cache="always")}) as sb,
        sb.container(BUSYBOX) as container,
    ):
        assert (await container.run(sh("cat /v/seen"), check=True)).stdout == "before\n"
        for name in ("seen", "other"):
            (tmp_path / name).write_text("behind\n")
        assert (await container.run(sh("cat /v/seen /v/other"), check=True)).stdout == "before\nbehind\n"


@pytest.mark.parametrize("daemon", known_daemons())
async def test_what_waits_in_the_guest_is_there_when_the_file_is_closed(
    tmp_path: Path, daemon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYKATA_VIRTIOFSD", daemon)
    async with Sandbox(isolation="emulated", volumes={"/v": Bind(tmp_path, cache="always")}) as sb:
        async with sb.process(BUSYBOX, sh("echo 1 > /v/a; echo 2 >> /v/a; exec 3> /v/b; echo 3 >&3; echo; cat")) as cat:
            await anext(cat.stdout)
            assert (tmp_path / "a").read_text() == "1\n2\n"
        # Killed, and its file was never closed by itself.
        await sb.run(BUSYBOX, ["true"], check=True)
        assert (tmp_path / "b").read_text() == "3\n"


@pytest.mark.parametrize("via", ["virtiofs", "9p"])
async def test_files_of_a_container_include_its_volumes(tmp_path: Path, via: Literal["virtiofs", "9p"]) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "tree" / "d").mkdir(parents=True)
    (tmp_path / "tree" / "d" / "f").write_text("of a tree")
    async with (
        Sandbox(isolation="emulated", volumes={"/v": Bind(tmp_path / "v", via=via)}) as sb,
        sb.container(BUSYBOX) as container,
    ):
        await container.files.write_text("/v/f", "text")
        assert (tmp_path / "v" / "f").read_text() == "text"
        await container.files.write_text("/v/f", "longer text")
        await container.files.upload(tmp_path / "tree", "/v/tree")
        assert await container.files.read_text("/v/tree/d/f") == "of a tree"
    assert (tmp_path / "v" / "f").read_text() == "longer text"
    assert (tmp_path / "v" / "tree" / "d" / "f").read_text() == "of a tree"
    assert {path.name for path in (tmp_path / "v").iterdir()} == {"f", "tree"}, "no name of ours is left"


async def test_a_disk_keeps_what_was_written_and_has_limits(tmp_path: Path) -> None:
    image = tmp_path / "data.img"
    disk, neighbour = DiskImage(image, size="16M", files=50), Bind(tmp_path / "other")
    (tmp_path / "other").mkdir()
    async with Sandbox(isolation="emulated", volumes={"/d": disk, "/n": neighbour}) as sb:
        script = "echo kept > /d/kept; mknod /d/null c 1 3; echo x > /d/null; " \
                 "for i in $(seq 100); do mkdir /d/$i || break; done; " \
                 "dd if=/dev/zero of=/d/kept2 bs=1M count=20; echo on > /n/on && cat /n/on"
        done = await sb.run(BUSYBOX, sh(script))
        assert done.stderr.count("No space left on device") == 2, done
        assert done.stderr.count("Permission denied") == 1, "a device of the volume isn't one"
        assert done.stdout == "on\n", "a neighbour goes on writing"
        with pytest.raises(VolumeInUseError, match="is in use by another sandbox"):
            async with Sandbox(isolation="emulated", volumes={"/d": DiskImage(image, readonly=True)}):
                pass
    assert image.stat().st_blocks * 512 <= image.stat().st_size == 16 * 1024 * 1024
    reader = DiskImage(image, readonly=True)
    async with (
        Sandbox(isolation="emulated", volumes={"/d": reader}) as one,
        Sandbox(isolation="emulated", volumes={"/d": reader}) as two,
    ):
        for sb in (one, two):
            done = await sb.run(BUSYBOX, sh("cat /d/kept; echo x > /d/x"))
            assert done.stdout == "kept\n"
            assert "Read-only file system" in done.stderr


async def test_a_named_volume_with_a_size(tmp_path: Path) -> None:
    volumes: dict[str, Any] = {"/full": Named("full", size="8M", files=50), "/free": Named("free", size="8M")}
    async with Sandbox(isolation="emulated", volumes=volumes) as sb:
        script = "i=0; while echo > /full/$i; do i=$((i+1)); done; echo $i; echo x > /free/f; cat /free/f"
        done = await sb.run(BUSYBOX, sh(script))
        count, *rest = done.stdout.splitlines()
        assert 40 <= int(count) <= 80
        assert "No space left" in done.stderr
        assert rest == ["x"], "its neighbour goes on"
        with pytest.raises(VolumeInUseError, match="a sandbox uses the volume 'free'"):
            remove_volume("free", force=False)
        with pytest.raises(VolumeInUseError):
            async with Sandbox(isolation="emulated", volumes={"/v": Named("free")}):
                pass
    async with Sandbox(isolation="emulated", volumes={"/v": Named("free", readonly=True)}) as sb:
        assert (await sb.run(BUSYBOX, ["cat", "/v/f"])).stdout == "x\n"
    remove_volume("full", force=False)
    remove_volume("free", force=False)


async def test_an_image_as_a_volume(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "model").mkdir(parents=True)
    (root / "model/weights").write_text("1 2 3\n")
    volumes = {"/opt/data": ImageVolume(f"dir:{root}"), "/opt/tools": ImageVolume(BUSYBOX)}
    async with Sandbox(isolation="emulated", volumes=volumes) as sb:
        script = "cat /opt/data/model/weights; /opt/tools/bin/busybox echo on; echo x > /opt/data/x"
        done = await sb.run(BUSYBOX, sh(script))
        assert done.stdout == "1 2 3\non\n"
        assert "Read-only file system" in done.stderr
    with pytest.raises(ImageNotFoundError):
        async with Sandbox(isolation="emulated", volumes={"/v": ImageVolume("dir:/nowhere")}):
            pass


async def test_a_disk_that_is_none(tmp_path: Path) -> None:
    image = tmp_path / "data.img"
    image.write_bytes(bytes(8 * 1024 * 1024))
    with pytest.raises(ConfigError, match="has no filesystem that we know"):
        async with Sandbox(isolation="emulated", volumes={"/d": DiskImage(image)}):
            pass


async def test_a_disk_that_isnt_whole(tmp_path: Path) -> None:
    image = tmp_path / "data.img"
    async with Sandbox(isolation="emulated", volumes={"/d": DiskImage(image, size="16M")}) as sb:
        await sb.run(BUSYBOX, sh("echo kept > /d/f"), check=True)
    os.truncate(image, 20 * 1024 * 1024)        # more than whole is whole
    async with Sandbox(isolation="emulated", volumes={"/d": DiskImage(image)}) as sb:
        assert (await sb.run(BUSYBOX, ["cat", "/d/f"])).stdout == "kept\n"
    os.truncate(image, 8 * 1024 * 1024)
    why = "data.img can't be mounted: it has 16777216 bytes, and the file only 8388608: is it whole"
    for readonly in (False, True):
        with pytest.raises(ConfigError, match=why):
            async with Sandbox(isolation="emulated", volumes={"/d": DiskImage(image, readonly=readonly)}):
                pass


async def test_a_block_device(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    async with Sandbox(isolation="emulated", volumes={"/d": DiskImage(image, size="16M")}) as sb:
        await sb.run(BUSYBOX, sh("echo one > /d/f"), check=True)
    losetup = await anyio.run_process(["losetup", "--find", "--show", str(image)])
    device = losetup.stdout.decode().strip()
    try:
        async with Sandbox(isolation="emulated", volumes={"/d": DiskImage(device)}) as sb:
            assert (await sb.run(BUSYBOX, sh("cat /d/f; echo two > /d/f"), check=True)).stdout == "one\n"
        async with Sandbox(isolation="emulated", volumes={"/d": DiskImage(device, readonly=True)}) as sb:
            assert (await sb.run(BUSYBOX, sh("cat /d/f"), check=True)).stdout == "two\n"
    finally:
        await anyio.run_process(["losetup", "--detach", device])


@pytest.mark.parametrize("after", [0.0, 0.02, 0.06, 0.3, 0.7])
async def test_a_cancelled_boot_leaves_no_daemon(tmp_path: Path, after: float) -> None:
    # What is left behind, each test is asked for; nothing is measured.
    (tmp_path / "v").mkdir()
    volumes: dict[str, Any] = {
        "/v": tmp_path / "v", "/p": Bind(tmp_path / "v", via="9p"), "/d": DiskImage(tmp_path / "d", size="8M"),
    }  # fmt: skip
    with anyio.move_on_after(after):
        async with Sandbox(isolation="emulated", volumes=volumes):
            pass
    assert set(os.listdir(tmp_path)) <= {"v", "d"}, "no part of a disk"


async def test_a_detached_sandbox_has_its_volumes(tmp_path: Path) -> None:
    sandbox = Sandbox(isolation="emulated", volumes={"/v": tmp_path, "/t": Tmpfs("1M")})
    detached = await sandbox.detach("volumes")
    try:
        async with Sandbox.connect("volumes") as sb:
            await sb.run(BUSYBOX, sh("echo x > /v/f; echo y > /t/f"), check=True)
            assert (await sb.run(BUSYBOX, ["cat", "/t/f"])).stdout == "y\n"
    finally:
        await detached.stop()
    assert (tmp_path / "f").read_text() == "x\n"


async def test_forks_have_what_was_in_memory_and_nothing_of_the_host(tmp_path: Path) -> None:
    async with Sandbox(isolation="emulated", volumes={"/t": Tmpfs("1M")}) as sb:
        await sb.run(BUSYBOX, sh("echo before > /t/f"), check=True)
        (fork,) = await sb.fork()
        await sb.run(BUSYBOX, sh("echo after > /t/f"), check=True)
        async with fork:
            assert (await fork.run(BUSYBOX, ["cat", "/t/f"])).stdout == "before\n"
    async with Sandbox(isolation="emulated", volumes={"/v": tmp_path}) as sb:
        with pytest.raises(ConfigError, match="can't be saved: it has directories or disks of the host, at /v "):
            await sb.fork()
        assert (await sb.run(BUSYBOX, ["true"])).exit_code == 0
    async with Sandbox(isolation="emulated", fs="virtiofs") as sb:
        with pytest.raises(ConfigError, match="can't be saved: fs='virtiofs' shares files of the host with it"):
            await sb.fork()
