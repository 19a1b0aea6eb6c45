"""A filesystem of fsspec as object storage is one: keys with content, and directories only where there are keys."""

from __future__ import annotations

import io
from typing import Any

from fsspec import AbstractFileSystem


class ObjectStore(AbstractFileSystem):      # type: ignore[misc]
    """What ``s3fs`` does with buckets left out: making a directory makes nothing, and one that isn't there can't go."""

    cachable = False

    def __init__(self, **keys: bytes) -> None:
        super().__init__()
        self.keys = dict(keys)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return [cls._strip_protocol(one) for one in path] if isinstance(path, list) else path.strip("/")

    def info(self, path: str, **more: Any) -> dict[str, Any]:
        key = self._strip_protocol(path)
        if key in self.keys:
            return {"name": key, "size": len(self.keys[key]), "type": "file"}
        if not key or any(other.startswith(f"{key}/") for other in self.keys):
            return {"name": key, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **more: Any) -> list[Any]:
        key = self._strip_protocol(path)
        below = f"{key}/" if key else ""
        found = {below + other[len(below):].partition("/")[0] for other in self.keys if other.startswith(below)}
        if key in self.keys:
            found.add(key)
        if key and not found:
            raise FileNotFoundError(path)
        return [self.info(name) if detail else name for name in sorted(found)]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        return self._content(path)[start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        self.keys[self._strip_protocol(path)] = bytes(value)

    def cp_file(self, path1: str, path2: str, **more: Any) -> None:
        self.pipe_file(path2, self._content(path1))

    def _rm(self, path: str) -> None:
        self._content(path)
        del self.keys[self._strip_protocol(path)]

    def mkdir(self, path: str, create_parents: bool = True, **more: Any) -> None:
        pass

    def rmdir(self, path: str) -> None:
        if self.exists(path):
            raise FileExistsError(path)
        raise FileNotFoundError(path)

    def _open(self, path: str, mode: str = "rb", **more: Any) -> io.BytesIO:
        return io.BytesIO(self._content(path))

    def _content(self, path: str) -> bytes:
        try:
            return self.keys[self._strip_protocol(path)]
        except KeyError:
            raise FileNotFoundError(path) from None
