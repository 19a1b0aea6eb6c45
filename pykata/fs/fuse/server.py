"""Answers the requests of a guest's FUSE from a tree of files.

A request that fails, or takes too long, is answered with an errno, whatever the tree raises; only bytes that are no
requests end the conversation.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable

import anyio

from pykata.fs.fuse.operations import Session
from pykata.fs.fuse.tree import Tree
from pykata.fs.fuse.wire import UNANSWERED, Inbox, MalformedError, Request, answer, failed
from pykata.fs.fuse.workers import Workers
from pykata.host import finish

log = logging.getLogger(__name__)

IN_FLIGHT = 64              # requests that are being answered at a time; more aren't read
PARALLEL = 8                # of them in the tree at the same time
STUCK = 32                  # threads that may hang in a tree that doesn't answer

Receive = Callable[[], Awaitable[bytes | None]]
Send = Callable[[bytes], Awaitable[None]]


class Server:
    """One conversation. ``timeout`` is in seconds, for each request; ``keep`` for how long the guest may take for
    granted what it was told of a file."""

    def __init__(self, tree: Tree, timeout: float, keep: float = 1.0) -> None:
        self.session = Session(tree, keep)
        self._timeout = timeout
        self._limiter = anyio.CapacityLimiter(PARALLEL)
        self._sending = anyio.Lock()
        self._workers = Workers()

    async def serve(self, receive: Receive, send: Send) -> None:
        """Answer what comes until ``receive`` gives None. Raises MalformedError, in a group.

        What was written and is still open is handed over then.
        """
        inbox = Inbox()
        room = anyio.Semaphore(IN_FLIGHT)
        try:
            async with anyio.create_task_group() as tasks:
                while (data := await receive()) is not None:
                    inbox.add(data)
                    while (request := inbox.take()) is not None:
                        if request.op in UNANSWERED:
                            self.session.do(request)        # only forgets
                            continue
                        await room.acquire()
                        tasks.start_soon(self._handle, request, room, send)
                tasks.cancel_scope.cancel()
        finally:
            # A machine that ends takes the connection with it, and then this is cancelled, again and again.
            await finish(self._end())

    async def _end(self) -> None:
        try:
            with anyio.move_on_after(self._timeout) as patience:
                await self._workers.run(self._close)
        finally:
            self._workers.close()
        if patience.cancelled_caught:
            log.warning("what was written last to a volume may be lost: its file system took longer than %g s",
                        self._timeout)

    async def _handle(self, request: Request, room: anyio.Semaphore, send: Send) -> None:
        try:
            said = await self._answered(request)
            async with self._sending:
                await send(said)
        finally:
            room.release()

    async def _answered(self, request: Request) -> bytes:
        with anyio.move_on_after(self._timeout):
            try:
                return answer(request.unique, await self._in_thread(request))
            except MalformedError:
                raise
            except Exception as error:      # the tree is somebody else's
                return failed(request.unique, errno_of(error))
        log.warning("a volume's file system took longer than %g s", self._timeout)
        return failed(request.unique, errno.ETIMEDOUT)

    async def _in_thread(self, request: Request) -> bytes:
        async with self._limiter:
            if self._workers.busy >= STUCK:
                raise OSError(errno.EIO, "the file system doesn't answer")
            return await self._workers.run(lambda: self.session.do(request))

    def _close(self) -> None:
        for error in self.session.close():
            log.warning("a file of a volume couldn't be written: %r", error)


def errno_of(error: Exception) -> int:
    """What a failure is to the guest."""
    if isinstance(error, OSError) and isinstance(error.errno, int) and 0 < error.errno < 512:
        return error.errno
    kinds: tuple[tuple[type[Exception], int], ...] = (
        (FileNotFoundError, errno.ENOENT), (FileExistsError, errno.EEXIST), (IsADirectoryError, errno.EISDIR),
        (NotADirectoryError, errno.ENOTDIR), (PermissionError, errno.EACCES), (TimeoutError, errno.ETIMEDOUT),
        (NotImplementedError, errno.EOPNOTSUPP), (MemoryError, errno.ENOMEM),
    )  # fmt: skip
    for kind, number in kinds:
        if isinstance(error, kind):
            return number
    log.warning("a volume's file system failed: %r", error)
    return errno.EIO
