"""Root filesystems in a tar or a directory, builtin images, and how resolving ends when nobody waits."""

from __future__ import annotations

import asyncio
import gzip
import io
import lzma
import os
import socket
import threading
from pathlib import Path

import anyio
import pytest
import zstandard

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError, ImageUnsupportedError
from pykata.images import directory, resolve
from pykata.images.limits import Limits
from pykata.spec import Image
from tests.images_fixtures import Seen, digest_of, file, folder, hardlink, look, symlink, tar_of


async def find(reference: str, limits: Limits | None = None) -> Image:
    return await resolve(reference, architecture="x86_64", limits=limits or Limits())


def content(image: Image) -> dict[str, Seen]:
    out = io.BytesIO()
    assert image.write_tar is not None
    image.write_tar(out)
    return look(out.getvalue())


# --- tar ---

TAR = tar_of([
    folder("./"), folder("./bin"), file("./bin/sh", b"#!"), file("./.wh.x"), hardlink("./bin/ash", "./bin/sh"),
])


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress, lzma.compress])
async def test_a_root_filesystem_in_a_tar(tmp_path: Path, compress: object) -> None:
    assert callable(compress)
    (tmp_path / "root:fs.tar").write_bytes(compress(TAR))
    image = await find(f"tar:{tmp_path}/root:fs.tar")
    assert set(content(image)) == {"", "bin", "bin/sh", "bin/ash", ".wh.x"}
    assert image.config.cmd == ("/bin/sh",)
    assert "/usr/bin" in image.config.env["PATH"]


async def test_a_tar_is_another_image_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "r.tar"
    path.write_bytes(TAR)
    first = await find(f"tar:{path}")
    assert (await find(f"tar:{path}")).digest == first.digest
    path.write_bytes(TAR)
    os.utime(path, ns=(1, 1))
    assert (await find(f"tar:{path}")).digest != first.digest


async def test_what_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"text" * 1000)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageCorruptError, match=r"layer .*/text is refused"):
        content(await find(f"tar:{tmp_path}/text"))
    for name, error in (("nothing", ImageNotFoundError), ("", ImageError), ("fifo", ImageCorruptError)):
        with pytest.raises(error):
            await find(f"tar:{tmp_path}/{name}")


# --- directories ---


def make(root: Path) -> None:
    (root / "d" / "e").mkdir(parents=True)
    (root / "d" / "f").write_bytes(b"data" * 100_000)
    (root / "d" / "f").chmod(0o4755)
    (root / "d" / "e" / "empty").touch()
    (root / "s").symlink_to("/etc/passwd")
    (root / "up").symlink_to("../../..")
    os.link(root / "d" / "f", root / "l")
    os.mkfifo(root / "p")
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    os.setxattr(root / "d" / "f", "user.x", b"\0\xff")
    os.setxattr(root / "d", "user.y", b"1")
    with (root / "sparse").open("wb") as sparse:
        sparse.seek(5_000_000)
        sparse.write(b"end")
    with (root / "hole").open("wb") as hole:
        hole.truncate(1_000_000)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "sock"))
    os.utime(root / "d" / "f", (1, 1_600_000_000))
    root.chmod(0o711)


async def test_a_directory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make(root)
    found = content(await find(f"dir:{root}"))
    assert set(found) == {"", "d", "d/e", "d/e/empty", "d/f", "l", "s", "up", "p", "caf\udce9", "sparse", "hole"}
    assert found["d/f"].names == {"d/f", "l"}
    assert (found["d/f"].mode, found["d/f"].mtime, found["d/f"].size) == (0o4755, 1_600_000_000, 400_000)
    assert found["d/f"].xattrs == (("user.x", b"\0\xff"),)
    assert found["d"].xattrs == (("user.y", b"1"),)
    assert (found["s"].link, found["up"].link) == ("/etc/passwd", "../../..")
    assert (found[""].mode, found[""].uid) == (0o711, os.getuid())
    for name in ("sparse", "hole", "d/f"):
        assert found[name].data == digest_of((root / name).read_bytes())[7:]


async def test_the_holes_of_a_directory_s_files_stay_holes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make(root)
    out = io.BytesIO()
    image = await find(f"dir:{root}")
    assert image.write_tar is not None
    image.write_tar(out)
    assert len(out.getvalue()) < 1_000_000


@pytest.mark.parametrize("change", ["write", "chmod", "touch", "remove", "add", "xattr", "retarget"])
async def test_a_directory_is_another_image_when_anything_changes(tmp_path: Path, change: str) -> None:
    root = tmp_path / "root"
    make(root)
    before = (await find(f"dir:{root}")).digest
    assert (await find(f"dir:{root}")).digest == before
    deep = root / "d" / "e" / "empty"
    await anyio.sleep(0.02)     # the kernel's clock for ctime ticks every 4 ms
    match change:
        case "write":
            deep.write_bytes(b"x")
        case "chmod":
            deep.chmod(0o600)
        case "touch":
            deep.touch()
        case "remove":
            deep.unlink()
        case "add":
            (root / "d" / "e" / "more").touch()
        case "xattr":
            os.setxattr(deep, "user.z", b"")
        case "retarget":
            (root / "s").unlink()
            (root / "s").symlink_to("/etc/shadow")
    assert (await find(f"dir:{root}")).digest != before


async def test_a_symlink_that_takes_the_place_of_a_directory_isn_t_followed(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    make(root)
    secret.mkdir()
    (secret / "key").write_text("secret")
    image = await find(f"dir:{root}")
    walk = directory._walk

    def swapped(*args: object) -> object:
        for found in walk(*args):  # type: ignore[arg-type]
            if found.path == b"d":
                (root / "d").rename(root / "z")
                (root / "d").symlink_to(secret)
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "_walk", swapped)
        with pytest.raises(ImageError, match="can't read 'd'"):
            content(image)


async def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make(root)
    image = await find(f"dir:{root}")
    walk = directory._walk

    def swapped(*args: object) -> object:
        for found in walk(*args):  # type: ignore[arg-type]
            if found.path == b"d/f":
                with (root / "d" / "f").open("ab") as more:
                    more.write(b"more")
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "_walk", swapped)
        with pytest.raises(ImageCorruptError, match=r"'d/f' .* changed"):
            content(image)


async def test_what_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for name in ("f", "nothing"):
        with pytest.raises(ImageNotFoundError, match="is not a directory"):
            await find(f"dir:{tmp_path}/{name}")


async def test_limits_of_a_directory(tmp_path: Path) -> None:
    make(tmp_path / "root")
    with pytest.raises(ImageCorruptError, match="more than 5 files"):
        await find(f"dir:{tmp_path}/root", Limits(entries=5))
    image = await find(f"dir:{tmp_path}/root", Limits(size=1000))
    with pytest.raises(ImageCorruptError, match="more than 1000 bytes"):
        content(image)


async def test_a_directory_that_is_nested_too_deep(tmp_path: Path) -> None:
    top = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(directory.MAX_DEPTH + 2):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(top)
    with pytest.raises(ImageUnsupportedError, match="nested"):
        await find(f"dir:{tmp_path}")


async def test_giving_up_a_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "root")
    started, ended = threading.Event(), threading.Event()

    def endless(root: Path, limits: Limits, poll: object) -> object:
        assert callable(poll)
        try:
            while True:
                started.set()
                poll()
                yield from ()
        finally:
            ended.set()

    monkeypatch.setattr(directory, "_walk", endless)
    finding = asyncio.ensure_future(find(f"dir:{tmp_path}/root"))
    await asyncio.to_thread(started.wait)
    finding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finding
    assert await asyncio.to_thread(ended.wait, 120)


# --- builtin ---


async def test_a_builtin_image(tmp_path: Path) -> None:
    disk = tmp_path / "busybox.squashfs"
    disk.write_bytes(b"hsqs")
    builtin = {"busybox": (disk, {"config": {"Cmd": ["sh"], "WorkingDir": "/root"}})}
    image = await resolve("builtin:busybox", architecture="x86_64", builtin=builtin)
    assert (image.disk, image.write_tar, image.disk_type) == (disk, None, "squashfs")
    assert (image.config.cmd, image.config.workdir) == (("sh",), "/root")
    assert image.digest == digest_of(b"hsqs")
    with pytest.raises(ImageNotFoundError, match=r"no builtin image 'bash' \(there is busybox\)"):
        await resolve("builtin:bash", architecture="x86_64", builtin=builtin)
    with pytest.raises(ImageNotFoundError, match=r"there is none"):
        await resolve("builtin:bash", architecture="x86_64")


# --- errors ---


async def test_an_error_carries_the_reference(tmp_path: Path) -> None:
    (tmp_path / "r.tar").write_bytes(tar_of([symlink("a", "b"), file("a/x")]))
    image = await find(f"tar:{tmp_path}/r.tar")
    with pytest.raises(ImageCorruptError) as caught:
        content(image)
    assert caught.value.reference == f"tar:{tmp_path}/r.tar"
