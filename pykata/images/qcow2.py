"""What a qcow2 image says of itself, read here before QEMU opens it (qemu, docs/interop/qcow2.txt).

Such an image can name other files of the host, and QEMU would open them. So one that does is refused; and which
filesystem it has is read without QEMU, for only its first bytes are needed.
"""

from __future__ import annotations

import os
import struct
import zlib

from attrs import frozen

MAGIC = b"QFI\xfb"

_HEADER = struct.Struct(">4sIQIIQIIQ")          # up to l1_table_offset; the same in version 2 and 3
_FEATURES = struct.Struct(">72xQ20xIB")         # incompatible_features, header_length, compression_type
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1, 2, 4, 8, 16
_CLUSTER_BITS = range(9, 22)
_SECTOR = 512
_OFFSET = 0x00FF_FFFF_FFFF_FE00                 # of an entry of a table: where in the file
_ZEROS, _COMPRESSED = 1, 1 << 62                # of an entry of the second table
_ZLIB, _ZSTD = 0, 1


class Qcow2Error(Exception):
    """Why it can't be used. ``hint`` is the remedy."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@frozen
class Qcow2:
    """The disk that the image is of: its ``size`` in bytes, and how to find its content."""

    descriptor: int
    size: int
    cluster_bits: int
    l1: int                 # where the first entry of the first table is; 0 if there is none
    compression: int

    def read(self, length: int) -> bytes:
        """The first ``length`` bytes of the disk, at most what one second table covers. Raises Qcow2Error, OSError."""
        length = min(length, self.size)
        cluster = 1 << self.cluster_bits
        table = self._entry(self.l1) & _OFFSET if self.l1 else 0
        found = b"".join(
            self._cluster(self._entry(table + 8 * number)) if table else bytes(cluster)
            for number in range(-(-length // cluster))
        )
        return found[:length]

    def _entry(self, offset: int) -> int:
        return int.from_bytes(self._at(offset, 8), "big")

    def _cluster(self, entry: int) -> bytes:
        size = 1 << self.cluster_bits
        if entry & _COMPRESSED:
            return self._unpacked(entry, size)
        if entry & _ZEROS or not entry & _OFFSET:
            return bytes(size)
        return self._at(entry & _OFFSET, size)

    def _unpacked(self, entry: int, size: int) -> bytes:
        bits = 62 - (self.cluster_bits - 8)
        offset, sectors = entry & ((1 << bits) - 1), (entry & (_COMPRESSED - 1)) >> bits
        packed = os.pread(self.descriptor, (sectors + 1) * _SECTOR - offset % _SECTOR, offset)
        unpack = _unzstd if self.compression == _ZSTD else _inflate
        return unpack(packed, size).ljust(size, b"\0")

    def _at(self, offset: int, length: int) -> bytes:
        # The end of the file may lie within the last cluster.
        return os.pread(self.descriptor, length, offset).ljust(length, b"\0")


def _inflate(packed: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(packed, size)
    except zlib.error as exc:
        raise Qcow2Error(f"its first cluster can't be decompressed: {exc}") from exc


def _unzstd(packed: bytes, size: int) -> bytes:
    import zstandard  # few images need it

    try:
        return bytes(zstandard.ZstdDecompressor().stream_reader(packed).read(size))
    except zstandard.ZstdError as exc:
        raise Qcow2Error(f"its first cluster can't be decompressed: {exc}") from exc


def open_qcow2(descriptor: int) -> Qcow2:
    """The image in this file, which must be one that stands alone. Raises Qcow2Error, OSError."""
    raw = os.pread(descriptor, 512, 0)
    if len(raw) < 105 or not raw.startswith(MAGIC):
        raise Qcow2Error("it is no qcow2", "format='raw' is what a disk is by default")
    _, version, backing, _, bits, size, encryption, l1_size, l1 = _HEADER.unpack_from(raw)
    if version not in (2, 3):
        raise Qcow2Error(f"it is a qcow2 of version {version}", "2 and 3 are known: qemu-img convert makes one")
    if backing:
        raise Qcow2Error("it is what was written over another file of this host, which is not opened for it",
                         "qemu-img convert -O qcow2 makes one that has all of it")
    if encryption:
        raise Qcow2Error("it is encrypted", "qemu-img convert makes one that isn't")
    if bits not in _CLUSTER_BITS:
        raise Qcow2Error(f"its clusters have 2^{bits} bytes")
    compression = _checked(raw) if version == 3 else _ZLIB
    return Qcow2(descriptor, size, bits, l1 & _OFFSET if l1_size else 0, compression)


def _checked(raw: bytes) -> int:
    """What version 3 adds: features without which it can't be read. Returns how clusters are compressed."""
    features, length, compression = _FEATURES.unpack_from(raw)
    if features & _DATA_FILE:
        raise Qcow2Error("its data is in another file of this host, which is not opened for it",
                         "qemu-img convert -O qcow2 makes one that has all of it")
    if features & _CORRUPT:
        raise Qcow2Error("it is marked as damaged", "qemu-img check -r all repairs what can be")
    if unknown := features & ~(_DIRTY | _COMPRESSION):
        what = "extended entries (extended_l2=on)" if unknown == _EXTENDED_L2 else f"features {unknown:#x}"
        raise Qcow2Error(f"it needs {what}, which aren't supported", "qemu-img convert -O qcow2 makes one without")
    kind = compression if features & _COMPRESSION and length > 104 else _ZLIB
    if kind not in (_ZLIB, _ZSTD):
        raise Qcow2Error(f"it is compressed in a way that isn't known: {kind}")
    return kind
