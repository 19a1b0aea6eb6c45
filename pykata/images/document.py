"""JSON of unknown origin: bounded, and every access says what it expects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from pykata.errors import ImageCorruptError

MAX_DOCUMENT = 4 * 1024 * 1024      # bytes; distribution-spec: registries need to take manifests of up to 4 MiB


@frozen
class Document:
    """A value in a JSON document. ``where`` names it in messages: ``index.json: manifests[0].digest``."""

    value: Any
    where: str

    def get(self, key: str) -> Document:
        """A member of an object. What isn't there is null, as in Go's encoding/json."""
        where = f"{self.where}.{key}" if ": " in self.where else f"{self.where}: {key}"
        return Document(self.mapping().get(key), where)

    def mapping(self) -> Mapping[str, Any]:
        return self._typed(dict, "an object") or {}

    def list(self) -> Iterator[Document]:
        """The elements of an array; null has none."""
        for number, element in enumerate(self._typed(list, "an array") or ()):
            yield Document(element, f"{self.where}[{number}]")

    def text(self, default: str = "") -> str:
        found = self._typed(str, "text")
        if found is None:
            return default
        # A NUL ends an argument or a path early, and JSON's lone surrogates aren't text.
        if "\0" in found or not _encodable(found):
            raise self.wrong("text without NUL and surrogates")
        return str(found)

    def texts(self) -> tuple[str, ...]:
        return tuple(element.text() for element in self.list())

    def text_map(self) -> dict[str, str]:
        return {Document(key, self.where).text(): self.get(key).text() for key in self.mapping()}

    def integer(self) -> int:
        """A number that isn't negative and fits into 63 bits."""
        found = self._typed(int, "a number")
        if found is None or isinstance(found, bool) or not 0 <= found < 2**63:
            raise self.wrong("a number that isn't negative")
        return int(found)

    def wrong(self, expected: str) -> ImageCorruptError:
        shown = repr(self.value)
        return ImageCorruptError(f"{self.where} is {shown[:100]}, not {expected}")

    def _typed(self, kind: type, expected: str) -> Any:
        if self.value is not None and not isinstance(self.value, kind):
            raise self.wrong(expected)
        return self.value


def parse_document(raw: bytes, where: str) -> Document:
    """Parse a JSON object. Raises :class:`~pykata.errors.ImageCorruptError`."""
    if len(raw) > MAX_DOCUMENT:
        raise ImageCorruptError(f"{where} has more than {MAX_DOCUMENT} bytes")
    try:
        return Document(json.loads(raw), where)
    except (ValueError, RecursionError) as exc:     # also UnicodeDecodeError
        raise ImageCorruptError(f"{where} is not JSON: {exc}") from exc


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
