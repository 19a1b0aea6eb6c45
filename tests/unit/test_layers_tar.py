"""The tar parser and writer: archives of other programs, every feature that they use, and damaged ones."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata.images.entry import BadEntryError, Entry, Kind
from pykata.images.stream import Reader, StreamError
from pykata.images.tar_reader import BLOCK, TarReader
from pykata.images.tar_writer import END, header, padding
from tests.images_fixtures import CAPABILITY, Item, file, folder, hardlink, look, symlink, tar_of


def chunked(raw: bytes, size: int = 1000) -> Iterator[bytes]:
    return (raw[at:at + size] for at in range(0, len(raw), size))


def read(raw: bytes, size: int = 1000) -> list[tuple[Entry, bytes]]:
    tar = TarReader(Reader(chunked(raw, size)))
    return [(entry, b"".join(tar.data())) for entry in tar]


def one(raw: bytes) -> Entry:
    [(entry, _)] = read(raw)
    return entry


def written(entries: list[tuple[Entry, bytes]]) -> bytes:
    return b"".join(header(entry) + data + padding(len(data)) for entry, data in entries) + END


def expand(entry: Entry, data: bytes) -> bytes:
    """The content of a sparse file."""
    if entry.extents is None:
        return data
    out, at = bytearray(entry.size), 0
    for offset, length in entry.extents:
        out[offset:offset + length] = data[at:at + length]
        at += length
    return bytes(out)


def ustar(name: bytes = b"f", *, flag: bytes = b"0", size: int = 0, **fields: tuple[int, bytes]) -> bytes:
    """A header block made by hand; ``fields`` are put at an offset."""
    block = bytearray(header(Entry(name, Kind.FILE, size=size, stored=size)))
    block[156:157] = flag
    for offset, value in fields.values():
        block[offset:offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records: bytes, flag: bytes = b"x") -> bytes:
    body = b"".join(b"%d %s\n" % (next(n for n in range(10**6) if n == len(str(n)) + 2 + len(r)), r) for r in records)
    return ustar(b"PaxHeader", flag=flag, size=len(body)) + body + padding(len(body))


ITEMS = [
    folder("./", mode=0o700), folder("d", mode=0o3775, uid=10, gid=20), file("d/f", b"data" * 1000, mode=0o4755),
    hardlink("d/l", "d/f"), symlink("s", "d/f"), Item("c", tarfile.CHRTYPE, device=(1, 3)),
    Item("b", tarfile.BLKTYPE, device=(259, 7)), Item("p", tarfile.FIFOTYPE), file("x" * 120, b"long"),
    symlink("long", "y" * 200), file("a/" * 40 + "deep", b"z"), file("u", uid=2**21, gid=2**31),
]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [1, 511, 512, 10**6])
def test_it_reads_what_tarfile_writes(format: int, size: int) -> None:
    items = [item for item in ITEMS if format != tarfile.USTAR_FORMAT
             or (item.uid < 2**21 and len(item.name) <= 100 and len(item.link) <= 100)]
    raw = tar_of(items, format=format)
    expected = look(raw, whole=False)
    again = look(written([(entry, data) for entry, data in read(raw, size)]), whole=False)
    assert again == expected


names = st.lists(st.binary(min_size=1, max_size=90).map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_")),
                 min_size=1, max_size=5).map(b"/".join).filter(
                     lambda path: not {b"", b".", b".."} & set(path.split(b"/")))
numbers = st.one_of(st.integers(0, 2**32 - 2), st.sampled_from([0o7777777, 0o7777777 + 1]))
entries = st.builds(
    Entry, names, st.sampled_from([Kind.CHAR, Kind.DIRECTORY, Kind.FIFO, Kind.FILE]), st.integers(0, 0o7777), numbers,
    numbers, st.integers(-(2**40), 2**40),
    xattrs=st.dictionaries(st.binary(min_size=1, max_size=9).filter(lambda key: not set(key) & set(b"=\0")),
                           st.binary(max_size=99)).map(lambda found: tuple(sorted(
                               (b"user." + key, value) for key, value in found.items()))),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(entries, max_size=3), st.binary(max_size=2000))
def test_what_is_written_is_read(heads: list[Entry], data: bytes) -> None:
    content = (Entry(b"data", Kind.FILE, size=len(data), stored=len(data)), data)
    everything = [*((head, b"") for head in heads), content]
    assert read(written(everything), 700) == everything


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_it_reads_what_gnu_tar_writes(tmp_path: Path, format: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ("n" * 60)).write_bytes(b"content" * 300)
    (tmp_path / "s").symlink_to("d")
    os.link(tmp_path / "d" / ("n" * 60), tmp_path / "l")
    raw = subprocess.run(["tar", "-C", tmp_path, f"--format={format}", "-c", "d", "s", "l"],
                         check=True, capture_output=True).stdout
    found = {entry.path: (entry.kind, len(data), entry.link) for entry, data in read(raw)}
    assert found == {
        b"d": (Kind.DIRECTORY, 0, b""), b"d/" + b"n" * 60: (Kind.FILE, 2100, b""), b"s": (Kind.SYMLINK, 0, b"d"),
        b"l": (Kind.HARDLINK, 0, b"d/" + b"n" * 60),
    }


@pytest.mark.parametrize("options", [
    ["--format=gnu"], ["--format=posix", "--sparse-version=0.0"], ["--format=posix", "--sparse-version=0.1"],
    ["--format=posix", "--sparse-version=1.0"],
])
@pytest.mark.parametrize("pieces", [0, 1, 3, 60])
def test_sparse_files(tmp_path: Path, options: list[str], pieces: int) -> None:
    with (tmp_path / "sparse").open("wb") as out:
        for piece in range(pieces):
            out.seek(piece * 200_000 + 50_000)
            out.write(bytes([piece + 1]) * 5000)
        out.truncate(pieces * 200_000 + 300_000)
    raw = subprocess.run(["tar", "-C", tmp_path, "--sparse", *options, "-c", "sparse"],
                         check=True, capture_output=True).stdout
    assert len(raw) < 60 * 20_000
    [(entry, data)] = read(raw)
    assert entry.path == b"sparse"
    assert expand(entry, data) == (tmp_path / "sparse").read_bytes()
    # Ours is read by others.
    again = written([(entry, data)])
    assert look(again, whole=False) == look(raw, whole=False)
    assert read(again) == [(entry, data)]


def test_a_binary_xattr_and_one_with_newlines() -> None:
    xattrs = {"security.capability": CAPABILITY, "user.n": b"1 a=b\n\n2", "user.all": bytes(range(256))}
    assert dict(one(tar_of([file("f", xattrs=xattrs)])).xattrs) == {name.encode(): v for name, v in xattrs.items()}


def test_numbers_in_base_256() -> None:
    entry = one(ustar(uid=(108, b"\x80" + (2**31).to_bytes(7, "big")), mtime=(136, b"\xff" * 12)))
    assert (entry.uid, entry.mtime) == (2**31, -1)


def test_numbers_with_blanks() -> None:
    assert one(ustar(mode=(100, b"   755 \0"), uid=(108, b" 12\0\0\0\0\0"))).mode == 0o755


def test_a_time_is_rounded_down() -> None:
    assert one(pax(b"mtime=12.999") + ustar()).mtime == 12
    assert one(pax(b"mtime=-12.001") + ustar()).mtime == -13
    assert one(pax(b"mtime=-12.000") + ustar()).mtime == -12


def test_a_prefix_of_ustar_and_what_gnu_has_in_its_place() -> None:
    assert one(ustar(prefix=(345, b"some/where"))).path == b"some/where/f"
    assert one(ustar(magic=(257, b"ustar  \0"), atime=(345, b"14712345670\0"))).path == b"f"
    assert one(ustar(prefix=(345, b"p"), atime=(476, b"14712345670\0"), star=(508, b"tar\0"))).path == b"p/f"


def test_a_directory_as_it_was_before_ustar() -> None:
    assert one(ustar(b"old/", flag=b"\0")).kind is Kind.DIRECTORY
    assert one(ustar(b"old", flag=b"\0")).kind is Kind.FILE
    assert one(ustar(b"contiguous", flag=b"7")).kind is Kind.FILE


def test_a_signed_checksum() -> None:
    block = bytearray(ustar("é".encode()))
    signed = sum(struct.unpack("512b", bytes(block[:148]) + b" " * 8 + bytes(block[156:])))
    block[148:156] = b"%06o\0 " % signed
    assert one(bytes(block)).path == "é".encode()


def test_a_global_header_is_read_over() -> None:
    assert one(pax(b"comment=of git", b"path=other", flag=b"g") + ustar()).path == b"f"
    assert read(ustar() + pax(b"comment=at the end", flag=b"g"))[0][0].path == b"f"


def test_an_empty_record_stands_for_none() -> None:
    assert one(pax(b"path=", b"size=", b"uid=") + ustar()).path == b"f"


def test_the_last_file_without_what_fills_its_block() -> None:
    tar = header(Entry(b"a", Kind.FILE, size=5, stored=5)) + b"12345"
    for more in (0, 100):
        reader = TarReader(Reader(iter([tar + bytes(more)])))
        assert [entry.path for entry in reader] == [b"a"]
    with pytest.raises(StreamError, match="truncated: 1 bytes"):
        list(TarReader(Reader(iter([tar[:-1]]))))


def test_the_end_without_blocks_of_zeros_and_what_follows_them() -> None:
    assert [entry.path for entry, _ in read(ustar())] == [b"f"]
    assert [entry.path for entry, _ in read(ustar() + bytes(BLOCK))] == [b"f"]
    assert [entry.path for entry, _ in read(ustar() + END + b"rubbish" * 1000)] == [b"f"]
    assert read(b"") == []


@pytest.mark.parametrize(("raw", "why"), [
    (ustar(b"../f"), "'..'"),
    (ustar(b"a/../../f"), "'..'"),
    (ustar(b"a/../f"), "'..'"),
    (ustar(b"/..", flag=b"5"), "'..'"),
    (pax(b"path=" + b"a/" * 2100) + ustar(), "4200 bytes"),
    (pax(b"path=" + b"n" * 256) + ustar(), "256 bytes"),
    (pax(b"path=a\0b") + ustar(), "NUL"),
    (pax(b"linkpath=a\0b") + ustar(flag=b"2"), "NUL"),
    (pax(b"linkpath=../../etc/passwd") + ustar(flag=b"1"), "'..'"),
    (ustar(flag=b"2"), "symlink to a name of 0 bytes"),
    (pax(b"linkpath=" + b"x" * 4096) + ustar(flag=b"2"), "4096 bytes"),
    (ustar(flag=b"s"), "its type b's'"),
    (ustar(flag=b"D"), "its type b'D'"),
    (ustar(flag=b"M"), "its type b'M'"),
    (ustar(owner=(108, b"\x80" + (2**32 - 1).to_bytes(7, "big"))), "its owner"),
    (ustar(owner=(108, b"\xff" * 8)), "its owner"),
    (pax(b"uid=99999999999") + ustar(), "its owner"),
    (pax(b"uid=-1") + ustar(), "where a number should be"),
    (pax(b"size=1_0") + ustar(), "where a number should be"),
    (pax(b"size=" + b"9" * 19) + ustar(), "can't be"),
    (pax(b"size=" + b"9" * 5000) + ustar(), "where a number should be"),
    (pax(b"mtime=soon") + ustar(), "where a number should be"),
    (ustar(mode=(100, b"rwxr-x\0\0")), "where a number should be"),
    (ustar(mode=(100, b"1_1\0\0\0\0\0")), "where a number should be"),
    (ustar(length=(124, b"-0000000001\0")), "where a number should be"),
    (ustar(flag=b"3", major=(329, b"0010000\0")), "device number"),
    (ustar(flag=b"4", minor=(337, b"\x80" + (2**20).to_bytes(7, "big"))), "device number"),
    (ustar()[:-1] + b"x", "checksum"),
    (bytes(BLOCK) + ustar(), "lone block of zeros"),
    (pax(b"path=x"), "last of the archive"),
    (ustar(flag=b"x", size=2**20 + 1), "more than 1048576"),
    (ustar(flag=b"L", size=2**32), "more than 1048576"),
    (ustar(flag=b"x", size=5) + b"5 a=b" + padding(5) + ustar(), "malformed"),
    (ustar(flag=b"x", size=6) + b"99 a=b" + padding(6) + ustar(), "malformed"),
    (ustar(flag=b"x", size=6) + b"x a=b\n" + padding(6) + ustar(), "malformed"),
    (ustar(flag=b"x", size=6) + b"0 a=b\n" + padding(6) + ustar(), "malformed"),
    (ustar(flag=b"x", size=6) + b"6 abc\n" + padding(6) + ustar(), "malformed"),
    (pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + ustar(), "real size is missing"),
    (pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=9") + ustar(), "map"),
    (pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=9") + ustar(size=512)
     + b"99999999\n".ljust(512, b"0"), "map"),
    (pax(b"GNU.sparse.map=0,1,2", b"GNU.sparse.size=9") + ustar(size=1) + bytes(512), "map"),
    (pax(b"GNU.sparse.map=5,1,2,1", b"GNU.sparse.size=9") + ustar(size=2) + bytes(512), "overlaps"),
    (pax(b"GNU.sparse.map=5,6", b"GNU.sparse.size=9") + ustar(size=6) + bytes(512), "after the file"),
    (pax(b"GNU.sparse.map=5,1", b"GNU.sparse.size=9") + ustar(size=6) + bytes(512), "isn't about the data"),
    (pax(b"GNU.sparse.numbytes=1", b"GNU.sparse.offset=1", b"GNU.sparse.size=9") + ustar(), "malformed"),
    (ustar(flag=b"S", size=5, map=(386, b"00000000000\000000000004\0"), real=(483, b"00000000011\0")), "isn't about"),
])
def test_what_can_t_be_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(BadEntryError) as caught:
        read(raw)
    assert why in str(caught.value)


@pytest.mark.parametrize("raw", [ustar()[:100], ustar(size=1), ustar(size=600) + bytes(512), pax(b"path=x")[:600]])
def test_what_is_truncated_is_refused(raw: bytes) -> None:
    with pytest.raises(StreamError, match="truncated"):
        read(raw)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_damage_never_does_more_than_be_refused(data: st.DataObject) -> None:
    raw = bytearray(tar_of(ITEMS[2:], format=data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))))
    for _ in range(data.draw(st.integers(1, 4))):
        block = data.draw(st.integers(0, len(raw) // BLOCK - 1)) * BLOCK
        at = block + data.draw(st.integers(0, BLOCK - 1))
        raw[at:at + 1] = data.draw(st.binary(min_size=0, max_size=4))
        whole = raw[block:block + 148] + b" " * 8 + raw[block + 156:block + BLOCK]
        raw[block + 148:block + 156] = b"%06o\0 " % sum(whole)      # damage past the checksum
    try:
        for entry, content in read(bytes(raw)):
            assert len(content) == entry.stored
            assert b".." not in entry.path.split(b"/")
            assert io.BytesIO(header(entry)).read()
    except (BadEntryError, StreamError):
        pass
