"""Runs the commands of a recipe, in a sandbox that is entered when the first of them has to be run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from pykata.errors import BuildFailedError, CommandFailedError
from pykata.guest import find_bundle
from pykata.images import Pulling, resolve
from pykata.images.build import RunCommand, describe
from pykata.images.recipe import RunStep
from pykata.rootfs import builtin_images
from pykata.sandbox import Sandbox
from pykata.spec import Image

TAIL = 16 * 1024        # bytes of a command's output that are kept for an error


async def find_base(reference: str, architecture: str, sandbox: Sandbox | None) -> Image:
    """What a recipe begins with. A sandbox's options say how it is pulled."""
    builtin = builtin_images(find_bundle()) if reference.startswith("builtin:") else None
    how = Pulling()
    if sandbox is not None:
        options = sandbox.options
        how = Pulling(options.pull, options.registries, options.progress)
    return await resolve(reference, architecture=architecture, builtin=builtin, how=how)


@asynccontextmanager
async def commands(sandbox: Sandbox | None) -> AsyncIterator[RunCommand]:
    """What runs commands: in ``sandbox`` if it is open, else in one that is open while this block is."""
    async with AsyncExitStack() as stack:
        opened: list[Sandbox] = [sandbox] if sandbox is not None and sandbox._running is not None else []

        async def run(reference: str, step: RunStep, target: Path, wrote: Callable[[bytes], None]) -> None:
            if not opened:
                opened.append(await stack.enter_async_context(sandbox or Sandbox()))
            await _run(opened[0], reference, step, target, wrote)

        yield run


async def _run(
    sandbox: Sandbox, reference: str, step: RunStep, target: Path, wrote: Callable[[bytes], None]
) -> None:
    tail = bytearray()

    def take(data: bytes) -> None:
        tail.extend(data)
        del tail[:-TAIL]
        wrote(data)

    async with sandbox.container(reference) as container:
        done = await container.run(step.cmd, timeout=step.timeout, on_stdout=take, on_stderr=take, max_output=0)
        try:
            done.check()
        except CommandFailedError as exc:
            output = tail.decode("utf-8", "replace")
            raise BuildFailedError(f"{describe(step)!r}: {exc.message}", completed=done, output=output) from exc
        await container.export_changes(target)
