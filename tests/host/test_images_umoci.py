"""A real image of many layers, merged by us and unpacked by umoci: the same tree."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import anyio
import pytest

from pykata.fs.block import Block
from pykata.images import resolve
from pykata.spec import Disk
from tests.images_fixtures import CAPABILITY, Seen, look_into

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can unpack owners and device nodes")

KINDS = {
    stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE, stat.S_IFBLK: tarfile.BLKTYPE, stat.S_IFIFO: tarfile.FIFOTYPE,
}


def run(*argv: str | Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def look_at(root: Path) -> dict[str, Seen]:
    """Everything in a directory, as :func:`tests.images_fixtures.look` has it."""
    status = {"": root.lstat()}
    for directory, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(directory, name)
            status[str(path.relative_to(root))] = path.lstat()
    names: dict[int, set[str]] = {}
    for name, one in status.items():
        names.setdefault(one.st_ino, set()).add(name)
    return {name: _seen(root / name, one, names[one.st_ino]) for name, one in status.items()}


def _seen(path: Path, status: os.stat_result, names: set[str]) -> Seen:
    kind = KINDS[stat.S_IFMT(status.st_mode)]
    node = kind in (tarfile.CHRTYPE, tarfile.BLKTYPE)
    attributes = os.listxattr(path, follow_symlinks=False)
    xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in attributes}
    return Seen(
        kind=kind, mode=stat.S_IMODE(status.st_mode), uid=status.st_uid, gid=status.st_gid,
        mtime=int(status.st_mtime), size=status.st_size if kind == tarfile.REGTYPE else 0,
        data=hashlib.sha256(path.read_bytes()).hexdigest() if kind == tarfile.REGTYPE else "",
        link=os.readlink(path) if kind == tarfile.SYMTYPE else "",
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if node else (0, 0),
        xattrs=tuple(sorted(xattrs.items())), names=frozenset(names),
    )


def live(root: Path, random: random.Random) -> None:
    """Change a root filesystem the way that installing and removing packages does."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()
                   and path.name not in ("passwd", "group"))        # umoci reads them
    # Not those at the top: what is left must be worth a comparison, whatever this machine has.
    folders = sorted(path for path in root.glob("*/**/*") if path.is_dir() and not path.is_symlink())
    for path in random.sample(files, min(len(files), 60)):
        match random.choice(["remove", "write", "chmod", "chown", "link", "rename", "xattr", "folder", "symlink"]):
            case "remove":
                path.unlink()
            case "write":
                path.write_bytes(random.randbytes(random.randrange(5000)))
            case "chmod":
                path.chmod(random.choice([0o600, 0o755, 0o4755, 0o2711]))
            case "chown":
                os.chown(path, random.randrange(70_000), random.randrange(70_000))
            case "link":
                os.link(path, path.with_name(f"{path.name}.{random.random()}"))
            case "rename":
                path.rename(path.with_name(f"{path.name}.{random.random()}"))
            case "xattr":
                os.setxattr(path, "security.capability", CAPABILITY)
            case "folder":
                path.unlink()
                path.mkdir(mode=0o1777)
                (path / "in it").write_bytes(b"new")
            case "symlink":
                path.unlink()
                path.symlink_to("/etc/" + path.name)
    for path in random.sample(folders, min(len(folders), 4)):
        if not path.is_dir():
            continue        # it was in one that is gone
        what = random.choice(["remove", "replace", "file", "rename"])
        if what == "rename":
            path.rename(path.with_name(f"{path.name}.{random.random()}"))
            continue
        shutil.rmtree(path)
        if what == "replace":
            path.mkdir()
            (path / "other").write_bytes(b"other")
        elif what == "file":
            path.write_bytes(b"a file now")
    os.mknod(root / f"node{random.randrange(10**6)}", stat.S_IFCHR | 0o600, os.makedev(10, random.randrange(2**18)))
    os.mkfifo(root / f"fifo{random.randrange(10**6)}")


@pytest.mark.parametrize("seed", [1, 2])
def test_the_tree_is_that_of_umoci(tmp_path: Path, seed: int) -> None:
    layout, bundle = tmp_path / "layout", tmp_path / "bundle"
    chance = random.Random(seed)
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:a")
    for number in range(5):
        run("umoci", "unpack", "--image", f"{layout}:a", bundle)
        root = bundle / "rootfs"
        if number == 0:
            shutil.copytree("/etc", root / "etc", symlinks=True)
        live(root, chance)
        run("umoci", "repack", "--image", f"{layout}:a", bundle)
        shutil.rmtree(bundle)
    run("umoci", "unpack", "--image", f"{layout}:a", bundle)
    expected = look_at(bundle / "rootfs")
    found = look_into(anyio.run(convert, f"oci:{layout}:a"))
    assert found.keys() == expected.keys()
    assert {path: one for path, one in found.items() if one != expected[path]} == {}
    assert len(found) > 500


async def convert(reference: str) -> Path:
    image = await resolve(reference, architecture=os.uname().machine)
    async with Block().rootfs(image, Path("/nowhere")) as attachment:
        [disk] = attachment.devices
        assert isinstance(disk, Disk)
        return disk.path
