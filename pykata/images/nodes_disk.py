"""The database that a tree goes to when it is too large for memory (SQLite). It is gone when it is closed."""

from __future__ import annotations

import marshal
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from attrs import astuple, define

from pykata.errors import DiskFullError, HostError
from pykata.images.entry import Entry, Kind
from pykata.images.leaf import Inode, Leaf
from pykata.images.nodes import Child, Directory, Link

SOME = 64               # names of a directory that are read at a time: those above it are being listed, too

_SCHEMA = """
PRAGMA page_size = 4096;
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
CREATE TABLE node (directory INTEGER, name BLOB, child BLOB, PRIMARY KEY (directory, name)) WITHOUT ROWID;
CREATE TABLE file (layer INTEGER, place INTEGER, number INTEGER, path BLOB, leaf BLOB,
                   PRIMARY KEY (layer, place, number)) WITHOUT ROWID;
CREATE TABLE first (file INTEGER PRIMARY KEY, path BLOB);
CREATE TABLE link (number INTEGER PRIMARY KEY, path BLOB, target BLOB, leaf BLOB);
BEGIN;
"""


@contextmanager
def opened(memory: int) -> Iterator[Database]:
    """An empty database, for the thread that opens it. It holds so many bytes of itself in memory."""
    # Without a name it is SQLite's own temporary file, which nobody else can open, and which goes with the process.
    with explained(), closing(sqlite3.connect("", isolation_level=None)) as connection:
        connection.execute(f"PRAGMA cache_size = -{memory // 1024}")
        connection.executescript(_SCHEMA)
        yield Database(connection)


@contextmanager
def explained() -> Iterator[None]:
    """What SQLite says, as one of our errors."""
    try:
        yield
    except sqlite3.Error as exc:
        if exc.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise DiskFullError("no space left for the names of the image's files", hint="TMPDIR says where") from exc
        raise HostError(f"can't keep the names of the image's files on disk: {exc}", hint="TMPDIR says where") from exc


@define(eq=False)
class Database:
    """Names by directory, and the order in which files are written."""

    _connection: sqlite3.Connection
    _count: int = 0

    def get(self, directory: int, name: bytes) -> Child | None:
        query = "SELECT child FROM node WHERE directory = ? AND name = ?"
        row = self._connection.execute(query, (directory, name)).fetchone()
        return None if row is None else _unpacked(row[0])

    def update(self, changed: Mapping[int, Mapping[bytes, Child | None]]) -> None:
        """Put names in, and take away those that have nothing any more."""
        rows = ((directory, name, _packed(child)) for directory, names in sorted(changed.items())
                for name, child in sorted(names.items(), key=lambda item: item[0]) if child is not None)
        self._connection.executemany("REPLACE INTO node VALUES (?, ?, ?)", rows)
        gone = ((directory, name) for directory, names in changed.items()
                for name, child in names.items() if child is None)
        self._connection.executemany("DELETE FROM node WHERE directory = ? AND name = ?", gone)

    def list(self, directory: int, after: bytes) -> tuple[list[tuple[bytes, Child]], bytes | None]:
        """The next names in a directory, and after which more follow."""
        query = "SELECT name, child FROM node WHERE directory = ? AND name > ? ORDER BY name LIMIT ?"
        rows = self._connection.execute(query, (directory, after, SOME)).fetchall()
        return [(name, _unpacked(child)) for name, child in rows], rows[-1][0] if len(rows) == SOME else None

    # --- what a plan has: see pykata.images.plan.Order ---

    def first(self, file: int, path: bytes) -> bytes:
        row = self._connection.execute("SELECT path FROM first WHERE file = ?", (file,)).fetchone()
        if row is not None:
            found: bytes = row[0]
            return found
        self._connection.execute("INSERT INTO first VALUES (?, ?)", (file, path))
        return path

    def add_file(self, layer: int, place: int, parent: bytes, name: bytes, leaf: Leaf) -> None:
        self._count += 1
        row = layer, place, self._count, parent + b"/" + name if parent else name, _packed(leaf)
        self._connection.execute("INSERT INTO file VALUES (?, ?, ?, ?, ?)", row)

    def files(self, layer: int) -> Iterator[tuple[bytes, Leaf]]:
        query = "SELECT path, leaf FROM file WHERE layer = ? ORDER BY place, number"
        for path, leaf in self._connection.execute(query, (layer,)):
            yield path, _leaf(leaf)

    def has_files(self, layer: int) -> bool:
        query = "SELECT 1 FROM file WHERE layer = ? LIMIT 1"
        return self._connection.execute(query, (layer,)).fetchone() is not None

    def add_link(self, path: bytes, target: bytes, leaf: Leaf) -> None:
        self._count += 1
        self._connection.execute("INSERT INTO link VALUES (?, ?, ?, ?)", (self._count, path, target, _packed(leaf)))

    def links(self) -> Iterator[tuple[bytes, bytes, Leaf]]:
        for path, target, leaf in self._connection.execute("SELECT path, target, leaf FROM link ORDER BY number"):
            yield path, target, _leaf(leaf)


# --- a child as bytes: marshal, for what it reads is ours, and a version of Python lasts as long as the database ---


def _packed(child: Child | None) -> bytes:
    if isinstance(child, bytes):
        return b"f" + child
    if isinstance(child, Inode):
        return b"i" + marshal.dumps(_values(child))
    if isinstance(child, Link):
        return b"l" + marshal.dumps((_packed(child.leaf), child.layer, child.file))
    assert child is not None
    inode = None if child.inode is None else _values(child.inode)
    return b"d" + marshal.dumps((child.id, inode, child.layer, child.opaque))


def _unpacked(raw: bytes) -> Child:
    if raw[:1] in b"fi":
        return _leaf(raw)
    values = marshal.loads(raw[1:])
    if raw[:1] == b"l":
        return Link(_leaf(values[0]), *values[1:])
    identity, inode, layer, opaque = values
    return Directory(identity, None if inode is None else _inode(inode), layer, opaque)


def _leaf(raw: bytes) -> Leaf:
    return raw[1:] if raw[:1] == b"f" else _inode(marshal.loads(raw[1:]))


def _values(inode: Inode) -> tuple[Any, ...]:
    path, kind, *rest = astuple(inode.entry, recurse=False)
    return inode.layer, path, kind.value, *rest


def _inode(values: tuple[Any, ...]) -> Inode:
    layer, path, kind, *rest = values
    return Inode(Entry(path, Kind(kind), *rest), layer)
