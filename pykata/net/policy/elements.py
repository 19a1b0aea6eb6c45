"""Changing nftables' sets while packets pass, by netlink: some microseconds, where ``nft`` takes a process.

A batch of messages is one transaction (linux/netfilter/nf_tables.h, nfnetlink.h).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

NETLINK_NETFILTER = 12
NFNL_BATCH_BEGIN, NFNL_BATCH_END, SUBSYSTEM = 16, 17, 10
DELETE_TABLE, NEW_ELEMENT, DELETE_ELEMENT, DESTROY_ELEMENT = 2, 12, 14, 30
REQUEST, ACK, CREATE = 1, 4, 0x400
NETDEV = 5
TABLE, SET, ELEMENTS = 1, 2, 3              # NFTA_SET_ELEM_LIST_*
ELEMENT, KEY, TIMEOUT, VALUE = 1, 1, 4, 1   # NFTA_LIST_ELEM, NFTA_SET_ELEM_*, NFTA_DATA_VALUE
NESTED = 0x8000
ERROR = 2                                   # NLMSG_ERROR, also for what went well


class Change(NamedTuple):
    """One element to add to a set (for ``timeout`` seconds, or for good if it is 0), or to delete."""

    verb: Literal["add", "delete"]
    set: str
    key: bytes
    timeout: int = 0


class Elements:
    """The sets of one table. The socket is of the table's namespace, and the caller's."""

    def __init__(self, connection: socket.socket, table: str) -> None:
        self._socket = connection
        self._table = table.encode() + b"\0"
        self._sequence = 0
        # That the element isn't there (its time was over) is no error, and an error takes milliseconds: the kernel
        # waits for all packets that are under way. Linux before 6.3 only knows the other one.
        self._delete = DESTROY_ELEMENT

    def change(self, changes: Sequence[Change]) -> list[int]:
        """Do all of it, each by itself; returns an errno for each, 0 for what was done. Doesn't wait: the kernel
        works while it is told."""
        return [self._transaction(each) for each in changes]

    def _transaction(self, change: Change) -> int:
        self._sequence += 3
        first = self._sequence & 0x7FFFFFFF
        begin = _message(NFNL_BATCH_BEGIN, REQUEST, first, struct.pack("!BBH", 0, 0, SUBSYSTEM))
        end = _message(NFNL_BATCH_END, REQUEST, first + 2, struct.pack("!BBH", 0, 0, SUBSYSTEM))
        kind = NEW_ELEMENT if change.verb == "add" else self._delete
        flags = REQUEST | ACK | (CREATE if change.verb == "add" else 0)
        body = struct.pack("!BBH", NETDEV, 0, 0) + self._body(change)
        try:
            self._socket.send(begin + _message(SUBSYSTEM << 8 | kind, flags, first + 1, body) + end)
            answer = self._answer(first + 1)
        except OSError as exc:
            return exc.errno or errno.EIO
        if answer in (errno.EINVAL, errno.EOPNOTSUPP) and kind == DESTROY_ELEMENT:
            self._delete = DELETE_ELEMENT
            return self._transaction(change)
        return answer

    def _body(self, change: Change) -> bytes:
        element = _attribute(KEY | NESTED, _attribute(VALUE, change.key))
        if change.timeout:
            element += _attribute(TIMEOUT, struct.pack("!Q", change.timeout * 1000))
        listed = _attribute(ELEMENTS | NESTED, _attribute(ELEMENT | NESTED, element))
        return _attribute(TABLE, self._table) + _attribute(SET, change.set.encode() + b"\0") + listed

    def _answer(self, sequence: int) -> int:
        while True:
            data = self._socket.recv(16384, socket.MSG_DONTWAIT)
            while len(data) >= 20:
                length, kind, _, number, _ = struct.unpack_from("=IHHII", data)
                if kind == ERROR and number == sequence:
                    return -int(struct.unpack_from("=i", data, 16)[0])
                data = data[(max(length, 16) + 3) & ~3 :]


def delete_table(connection: socket.socket, table: str) -> None:
    """Remove a table of the family netdev with all that is in it, if it is there."""
    edge = struct.pack("!BBH", 0, 0, SUBSYSTEM)
    body = struct.pack("!BBH", NETDEV, 0, 0) + _attribute(TABLE, table.encode() + b"\0")
    with suppress(OSError):
        connection.send(
            _message(NFNL_BATCH_BEGIN, REQUEST, 1, edge) + _message(SUBSYSTEM << 8 | DELETE_TABLE, REQUEST, 2, body)
            + _message(NFNL_BATCH_END, REQUEST, 3, edge)
        )  # fmt: skip


def flow_key(protocol: int, source: bytes, destination: bytes, dport: int, sport: int) -> bytes:
    """An element of a set of flows: each part takes whole registers of 4 bytes."""
    return struct.pack("!Bxxx", protocol) + source + destination + struct.pack("!HxxHxx", dport, sport)


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
