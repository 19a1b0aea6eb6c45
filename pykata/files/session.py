"""The process that small operations on a container's files share: it is started by the first of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from pykata.errors import AgentProtocolError
from pykata.files.tool import LostError, Tool, tool
from pykata.files.v1 import Attributes, Request, Response
from pykata.host import finish
from pykata.running import Running


class Session:
    """Operations one after the other, about a millisecond each.

    One that is cancelled before its answer came takes the process with it; the next operation starts another.
    """

    def __init__(self, running: Running, container: str, user: str, check: Callable[[], None]) -> None:
        self.running = running
        self.container = container
        self.user = user
        self.check = check
        """Raises if the container is gone."""
        self._turn = anyio.Lock()
        self._owned = AsyncExitStack()
        self._tool: Tool | None = None

    async def ask(self, request: Request, path: bytes) -> Response:
        """An operation that changes nothing, with one answer. Raises :class:`FileError`.

        The container may kill the process at any time; then another one is asked, once. What changes something isn't
        asked for again, since nobody knows whether it was done.
        """
        try:
            return await self._asked(request, path)
        except LostError:
            return await self._asked(request, path)

    async def attributes(self, request: Request, path: bytes) -> Attributes:
        """An operation that changes nothing, and is answered with a file's attributes."""
        response = await self.ask(request, path)
        if response.attributes is None:
            raise AgentProtocolError("the guest's process for files sent another answer than a file's attributes")
        return response.attributes

    async def _asked(self, request: Request, path: bytes) -> Response:
        async with self._ready() as shared:
            return await shared.ask(request, path)

    async def done(self, request: Request, path: bytes) -> None:
        """An operation that is only said to be done."""
        async with self._ready() as shared:
            response = await shared.ask(request, path)
            if response.done is None:
                shared.broken("sent another answer than that it is done")

    @asynccontextmanager
    async def several(self, request: Request, path: bytes) -> AsyncIterator[Tool]:
        """An operation with several answers. Whoever has taken the last of them sets ``idle``."""
        async with self._ready() as shared:
            await shared.begin(request, path)
            yield shared

    @asynccontextmanager
    async def own(self) -> AsyncIterator[Tool]:
        """A process that isn't shared, for what takes long."""
        self.check()
        async with tool(self.running, self.container, self.user, much=True) as mine:
            yield mine

    async def aclose(self) -> None:
        """End the process."""
        self._tool = None
        await self._owned.aclose()

    @asynccontextmanager
    async def _ready(self) -> AsyncIterator[Tool]:
        self.check()
        async with self._turn:
            self.check()
            if self._tool is None or self._tool.gone:
                await finish(self.aclose())
                self._tool = await self._owned.enter_async_context(tool(self.running, self.container, self.user))
            shared = self._tool
            try:
                yield shared
            except BaseException:
                if not shared.idle or shared.gone:
                    await finish(self.aclose())
                raise
