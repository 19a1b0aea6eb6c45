"""Archives of a hostile guest, unpacked on the host: nothing is written outside, and every refusal is a typed error."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykata import Transfer, UnsafeTreeError
from pykata.files.extract import Bounds, Extractor
from pykata.files.pack import write_tree
from pykata.images.stream import Reader
from tests.images_fixtures import Item, file, folder, hardlink, symlink, tar_of

BOUNDS = Bounds(size=10 * 1024 * 1024, entries=1000)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An empty directory, beside one with a secret."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    inside = tmp_path / "target"
    inside.mkdir()
    return inside


def chunks(tar: bytes, size: int = 700) -> Iterator[bytes]:
    return (tar[at : at + size] for at in range(0, len(tar), size))


def extract(tar: bytes, target: Path, bounds: Bounds = BOUNDS, only: bytes | None = None) -> Transfer:
    top = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return Extractor(top, bounds, only).extract(Reader(chunks(tar)))
    finally:
        os.close(top)


def contents(top: Path) -> dict[str, bytes | str | None]:
    """What is below a directory, symlinks unfollowed: bytes of files, text of links, None for directories."""
    found: dict[str, bytes | str | None] = {}
    for here, directories, files in os.walk(top):
        for name in [*directories, *files]:
            path = Path(here, name)
            if path.is_symlink():
                found[str(path.relative_to(top))] = os.readlink(path)
            else:
                found[str(path.relative_to(top))] = path.read_bytes() if path.is_file() else None
    return found


def refused(items: Iterable[Item], target: Path, match: str, bounds: Bounds = BOUNDS) -> None:
    before = contents(target.parent / "outside")
    with pytest.raises(UnsafeTreeError, match=match):
        extract(tar_of(items), target, bounds)
    assert contents(target.parent / "outside") == before


# --- what is kept ---


def test_a_tree(target: Path) -> None:
    items = [
        folder("d", mode=0o2750), file("d/f", b"data", mode=0o6711), hardlink("d/h", "d/f"), symlink("l", "d/f"),
        file("empty"), folder("closed", mode=0o500), file("closed/f", b"x"),
    ]  # fmt: skip
    done = extract(tar_of(items), target)
    assert (done.entries, done.size, done.skipped) == (7, 5, ())
    assert contents(target) == {
        "d": None, "d/f": b"data", "d/h": b"data", "l": "d/f", "empty": b"", "closed": None, "closed/f": b"x",
    }  # fmt: skip
    assert stat.S_IMODE((target / "d").stat().st_mode) == 0o750, "setgid is dropped"
    assert stat.S_IMODE((target / "d/f").stat().st_mode) == 0o711, "setuid is dropped"
    assert stat.S_IMODE((target / "closed").stat().st_mode) == 0o500
    assert (target / "d").stat().st_mtime == 1_700_000_000
    assert (target / "d/h").stat().st_ino == (target / "d/f").stat().st_ino


def test_setuid_if_asked_for(target: Path) -> None:
    extract(tar_of([file("f", mode=0o4755)]), target, Bounds(size=100, entries=10, setuid=True))
    assert stat.S_IMODE((target / "f").stat().st_mode) == 0o4755


def test_what_was_there_is_replaced_not_written_through(target: Path) -> None:
    (target / "f").symlink_to("../outside/secret")
    (target / "h").hardlink_to(target.parent / "outside" / "secret")
    extract(tar_of([file("f", b"new"), file("h", b"new")]), target)
    assert contents(target) == {"f": b"new", "h": b"new"}
    assert contents(target.parent / "outside") == {"secret": b"secret"}


def test_names_that_are_not_utf8(target: Path) -> None:
    extract(tar_of([folder("\udcff"), file("\udcff/\udcfe\n", b"x")]), target)
    assert os.listdir(os.fsencode(target)) == [b"\xff"]
    assert os.listdir(os.fsencode(target) + b"/\xff") == [b"\xfe\n"]


def test_devices_are_left_out(target: Path) -> None:
    kinds = {"char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE}
    done = extract(tar_of([Item(name, kind, device=(1, 3)) for name, kind in kinds.items()]), target)
    assert done.skipped == tuple(kinds)
    assert contents(target) == {}


# --- what is refused ---


@pytest.mark.parametrize("name", ["../outside/new", "a/../../outside/new", "..", "a/.."])
def test_dots(target: Path, name: str) -> None:
    refused([file(name, b"x")], target, "'\\.\\.' in it")


def test_absolute_names_are_relative_to_the_target(target: Path) -> None:
    extract(tar_of([file("/etc/passwd", b"x"), symlink("abs", "/etc")]), target)
    assert contents(target) == {"etc": None, "etc/passwd": b"x", "abs": "/etc"}


def test_through_a_symlink(target: Path) -> None:
    refused([symlink("l", "../outside"), file("l/new", b"x")], target, "leads through 'l'")
    refused([symlink("m", "/"), folder("m/tmp/x")], target, "leads through 'm'")
    refused([symlink("n", "../outside"), folder("n")], target, "already something else")


def test_a_directory_that_becomes_a_symlink(target: Path) -> None:
    refused([folder("d"), symlink("d", "../outside"), file("d/new")], target, "already something else")
    refused([folder("e"), file("e", b"x")], target, "already something else")


def test_a_symlink_that_is_replaced_by_a_file(target: Path) -> None:
    extract(tar_of([symlink("l", "../outside/secret"), file("l", b"mine")]), target)
    assert contents(target) == {"l": b"mine"}


def test_hard_links_to_what_is_not_from_the_archive(target: Path) -> None:
    (target / "mine").write_text("mine")
    (target / "out").symlink_to("../outside")
    refused([hardlink("h", "mine")], target, "didn't come from the container")
    refused([symlink("s", "../outside/secret"), hardlink("h", "s")], target, "didn't come from the container")
    refused([hardlink("h", "out/secret")], target, "leads through 'out'")
    refused([hardlink("h", "none")], target, "isn't there")
    refused([hardlink("h", "../outside/secret")], target, "'\\.\\.' in it")
    extract(tar_of([file("a", b"x"), hardlink("a", "a")]), target)
    assert (target / "a").read_bytes() == b"x"


def test_limits(target: Path) -> None:
    refused([file(f"f{n}") for n in range(11)], target, "more than 10 entries", Bounds(size=100, entries=10))
    refused([file("f", bytes(101))], target, "more than 100 bytes", Bounds(size=100, entries=10))


def test_archives_that_are_cut_off_or_go_on(target: Path) -> None:
    tar = tar_of([file("f", bytes(2000))])
    for end in (1, 511, 513, 1024, 1100):
        with pytest.raises(UnsafeTreeError):
            extract(tar[:end], target)
    with pytest.raises(UnsafeTreeError, match="after the end"):
        extract(tar + b"more", target)


def test_one_file(target: Path) -> None:
    extract(tar_of([file("whatever/name", b"x")]), target, only=b"mine")
    assert contents(target) == {"mine": b"x"}
    for wrong in ([folder("d")], [symlink("s", "/")], [file("a"), file("b")]):
        with pytest.raises(UnsafeTreeError, match="something else"):
            extract(tar_of(wrong), target, only=f"other{len(wrong)}{wrong[0].name}".encode())


# --- any archive at all ---

NAMES = st.sampled_from(
    ["a", "b", "a/b", "a/b/c", "../outside/x", "/a", "a/../b", ".", "\udcff", "out", "out/secret", "b/a"]
)
TARGETS = st.sampled_from(["a", "b", "a/b", "../outside", "../outside/secret", "/", ".", "..", "out", "/etc/passwd"])
ITEMS = st.one_of(
    st.builds(file, NAMES, st.binary(max_size=600)), st.builds(folder, NAMES), st.builds(symlink, NAMES, TARGETS),
    st.builds(hardlink, NAMES, TARGETS),
    st.builds(Item, NAMES, st.sampled_from([tarfile.CHRTYPE, tarfile.FIFOTYPE]), device=st.just((1, 3))),
)  # fmt: skip


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(items=st.lists(ITEMS, max_size=8), at=st.integers(0, 5000), byte=st.integers(0, 255), clean=st.booleans())
def test_nothing_gets_out(
    tmp_path_factory: pytest.TempPathFactory, items: list[Item], at: int, byte: int, clean: bool
) -> None:
    top = tmp_path_factory.mktemp("hostile")
    target, outside = top / "target", top / "outside"
    target.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (target / "out").symlink_to("../outside")
    tar = bytearray(tar_of(items))
    if not clean and at < len(tar):
        tar[at] = byte
    with suppress(UnsafeTreeError, OSError):
        extract(bytes(tar), target)
    assert contents(outside) == {"secret": b"secret"}
    assert sorted(os.listdir(top)) == ["outside", "target"]
    for here, _, files in os.walk(target):
        for name in files:
            kind = os.lstat(os.path.join(here, name)).st_mode
            assert stat.S_ISREG(kind) or stat.S_ISLNK(kind)


# --- what the host itself packs ---


def packed(top: Path) -> tuple[bytes, Transfer]:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as file:
        done = write_tree(os.fsencode(top), writer)     # small: all of it fits into the pipe
        return file.read(), done


def test_there_and_back(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d/f").write_bytes(b"x" * 1000)
    (source / "d/h").hardlink_to(source / "d/f")
    (source / "l").symlink_to("/nowhere")
    with (source / "sparse").open("wb") as sparse:
        sparse.write(b"begin")
        sparse.truncate(5 * 1024**2)
    os.mkfifo(source / "fifo")
    os.utime(source / "d", ns=(0, 1_234_567_890_123_456_789))
    os.utime(source / "l", ns=(0, -1_500_000_000), follow_symlinks=False)
    (source / "d").chmod(0o511)
    tar, done = packed(source)
    assert done.skipped == ("fifo",)
    extract(tar, target)
    kept = contents(source)
    del kept["fifo"]
    assert contents(target) == kept
    assert (target / "sparse").stat().st_blocks * 512 < 1024**2
    for name in ("d", "l", "d/f"):
        was, now = (source / name).lstat(), (target / name).lstat()
        assert (was.st_mode, was.st_mtime_ns) == (now.st_mode, now.st_mtime_ns)
