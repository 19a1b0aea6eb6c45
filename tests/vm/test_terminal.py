"""Terminals in a real guest: what a program sees of one, its size, its ends."""

from __future__ import annotations

import anyio
import pytest

from pykata import AgentRefusedError, Process, Sandbox, Terminal

BUSYBOX = "builtin:busybox"


async def until(process: Process, words: bytes) -> bytes:
    """The output up to the line that has these words."""
    said = b""
    async for line in process.stdout.lines():
        said += line
        if words in line:
            return said
    raise AssertionError(f"it ended before it said {words!r}: {said!r}")


async def test_all_three_streams_are_the_terminal(sb: Sandbox) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && tty; stty size; echo $TERM; echo err >&2"
    async with sb.container(BUSYBOX) as container:
        async with container.process(["sh", "-c", script], tty=Terminal(rows=33, cols=99)) as process:
            said = (await process.stdout.read()).decode().replace("\r\n", "\n").splitlines()
            assert await process.wait() == 0
            assert await process.stderr.read() == b""
        assert said == ["/dev/pts/0", "33 99", "xterm", "err"]
        # It was given back.
        script = "tty; stty size; echo $TERM; ls /dev/pts"
        done = await container.run(["sh", "-c", script], tty=True, env={"TERM": "vt100"})
        assert done.stdout.split() == ["/dev/pts/0", "24", "80", "vt100", "0", "ptmx"]


async def test_it_is_the_controlling_terminal_of_a_session(sb: Sandbox) -> None:
    script = "trap 'echo got INT; exit 5' INT; echo here > /dev/tty; while :; do sleep 0.1; done"
    async with sb.process(BUSYBOX, ["sh", "-c", script], tty=True) as process:
        await until(process, b"here")
        await process.stdin.send(b"\x03")       # the terminal makes a signal for its foreground process group of it
        await until(process, b"got INT")
        assert await process.wait() == 5


async def test_it_is_its_user_s(sb: Sandbox) -> None:
    script = "stat -c %u:%g:%a $(tty); echo to it > $(tty)"
    done = await sb.run(BUSYBOX, ["sh", "-c", script], tty=True, user="1000:1000")
    assert done.stdout == "1000:5:620\r\nto it\r\n"


async def test_the_console_of_a_container_s_own_process(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, ["sh", "-c", "echo to the console > /dev/console"], tty=True)
    assert done.stdout == "to the console\r\n"
    async with sb.container(BUSYBOX) as container:
        assert (await container.run(["test", "-e", "/dev/console"], tty=True)).exit_code == 1


async def test_resize(sb: Sandbox) -> None:
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.1; done"
    async with sb.process(BUSYBOX, ["sh", "-c", script], tty=True) as process:
        await until(process, b"ready")
        await process.resize(10, 20)
        assert (await until(process, b"10 20")).endswith(b"10 20\r\n")
        await process.wait()
        await process.resize(11, 21)


async def test_the_end_of_input(sb: Sandbox) -> None:
    assert (await sb.run(BUSYBOX, ["cat"], tty=True)).stdout == ""
    for sent in ("a line\n", "no line"):
        done = await sb.run(BUSYBOX, ["sh", "-c", "stty -echo; cat > /f; wc -c < /f"], tty=True, input=sent)
        assert done.stdout.endswith(f"{len(sent)}\r\n"), done


async def test_much_input_and_output(sb: Sandbox) -> None:
    data = b"".join(b"%08d\n" % number for number in range(30_000))
    async with sb.process(BUSYBOX, ["sh", "-c", "stty -echo -onlcr; echo ready; cat"], tty=True) as process:
        await until(process, b"ready")

        async def feed() -> None:
            await process.stdin.send(data)
            await process.stdin.aclose()

        async with anyio.create_task_group() as group:
            group.start_soon(feed)
            assert await process.stdout.read() == data
        assert await process.wait() == 0


async def test_it_hangs_up_when_the_block_is_left(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        script = "trap 'echo hung up > /said; exit' HUP; echo ready; while :; do sleep 0.05; done"
        said = ""
        for _ in range(20):         # it has a moment to say goodbye before it is killed, of the guest's time
            async with container.process(["sh", "-c", script], tty=True) as process:
                await until(process, b"ready")
            while "trap" in (await container.run(["ps", "-o", "args"])).stdout:
                pass
            if said := (await container.run(["cat", "/said"])).stdout:
                break
        assert said == "hung up\n"
        # And one that doesn't take the hint is killed.
        script = "trap '' HUP; echo ready; while :; do sleep 1; done"
        async with container.process(["sh", "-c", script], tty=True) as process:
            await until(process, b"ready")
        while "trap" in (await container.run(["ps", "-o", "args"])).stdout:
            pass


async def test_output_ends_with_the_session(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        done = await container.run(["sh", "-c", "trap '' HUP; sleep 1000 & echo bye"], tty=True, timeout=600)
        assert (done.stdout, done.reason) == ("bye\r\n", "exit")
        assert "sleep" in (await container.run(["ps", "-o", "comm"])).stdout


async def test_a_command_that_cannot_start_says_so_on_the_terminal(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, ["no-such-program"], tty=True)
    assert (done.exit_code, done.stdout) == (127, "pykata: no-such-program: command not found\r\n")


async def test_a_container_without_terminals(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        await container.run(["sh", "-c", "rm -rf /dev/pts 2>/dev/null; ls /dev/pts"])
        assert (await container.run(["tty"], tty=True)).exit_code == 0
        with pytest.raises(AgentRefusedError):
            await container.run(["true"], tty=True, user="nobody-of-this-name")
        assert (await container.run(["ls", "/dev/pts"])).stdout == "ptmx\n", "a terminal that came to nothing is gone"
