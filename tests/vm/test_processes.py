"""Processes in a real guest, to the last byte: windows, memory, background processes, limits, many of them."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal

import anyio
import pytest

from pykata import Container, Process, Sandbox
from pykata.agent.v1 import StatsResponse
from pykata.requests import WINDOW
from tests.vm.conftest import idle

BUSYBOX = "builtin:busybox"
MIB = 1024 * 1024


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


async def stats(sb: Sandbox) -> StatsResponse:
    running = sb._running
    assert running is not None
    return await running.agent.stats()


def rss() -> int:
    """Resident memory of this process, bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def names(container: Container) -> list[str]:
    said = (await container.run(["ps", "-o", "comm"], check=True)).stdout.split()
    return sorted(set(said) - {"COMMAND", "init", "ps"})


# --- windows ---


async def test_stdout_is_whole_while_stderr_is_full(sb: Sandbox) -> None:
    script = "yes >&2 & head -c 5000000 /dev/zero; echo end; exec >&-; wait"
    async with sb.process(BUSYBOX, sh(script)) as process:
        digest = hashlib.sha256()
        async for piece in process.stdout:
            digest.update(piece)
        assert digest.digest() == hashlib.sha256(bytes(5_000_000) + b"end\n").digest()
        assert process.returncode is None
        await process.kill()
        # What nobody read is there, as far as it came.
        assert len(await process.stderr.read()) >= WINDOW
        assert await process.wait() == 137


async def test_the_exit_comes_after_the_last_byte_of_both(sb: Sandbox) -> None:
    script = "head -c 8000000 /dev/zero >&2 & head -c 8000000 /dev/zero; exec >&-; wait"
    async with sb.process(BUSYBOX, sh(script)) as process:
        async with anyio.create_task_group() as group:
            group.start_soon(process.wait)
            assert len(await process.stdout.read()) == 8_000_000
            assert process.returncode is None, "stderr has more than there is room for"
            assert len(await process.stderr.read()) == 8_000_000
        assert process.returncode == 0


async def test_a_process_that_waits_for_its_reader_and_its_writer(sb: Sandbox) -> None:
    # It writes all the time while it reads: each side waits for the other more than once.
    data = os.urandom(6 * MIB)
    async with sb.process(BUSYBOX, ["cat"]) as process:
        async def feed() -> None:
            await process.stdin.send(data)
            await process.stdin.aclose()

        async with anyio.create_task_group() as group:
            group.start_soon(feed)
            got = bytearray()
            async for piece in process.stdout:
                got += piece
                if len(got) < 5 * len(piece):
                    await anyio.sleep(0.05)
        assert got == data


async def test_output_of_any_length_is_whole(sb: Sandbox) -> None:
    # What is short comes in one answer, what isn't goes on as a call, and then in bulk; left in between, it is over.
    async with sb.container(BUSYBOX) as container:
        for size in (3, 60_000, 66_000, 130_000, 200_000, 300_000, 2_000_000) * 2:
            done = await container.run(sh(f"yes | head -c {size} | tee /dev/stderr"), check=True)
            assert done.stdout == done.stderr == ("y\n" * size)[:size]
        for step in range(20):
            with anyio.move_on_after(step / 400):
                await container.run(sh("yes"), max_output=1)
        assert (await container.run(["echo", "through"])).stdout == "through\n"


async def test_a_pause_while_the_first_command_writes() -> None:
    async with Sandbox(isolation="emulated") as sb, sb.process(BUSYBOX, sh("yes | head -c 3000000")) as process:
        got = bytearray(await anext(process.stdout))
        for _ in range(2):
            await sb.pause()
            await sb.resume()
        async for piece in process.stdout:
            got += piece
        assert await process.wait() == 0
        assert got == b"y\n" * 1_500_000


async def test_yes_costs_no_memory_on_either_side(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container, container.process(["yes"]) as process:
        unread = 0
        before: tuple[int, StatsResponse] | None = None
        for round_ in range(40):        # slowly: a piece, and a pause in which more comes than fits
            unread += len(await anext(process.stdout))
            await anyio.sleep(0.02)
            if round_ == 10:
                before = rss(), await stats(sb)
        assert before is not None
        # And not at all, with somebody who waits for its end.
        with anyio.move_on_after(2):
            await process.wait()
        after = await stats(sb)
        # Windows, pipes and what is on its way to the port were empty before, maybe, and are full now: some MiB on each
        # side. What was kept of all that `yes` can write would be more.
        assert rss() - before[0] < 32 * MIB
        assert after.agent_rss - before[1].agent_rss < 8 * MIB
        grown = after.containers[container.id].memory_current - before[1].containers[container.id].memory_current
        assert grown < 24 * MIB
        assert (await container.run(["echo", "through"])).stdout == "through\n"


@pytest.mark.parametrize("seed", range(3))
async def test_arbitrary_bytes_in_arbitrary_pieces_to_both_streams(sb: Sandbox, seed: int) -> None:
    # A script of writes, made at random, replayed by a shell; both streams are read at random speeds.
    chance = random.Random(seed)
    data = {1: bytearray(), 2: bytearray()}
    script = []
    source = chance.randbytes(MIB)
    for _ in range(60):
        fd, start = chance.choice([1, 1, 2]), chance.randrange(900_000)
        size = chance.choice([1, 7, 4096, 65_536, 65_537, 100_000])
        data[fd] += source[start : start + size]
        script.append(f"tail -c +{start + 1} /data | head -c {size} >&{fd}")
    async with sb.container(BUSYBOX) as container:
        await container.run(sh("cat > /data"), input=source, check=True)
        got = {1: bytearray(), 2: bytearray()}

        async def read(process: Process, fd: int) -> None:
            speed = random.Random(seed + fd)
            async for piece in process.stdout if fd == 1 else process.stderr:
                got[fd] += piece
                if speed.random() < 0.1:
                    await anyio.sleep(0.01)

        async with container.process(sh("\n".join([*script, "exit 9"]))) as process:
            async with anyio.create_task_group() as group:
                group.start_soon(read, process, 1)
                group.start_soon(read, process, 2)
            assert await process.wait() == 9
        assert got == data


async def test_lines_as_they_come(sb: Sandbox) -> None:
    script = "for n in 1 2 3; do printf $n; printf \"$n\\n\"; done; printf 'no end'"
    async with sb.process(BUSYBOX, sh(script)) as process:
        assert [line async for line in process.stdout.lines()] == [b"11\n", b"22\n", b"33\n", b"no end"]
        assert await process.wait() == 0


# --- limits ---


async def test_limits_hold(sb: Sandbox) -> None:
    script = "ulimit -n; ulimit -c; ulimit -Hf; dd if=/dev/zero of=/f bs=1k count=9; wc -c < /f"
    done = await sb.run(BUSYBOX, sh(script), rlimits={"nofile": 77, "core": (0, -1), "fsize": 4096})
    assert done.stdout.split() == ["77", "0", "8", "4096"]
    assert done.reason == "exit"


# --- memory runs out ---

GREEDY = "dd if=/dev/zero of=/dev/null count=1 bs=$(awk '/MemTotal/ {print $2 - 4096}' /proc/meminfo)K 2>/dev/null"


@pytest.mark.parametrize(
    ("script", "reason", "code", "signal_"),
    [
        (f"exec {GREEDY}", "oom", 137, signal.SIGKILL),     # itself
        (f"{GREEDY}; exit $?", "oom", 137, None),           # a child, and the shell passes that on
        (f"{GREEDY}; exit 3", "oom", 3, None),              # a child, and it fails of that
        (f"{GREEDY}; exit 0", "exit", 0, None),             # a child, and it gets by without
    ],
)
async def test_memory_runs_out(sb: Sandbox, script: str, reason: str, code: int, signal_: int | None) -> None:
    done = await sb.run(BUSYBOX, sh(f"echo before; {script}"))
    assert (done.reason, done.exit_code, done.signal, done.stdout) == (reason, code, signal_, "before\n")
    assert done.oom_kills == 1


async def test_memory_that_another_command_ran_out_of(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container, container.process(sh("echo up; read word; exit 4")) as process:
        assert await anext(process.stdout) == b"up\n"
        assert (await container.run(sh(f"exec {GREEDY}"))).reason == "oom"
        await process.stdin.send(b"end\n")
        assert await process.wait() == 4
        assert process.exited is not None
        assert (process.exited.oom_killed, process.exited.oom_kills) == (False, 1)
        assert (await container.run(["false"])).reason == "exit"


# --- /dev/stdin, /dev/stdout and /dev/stderr ---

AGAIN = "cat /dev/stdin; echo out > /dev/stdout; echo err > /dev/stderr; echo 1 > /proc/self/fd/1; echo 2 > /dev/fd/2"


async def test_whoever_a_process_is_it_can_open_its_streams_again(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        for user in ("root", "nobody", "1234:5"):
            for given in (None, None, None, "in\n", "in\n", "in\n"):     # the third of a kind is made by a stem
                done = await container.run(sh(AGAIN), user=user, input=given)
                assert (done.stdout, done.stderr) == (f"{given or ''}out\n1\n", "err\n2\n"), user
        # Many an image begins as root, and becomes somebody else before it writes its log.
        done = await container.run(["su", "-s", "/bin/sh", "nobody", "-c", f"id -u; {AGAIN}"])
        assert (done.stdout, done.stderr) == ("65534\nout\n1\n", "err\n2\n")
        server = await container.start(sh(AGAIN), user="nobody")
        assert (await server.wait(), await server.log()) == (0, b"out\nerr\n1\n2\n")
        async with container.process(["ls", "-ln", "/dev/null"], user="nobody", tty=True) as process:
            assert b"crw-rw-rw-" in await process.stdout.read()
        done = await container.run(sh(f"{AGAIN}; stat -c '%u %t' $(tty)"), user="nobody", tty=True, input="in\n")
        assert "65534 " in done.stdout
    assert (await sb.run(BUSYBOX, sh(AGAIN), user="nobody")).stdout == "out\n1\n"


async def test_as_many_variables_as_there_may_be(sb: Sandbox) -> None:
    many = {f"V{number}": "1" for number in range(100_000)}
    done = await sb.run(BUSYBOX, ["env"], env=many)     # a shell would take minutes to look through them
    assert [line for line in done.stdout.splitlines() if line.startswith("V")] == [f"{name}=1" for name in many]


# --- in the background ---


async def test_a_server_in_the_background_goes_on_writing(sb: Sandbox) -> None:
    script = "(while :; do echo tick; echo x >> /ticks; sleep 0.05; done) & echo started"
    async with sb.container(BUSYBOX) as container:
        done = await container.run(sh(script), timeout=600)
        assert done.reason == "exit"
        assert "started\n" in done.stdout
        # A write to a pipe that nobody holds any more would have ended it.
        count = "wc -l < /ticks"
        first = int((await container.shell(count)).stdout)
        while int((await container.shell(count)).stdout) <= first + 3:
            pass
        assert "sh" in await names(container)
    assert (await stats(sb)).containers == {}


async def test_a_process_that_outlives_its_call(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        await container.run(["true"])       # what the agent keeps for the next one is there from now on
        before = (await idle(sb)).open_files
        echo = await container.start(sh("echo out; echo err >&2; head -c 3 >&2; exit 6"), env={"A": "b"})
        assert await echo.wait() == 6
        assert await echo.log() == b"out\nerr\n"
        chatty = await container.start(sh("yes | head -c 1000000; echo end"), log=10)
        assert await chatty.wait() == 0
        assert await chatty.log() == b"y\ny\ny\nend\n"
        quiet = await container.start(sh("exec 3>&1; readlink /proc/self/fd/3 > /where; exec sleep 1000"), log=0)
        assert await quiet.poll() is None
        while not (await container.run(["cat", "/where"])).stdout:
            pass
        assert (await container.run(["cat", "/where"])).stdout == "/dev/null\n"
        await quiet.terminate()
        assert await quiet.wait() == 143
        tree = await container.start(sh("setsid sleep 1000 & sleep 1001; true"))
        while await names(container) != ["sh", "sleep"]:
            pass
        await tree.kill()
        assert await tree.wait() == 137
        while await names(container):
            pass
        gone = await container.start(["no-such-program"])
        assert await gone.wait() == 127
        assert b"not found" in await gone.log()
        while (await stats(sb)).open_files > before + 4:        # the spare cgroup, and its stem
            pass
        await container.start(["sleep", "1000"])
    assert (await stats(sb)).containers == {}


async def test_many_that_outlive_their_calls(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        processes = [await container.start(["sleep", "1000"]) for _ in range(20)]
        assert len({process.pid for process in processes}) == 20
        await container.run(["killall", "sleep"], check=True)
        assert [await process.wait() for process in processes] == [143] * 20


# --- many ---


async def test_a_hundred_at_once(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        results: dict[int, tuple[bytes, bytes, int | None]] = {}

        async def one(number: int) -> None:
            done = await container.run(sh(f"cat; echo err {number} >&2; exit {number}"), input=b"%d\n" % number * 1000)
            results[number] = done.stdout_bytes, done.stderr_bytes, done.exit_code

        async with anyio.create_task_group() as group:
            for number in range(100):
                group.start_soon(one, number)
        assert results == {n: (b"%d\n" % n * 1000, b"err %d\n" % n, n) for n in range(100)}
        assert await names(container) == []


async def in_a_row(sb: Sandbox, count: int) -> None:
    """So many short commands one after the other; nothing is lost, and nothing grows."""
    async with sb.container(BUSYBOX) as container:
        before: tuple[int, int, StatsResponse] | None = None
        for number in range(count):
            size = (number * 7919) % 3000
            data = bytes([number % 251]) * size
            done = await container.run(sh(f"cat; echo e{number} >&2; exit {number % 256}"), input=data)
            assert done.stdout_bytes == data
            assert done.stderr_bytes == b"e%d\n" % number
            assert (done.exit_code, done.reason) == (number % 256, "exit")
            if number == count // 10:
                before = rss(), len(os.listdir("/proc/self/fd")), await idle(sb)
        assert before is not None
        while (after := await idle(sb)).open_files > before[2].open_files:
            pass
        # A page for each command would be more.
        assert after.agent_rss <= before[2].agent_rss + 2 * count * 1024 + MIB // 4
        assert after.memory_available >= before[2].memory_available - 16 * MIB
        assert len(os.listdir("/proc/self/fd")) == before[1]
        assert rss() <= before[0] + 32 * MIB


async def test_three_hundred_in_a_row(sb: Sandbox) -> None:
    await in_a_row(sb, 300)


@pytest.mark.slow
async def test_ten_thousand_in_a_row(sb: Sandbox) -> None:
    await in_a_row(sb, 10_000)


async def test_leaving_what_has_ended_but_was_not_read(sb: Sandbox) -> None:
    # More than the window and less than that and a pipe: the process ends, and some of its output stays in the guest.
    async with sb.container(BUSYBOX) as container:
        for _ in range(5):
            async with container.process(["head", "-c", str(WINDOW + 30_000), "/dev/zero"]):
                await container.shell("while pidof head; do :; done", check=True)
        assert (await container.run(["echo", "usable"])).stdout == "usable\n"
