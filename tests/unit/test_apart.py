"""Images in two parts: the tree without content, and the content without names. Together they are the image."""

from __future__ import annotations

import io
import os
import stat
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata import host
from pykata.errors import ImageCorruptError
from pykata.fs.apart import kept_apart
from pykata.images import resolve
from pykata.images.apart import write_apart
from pykata.images.entry import Entry, Kind
from pykata.images.stream import Reader, read_chunks
from pykata.images.tar_reader import TarReader
from pykata.images.tar_writer import END, header, padding
from pykata.spec import Image, ImageConfig
from tests.images_fixtures import file, folder, hardlink, symlink, tar_of

REDIRECT, METACOPY = b"trusted.overlay.redirect", b"trusted.overlay.metacopy"


def raw_attributes(tar: bytes) -> dict[bytes, dict[bytes, bytes]]:
    """What each file's extended header says, read here: the reader of images leaves overlayfs's own out."""
    found: dict[bytes, dict[bytes, bytes]] = {}
    at, records = 0, dict[bytes, bytes]()
    while tar[at:at + 1] != b"\0":
        flag, size = tar[at + 156:at + 157], int(tar[at + 124:at + 135], 8)
        if flag == b"x":
            body = tar[at + 512:at + 512 + size]
            records = {}
            while body:
                length = int(body.split(b" ", 1)[0])
                key, _, value = body[:length - 1].split(b" ", 1)[1].partition(b"=")
                records[key], body = value, body[length:]
        else:
            name = records.get(b"GNU.sparse.name", records.get(b"path", tar[at:at + 100].rstrip(b"\0")))
            prefix = b"SCHILY.xattr."
            found[name] = {key.removeprefix(prefix): v for key, v in records.items() if key.startswith(prefix)}
            records = {}
        at += 512 + (size + 511) // 512 * 512 if flag in b"0x" else 512
    return found


def apart(tar: bytes, content: Path) -> tuple[list[Entry], dict[bytes, dict[bytes, bytes]]]:
    def write(dest: IO[bytes]) -> None:
        for start in range(0, len(tar), 700):
            dest.write(tar[start:start + 700])

    out = io.BytesIO()
    write_apart(write, out, content)
    reader = TarReader(Reader(read_chunks(io.BytesIO(out.getvalue()))))
    return list(reader), raw_attributes(out.getvalue())


def test_the_tree_says_where_the_content_is(tmp_path: Path) -> None:
    entries, attributes = apart(tar_of([
        folder("d", mode=0o1777, uid=5), file("d/setuid", b"program", mode=0o4755, uid=7, xattrs={"user.x": b"y"}),
        file("empty"), hardlink("e", "d/setuid"), symlink("l", "/etc/passwd"), file("second", b"2"),
    ]), tmp_path)  # fmt: skip
    assert [(e.path, e.kind, e.mode, e.uid, e.size) for e in entries] == [
        (b"d", Kind.DIRECTORY, 0o1777, 5, 0), (b"d/setuid", Kind.FILE, 0o4755, 7, 7),
        (b"empty", Kind.FILE, 0o644, 0, 0),
        (b"e", Kind.HARDLINK, 0o644, 0, 0), (b"l", Kind.SYMLINK, 0o777, 0, 0), (b"second", Kind.FILE, 0o644, 0, 1),
    ]  # fmt: skip
    assert [e.stored for e in entries] == [0] * 6
    assert attributes[b"d/setuid"] == {b"user.x": b"y", METACOPY: b"\0\4\0\0", REDIRECT: b"/0/0"}
    assert attributes[b"second"][REDIRECT] == b"/0/1"
    assert attributes[b"empty"] == {}
    assert (tmp_path / "0/0").read_bytes() == b"program"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "0").iterdir()}
    assert modes == {0o444}, "no setuid program of an image lies about on the host"


def test_names_of_an_image_never_reach_the_host(tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.mkdir()
    hostile = [symlink("0", str(tmp_path)), file("x/y/z", b"1"), symlink("x/0", "/"), file("a" * 200, b"2")]
    apart(tar_of(hostile), content)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "content", "content/0", "content/0/0", "content/0/1"]


@st.composite
def sparse(draw: st.DrawFn) -> tuple[bytes, Entry]:
    """A file with holes, and what it reads as."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 600), st.integers(1, 600)), max_size=5))
    at, extents = 0, list[tuple[int, int]]()
    for hole, data in lengths:
        extents.append((at + hole, data))
        at += hole + data
    size = at + draw(st.integers(0, 500))
    whole = bytearray(size)
    for offset, length in extents:
        whole[offset:offset + length] = os.urandom(length)
    stored = sum(length for _, length in extents)
    return bytes(whole), Entry(b"f", Kind.FILE, size=size, stored=stored, extents=tuple(extents))


@given(sparse())
@settings(max_examples=60, deadline=None)
def test_holes_stay_where_they_are(made: tuple[bytes, Entry]) -> None:
    whole, entry = made
    assert entry.extents is not None
    data = b"".join(whole[offset:offset + length] for offset, length in entry.extents)
    with TemporaryDirectory() as name:
        content = Path(name)
        (found,), attributes = apart(header(entry) + data + padding(len(data)) + END, content)
        assert found.size == len(whole)
        if data:
            assert (content / "0/0").read_bytes() == whole
        else:
            assert attributes[b"f"] == {}, "nothing but a hole has no content"


def test_who_breaks_off_is_who_is_told_of(tmp_path: Path) -> None:
    tar = tar_of([file("a", b"x" * 5000)])

    def broken(dest: IO[bytes]) -> None:
        dest.write(tar[:3000])
        raise ImageCorruptError("layer 1 is damaged")

    with pytest.raises(ImageCorruptError, match="layer 1 is damaged"):
        write_apart(broken, io.BytesIO(), tmp_path)

    def short(dest: IO[bytes]) -> None:
        dest.write(tar[:3000])

    (tmp_path / "2").mkdir()
    with pytest.raises(ImageCorruptError, match="its tree can't be read"):
        write_apart(short, io.BytesIO(), tmp_path / "2")


def test_a_reader_that_is_gone_ends_the_writer(tmp_path: Path) -> None:
    class Gone(io.BytesIO):
        def write(self, data: object) -> int:
            raise BrokenPipeError

    def endless(dest: IO[bytes]) -> None:
        while True:
            dest.write(header(Entry(b"x", Kind.DIRECTORY)))

    with pytest.raises(BrokenPipeError):
        write_apart(endless, Gone(), tmp_path)


# --- kept ---


def image(tar: bytes, digest: str = "sha256:aa") -> Image:
    def write(dest: IO[bytes]) -> None:
        dest.write(tar)

    return Image("x", digest, ImageConfig(), "x86_64", write_apart=partial(write_apart, write))


async def test_it_is_made_once_and_goes_as_a_whole(tmp_path: Path) -> None:
    made = image(tar_of([file("a", b"x" * 100_000), file("b", b"y")]))
    async with kept_apart(made, tmp_path, "sha256-aa", in_place=True) as first:
        assert sorted(path.name for path in (first.content / "0").iterdir()) == ["0", "1"]
        assert int((first.content / host.CONTENT_SIZE).read_text()) >= 100_000
        assert not host.remove_unused(first.tree), "it is in use"
    async with kept_apart(image(b""), tmp_path, "sha256-aa", in_place=True) as second:
        assert second == first, "nothing is made again"
    assert host.remove_unused(first.tree)
    assert os.listdir(tmp_path) == []


async def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImageCorruptError):
        async with kept_apart(image(tar_of([file("a", b"x" * 5000)])[:3000]), tmp_path, "sha256-aa", in_place=True):
            pass
    assert os.listdir(tmp_path) == []


def test_what_a_killed_maker_left_is_removed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path))
    orphan = tmp_path / "rootfs" / f"sha256-bb-apart1-1{host.CONTENT}"
    (orphan / "0").mkdir(parents=True)
    host.trim_cache()
    assert orphan.exists(), "it may be being made"
    os.utime(orphan, (0, 0))
    host.trim_cache()
    assert not orphan.exists()


async def test_the_content_of_a_directory_is_the_directory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/sh").write_bytes(b"#!")
    os.link(root / "bin/sh", root / "bin/ash")
    found = await resolve(f"dir:{root}", architecture="x86_64")
    assert found.directory == root
    async with kept_apart(found, tmp_path / "kept", "sha256-dd", in_place=True) as parts:
        assert parts.content == root
        assert os.listdir(tmp_path / "kept") == [parts.tree.name]
    async with kept_apart(found, tmp_path / "kept", "sha256-dd", in_place=False) as copied:
        assert (copied.content / "0/0").read_bytes() == b"#!"
        assert copied.tree != parts.tree
    out = io.BytesIO()
    assert found.write_apart is not None
    found.write_apart(out, None)
    attributes = raw_attributes(out.getvalue())
    assert attributes[b"bin/ash"][REDIRECT] == b"/bin/ash"
    assert attributes[b"bin/sh"] == {}, "a hard link"

