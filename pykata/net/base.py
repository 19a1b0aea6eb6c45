"""What every network offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import ClassVar

from attrs import field, frozen

from pykata.net.policy.rules import Policy
from pykata.spec import Attachment, Port


@frozen(kw_only=True)
class Wanted:
    """What one sandbox wants of its network beyond being connected; checked before anything starts.

    ``policy`` None lets everything through. ``ports`` are to be published on the host. ``dns`` are the name servers
    that were asked for, if any, and ``hosts`` names of the guest's own: whoever composes puts them into the guest, a
    strategy may need to know them. ``hostname`` is the guest's.
    """

    policy: Policy | None = None
    ports: tuple[Port, ...] = ()
    dns: tuple[str, ...] = ()
    hosts: Mapping[str, str] = field(factory=dict)
    hostname: str = ""

    @property
    def restricts(self) -> bool:
        """Does it matter what is in a guest's frames? Then they must be what they look like: see :func:`.tap.tap`."""
        return self.policy is not None and self.policy.restricts


class NetworkStrategy(ABC):
    """A way to connect the guest: a frozen value with its options.

    What else is wanted of it comes with :meth:`attach`, and what it can't do is refused before: ``publishes`` says
    whether ports can be published, ``enforces`` whether packets pass a place where a policy can be kept. A strategy
    that enforces makes its taps, and enters :func:`pykata.net.policy.enforce.enforced` for them before the guest can
    send. What that yields is part of its attachment: by ``Attachment.guards`` a running sandbox's policy is changed and
    its events are read. Published ports, with their real numbers, are ``Attachment.published``.
    """

    name: ClassVar[str]
    """What it is registered as."""
    publishes: ClassVar[bool] = False
    enforces: ClassVar[bool] = False

    @abstractmethod
    def attach(self, run_dir: Path, wanted: Wanted) -> AbstractAsyncContextManager[Attachment]:
        """Make the host's side; yields the devices, interfaces and name servers for the guest.

        Whatever it makes on the host carries the name of ``run_dir``, by which ``pykata gc`` finds it after a crash.
        Raises :class:`~pykata.errors.HostError`.
        """
