"""One disk for each image, or one for each layer with overlayfs above them: what sharing layers saves and costs.

Two images have the demo image (Debian with Python) as their base and differ in a small layer above it. The first is
there already. Merged, as pykata does it, the second is converted as a whole; shared, only its own layer is. In the
guest both are the lower part of an overlay: one disk, or one for each layer. "Floor" is the merged one throughout, so
a ratio below 1 means that sharing is better. The guest has only the kernel and a shell.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import IO, cast

import anyio
import anyio.to_thread

from benchmarks._table import Row, interleaved, main, note, row
from pykata import QEMU, find_bundle
from pykata.fs.squashfs import convert
from pykata.images import resolve
from pykata.images.layer import Layer, write_merged
from pykata.images.limits import DEFAULT_LIMITS
from pykata.spec import Disk
from tests.vm.qemu_guest import Guest, booted, initrd

DEMO_IMAGE = Path(__file__).resolve().parents[1] / "images" / "debian-python"
LAYERS = 4                      # disks in the deepest stack; with the merged one all that a microvm has room for
FILES, SIZE = 40, 5000          # of the small layer
READ = "/usr/lib/python3.11"


def small_layer(number: int, *, overlay: bool) -> bytes:
    """New files, one in place of a file of the base, and a removed one: as image-spec or as overlayfs has that."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for each in range(FILES):
            info = tarfile.TarInfo(f"usr/lib/python3.11/of-layer-{number}-{each}.py")
            info.size = SIZE
            tar.addfile(info, io.BytesIO(bytes([97 + number]) * SIZE))
        changed = tarfile.TarInfo("etc/issue")
        changed.size = 6
        tar.addfile(changed, io.BytesIO(b"issue\n"))
        gone = tarfile.TarInfo("etc/motd" if overlay else "etc/.wh.motd")
        gone.type = tarfile.CHRTYPE if overlay else tarfile.REGTYPE     # overlayfs: a device 0:0
        tar.addfile(gone)
    return out.getvalue()


def layer(tar: bytes) -> Layer:
    return Layer("small", lambda: io.BytesIO(tar))


async def converted(layers: list[Layer], path: Path) -> float:
    """Milliseconds of converting them into one disk."""
    began = time.perf_counter()
    await convert(partial(write_merged, layers, DEFAULT_LIMITS), path, "lz4")
    return (time.perf_counter() - began) * 1000


async def base_layer(folder: Path) -> Layer:
    """The demo image as one layer, plain."""
    image = await resolve(f"oci:{DEMO_IMAGE}", architecture="x86_64")
    assert image.write_tar is not None
    with (folder / "base.tar").open("wb") as out:
        await anyio.to_thread.run_sync(image.write_tar, cast(IO[bytes], out))
    return Layer("base", lambda: (folder / "base.tar").open("rb"))


async def timed(guest: Guest, line: str, times: int) -> float:
    """Milliseconds of a command in the guest."""
    began = time.perf_counter()
    code, said = await guest.run(f"(for i in $(seq {times}); do {line} || exit 9; done)")
    assert code == 0, said
    return (time.perf_counter() - began) * 1000 / times


def mounted(tags: list[str], place: str) -> str:
    """Mount disks, topmost first, below an overlay at ``place``."""
    lower = ":".join(f"{place}/{tag}" for tag in tags)
    lines = [f"mkdir -p {place}/{tag} && mount -t squashfs -o ro $(disk {tag}) {place}/{tag}" for tag in tags]
    lines += [f"mkdir -p {place}/w && mount -t tmpfs none {place}/w && mkdir {place}/w/u {place}/w/w {place}/w/m",
              f"mount -t overlay -o lowerdir={lower},upperdir={place}/w/u,workdir={place}/w/w none {place}/w/m"]
    return " && ".join(lines)


def unmounted(tags: list[str], place: str) -> str:
    lines = [f"umount {place}/w/m", f"umount {place}/w", *(f"umount {place}/{tag}" for tag in tags)]
    return " && ".join(lines)


async def in_guest(guest: Guest, stacks: dict[str, list[str]], rounds: int) -> list[Row]:
    """Rows for each stack of disks beside the merged one."""
    work = {
        "mount and unmount": None, "list all names, cold": "find {m} -xdev > /dev/null",
        "look at all files, warm": "ls -lR {m} > /dev/null",
        "read Python's library, cold": "find {m}" + READ + " -type f -name '*.py' -exec cat {{}} + > /dev/null",
    }  # fmt: skip
    rows = []
    for what, command in work.items():
        async def sample(tags: list[str], command: str | None = command, what: str = what) -> float:
            if command is None:
                return await timed(guest, f"{mounted(tags, '/mnt/a')} && {unmounted(tags, '/mnt/a')}", 3)
            line = command.format(m="/mnt/a/w/m")
            assert (await guest.run(mounted(tags, "/mnt/a")))[0] == 0
            await guest.run("echo 3 > /proc/sys/vm/drop_caches" if "cold" in what else line)
            elapsed = await timed(guest, line, 1)
            assert (await guest.run(unmounted(tags, "/mnt/a")))[0] == 0
            return elapsed

        samples = await interleaved(rounds, *(partial(sample, tags) for tags in stacks.values()))
        for name, values in list(zip(stacks, samples, strict=True))[1:]:
            rows.append(row(f"{what}, {name}", "ms", values, samples[0]))
    return rows


async def measure(rounds: int) -> list[Row]:
    """Rows for converting the second image, and for what a guest does with it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        folder = Path(place)
        base = await base_layer(folder)
        await converted([base], folder / "base")
        for number in range(1, LAYERS):
            await converted([layer(small_layer(number, overlay=True))], folder / f"l{number}")
        own = layer(small_layer(1, overlay=False))
        merged, alone = await interleaved(
            rounds, partial(converted, [base, own], folder / "merged"),
            partial(converted, [layer(small_layer(1, overlay=True))], folder / "l1"))
        rows = [row("convert the second image", "ms", alone, merged),
                row("  disk that it takes", "MB", [(folder / "l1").stat().st_size / 1e6],
                    [(folder / "merged").stat().st_size / 1e6])]
        tops = [f"l{number}" for number in range(LAYERS - 1, 0, -1)]
        disks = tuple(Disk(tag, folder / tag) for tag in ("merged", "base", *tops))
        bundle = find_bundle()
        stacks = {"merged": ["merged"], "2 layers": ["l1", "base"], f"{LAYERS} layers": [*tops, "base"]}
        async with booted(QEMU(), bundle.kernel, initrd(folder / "ramdisk"), memory=512, devices=disks) as guest:
            for tags in stacks.values():        # once for the emulator, which translates what it hasn't seen
                await timed(guest, f"{mounted(tags, '/mnt/a')} && {unmounted(tags, '/mnt/a')}", 1)
            rows += await in_guest(guest, stacks, rounds)
    note(f"the base: {(DEMO_IMAGE / 'index.json').parent.name}; a small layer: {FILES} files of {SIZE} bytes")
    return rows


if __name__ == "__main__":
    main(measure, rounds=5, about=__doc__)
