"""Keeping a sandbox: boot it, run its main command, serve who connects, and end for one of many reasons."""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import anyio
from anyio.abc import TaskGroup
from attrs import evolve

from pykata.boot import boot
from pykata.concurrency import alongside
from pykata.container import Container, inherited, kept_container
from pykata.detached import directory as directories
from pykata.detached.directory import Claim
from pykata.detached.welcome import Request, Welcome
from pykata.detached.wire import Wire, pack_error
from pykata.errors import ConfigError, NotPermittedError, PykataError, SandboxClosedError
from pykata.isolation import EmulationWarning
from pykata.keeper.client import Client
from pykata.keeper.ending import End, Ending
from pykata.keeper.log import Log
from pykata.process import Process
from pykata.running import Loss, Running
from pykata.spec import StreamName
from pykata.streams import Output

KILL_GRACE = 10.0
"""Seconds that a killed main command may take to be gone before its machine is ended under it."""

ABANDONED = End.stopped("who started it went before it ran")


class Keeper:
    """The sandbox of one keeper process. ``running`` is there from when anybody can connect."""

    running: Running

    def __init__(self, request: Request, claim: Claim, log: Log) -> None:
        self.log = log
        self.ending = Ending(self._tell)
        self._request = request
        self._claim = claim
        self._directory = claim.directory
        self._state = evolve(claim.directory.read(), keeper=os.getpid())
        self._container: Container | None = None
        self._main: Process | None = None
        self._wires: set[Wire] = set()
        self.was_ready = False
        self._tasks: TaskGroup

    # --- its life ---

    async def live(self, leash: Wire) -> None:
        """Boot, say so, and serve until the end."""
        # A container that waits to be asked for would be a stranger to everybody who connects.
        options = evolve(self._request.options, bare=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EmulationWarning)      # who started us was warned
            async with boot(options) as self.running, AsyncExitStack() as stack:
                stack.callback(self._give_up)
                self.running.on_loss = self._tell_loss
                await self._start_main(stack)
                self._tasks = await stack.enter_async_context(anyio.create_task_group())
                for work in (self._watch_vm, self._watch_agent, self._watch_main):
                    self._tasks.start_soon(work)
                self._tasks.start_soon(self._accept)
                self._write(phase="running", keeper=os.getpid(), vmm=self.running.vm.pid)
                self.was_ready = True
                await leash.send({"ready": True})
                await anyio.sleep_forever()

    def _give_up(self) -> None:
        # The guest need not clean up what ends with it, and might not answer.
        self.running.broken = self.running.broken or SandboxClosedError("the sandbox is ending")

    async def _start_main(self, stack: AsyncExitStack) -> None:
        request = self._request
        if request.image is None:
            # A template may have set up one.
            self._container = {one.id: one for one in inherited(self.running)}.get(self.running.main)
            return
        pull = self.running.options.pull
        asked = kept_container(self.running, request.image, "missing" if pull == "always" else pull)
        self._container = await stack.enter_async_context(asked)        # who started us has just pulled it
        self._state = evolve(self._state, image=request.image)
        if (command := request.command) is not None:
            args = command.argv(self._container.image.config)
            self._main = await stack.enter_async_context(
                self._container.process(args, env=command.env, cwd=command.cwd or None, user=command.user or None,
                                        rlimits=command.limits())
            )
            self._state = evolve(self._state, args=args)

    def welcome(self) -> Welcome:
        """What a client gets to know."""
        running, vm = self.running, self.running.vm
        main = self._container
        return Welcome(
            options=running.options, bundle=running.bundle, run_dir=running.run_dir, accel=vm.accel, vmm=vm.pid,
            spawned_at=vm.spawned_at, ready_at=vm.ready_at, memory_limit=running.memory_limit, entered=running.entered,
            timings=running.timings, console=vm.console(), ports=running.network.ports,
            addresses=running.network.addresses, via=running.network.via, has_policy=running.network.has_policy,
            main=None if main is None else (main.id, evolve(main.image, write_tar=None, write_apart=None)),
        )  # fmt: skip

    # --- what ends it ---

    async def _watch_vm(self) -> None:
        died = await self.running.vm.died()
        self.ending.set(End.died(died))

    async def _watch_agent(self) -> None:
        error = await self.running.why(await self.running.agent.lost())
        self.ending.set(End.died(error))

    async def _watch_main(self) -> None:
        if (main := self._main) is None:
            return
        try:
            await main.stdin.aclose()
            async with anyio.create_task_group() as copies:
                copies.start_soon(self._copy, main.stdout, "stdout")
                copies.start_soon(self._copy, main.stderr, "stderr")
            await main.wait()       # it may run on without its output
        except* PykataError:
            pass            # its machine or its agent is gone, which is watched
        if not main.ended:
            return
        self.ending.set(End(
            why=f"its command ended with exit code {main.returncode}", exit_code=main.returncode, reason=main.reason,
            lost=main.lost.message if main.lost else "",
        ))  # fmt: skip

    async def _copy(self, output: Output, name: StreamName) -> None:
        async for piece in output:
            self.log.write(name, piece)

    async def signal(self, number: int) -> None:
        """Send a signal to the main command. Without one, SIGKILL and SIGTERM end the sandbox."""
        if self._main is None:
            if number not in (signal.SIGKILL, signal.SIGTERM):
                raise ConfigError(f"the sandbox has no command that could take signal {number}")
            self.ending.set(End.stopped("it was killed"))
        elif number == signal.SIGKILL:
            await self._main.kill()
        else:
            await self._main.send_signal(number)

    def stop(self, grace: float) -> None:
        """Begin to end it: the main command gets SIGTERM and ``grace`` seconds, then SIGKILL."""
        self._tasks.start_soon(self._stop, grace)

    async def _stop(self, grace: float) -> None:
        try:
            if self._main is not None:
                with anyio.move_on_after(grace):
                    await self._main.terminate()
                    await anyio.sleep_forever()             # its end is the sandbox's, which cancels this
                with anyio.move_on_after(KILL_GRACE):
                    await self._main.kill()
                    await anyio.sleep_forever()
        except PykataError:
            pass            # a guest that doesn't answer is ended all the same
        self.ending.set(End.stopped())

    # --- who connects ---

    async def _accept(self) -> None:
        listener, number = self._claim.listener, 0
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(listener)
                continue
            except OSError:
                # No descriptors are left, say. The connection stays in the queue; another's end makes room.
                await anyio.sleep(0.1)
                continue
            number += 1
            self._tasks.start_soon(self._serve, Wire(sock), number)

    async def _serve(self, wire: Wire, number: int) -> None:
        try:
            wire.check_peer()
        except NotPermittedError:
            wire.close()
            return
        self._wires.add(wire)
        try:
            for loss in self.running.losses:
                await wire.send(_packed(loss))
            await Client(self, wire, number).serve()
        except Exception:  # a client that can't be served is no reason to end the sandbox
            traceback.print_exc()
        # Not when this is cancelled: who waits for the end of the sandbox waits for that of the connection.
        self._wires.discard(wire)
        wire.close()

    def _tell(self, end: End) -> None:
        error = end.error or SandboxClosedError(f"sandbox {self._request.name!r} has ended: {end.why}")
        for wire in self._wires:
            with suppress(anyio.BrokenResourceError):
                wire.send_now({"event": "ended", "error": pack_error(error)})

    def _tell_loss(self, loss: Loss) -> None:
        for wire in self._wires:
            with suppress(anyio.BrokenResourceError):
                if not wire.send_now(_packed(loss)):
                    self._tasks.start_soon(self._tell_later, wire, loss)

    async def _tell_later(self, wire: Wire, loss: Loss) -> None:
        with suppress(anyio.BrokenResourceError):
            await wire.send(_packed(loss))

    def _write(self, **changes: object) -> None:
        self._state = evolve(self._state, **changes)    # type: ignore[arg-type]
        self._directory.write(self._state)

    # --- its end ---

    def finish(self, end: End) -> None:
        """The sandbox is gone: leave how it ended, or nothing where nothing had been asked of it."""
        if end is ABANDONED or not (self._main or end.reason):
            directories.remove(self._directory, alive=True)
        else:
            self._write(
                phase="ended", ended=time.time(), exit_code=end.exit_code, reason=end.reason, why=end.why,
                lost=end.lost,
            )
        os.close(self._claim.lock)      # before the connections end: who waits for that finds the sandbox ended

    def hang_up(self) -> None:
        """End all connections, those that nobody has answered too."""
        self._claim.listener.close()
        for wire in self._wires:
            wire.close()
        self._wires.clear()


async def keep(request: Request, claim: Claim, leash: Wire) -> None:
    """Keep a sandbox until its end, and leave of it what shall be left. The claim and the leash are its own."""
    with Log(claim.directory.log) as log:
        keeper = Keeper(request, claim, log)
        try:
            await _until_end(keeper, leash)
            keeper.finish(keeper.ending.end or End.stopped())
        except Exception as failure:
            first = _first(failure)
            if not isinstance(first, PykataError):
                traceback.print_exception(failure)
            keeper.finish(End.died(_told(first)) if keeper.was_ready else ABANDONED)
            with suppress(anyio.BrokenResourceError):
                await leash.send({"error": pack_error(first)})
        finally:
            leash.close()
            keeper.hang_up()


async def _until_end(keeper: Keeper, leash: Wire) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with alongside(_obey(signals, keeper.ending)), alongside(_leashed(leash, keeper.ending)):
            with keeper.ending.scope:
                await keeper.live(leash)


async def _obey(signals: AsyncIterator[signal.Signals], ending: Ending) -> None:
    async for number in signals:
        ending.set(End.stopped(f"its keeper got {number.name}"))


async def _leashed(leash: Wire, ending: Ending) -> None:
    """Who started us may go, or give up, until it has told us to stay."""
    if await leash.receive() is None:
        ending.set(ABANDONED)
    else:
        leash.close()


def _packed(loss: Loss) -> dict[str, object]:
    return {"event": "loss", "of_images": loss.of_images, "error": pack_error(loss.error)}


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _told(error: BaseException) -> PykataError:
    return error if isinstance(error, PykataError) else PykataError(f"the keeper failed: {type(error).__name__}")
