"""From a thread into an event loop that runs in a thread of its own, and back.

There is one such loop for all, so that boots wait for each other; it runs while somebody uses it. The thread that waits
for a call also runs the call's callbacks. If it is interrupted, the call is cancelled, and its clean-up is waited for.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from inspect import isawaitable
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

import anyio
from anyio.from_thread import BlockingPortalProvider

from pykata.concurrency import alongside

T = TypeVar("T")

_loop = BlockingPortalProvider(backend="asyncio")


class Turn:
    """The waiting thread's side of one call. Work in the loop ends the turn; until then it may send jobs here."""

    def __init__(self, jobs: SimpleQueue[Callable[[], object] | None] | None = None) -> None:
        self._jobs = SimpleQueue() if jobs is None else jobs
        self._ended = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scope: anyio.CancelScope | None = None
        self._abandoned = False

    # --- in the loop ---

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work."""
        self._loop = asyncio.get_running_loop()
        try:
            with anyio.CancelScope() as self._scope:
                if self._abandoned:
                    self._scope.cancel()
                return await work
            raise _InterruptedError     # it was cancelled, and nobody waits for a result
        finally:
            self.end()

    def here(self, callback: Callable[..., object]) -> Callable[..., Coroutine[Any, Any, object]]:
        """The callback as one for the loop: it is called in the waiting thread, and the loop waits for its result."""

        async def called(*args: object) -> object:
            answer: Future[object] = Future()
            self._jobs.put(lambda: _answer(answer, callback, args))
            result = await asyncio.wrap_future(answer)
            return await result if isawaitable(result) else result

        return called

    def end(self) -> None:
        """Let the thread go on: there is a result, or there will be in a moment."""
        self._ended.set()
        self._jobs.put(None)

    # --- in the thread ---

    def next(self) -> Turn:
        """One after this, with the same callbacks."""
        return Turn(self._jobs)

    def serve(self) -> None:
        """Run callbacks until the end."""
        while (job := self._jobs.get()) is not None:
            job()

    def abandon(self) -> None:
        """Cancel the work."""
        self._abandoned = True
        if self._loop is not None and self._scope is not None:
            with suppress(RuntimeError):        # the loop has ended, and the work with it
                self._loop.call_soon_threadsafe(self._scope.cancel)

    def outlast(self) -> None:
        """Wait for the end, and be interrupted only after it. A second interrupt doesn't wait."""
        try:
            self._ended.wait()
        except KeyboardInterrupt:
            self._ended.wait()
            raise


class _InterruptedError(Exception):
    """Stands for what must not be raised in a loop (KeyboardInterrupt, SystemExit), and for no result at all."""


def _answer(answer: Future[object], callback: Callable[..., object], args: tuple[object, ...]) -> None:
    try:
        answer.set_result(callback(*args))
    except Exception as error:  # raised where the call is, which is in this thread
        answer.set_exception(error)


@contextmanager
def _as_a_whole() -> Iterator[None]:
    """Be interrupted after the block, and not in it: half of a loop's start would be waited for for ever."""
    old = signal.getsignal(signal.SIGINT)
    if not callable(old) or threading.current_thread() is not threading.main_thread():
        yield       # nobody is interrupted by that
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
        if came:
            old(*came[0])


def call(work: Coroutine[Any, Any, T], turn: Turn | None = None) -> T:
    """Do the work in the loop, and wait for its result."""
    turn = turn or Turn()
    future: Future[T] | None = None
    with ExitStack() as stack:
        try:
            with _as_a_whole():
                future = stack.enter_context(_loop).start_task_soon(turn.run, work)
            turn.serve()
            return future.result()
        except BaseException:
            if future is None:
                work.close()
            elif not future.done():     # it isn't the work's own failure: we were interrupted
                turn.abandon()
                turn.outlast()
            raise


class Held(Generic[T]):
    """An asynchronous context manager, held by a task in the loop. ``convert`` makes of its value what is yielded."""

    def __init__(self, manager: AbstractAsyncContextManager[Any], convert: Callable[[Any], T]) -> None:
        self._manager = manager
        self._convert = convert
        self._stack = ExitStack()
        self._error: BaseException | None = None

    def __enter__(self) -> T:
        with ExitStack() as stack:
            self._entering, self._turn = Turn(), Turn()
            self._inside = False
            future: Future[bool] | None = None
            try:
                with _as_a_whole():
                    loop = stack.enter_context(_loop)
                    future = loop.start_task_soon(self._turn.run, self._hold())
                self._entering.serve()
                if not self._inside:
                    future.result()     # raises why
            except BaseException:
                if future is not None and not future.done():
                    self._turn.abandon()
                    self._turn.outlast()
                raise
            self._future = future
            self._stack = stack.pop_all()
        remember(self)
        return self._convert(self._value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        forget(self)
        self._error = error if error is None or isinstance(error, Exception) else _InterruptedError()
        with self._stack:
            with suppress(RuntimeError):        # its loop has ended, and it with that
                self._aio.call_soon_threadsafe(self._leave.set)
            self._turn.outlast()
            try:
                return bool(self._future.result())
            except BaseException as raised:
                if raised is error:
                    return False
                raise

    async def _hold(self) -> bool:
        """Enter, and leave when told to; returns whether the error with which it was left was suppressed."""
        self._aio = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        try:
            with suppress(_InterruptedError):
                async with self._manager as self._value:
                    self._inside = True
                    self._entering.end()
                    await self._leave.wait()
                    if self._error is not None:
                        raise self._error
                return self._error is not None
            return False
        finally:
            self._entering.end()


def iterate(source: AsyncGenerator[Any], convert: Callable[[Any], T], turn: Turn) -> Generator[T]:
    """What an asynchronous generator yields. It lives in one task, as it may hold what belongs to a task.

    It goes on when it is asked for the next, and not before: the body of the loop may change what it was given.
    """
    end = object()
    with Held(_pumped(source, end), lambda next_one: next_one) as next_one:
        while (item := call(next_one(), turn.next())) is not end:
            yield convert(item)


@asynccontextmanager
async def _pumped(source: AsyncGenerator[Any], end: object) -> AsyncIterator[Callable[[], Coroutine[Any, Any, Any]]]:
    pump = _Pump(source, end)
    async with alongside(pump.run()):
        yield pump.next_one


class _Pump:
    """Takes one item out of the source for each that is asked for. A question that is cancelled loses none."""

    def __init__(self, source: AsyncGenerator[Any], end: object) -> None:
        self._source = source
        self._end = end
        self._items: list[Any] = []     # one at most
        self._asked, self._answered = anyio.Event(), anyio.Event()

    async def run(self) -> None:
        """What holds the source."""
        item: Any = None
        try:
            async with aclosing(self._source):
                while item is not self._end:
                    await self._asked.wait()
                    item = await anext(self._source, self._end)
                    self._asked = anyio.Event()
                    self._items.append(item)
                    self._answered.set()
        finally:
            self._items.append(self._end)       # if that was a failure, leaving raises it
            self._answered.set()

    async def next_one(self) -> Any:
        """The next item. Never asked for by two at a time."""
        if not self._items:
            self._answered = anyio.Event()
            self._asked.set()
            await self._answered.wait()
        return self._items.pop(0)


# --- what is open when the interpreter ends ---

_open: dict[Held[Any], None] = {}
_watching = threading.Lock()
_watched = False


def remember(held: Held[Any]) -> None:
    """It is to be left at the interpreter's end, if nobody leaves it before."""
    global _watched
    with _watching:
        if not _watched:
            _watched = True
            # Not atexit: by then no executor takes work any more, and leaving a sandbox gives some to one. The last
            # who registers comes first; executors do that when their module is imported.
            import concurrent.futures.thread  # noqa: F401

            threading._register_atexit(_leave_all)  # type: ignore[attr-defined]
    _open[held] = None


def forget(held: Held[Any]) -> None:
    """Somebody leaves it."""
    _open.pop(held, None)


def _leave_all() -> None:
    while _open:
        held, _ = _open.popitem()
        with suppress(Exception):
            held.__exit__(None, None, None)
