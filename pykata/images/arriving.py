"""A blob that one thread writes while another one reads it."""

from __future__ import annotations

import io
import os
import threading
from typing import IO, cast

from attrs import define, field

TICK = 0.1      # seconds after which a reader that waits looks whether it is still wanted


@define(eq=False)
class Arriving:
    """A blob of ``size`` bytes, of which ``available`` can be read from ``descriptor``. It owns the descriptor."""

    digest: str
    size: int
    descriptor: int = -1
    available: int = 0
    failure: BaseException | None = None
    whole: bool = False
    _changed: threading.Condition = field(factory=threading.Condition)

    # --- who writes it ---

    def opened(self, descriptor: int) -> None:
        """Its file is there."""
        with self._changed:
            if self.descriptor >= 0:
                os.close(self.descriptor)
            self.descriptor = descriptor

    def arrived(self, available: int, *, whole: bool = False) -> None:
        """More of it can be read; ``whole``: there is no more."""
        with self._changed:
            self.available, self.whole = available, whole
            self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """There will be no more; readers get ``failure``."""
        with self._changed:
            if not self.whole and self.failure is None:
                self.failure = failure
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody reads it any more."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    # --- who reads it ---

    def open(self) -> IO[bytes]:
        """Read it from its start. Where the next bytes aren't there yet ``read`` returns None after a moment."""
        return cast(IO[bytes], _Reader(self))

    def wait_beyond(self, position: int) -> bool | None:
        """Whether there is more than ``position`` bytes; None if that isn't known yet."""
        with self._changed:
            self._changed.wait_for(lambda: self.available > position or self.whole or self.failure, TICK)
            if self.available > position:
                return True
            if self.failure is not None:
                raise self.failure
            return False if self.whole else None


class _Reader(io.RawIOBase):
    def __init__(self, blob: Arriving) -> None:
        self._blob = blob
        self._position = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes | None:
        more = self._blob.wait_beyond(self._position)
        if not more:
            return None if more is None else b""
        ready = self._blob.available - self._position
        data = os.pread(self._blob.descriptor, ready if size < 0 else min(size, ready), self._position)
        self._position += len(data)
        return data
