"""The least there is to know: a sandbox, a command in it, and why it ended.

It prints::

    a kernel of its own: Linux 6.12.117-pykata
    timeout 'as far as it got\\n'
"""

import asyncio

import pykata


async def main() -> None:
    # Emulation is accepted here, so that the example runs everywhere. For code you don't trust: isolation="hardware".
    async with pykata.Sandbox(memory="256M", isolation="emulated") as sb:
        done = await sb.run("builtin:busybox", ["uname", "-sr"])
        print("a kernel of its own:", done.stdout.strip())

        late = await sb.run("builtin:busybox", ["sh", "-c", "echo as far as it got; sleep 60"], timeout=1)
        print(late.reason, repr(late.stdout))


asyncio.run(main())
