"""What only shows with the guest's real agent: two implementations of HTTP/2, of flow control and of its limits."""

from __future__ import annotations

import signal

import anyio
import pytest

from pykata import Process, Sandbox

pytestmark = pytest.mark.vm

IMAGE = "builtin:busybox"
GUARD = 300.0   # seconds; only a hang takes that long


async def next_command_works(sb: Sandbox) -> None:
    assert (await sb.run(IMAGE, ["echo", "still here"])).stdout == "still here\n"


async def test_killed_while_its_output_waits() -> None:
    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sb, sb.container(IMAGE) as container:
            for number in (signal.SIGTERM, signal.SIGKILL):
                async with container.process(["yes"]) as process:
                    await anyio.sleep(0.5)      # until pipe, queue and window are full
                    await process.send_signal(number)
                    async for _ in process.stdout:
                        pass
                    assert await process.wait() == 128 + number
            await next_command_works(sb)


async def test_unread_output_blocks_nobody() -> None:
    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sb, sb.process(IMAGE, ["yes"]):
            await next_command_works(sb)


async def test_many_commands_cancelled_at_once() -> None:
    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sb, sb.container(IMAGE) as container:

            async def one() -> None:
                async with container.process(["sleep", "1000"]):
                    await anyio.sleep_forever()

            for patience in (0.0, 0.01, 0.1, 1.0):
                with anyio.move_on_after(patience):
                    async with anyio.create_task_group() as group:
                        for _ in range(60):
                            group.start_soon(one)
            await next_command_works(sb)


async def test_output_and_input_are_whole() -> None:
    sent = bytes(range(256)) * 20_000

    async def feed(process: Process) -> None:
        await process.stdin.send(sent)
        await process.stdin.aclose()

    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sb, sb.process(IMAGE, ["cat"]) as process:
            async with anyio.create_task_group() as group:
                group.start_soon(feed, process)
                assert await process.stdout.read() == sent
            assert await process.wait() == 0


async def test_stdin_that_nobody_reads() -> None:
    with anyio.fail_after(GUARD):
        async with Sandbox(isolation="emulated") as sb:
            done = await sb.run(IMAGE, ["sh", "-c", "exec <&-; sleep 1; echo done"], input=bytes(3_000_000))
            assert (done.stdout, done.exit_code) == ("done\n", 0)
