"""Where a sandbox goes on from: a guest that was saved together with its machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

from pykata.spec import ImageConfig, SavedVM, Start

if TYPE_CHECKING:
    from pykata.guest import Bundle

NOBODY = "pykata-template"
"""Host name of a guest that isn't anybody's yet. As long as those to come: their files needn't be made shorter."""


@frozen
class SavedContainer:
    """A container that was there when the guest was saved.

    ``fresh``: nothing has run in it, and a process waits. ``rehearsal``: the same, and nobody gets it (rehearsal.py).
    """

    id: str
    reference: str                      # the image, as it was named
    digest: str
    config: ImageConfig
    architecture: str
    disk: int                           # bytes of its writable layer
    fresh: bool = False
    rehearsal: bool = False


@frozen
class Origin:
    """A guest that was saved with its machine, and what the host has to know to take it over."""

    vm: SavedVM
    greeting: bytes
    parked: bool                        # its agent waits for a host; else processes run, and the old host's connection
    memory_limit: int
    start: Start
    containers: tuple[SavedContainer, ...] = ()
    main: str = ""                      # the container that a setup has set up
    idle: bool = False                  # ... in which nothing runs any more
    next_number: int = 1                # of the next container or process
    identity: Mapping[str, str] = field(factory=dict)       # what a machine has to be to go on from here
    bundle: Bundle | None = None        # that it was booted from, if that was in this process

    @property
    def is_busy(self) -> bool:
        """Whether processes may run in it, which shall execute nothing before the guest has become another one."""
        return not self.parked or (bool(self.main) and not self.idle)

    @property
    def rehearsal(self) -> SavedContainer | None:
        """The container in which the way of a first command can be rehearsed."""
        return next((one for one in self.containers if one.rehearsal), None)
