"""The network of a sandbox that runs."""

from __future__ import annotations

from collections.abc import AsyncIterator

from attrs import define, field

from pykata.errors import ConfigError
from pykata.spec import Attachment, Guard, NetworkEvent, Port


@define(eq=False)
class RunningNetwork:
    """What ``sb.network`` is: what was published and given, and the policy that can be changed."""

    ports: tuple[Port, ...] = ()
    """What was published, with the ports that it got."""
    addresses: tuple[str, ...] = ()
    """The guest's, without the lengths of their prefixes."""
    via: str = ""
    """What makes the guest's connections, where there was a choice: ``"slirp4netns"``, ``"passt"`` or ``"qemu"``."""
    _guard: Guard | None = field(default=None, alias="guard")

    @classmethod
    def of(cls, attachment: Attachment) -> RunningNetwork:
        """That of an attached network."""
        addresses = [address for one in attachment.interfaces for address in one.addresses]
        plain = tuple(each.partition("/")[0] for each in addresses)
        guard = attachment.guards[0] if attachment.guards else None
        return cls(attachment.published, plain, "".join(attachment.via), guard=guard)

    @property
    def has_policy(self) -> bool:
        """There is something that says what the guest may reach, or how much it may send."""
        return self._guard is not None

    async def events(self) -> AsyncIterator[NetworkEvent]:
        """What the policy denies and allows, from now on, until the sandbox ends."""
        async for event in self._guarded().events():
            yield event

    async def allow(self, *rules: str) -> None:
        """Let the guest reach more, from now on: ``await sb.network.allow("pypi.org")``."""
        await self._guarded().allow(*rules)

    async def deny(self, *rules: str) -> None:
        """Let the guest reach less, from now on. Connections that were allowed before and aren't any more end."""
        await self._guarded().deny(*rules)

    def _guarded(self) -> Guard:
        if self._guard is None:
            raise ConfigError("this sandbox's network has no policy", hint="Network(allow=[...]) gives it one")
        return self._guard
