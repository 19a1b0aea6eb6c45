"""How much a guest may add to a filesystem that has no limit of its own."""

from __future__ import annotations

import errno
import threading

from attrs import define, field

from pykata.fs.fuse.tree import Room


@define
class Quota:
    """``size`` bytes and ``files`` files and directories more than there were; None: as much as it likes."""

    size: int | None = None
    files: int | None = None
    _limits: tuple[int | None, int | None] = field(init=False)
    _lock: threading.Lock = field(factory=threading.Lock)

    def __attrs_post_init__(self) -> None:
        self._limits = self.size, self.files

    def room(self) -> Room:
        """What may be added, and what is left of it."""
        size, files = self._limits
        with self._lock:
            return Room(size, self.size, files, self.files)

    def add(self, *, size: int = 0, files: int = 0) -> None:
        """Count what is added, or what goes (below 0). Raises OSError (ENOSPC), and nothing is counted then."""
        with self._lock:
            if _is_over(size, self.size) or _is_over(files, self.files):
                raise OSError(errno.ENOSPC, "the guest has added to the volume what it may")
            if self.size is not None:
                self.size -= size
            if self.files is not None:
                self.files -= files

    def back(self, size: int) -> None:
        """Uncount what was added (above 0) or had gone (below) and came to nothing, which never fails."""
        with self._lock:
            if self.size is not None:
                self.size += size


def _is_over(more: int, left: int | None) -> bool:
    return left is not None and more > max(left, 0)
