"""Decompression of layers: hostile input costs bounded memory, and what is truncated is never taken for complete."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator

import zstandard

from pykata.images.stream import CHUNK, Reader, StreamError

WINDOW = 128 * 1024 * 1024      # bytes of memory that a stream may ask of its decompressor; zstd --long=27 needs it

_GZIP_PIECE = 32 * 1024         # what is left after each gzip member is copied: tiny members cost a square of it
_ZSTD_MAGIC = 0xFD2FB528
_ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_ZSTD_BLOCK = 128 * 1024        # RFC 8878, 3.1.1.2.4: no block holds more


class ForeignCompressionError(StreamError):
    """Compressed in a way that we don't read."""


def compression_of(head: bytes) -> str:
    """What the first bytes of a stream (10 are enough) say: "gzip", "zstd", "xz" or "plain"."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if len(head) >= 4 and (magic := int.from_bytes(head[:4], "little")) and (
        magic == _ZSTD_MAGIC or magic in _ZSTD_SKIPPABLE
    ):
        return "zstd"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    # A tar starts with the name of a file, which might be "BZhang".
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        raise ForeignCompressionError("it is compressed with bzip2")
    if head[:4] == b"\x04\x22\x4d\x18":
        raise ForeignCompressionError("it is compressed with lz4")
    return "plain"


def decompressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a stream, in chunks of bounded size, whatever it is compressed with."""
    head = b""
    while len(head) < 10 and (chunk := next(chunks, None)) is not None:
        head += chunk
    decompress: dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]] = {
        "gzip": _gunzip, "zstd": _unzstd, "xz": _unxz, "plain": iter,
    }
    yield from decompress[compression_of(head)](_again(head, chunks))


def _again(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from rest


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    # A layer may be any number of gzip members (RFC 1952, 2.2): pigz writes a few, eStargz one for each file.
    inflate = zlib.decompressobj(wbits=31)
    try:
        for data in _pieces(chunks):
            while data:
                if inflate.eof:
                    inflate = zlib.decompressobj(wbits=31)
                yield inflate.decompress(data, CHUNK)
                data = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
        # zlib holds output back where its input was used up just as the limit of one call was reached.
        while not inflate.eof:
            out = inflate.decompress(b"", CHUNK)
            if not out:
                raise StreamError("truncated gzip")
            yield out
    except zlib.error as exc:
        raise StreamError(f"not valid gzip: {exc}") from exc


def _pieces(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for at in range(0, len(chunk), _GZIP_PIECE):
            yield chunk[at:at + _GZIP_PIECE]


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Block by block (RFC 8878, 3.1.1): the library's own readers bound the output or see the end, not both."""
    source = Reader(chunks)
    context = zstandard.ZstdDecompressor(max_window_size=WINDOW)
    while not source.at_end():
        head = source.read(4)
        magic = int.from_bytes(head, "little")
        if magic in _ZSTD_SKIPPABLE:
            source.skip(int.from_bytes(source.read(4), "little"))
        elif magic == _ZSTD_MAGIC:
            yield from _unzstd_frame(source, context, head)
        else:
            raise StreamError("not valid zstd: something else follows a frame")


def _unzstd_frame(source: Reader, context: zstandard.ZstdDecompressor, head: bytes) -> Iterator[bytes]:
    descriptor = source.read(1)
    flags = descriptor[0]
    single, checksum = flags >> 5 & 1, flags >> 2 & 1
    fields = (not single) + (0, 1, 2, 4)[flags & 3] + ((single, 2, 4, 8)[flags >> 6])
    pending = bytearray(head + descriptor + source.read(fields))
    frame = context.decompressobj()
    last = False
    try:
        while not last:
            blocks = 0
            while not last and blocks * _ZSTD_BLOCK < CHUNK:
                header = source.read(3)
                number = int.from_bytes(header, "little")
                last, kind, size = bool(number & 1), number >> 1 & 3, number >> 3
                if kind == 3 or size > _ZSTD_BLOCK:
                    raise StreamError("not valid zstd: a block that the format doesn't allow")
                pending += header + source.read(1 if kind == 1 else size)
                blocks += 1
            if last and checksum:
                pending += source.read(4)
            yield frame.decompress(bytes(pending))
            pending.clear()
    except zstandard.ZstdError as exc:
        raise StreamError(f"not valid zstd: {exc}") from exc
    if not frame.eof:
        raise StreamError("not valid zstd: a frame doesn't end where its blocks do")


def _unxz(chunks: Iterator[bytes]) -> Iterator[bytes]:
    decoder = lzma.LZMADecompressor(memlimit=WINDOW)
    try:
        for data in chunks:
            while data or not (decoder.eof or decoder.needs_input):
                if decoder.eof:
                    # Streams may follow each other, with zeros between them (the .xz file format, 2.2).
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    decoder = lzma.LZMADecompressor(memlimit=WINDOW)
                yield decoder.decompress(data, CHUNK)
                data = decoder.unused_data if decoder.eof else b""
    except lzma.LZMAError as exc:
        raise StreamError(f"not valid xz: {exc}") from exc
    if not decoder.eof:
        raise StreamError("truncated xz")
