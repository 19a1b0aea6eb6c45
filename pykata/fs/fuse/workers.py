"""Threads for what may never come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_Job = tuple[Callable[[], object], asyncio.Future[object]]


class Workers:
    """Threads of one event loop, as many as there is to do at a time.

    One that hangs is left behind, and the program can end all the same: for the threads of anyio and of
    concurrent.futures Python waits at its end, whatever became of them.
    """

    def __init__(self) -> None:
        self.busy = 0               # those that were left behind are
        self._idle: list[SimpleQueue[_Job | None]] = []
        self._is_closed = False
        self._lock = threading.Lock()

    async def run(self, do: Callable[[], T]) -> T:
        """Do it in a thread, which is left behind if this is cancelled. What it raises is an Exception in any case."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        with self._lock:
            self.busy += 1
            jobs = self._idle.pop() if self._idle else None
        (jobs or self._started(loop)).put((do, result))     # type: ignore[arg-type]
        return await result

    def close(self) -> None:
        """No thread waits for more to do."""
        with self._lock:
            self._is_closed = True
            for jobs in self._idle:
                jobs.put(None)

    def _started(self, loop: asyncio.AbstractEventLoop) -> SimpleQueue[_Job | None]:
        jobs: SimpleQueue[_Job | None] = SimpleQueue()

        def work() -> None:
            while (job := jobs.get()) is not None:
                do, result = job
                value, error = (None, None) if result.cancelled() else _done(do)
                with self._lock:
                    self.busy -= 1
                    self._idle.append(jobs)
                    if self._is_closed:
                        jobs.put(None)
                with suppress(RuntimeError):        # the loop is closed: nobody wants to know
                    loop.call_soon_threadsafe(_tell, result, value, error)

        try:
            threading.Thread(target=work, name="pykata-files", daemon=True).start()
        except BaseException:       # there are too many, or no memory: the next one may be started again
            with self._lock:
                self.busy -= 1
            raise
        return jobs


def _tell(result: asyncio.Future[object], value: object, error: Exception | None) -> None:
    if result.cancelled():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)


def _done(do: Callable[[], object]) -> tuple[object, Exception | None]:
    try:
        return do(), None
    except StopIteration as error:      # which no future takes
        return None, RuntimeError(repr(error))
    except Exception as error:
        return None, error
    except BaseException as error:
        # Not ours: a CancelledError of another event loop would be taken for ours, an exit for the program's.
        return None, RuntimeError(repr(error))
