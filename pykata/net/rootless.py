"""A network namespace that takes no privileges, with a program beside it that connects it to the host's network."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from threading import Lock

import anyio
from attrs import evolve

from pykata import host
from pykata.errors import NetworkError
from pykata.net.netlink import netlink
from pykata.net.netns import Netns, checked, socket_in

PROGRAM = Path(__file__).with_name("uplink.py")
LINKS = 1               # RTMGRP_LINK (rtnetlink(7)): told of each new interface
REFUSED = "can't make the n"        # ...amespaces, ...etwork namespace: what the program says of it
PATIENCE = 20.0         # seconds that a program may take to make its interface, on the busiest host


@asynccontextmanager
async def rootless(
    name: str, program: Sequence[str | Path], interface: str
) -> AsyncIterator[tuple[Netns, host.LastWords]]:
    """A network namespace with ``program`` beside it, which makes ``interface`` in it; both end with the block.

    ``@`` in an argument is the directory in /proc of the process that is in the namespace. Raises HostError.
    """
    async with AsyncExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        opener = stack.enter_context(closing(_Opener(ours)))
        with theirs:
            argv = [sys.executable, "-I", "-S", PROGRAM, str(theirs.fileno()), *program]
            process = await stack.enter_async_context(host.spawn(
                argv, stderr=host.PIPE, pass_fds=(theirs.fileno(),), cwd=Path("/"), env=host.TOOL_ENV, kill=host.KILL,
            ))  # fmt: skip
        words = host.LastWords(process, name)
        stack.push_async_callback(words.stop)
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC
            opener.ask({"open": "/proc/self/ns/net", "flags": flags})
            await anyio.wait_readable(ours)         # it has to be started first; from then on it answers at once
            fd = opener.take()
            stack.callback(os.close, fd)
            user_fd = opener({"open": "/proc/self/ns/user", "flags": flags})
            stack.callback(os.close, user_fd)
            netns = evolve(checked(fd, f"of {name}"), opener=opener, user_fd=user_fd)
            await _appeared(netns, interface, words)
        except _GoneError:
            raise await _failed(name, words) from None
        yield netns, words


async def _appeared(netns: Netns, interface: str, words: host.LastWords) -> None:
    """Wait until the program has made its interface: the kernel tells. Raises _GoneError if it ends instead."""
    there = False
    with socket_in(netns, socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as news:
        news.setblocking(False)
        news.bind((0, LINKS))
        with anyio.move_on_after(PATIENCE):
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    await words.ended()
                    group.cancel_scope.cancel()

                group.start_soon(watch)
                with suppress(_GoneError):
                    while not (there := await _is_there(netns, interface)):
                        await asyncio.get_running_loop().sock_recv(news, 65536)
                group.cancel_scope.cancel()
    if not there:
        raise _GoneError(f"there is no interface {interface} after {PATIENCE:g} s")


async def _is_there(netns: Netns, interface: str) -> bool:
    async with netlink(netns) as kernel:
        return any(each.name == interface for each in await kernel.links())


class NoNamespaceError(NetworkError):
    """This user, or this container, may not make namespaces."""


class _GoneError(NetworkError):
    """The process in the namespace doesn't answer."""


async def _failed(name: str, words: host.LastWords) -> NetworkError:
    why = f"{name} made no interface"
    with anyio.move_on_after(1):
        why = await words.ended()
    kind = NoNamespaceError if REFUSED in why else NetworkError
    return kind(f"user-mode networking doesn't work here: {why}",
                        hint="pykata check says what works; UserNetwork(via=\"qemu\") needs no namespace")


class _Opener:
    """Has the process in the namespace open things. Called from any thread; it answers in some 50 microseconds."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lock = Lock()

    def __call__(self, request: Mapping[str, object]) -> int:
        with self._lock:
            self.ask(request)
            return self.take()

    def ask(self, request: Mapping[str, object]) -> None:
        """Have something opened, for :meth:`take`."""
        try:
            self._control.send(json.dumps(request).encode())
        except OSError as exc:
            raise _GoneError("the network namespace is gone") from exc

    def take(self) -> int:
        """What was opened."""
        try:
            answer, descriptors, _, _ = socket.recv_fds(self._control, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as exc:
            raise _GoneError("the network namespace is gone") from exc
        if descriptors:
            return descriptors[0]
        if not answer:
            raise _GoneError("the network namespace is gone")
        number = json.loads(answer)["errno"]
        raise OSError(number, os.strerror(number))

    def close(self) -> None:
        # Who waits for an answer in a thread gets an end.
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
