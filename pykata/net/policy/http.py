"""The host that each request of a plain HTTP/1 connection is for (RFC 9112).

A connection may carry requests for many hosts, so it is read as long as it lasts. Where two readers could see different
requests in the same bytes (RFC 9112, 11.2), it is refused.
"""

from __future__ import annotations

import re

from pykata.net.policy.shown import RefusedError

MOST_HEAD = 16 * 1024
MOST_LINE = 256             # of a chunk's size, and of a line of a trailer

_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~]+) HTTP/1\.([01])")
_TEXT = re.compile(rb"[\t\x20-\x7e\x80-\xff]*(?:\r\n?)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_HOST = re.compile(rb"([a-z0-9_.-]{1,253})(?::(\d{1,5}))?", re.IGNORECASE)
_ABSOLUTE = re.compile(rb"http://([^/?#]*)(?:[/?#].*)?", re.IGNORECASE)
_STARTS = re.compile(rb"[^\r\n]*[\t\v\f ]HTTP/", re.IGNORECASE)
_PRINTED = re.compile(rb"[\t\v\f\x20-\x7e\x80-\xff]*\r?")
_SIZE = re.compile(rb"([0-9a-fA-F]{1,12})(?:[ \t]*;[\t\x20-\x7e]*)?")


def looks_like_http(data: bytes) -> bool:
    """Could it be the start of a request, as far as can be seen?"""
    word, space, _ = data[:33].partition(b" ")
    return bool(word) and bool(_METHOD.fullmatch(word)) and word.isupper() and (bool(space) or len(data) < 33)


def is_http(data: bytes) -> bool | None:
    """Does it begin with a request, of whatever version of HTTP? None if that can't be seen yet.

    Servers that forgive much take for one what we wouldn't, so any first line that speaks of HTTP is one.
    """
    line = data.lstrip(b"\r\n\t\v\f ")
    if b"\n" not in line and len(line) < MOST_HEAD and not _STARTS.match(line):
        return None if _PRINTED.fullmatch(line) else False
    return bool(_STARTS.match(line))


class Requests:
    """Reads what a client sends, from the first byte on.

    What was looked at is on its way to the server already, so nothing may be left for later: each line is checked as it
    comes, for nobody must take for the end of a line, or of a head, what we don't.
    """

    done = False

    def __init__(self) -> None:
        self._line = bytearray()    # as far as it has come
        self._size = 0              # of the head so far
        self._first: re.Match[bytes] | None = None
        self._fields: dict[bytes, list[bytes]] = {}
        self._body = 0              # bytes of a body, or of a chunk, that are to come
        self._chunked = False
        self._ending = False        # what comes is the line end behind a chunk
        self._trailer = False

    def feed(self, data: bytes) -> list[str]:
        """The hosts, in lower case and without ports, of the requests whose heads end in ``data``.

        Raises RefusedError.
        """
        hosts: list[str] = []
        while data:
            if self._body:
                taken = min(self._body, len(data))
                self._body -= taken
                data = data[taken:]
                continue
            end = data.find(b"\n") + 1 or len(data)
            piece, data = data[:end], data[end:]
            self._line += piece
            if not _TEXT.fullmatch(self._line):
                raise RefusedError("http", "a line of a request ends in two ways, or isn't text")
            if self._chunked:
                self._chunk_line()
            else:
                self._size += len(piece)
                hosts += self._head_line()
        return hosts

    def _taken(self) -> bytes | None:
        """The line, if it is whole, without its end."""
        if not self._line.endswith(b"\n"):
            return None
        line = bytes(self._line[:-2])
        self._line.clear()
        return line

    # --- heads ---

    def _head_line(self) -> list[str]:
        if self._size > MOST_HEAD:
            raise RefusedError("http", "the head of a request is too long")
        if self._first is None and not looks_like_http(bytes(self._line[:64])):
            raise RefusedError("http", "it isn't HTTP")
        line = self._taken()
        if line is None:
            return []
        if self._first is None:
            self._first = _LINE.fullmatch(line)
            if self._first is None:
                raise RefusedError("http", "it isn't a request of HTTP/1")
            return []
        if not line:
            return [self._request(self._first)]
        field = _FIELD.fullmatch(line)
        if field is None:
            raise RefusedError("http", "a field of a request can be read in two ways")
        self._fields.setdefault(field[1].lower(), []).append(field[2].strip(b" \t"))
        return []

    def _request(self, first: re.Match[bytes]) -> str:
        fields, self._fields, self._first, self._size = self._fields, {}, None, 0
        self._expect_body(fields, old=first[3] == b"0")
        if first[1] == b"CONNECT":
            raise RefusedError("connect", "it asks for a tunnel (CONNECT)")
        if b"upgrade" in fields:
            raise RefusedError("upgrade", "it asks for another protocol (Upgrade)")
        return self._host(first[2], fields.get(b"host", []))

    def _expect_body(self, fields: dict[bytes, list[bytes]], *, old: bool) -> None:
        lengths, codings = fields.get(b"content-length", []), fields.get(b"transfer-encoding", [])
        if len(lengths) + len(codings) > 1:
            raise RefusedError("http", "a request has more than one length")
        if lengths:
            if not lengths[0].isdigit() or len(lengths[0]) > 15:
                raise RefusedError("http", "the length of a request is none")
            self._body = int(lengths[0])
        if codings:
            if codings[0].lower() != b"chunked" or old:     # which HTTP/1.0 doesn't know (RFC 9112, 6.1)
                raise RefusedError("http", "a request has a transfer coding that can't be read")
            self._chunked, self._trailer = True, False

    def _host(self, target: bytes, hosts: list[bytes]) -> str:
        if len(hosts) != 1:
            raise RefusedError("host", "a request names no host, or several")
        found = _authority(hosts[0])
        if not target.startswith(b"/") and target != b"*":
            absolute = _ABSOLUTE.fullmatch(target)
            if absolute is None or _authority(absolute[1]) != found:
                raise RefusedError("host", "a request names one host in its line and another one as Host")
        return found[0]

    # --- chunks ---

    def _chunk_line(self) -> None:
        """The size of a chunk, its end, or a line of the trailer that ends the body (RFC 9112, 7.1)."""
        if len(self._line) > MOST_LINE:
            raise RefusedError("http", "a line of a chunked body is too long")
        if self._ending and not b"\r\n".startswith(self._line):
            raise RefusedError("http", "a chunk is longer than it says")
        line = self._taken()
        if line is not None:
            self._after(line)

    def _after(self, line: bytes) -> None:
        if self._ending:
            self._ending = False
            return
        if self._trailer:
            if line and not _FIELD.fullmatch(line):
                raise RefusedError("http", "a trailer can be read in two ways")
            self._chunked = bool(line)
            return
        size = _SIZE.fullmatch(line)
        if size is None:
            raise RefusedError("http", "the size of a chunk is none")
        self._trailer = int(size[1], 16) == 0
        self._body = int(size[1], 16)
        self._ending = not self._trailer


def _authority(text: bytes) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    if match is None:
        raise RefusedError("host", "a request names a host in a way that can't be read")
    return match[1].decode().lower().removesuffix("."), int(match[2] or 0)
