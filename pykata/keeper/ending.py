"""How a detached sandbox ends: for the first of several reasons."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from attrs import frozen

from pykata.errors import PykataError
from pykata.spec import Reason


@frozen(kw_only=True)
class End:
    """Why it ended: what its clients are told, and what is kept of it."""

    why: str
    exit_code: int | None = None
    reason: Reason | None = None
    error: PykataError | None = None
    lost: str = ""

    @classmethod
    def stopped(cls, why: str = "it was stopped") -> End:
        """Someone asked for it."""
        return cls(why=why)

    @classmethod
    def died(cls, error: PykataError) -> End:
        """Its machine ended under it."""
        return cls(why=error.message, reason="vm_died", error=error)


class Ending:
    """The end of a sandbox, once there is one. ``scope`` is what it cancels."""

    def __init__(self, on_end: Callable[[End], None]) -> None:
        self.scope = anyio.CancelScope()
        self.end: End | None = None
        self._on_end = on_end

    def set(self, end: End) -> None:
        """End it, unless it is ending already."""
        if self.end is None:
            self.end = end
            self._on_end(end)
            self.scope.cancel()
