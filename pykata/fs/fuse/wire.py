"""Requests and answers of FUSE as bytes: linux/include/uapi/linux/fuse.h, protocol 7.31.

What comes from a guest is bounded and checked here: a request that is none ends the conversation.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from attrs import frozen

MAJOR, MINOR = 7, 31
REQUEST = struct.Struct("<IIQQIIIHH")   # fuse_in_header: length, opcode, unique, node, uid, gid, pid, extensions
ANSWER = struct.Struct("<IiQ")          # fuse_out_header: length, error, unique
MAX_NAME = 255                          # bytes of a component of a path
MAX_PATH = 4096                         # bytes of a path, as long a one as Linux takes
DATA = 128 * 1024                       # bytes that one request reads or writes
LONGEST = DATA + 4096                   # bytes of a request


class Op(IntEnum):
    """What a request asks for; those that aren't here aren't supported."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    FALLOCATE = 43
    BATCH_FORGET = 42
    RENAME2 = 45


UNANSWERED = frozenset({Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT})


class MalformedError(ValueError):
    """The guest's bytes are no request."""


@frozen
class Request:
    """A request as it came, about the node ``node``."""

    op: int
    unique: int
    node: int
    body: bytes


class Inbox:
    """Bytes on their way in; :meth:`take` gives the next whole request."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, data: bytes) -> None:
        """Bytes that came."""
        self._bytes += data

    def take(self) -> Request | None:
        """The next request, if all of it is there. Raises MalformedError."""
        if len(self._bytes) < REQUEST.size:
            return None
        length, op, unique, node, *_ = REQUEST.unpack_from(self._bytes)
        if not REQUEST.size <= length <= LONGEST:
            raise MalformedError(f"a request of {length} bytes")
        if len(self._bytes) < length:
            return None
        body = bytes(self._bytes[REQUEST.size:length])
        del self._bytes[:length]
        return Request(op, unique, node, body)


def fields(form: str, body: bytes) -> tuple[int, ...]:
    """The integers with which a body begins. Raises MalformedError where it ends early."""
    try:
        return struct.unpack_from("<" + form, body)
    except struct.error:
        raise MalformedError("a request that ends early") from None


def names(body: bytes, skip: int, count: int) -> list[bytes]:
    """So many texts, each ended by a NUL, after the first bytes of a body. Raises MalformedError."""
    found = body[skip:].split(b"\0")
    if len(body) < skip or len(found) != count + 1 or found[-1]:
        raise MalformedError("a request without its names")
    return found[:-1]


def answer(unique: int, body: bytes = b"") -> bytes:
    """The answer to a request that went well."""
    return ANSWER.pack(ANSWER.size + len(body), 0, unique) + body


def failed(unique: int, errno: int) -> bytes:
    """The answer that says with which errno a request ended."""
    return ANSWER.pack(ANSWER.size, -errno, unique)
