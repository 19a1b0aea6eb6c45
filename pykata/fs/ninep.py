"""Directories of the host by 9p, which QEMU serves itself: no daemon, and slower than virtio-fs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio.to_thread
from attrs import field, frozen

from pykata import host, spec
from pykata.errors import ConfigError, HostError
from pykata.fs.helper import NO_NAMESPACE, entered, not_permitted
from pykata.fs.shelf import SHELF, SharedRoot, open_shelf, shelf_socket
from pykata.spec import VOLUMES, Attachment, Mount

MSIZE = 512_000     # bytes of a message; what the guest's driver takes at most (net/9p/trans_virtio.c)
CACHES: Mapping[str, str] = {
    "auto": "mmap",         # nothing but what is mapped into memory
    "always": "loose",
    "none": "none",
}


def _known(instance: object, attribute: object, value: object) -> None:
    if value not in CACHES:
        raise ConfigError(f"cache={value!r} is unknown", hint=f"one of {', '.join(map(repr, CACHES))}")


@frozen
class NineP(SharedRoot):
    """The content of an image's files by 9p; see :class:`~pykata.fs.shelf.SharedRoot`.

    ::

        Sandbox(fs=NineP())

    QEMU serves it itself. ``cache`` is as for :class:`~pykata.Bind`. The files of an image that is a directory are
    copied: QEMU runs as nobody, who may not read all of them.
    """

    name = "9p"
    in_place = False
    cache: Literal["auto", "always", "none"] = field(default="always", validator=_known)

    @asynccontextmanager
    async def attach(self, run_dir: Path) -> AsyncIterator[Attachment]:
        root = run_dir / SHELF
        root.mkdir()
        async with AsyncExitStack() as stack:
            with shelf_socket(run_dir) as shelf:
                process = await stack.enter_async_context(host.spawn(
                    entered(root, (), shelf), stderr=host.PIPE, pass_fds=(shelf.fileno(),), cwd=Path("/"),
                    env=host.TOOL_ENV, kill=host.KILL))  # fmt: skip
            said = host.LastWords(process, "who shares images")
            stack.push_async_callback(said.stop)
            try:
                descriptor = await anyio.to_thread.run_sync(open_shelf, run_dir)
            except HostError as exc:
                why = await said.ended()        # it has ended, or is of no use
                raise (not_permitted(why) if NO_NAMESPACE in why else HostError(f"{exc.message}; {why}")) from exc
            stack.callback(os.close, descriptor)
            yield Attachment(
                devices=(spec.NineP(SHELF, root, readonly=True, descriptor=descriptor),),
                mounts=(_mount(SHELF, readonly=True, cache=self.cache),),
                lost=(said.ended,),
            )


def directory(tag: str, path: Path, *, readonly: bool, cache: str, security: spec.Security = "none") -> Attachment:
    """A directory, mounted as ``tag`` below :data:`~pykata.spec.VOLUMES`. Raises HostError."""
    mount = _mount(tag, readonly=readonly, cache=cache)
    try:
        is_whole = host.is_one_filesystem(path)
    except OSError as exc:
        raise HostError(f"can't share {path}: {exc.strerror}") from exc
    device = spec.NineP(tag, path, readonly, is_whole=is_whole, security=security)
    return Attachment(devices=(device,), mounts=(mount,))


def _mount(tag: str, *, readonly: bool, cache: str) -> Mount:
    options = ("trans=virtio", "version=9p2000.L", f"msize={MSIZE}", f"cache={CACHES[cache]}", "nosuid", "nodev",
               *(("ro",) if readonly else ()))
    return Mount(tag, "9p", f"{VOLUMES}/{tag}", options)
