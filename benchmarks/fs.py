"""Files in a guest: 256 MB written and read, 5,000 small files made, listed, read and removed, by each way; and what
each way to bring a root filesystem costs a cold start.

Each round measures all of them one after the other, and in between the floor: the same work in a guest of QEMU that was
started by hand, with the same kernel, busybox, device and server. What one guest wrote another one reads, so that
nothing comes from a guest's memory. Before that, each guest has run once the programs that do the work, elsewhere. On
both sides it uses memory for the first time, which this machine has at hand: what is held here until the work begins.

A ratio is how many times as long it takes as by hand, the median of what each round gives: the machine may be twice as
fast in one as in another. "More than block" is the median of differences, too.

``PYKATA_BENCH_MB``, ``PYKATA_BENCH_FILES``, ``PYKATA_BENCH_ONLY`` (one of PLACES, or ``starts``) and
``PYKATA_BENCH_WORK`` (``bytes`` or ``files``) make it shorter; ``PYKATA_VIRTIOFSD`` is used for both sides. In
``PYKATA_BENCH_DIR`` are the files: if that is a tmpfs (/dev/shm), the disk of this machine has no part in the figures.

All of it takes a quarter of an hour. ``PYKATA_BENCH_KEEP`` is a file that gets each pair as soon as it is measured, and
whose pairs the rows are of, so that it can be done in pieces; ``-n 0`` shows what is there, and each pair.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import evolve

import pykata
from benchmarks import _bare
from benchmarks._table import Row, interleaved, main, note, quantile, row

PLACES = ("disk", "virtio-fs", "virtio-fs, cache=always", "9p", "9p, cache=always")
ONLY = os.environ.get("PYKATA_BENCH_ONLY", "")      # one of PLACES, or "starts"
SIZE, FILES = int(os.environ.get("PYKATA_BENCH_MB", "256")), int(os.environ.get("PYKATA_BENCH_FILES", "5000"))
WORK = os.environ.get("PYKATA_BENCH_WORK", "")      # "bytes", "files", or both
KEEP = os.environ.get("PYKATA_BENCH_KEEP", "")      # a file of pairs, each a line of JSON


BYTES = ({f"write {SIZE} MB": f"dd if=/dev/zero of=big bs=1M count={SIZE} conv=fsync 2>/dev/null"},
         {f"read {SIZE} MB": "dd if=big of=/dev/null bs=1M 2>/dev/null"})
SMALL = (
    {f"{FILES:,} files made": f"mkdir d; i=0; while [ $i -lt {FILES} ]; do echo $i > d/$i; i=$((i+1)); done; sync"},
    {f"{FILES:,} files listed": "ls -l d > /dev/null", f"{FILES:,} files read": "cat d/* > /dev/null",
     f"{FILES:,} files removed": "rm -r d"},
)  # fmt: skip
NOTHING: tuple[dict[str, str], dict[str, str]] = ({}, {})
# What one guest does, and then another.
FIRST, THEN = (
    {**of_bytes, **of_files} for of_bytes, of_files in
    zip(NOTHING if WORK == "files" else BYTES, NOTHING if WORK == "bytes" else SMALL, strict=True)
)  # fmt: skip
# The programs, once. By hand they are in memory from the start on, and a container's come from a disk.
BEFORE = ("cd /tmp; mkdir w; dd if=/dev/zero of=w/a bs=1M count=1 conv=fsync 2>/dev/null; ls -l w > /dev/null; "
          "cat w/* > /dev/null; rm -r w; sync; echo | ts %.s > /dev/null")
CLOCK = "echo | ts %.s"       # seconds with all their digits; /proc/uptime has hundredths

Found = dict[tuple[str, str], list[float]]


async def measure(rounds: int) -> list[Row]:
    """Rows for each kind of work in each place, and for the starts."""
    found, floor = Found(), Found()
    begun = random.randrange(2)         # rounds may be runs of their own
    with tempfile.TemporaryDirectory(dir=os.environ.get("PYKATA_BENCH_DIR")) as top:
        for number in range(rounds):
            for way in PLACES:
                if ONLY in (way, ""):
                    await _both(way, Path(top), found, floor, ours_first=(begun + number) % 2 == 0)
                    _keep(way, found, floor)
    if KEEP:
        found, floor = _kept()
    rows = [_compared(f"{name}: {way}", found[name, way], floor[name, way]) for way, name in _measured(found)]
    return rows + (await _starts(rounds) if ONLY in ("starts", "") and rounds else [])


def _compared(name: str, ours: list[float], by_hand: list[float]) -> Row:
    pairs = list(zip(ours, by_hand, strict=True))
    if KEEP:
        note(f"{name}: {' '.join(f'{one:.0f}/{other:.0f}' for one, other in pairs)}")
    return evolve(row(name, "ms", ours, by_hand), ratio=quantile([one / other for one, other in pairs], 0.5))


def _measured(found: Found) -> list[tuple[str, str]]:
    names = [name for works in (*BYTES, *SMALL) for name in works]
    return [(way, name) for way in PLACES for name in names if (name, way) in found]


def _keep(way: str, found: Found, floor: Found) -> None:
    """Add what was measured last."""
    if KEEP:
        with open(KEEP, "a") as file:
            for name in (*FIRST, *THEN):
                print(json.dumps([name, way, found[name, way][-1], floor[name, way][-1]]), file=file)


def _kept() -> tuple[Found, Found]:
    found, floor = Found(), Found()
    with open(KEEP) as file:
        for name, way, ours, by_hand in map(json.loads, file):
            found.setdefault((name, way), []).append(ours)
            floor.setdefault((name, way), []).append(by_hand)
    return found, floor


@contextmanager
def _memory() -> Iterator[mmap.mmap]:
    """Memory for the next guest, its server and its file: used, and held until it is closed, when the work begins.

    If this machine is a virtual one, its own host takes back what has been free for two seconds, and has to find it
    anew for whoever uses it next: 256 MB take 27 ms or 740. One of two guests is later at work after its start than the
    other is, so it was that which was measured.
    """
    size = 768 + SIZE << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)      # as QEMU's
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
        yield memory


async def _both(way: str, top: Path, found: Found, floor: Found, *, ours_first: bool) -> None:
    if ours_first:
        await _ours(way, top, found)
    await _by_hand(way, top, floor)
    if not ours_first:
        await _ours(way, top, found)


def _script(work: dict[str, str]) -> str:
    return f"{CLOCK}; " + "; ".join(f"{each}; {CLOCK}" for each in work.values())


def _note(work: dict[str, str], said: str, way: str, found: Found) -> None:
    times = [float(line) * 1000 for line in said.split()]
    for name, before, after in zip(work, times[:-1], times[1:], strict=True):
        found.setdefault((name, way), []).append(after - before)


async def _ours(way: str, top: Path, found: Found) -> None:
    place = top / "ours"
    volume: Any = pykata.DiskImage(place, size=f"{2 * SIZE}M", files=FILES + 100)
    if way != "disk":
        place.mkdir()
        cache: Any = "always" if "always" in way else "auto"
        volume = pykata.Bind(place, via="9p" if way.startswith("9p") else "virtiofs", cache=cache)
    for work in (FIRST, THEN):
        script = f"{BEFORE}; cd /m; echo BEGIN; read begin; {_script(work)}"
        with _memory() as memory:
            async with (
                pykata.Sandbox(isolation="emulated", volumes={"/m": volume}, memory="512M") as sandbox,
                sandbox.process("builtin:busybox", ["sh", "-c", script]) as process,
            ):
                await anext(process.stdout)
                memory.close()
                said = (await process.communicate(b"begin\n"))[0].decode()
                assert process.returncode == 0, said
        _note(work, said, way, found)
    _remove(place)


async def _by_hand(way: str, top: Path, floor: Found) -> None:
    place, folder = top / "bare", top / "by-hand"
    folder.mkdir()
    if way == "disk":
        await _made_disk(place)
    else:
        place.mkdir()
    for work in (FIRST, THEN):
        with _memory() as memory:
            said = await _bare.run(way, place, BEFORE, _script(work), folder, begin=memory.close)
        _note(work, said, way, floor)
        (folder / "bare.sock").unlink(missing_ok=True)
    _remove(place)
    _remove(folder)


async def _made_disk(place: Path) -> None:
    import anyio

    place.touch()  # noqa: ASYNC240
    os.truncate(place, 2 * SIZE << 20)
    await anyio.run_process(["mkfs.ext4", "-q", "-F", "-m", "0", "-N", str(FILES + 111), str(place)])


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()


async def _starts(rounds: int) -> list[Row]:
    """A cold start with each way to bring a root filesystem, to the end of a first command."""
    image = f"dir:{_root()}"

    def start(fs: str) -> Any:
        async def sample() -> float:
            begun = time.monotonic()
            async with pykata.Sandbox(isolation="emulated", template="off", fs=fs) as sandbox:
                await sandbox.run(image, ["/bin/true"], check=True)
                return (time.monotonic() - begun) * 1000

        return sample

    ways = ("block", "virtiofs", "9p")
    try:
        for fs in ways:
            await start(fs)()               # converts
        values = await interleaved(3 * rounds, *(start(fs) for fs in ways))
    finally:
        shutil.rmtree(image.removeprefix("dir:"))
    rows = [row(f"cold start, fs={fs!r}", "ms", value) for fs, value in zip(ways, values, strict=True)]
    for fs, value in zip(ways[1:], values[1:], strict=True):
        more = [one - block for one, block in zip(value, values[0], strict=True)]
        rows.append(row(f"cold start, fs={fs!r}: more than block", "ms", more))
    return rows


def _root() -> str:
    root = Path(tempfile.mkdtemp(prefix="pykata-bench-"))
    busybox = shutil.which("busybox")
    assert busybox is not None
    (root / "bin").mkdir()
    shutil.copy(busybox, root / "bin/true")
    return str(root)


if __name__ == "__main__":
    main(measure, rounds=2, about=__doc__)
