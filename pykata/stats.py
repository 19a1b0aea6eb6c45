"""What a guest uses, as its agent says: nothing but numbers, which a hostile guest may have made up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

from pykata.errors import printable

if TYPE_CHECKING:
    from pykata.agent.v1 import StatsResponse


@frozen(kw_only=True)
class ContainerStats:
    """What a container uses: memory in bytes, CPU time in seconds since it was made."""

    memory: int
    memory_peak: int
    cpu: float
    pids: int
    oom_kills: int


@frozen(kw_only=True)
class Stats:
    """What a guest uses: memory in bytes. ``containers`` are its containers', by their ids."""

    memory_total: int
    memory_available: int
    containers: Mapping[str, ContainerStats] = field(factory=dict)


def decoded(said: StatsResponse, hidden: Collection[str] = ()) -> Stats:
    """The agent's answer, without the containers that nobody has asked for yet."""
    return Stats(
        memory_total=said.memory_total,
        memory_available=said.memory_available,
        containers={
            printable(identity.encode(), 64): ContainerStats(
                memory=one.memory_current, memory_peak=one.memory_peak, cpu=one.cpu_usec / 1e6, pids=one.pids,
                oom_kills=one.oom_kills,
            )
            for identity, one in said.containers.items()
            if identity not in hidden
        },
    )  # fmt: skip
