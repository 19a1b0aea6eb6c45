"""Running a process to its end while collecting what it writes."""

from __future__ import annotations

import inspect
from io import BytesIO

import anyio
from attrs import define, field

from pykata.command import Callback, Collection
from pykata.completed import Completed
from pykata.concurrency import alongside
from pykata.errors import AgentError, AgentTimeoutError, VMDiedError
from pykata.process import Process
from pykata.spec import Reason
from pykata.streams import Output

KILL_GRACE = 10.0
"""Seconds a killed process has for its exit and the rest of its output to arrive."""


@define
class Sink:
    """Where one stream of a process goes: kept up to a limit, and told to a callback."""

    output: Output
    limit: int
    callback: Callback | None = None
    truncated: bool = False
    kept: BytesIO = field(factory=BytesIO)      # what it holds needs no copy to be had as bytes

    async def drain(self) -> None:
        """Take all that has come so far."""
        while piece := self.output.take():
            room = self.limit - self.kept.tell()
            self.kept.write(piece[:room])
            self.truncated |= len(piece) > room
            if self.callback is not None and inspect.isawaitable(told := self.callback(piece)):
                await told


@define
class Collector:
    """Takes in a process's output until it ends."""

    process: Process
    stdout: Sink
    stderr: Sink

    async def until_ended(self) -> None:
        """Take in everything up to the exit."""
        while not self.process.ended:
            # Who feeds it may take in output, too.
            await self.process.advance(lambda: self.stdout.output.waiting or self.stderr.output.waiting)
            await self.sweep()

    async def put_down(self) -> None:
        """Kill the process and everything it started, and take in the rest."""
        try:
            await self.process.kill()
        except AgentTimeoutError:
            return      # the sandbox is broken, which its next use says; what came so far is still the result of this
        with anyio.move_on_after(KILL_GRACE):
            await self.until_ended()

    async def sweep(self) -> None:
        """Take in what is here already."""
        await self.stdout.drain()
        await self.stderr.drain()

    def completed(self, reason: Reason, error: VMDiedError | None = None) -> Completed:
        """The result, as far as it came."""
        exited = self.process.exited
        return Completed(
            args=self.process.args,
            exit_code=self.process.returncode,
            reason=reason,
            signal=self.process.signal,
            stdout_bytes=self.stdout.kept.getvalue(),
            stderr_bytes=self.stderr.kept.getvalue(),
            truncated=self.stdout.truncated or self.stderr.truncated,
            oom_kills=exited.oom_kills if exited else 0,
            error=error or self.process.lost,
        )


async def collect(process: Process, how: Collection) -> Completed:
    """Run ``process`` to its end, or to its death when its time is up. Output so far is never lost."""
    collector = Collector(
        process,
        Sink(process.stdout, how.max_output, how.on_stdout),
        Sink(process.stderr, how.max_output, how.on_stderr),
    )
    try:
        reason = await _to_the_end(collector, how)
    except VMDiedError as died:
        await collector.sweep()
        return collector.completed("vm_died", died)
    except AgentError as error:
        await collector.sweep()
        own = _copied(error)
        own.completed = collector.completed("vm_died")
        raise own from error
    return collector.completed(reason)


def _copied(error: AgentError) -> AgentError:
    # What broke a sandbox is raised to all who use it, and each of them has output of his own.
    own = type(error).__new__(type(error), *error.args)
    own.__dict__.update(error.__dict__)
    return own


async def _to_the_end(collector: Collector, how: Collection) -> Reason:
    process = collector.process
    if how.input:
        async with alongside(_feed(process, how.input)):
            in_time = await _in_time(collector, how.timeout)
    else:
        await process.stdin.aclose()
        in_time = await _in_time(collector, how.timeout)
    return (process.reason or "exit") if in_time else "timeout"


async def _in_time(collector: Collector, timeout: float | None) -> bool:
    """Run it to its end; False: to its death, after so many seconds."""
    if timeout is None:
        await collector.until_ended()
    else:
        with anyio.move_on_after(timeout):
            await collector.until_ended()
    if collector.process.ended:
        return True
    await collector.put_down()
    return False


async def _feed(process: Process, data: bytes) -> None:
    await process.stdin.send(data)
    await process.stdin.aclose()
