"""A process that runs while you talk to it: stdin, stdout as it comes, and a signal.

It prints::

    > 6 * 7
    42
    > 2 ^ 10
    1024
    ended by SIGTERM: True
"""

import asyncio
import signal

import pykata


async def main() -> None:
    # bc answers each line of its stdin with one of stdout, until it is told to stop.
    async with pykata.Sandbox(isolation="emulated") as sb, sb.process("builtin:busybox", ["bc"]) as bc:
        answers = aiter(bc.stdout)
        for question in ("6 * 7", "2 ^ 10"):
            await bc.stdin.send(question.encode() + b"\n")
            print(">", question)
            print((await anext(answers)).decode().strip())

        await bc.terminate()
        print("ended by SIGTERM:", await bc.wait() == 128 + signal.SIGTERM)


asyncio.run(main())
