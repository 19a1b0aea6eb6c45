"""The Debian system that the nested machine boots: a kernel, a RAM disk and a root filesystem, made once and kept.

Made from Debian's packages by mmdebstrap, in one to three minutes; 0.2 GB in the user's cache.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from attrs import frozen

from pykata.guest import cpio
from pykata.host import DEVNULL, STDOUT, TOOL_ENV, cache_dir, describe_exit, find_tool, spawn

SUITE = "bookworm"
PYTHON = (3, 11)
"""The suite's Python. It uses the libraries of the Python that runs the tests, so they must be for the same."""

PACKAGES = (
    "busybox-static", "iproute2", "kmod", "linux-image-cloud-amd64", "procps", "python3", "qemu-system-x86",
    "squashfs-tools-ng", "strace", "util-linux",
)  # fmt: skip
UNUSED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/lib/udev/hwdb.d/*")

# What it takes to see the disks, and to mount a writable root above one of them.
MODULES = ("virtio_pci", "virtio_blk", "squashfs", "overlay")
INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /dev /lower /work /upper /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$module; done
/bin/busybox mount -t squashfs -o ro /dev/vda /lower
/bin/busybox mount -t tmpfs tmpfs /upper
/bin/busybox mkdir /upper/files /upper/scratch
/bin/busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/scratch overlay /root
/bin/busybox mkdir -p /root/work
/bin/busybox mount -t squashfs -o ro /dev/vdb /root/work
/bin/busybox umount /dev /proc
exec /bin/busybox switch_root /root /usr/bin/python3 -u /work/tests/nested/init.py
"""


@frozen
class Debian:
    """A directory with what the nested machine boots."""

    path: Path

    @property
    def kernel(self) -> Path:
        return self.path / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.path / "initrd.cpio"

    @property
    def root(self) -> Path:
        return self.path / "root.squashfs"


async def debian() -> Debian:
    """The system, from the user's cache or made into it."""
    recipe = repr((SUITE, PACKAGES, UNUSED, MODULES, INIT))
    root = cache_dir() / "nested"
    finished = root / sha256(recipe.encode()).hexdigest()[:16]
    if not finished.is_dir():
        root.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="tmp-", dir=root))
        try:
            await _make(scratch)
            (scratch / "root.tar").unlink()
            os.rename(scratch, finished)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Debian(finished)


async def _make(into: Path) -> None:
    system = into / "root.tar"
    excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in UNUSED]
    mmdebstrap = find_tool("mmdebstrap", package="mmdebstrap")
    include = f"--include={','.join(PACKAGES)}"
    await _run([str(mmdebstrap), "--variant=minbase", "--format=tar", include, *excluded, SUITE, str(system)], into)
    with tarfile.open(system) as tar:
        files = {member.name.removeprefix("."): member for member in tar}
        kernel = next(name for name in files if name.startswith("/boot/vmlinuz-"))
        release = kernel.removeprefix("/boot/vmlinuz-")
        (into / "vmlinuz").write_bytes(_read(tar, files[kernel]))
        below = f"/usr/lib/modules/{release}/"
        order = _in_order(_read(tar, files[below + "modules.dep"]).decode(), MODULES)
        modules = {Path(name).name: _read(tar, files[below + name]) for name in order}
        (into / "initrd.cpio").write_bytes(_initrd(_read(tar, files["/usr/bin/busybox"]), modules))
    await squash(system, into / "root.squashfs")


async def squash(tar: Path, into: Path) -> None:
    """Turn a tar into a squashfs that is read quickly."""
    tar2sqfs = find_tool("tar2sqfs", package="squashfs-tools-ng")
    with tar.open("rb") as file:
        await _run([str(tar2sqfs), "--quiet", "--compressor", "lz4", str(into)], into.parent, stdin=file.fileno())


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _in_order(modules_dep: str, wanted: Iterable[str]) -> list[str]:
    """The files of the modules and of what they need, each after what it needs (modules.dep(5))."""
    needs = {}
    for line in modules_dep.splitlines():
        file, _, needed = line.partition(":")
        needs[Path(file).stem.replace("-", "_")] = [file, *needed.split()]
    # A line lists first what is needed by those after it last.
    return list(dict.fromkeys(file for name in wanted for file in reversed(needs[name])))


def _initrd(busybox: bytes, modules: Mapping[str, bytes]) -> bytes:
    return cpio.newc([
        cpio.directory("bin"), cpio.directory("modules"),
        cpio.program("bin/busybox", busybox), cpio.program("init", INIT.encode()),
        cpio.program("modules/order", "\n".join(modules).encode()),
        *(cpio.program(f"modules/{name}", data) for name, data in modules.items()),
    ])  # fmt: skip


async def _run(argv: list[str], folder: Path, stdin: int = DEVNULL) -> None:
    environment = {**TOOL_ENV, "TMPDIR": str(folder), "INITRD": "No"}
    environment |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    said = folder / "log"
    with said.open("wb") as log:
        async with spawn(argv, stdin=stdin, stdout=log, stderr=STDOUT, env=environment) as process:
            code = await process.wait()
    if code:
        text = said.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{argv[0]} {describe_exit(code)}:\n{text}")
