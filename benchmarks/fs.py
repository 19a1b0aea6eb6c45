"""Files in a guest: 256 MB written and read, 5,000 small files made, listed, read and removed, by each way; and what
each way to bring a root filesystem costs a cold start.

The floor is the same work in a guest of QEMU that was started by hand, with the same kernel, busybox, device and
server. Both guests are there at the same time, and do the work in turns, piece by piece: now one is first, now the
other. So what the machine does meanwhile hits both, and each piece has a pair of its own, some 100 ms apart: two guests
one after the other differ by a factor of two where a machine's speed does. A ratio is the median of all pairs' ratios,
of all rounds; p50 and floor are of the sums of a round's pieces.

Beside the time there is the CPU time of QEMU and of the server, which another program on the same machine moves less.
Within it a guest is told of each piece: 1 ms more for ours, which shows where pieces are short. What all pairs of a
round have in common may be its two guests: more rounds start others.

What one guest wrote another one reads, so that nothing comes from a guest's memory. Before anything is measured each
guest has run the programs that do the work, elsewhere, and the machine has memory at hand for them: what is held here
until the work begins.

``PYKATA_BENCH_MB``, ``PYKATA_BENCH_FILES``, ``PYKATA_BENCH_ONLY`` (one of PLACES, or ``starts``) and
``PYKATA_BENCH_WORK`` (``bytes`` or ``files``) make it shorter; ``PYKATA_VIRTIOFSD`` is used for both sides. In
``PYKATA_BENCH_DIR`` are the files: if that is a tmpfs (/dev/shm), the disk of this machine has no part in the figures.

All of it takes some minutes. ``PYKATA_BENCH_KEEP`` is a file that gets each pair as soon as it is measured, and
whose pairs the rows are of, so that it can be done in pieces; ``-n 0`` shows what is there, and each pair.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

import pykata
from benchmarks import _bare
from benchmarks._bare import Shell
from benchmarks._table import Row, interleaved, main, note, row
from benchmarks._used import cpu_time, descendants

PLACES = ("disk", "virtio-fs", "virtio-fs, cache=always", "9p", "9p, cache=always")
ONLY = os.environ.get("PYKATA_BENCH_ONLY", "")      # one of PLACES, or "starts"
SIZE, FILES = int(os.environ.get("PYKATA_BENCH_MB", "256")), int(os.environ.get("PYKATA_BENCH_FILES", "5000"))
WORK = os.environ.get("PYKATA_BENCH_WORK", "")      # "bytes", "files", or both
KEEP = os.environ.get("PYKATA_BENCH_KEEP", "")      # a file of pairs, a line of JSON for each round of one kind of work
PIECES = 8
MB, EACH = SIZE // PIECES, FILES // PIECES      # of a piece

# The scripts have the number of the piece as $n.
BYTES = ({f"write {SIZE} MB":
          f"dd if=/dev/zero of=big bs=1M count={MB} seek=$((n*{MB})) conv=notrunc,fsync 2>/dev/null"},
         {f"read {SIZE} MB": f"dd if=big of=/dev/null bs=1M count={MB} skip=$((n*{MB})) 2>/dev/null"})
SMALL = (
    {f"{FILES:,} files made": f"mkdir d$n; i=0; while [ $i -lt {EACH} ]; do echo $i > d$n/$i; i=$((i+1)); done; sync"},
    {f"{FILES:,} files listed": "ls -l d$n > /dev/null", f"{FILES:,} files read": "cat d$n/* > /dev/null",
     f"{FILES:,} files removed": "rm -r d$n"},
)  # fmt: skip
NOTHING: tuple[dict[str, str], dict[str, str]] = ({}, {})
# What one guest does, and then another.
FIRST, THEN = (
    {**of_bytes, **of_files} for of_bytes, of_files in
    zip(NOTHING if WORK == "files" else BYTES, NOTHING if WORK == "bytes" else SMALL, strict=True)
)  # fmt: skip
# The programs, once. By hand they are in memory from the start on, and a container's come from a disk.
BEFORE = ("cd /tmp; mkdir w; dd if=/dev/zero of=w/a bs=1M count=1 conv=fsync 2>/dev/null; ls -l w > /dev/null; "
          "cat w/* > /dev/null; rm -r w; sync; cd /m")


@frozen
class Taken:
    """What a piece of work has taken, in milliseconds: of time, and of the CPU's."""

    time: float
    cpu: float


@frozen
class Guest:
    """A guest that waits for work, and the processes that it is made of."""

    shell: Shell
    pids: frozenset[int]

    async def take(self, work: str, number: int) -> Taken:
        used = cpu_time(self.pids)
        # The shell's own clock, and nothing is said before the end: no process and no agent that runs meanwhile.
        (said,) = await self.shell.run(f"n={number}; b=$EPOCHREALTIME; {work}; e=$EPOCHREALTIME; echo $b $e")
        begun, ended = map(float, said.split())
        return Taken((ended - begun) * 1000, cpu_time(self.pids) - used)


Pair = tuple[Taken, Taken]      # ours, and by hand
Found = dict[tuple[str, str], list[list[Pair]]]
"""For each kind of work and each place the pieces of each round."""


async def measure(rounds: int) -> list[Row]:
    """Rows for each kind of work in each place, and for the starts."""
    found = Found()
    begun = random.randrange(2)         # rounds may be runs of their own
    with tempfile.TemporaryDirectory(dir=os.environ.get("PYKATA_BENCH_DIR")) as top:
        for number in range(rounds):
            for way in PLACES:
                if ONLY in (way, ""):
                    await _both(way, Path(top), found, begun + number)
    if KEEP:
        found = _kept()
    rows = [each for way, name in _measured(found) for each in _compared(f"{name}: {way}", found[name, way])]
    return rows + (await _starts(rounds) if ONLY in ("starts", "") and rounds else [])


def _compared(name: str, rounds: list[list[Pair]]) -> list[Row]:
    if KEEP:
        note(f"{name}: {', '.join(' '.join(f'{a.time:.0f}/{b.time:.0f}' for a, b in pairs) for pairs in rounds)}")
    return [
        _row(name, [[(a.time, b.time) for a, b in pairs] for pairs in rounds]),
        _row(f"{name}, CPU time", [[(a.cpu, b.cpu) for a, b in pairs] for pairs in rounds]),
    ]


def _row(name: str, rounds: list[list[tuple[float, float]]]) -> Row:
    ours, by_hand = ([sum(pair[side] for pair in pairs) for pairs in rounds] for side in (0, 1))
    ratios = [one / other for pairs in rounds for one, other in pairs]
    return evolve(row(name, "ms", ours, by_hand), ratio=statistics.median(ratios))


def _measured(found: Found) -> list[tuple[str, str]]:
    names = [name for works in (*BYTES, *SMALL) for name in works]
    return [(way, name) for way in PLACES for name in names if (name, way) in found]


def _add(name: str, way: str, pairs: list[Pair], found: Found) -> None:
    found.setdefault((name, way), []).append(pairs)
    if KEEP:
        with open(KEEP, "a") as file:
            print(json.dumps([name, way, [(a.time, a.cpu, b.time, b.cpu) for a, b in pairs]]), file=file)


def _kept() -> Found:
    found = Found()
    with open(KEEP) as file:
        for name, way, pairs in map(json.loads, file):
            found.setdefault((name, way), []).append([(Taken(*pair[:2]), Taken(*pair[2:])) for pair in pairs])
    return found


@contextmanager
def _memory() -> Iterator[mmap.mmap]:
    """Memory for the guests, their servers and files: used, and held until it is closed, when the work begins.

    If this machine is a virtual one, its own host takes back what has been free for two seconds, and has to find it
    anew for whoever uses it next: 256 MB take 27 ms or 740.
    """
    size = 2 * (768 + SIZE) << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)      # as QEMU's
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
        yield memory


async def _both(way: str, top: Path, found: Found, turn: int) -> None:
    ours, by_hand, folder = top / "ours", top / "bare", top / "by-hand"
    folder.mkdir()
    if way == "disk":
        await _made_disk(by_hand)
    else:
        ours.mkdir()
        by_hand.mkdir()
    for work in (FIRST, THEN):
        with _memory() as memory:
            async with _ours(way, ours) as one, _by_hand(way, by_hand, folder) as other:
                memory.close()
                for name, script in work.items():
                    pairs = [await _pair(one, other, script, number, turn + number) for number in range(PIECES)]
                    _add(name, way, pairs, found)
    for place in (ours, by_hand, folder):
        _remove(place)


async def _pair(ours: Guest, by_hand: Guest, script: str, number: int, turn: int) -> Pair:
    if turn % 2:
        second = await by_hand.take(script, number)
        return await ours.take(script, number), second
    return await ours.take(script, number), await by_hand.take(script, number)


@asynccontextmanager
async def _ours(way: str, place: Path) -> AsyncIterator[Guest]:
    cache: Any = "always" if "always" in way else "auto"
    volume: Any = pykata.DiskImage(place, size=f"{2 * SIZE}M", files=FILES + 100)
    if way != "disk":
        volume = pykata.Bind(place, via="9p" if way.startswith("9p") else "virtiofs", cache=cache)
    before = descendants()
    async with (
        pykata.Sandbox(isolation="emulated", volumes={"/m": volume}, memory="512M") as sandbox,
        sandbox.process("builtin:busybox", ["sh", "-c", f"{BEFORE}; {Shell.LOOP}"]) as process,
    ):
        shell = Shell(process.stdin.send, process.stdout.readline)
        await shell.answer()
        yield Guest(shell, descendants() - before)
        await shell.send(b"\n")
        assert await process.wait() == 0


@asynccontextmanager
async def _by_hand(way: str, place: Path, folder: Path) -> AsyncIterator[Guest]:
    before = descendants()
    async with _bare.guest(way, place, BEFORE, folder) as shell:
        yield Guest(shell, descendants() - before)


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
