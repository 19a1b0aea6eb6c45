"""Containers of one sandbox: each has its own files and processes, and all share the kernel and the memory.

It prints::

    left: ['notes.txt']
    right: []
    the left one still has: written in the left one
"""

import asyncio

import pykata


async def main() -> None:
    async with (
        pykata.Sandbox(isolation="emulated") as sb,
        sb.container("builtin:busybox") as left,
        sb.container("builtin:busybox") as right,
    ):
        # The commands of a container see each other's files; those of another container don't.
        await left.run(["sh", "-c", "echo written in the left one > /tmp/notes.txt"], check=True)

        # Both at the same time.
        files = await asyncio.gather(left.run(["ls", "/tmp"]), right.run(["ls", "/tmp"]))
        for name, done in zip(("left", "right"), files, strict=True):
            print(f"{name}: {done.stdout.split()}")

        kept = await left.run(["cat", "/tmp/notes.txt"], check=True)
        print("the left one still has:", kept.stdout.strip())


asyncio.run(main())
