"""The way of a first command, gone beforehand in a guest that goes on from a template.

What a guest executes for the first time after a restore has to be translated by the emulator: that is most of what the
first command takes. So a template has one container more than anybody will see, and before a guest is given to somebody
it goes the way of a command there: from the host's request over the process that waits to what the command has written,
and to the end of the container. Nothing of the image is executed but by the kernel; the command is the agent's own.
Since the container is gone then, with its processes, files, statistics and namespaces, nothing of it is left in the
others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from pykata.errors import AgentRefusedError, AgentTimeoutError
from pykata.origin import SavedContainer
from pykata.running import Running

if TYPE_CHECKING:
    from pykata.agent.client import AgentClient

COMMAND = ("/proc/self/exe", "rehearsal")
"""What waits in a container is the agent still: it executes itself (guest/agent/src/rehearsal.rs)."""
WINDOW = 1024 * 1024
LONGEST = 60.0
"""Seconds after which something is wrong with the guest: as many as a boot may take."""


async def rehearse(agent: AgentClient, container: SavedContainer | None) -> bool:
    """Go the way in this container, which is gone then; whether it was.

    Raises AgentError where the guest is of no use any more.
    """
    if container is None:
        return False
    from pykata.agent.v1 import Process, Start

    process = Process(id="rehearsal", args=list(COMMAND), user=container.config.user)
    start = Start(container_id=container.id, process=process, window=WINDOW, stdin_closed=True, last=True)
    with anyio.move_on_after(LONGEST):
        try:
            async with agent.run(start, timeout=LONGEST) as command:
                async for _ in command:
                    pass
                await command.finished()
        except AgentRefusedError:       # there is no memory for it, say: what comes next will take its time
            return False
        return True
    raise AgentTimeoutError(f"the guest's rehearsal took more than {LONGEST:g} s")


async def rehearse_in(running: Running) -> None:
    """The same in a sandbox that nobody has yet, where it wasn't done."""
    container = next((one for one in running.containers.values() if one.rehearsal), None)
    async with running.explained():
        if await rehearse(running.agent, container):
            running.end_rehearsal()
