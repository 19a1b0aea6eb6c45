"""Commands in a real guest: what goes in, what comes out, and how they end."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

import pykata
from pykata import AgentRefusedError, CommandFailedError, Container, Process, Sandbox
from tests.vm.conftest import cut_off, idle

BUSYBOX = "builtin:busybox"
MIB = 1024 * 1024
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text()


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


async def processes(container: Container) -> set[str]:
    """Names of what runs in a container, without the init that only waits, and without the look itself."""
    # Kernel threads aren't in its PID namespace. Each name of a zombie is in brackets.
    said = (await container.run(["ps", "-o", "comm"], check=True)).stdout.split()
    return set(said) - {"COMMAND", "init", "ps"}


# --- results ---


async def test_hello(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, ["echo", "hello"])
    assert done == pykata.Completed(args=("echo", "hello"), exit_code=0, reason="exit", stdout_bytes=b"hello\n")


async def test_python_from_an_image_on_disk(sb: Sandbox, demo_image: str) -> None:
    done = await sb.run(f"oci:{demo_image}", ["python3", "-c", "print(6 * 7)"], check=True)
    assert done.stdout == "42\n"


@pytest.mark.parametrize("code", [0, 1, 2, 42, 125, 126, 127, 128, 137, 255])
async def test_exit_codes_come_through(sb: Sandbox, code: int) -> None:
    done = await sb.run(BUSYBOX, sh(f"exit {code}"))
    assert (done.exit_code, done.reason, done.signal) == (code, "exit", None)


async def test_check(sb: Sandbox) -> None:
    with pytest.raises(CommandFailedError, match="exit code 3") as caught:
        await sb.run(BUSYBOX, sh("echo out; echo what went wrong >&2; exit 3"), check=True)
    assert caught.value.completed.stdout == "out\n"
    assert caught.value.hint == "what went wrong"


@pytest.mark.parametrize(
    "number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGABRT, signal.SIGUSR1], ids=lambda n: n.name
)
async def test_a_signal_is_not_an_exit_code(sb: Sandbox, number: signal.Signals) -> None:
    done = await sb.run(BUSYBOX, sh(f"echo before; kill -{int(number)} $$; echo after"))
    assert (done.reason, done.signal, done.exit_code) == ("signal", number, 128 + number)
    assert done.stdout == "before\n"


@pytest.mark.parametrize(
    ("cmd", "code", "said"),
    [
        (["no-such-program"], 127, "no-such-program"),
        (["/no/such/program"], 127, "/no/such/program"),
        (["/etc"], 126, "/etc"),
        (["/etc/passwd"], 126, "/etc/passwd"),
        (["/bin/busybox/no"], 127, "/bin/busybox/no"),
    ],
)
async def test_a_command_that_cannot_start_says_which_and_why(
    sb: Sandbox, cmd: list[str], code: int, said: str
) -> None:
    done = await sb.run(BUSYBOX, cmd)
    assert (done.exit_code, done.reason, done.stdout) == (code, "exit", "")
    (line,) = done.stderr.splitlines()
    assert said in line
    assert len(line) > len(said) + 5


async def test_a_script_whose_interpreter_is_missing(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        await container.run(sh("echo '#!/no/such/interpreter' > /s; echo 'echo ok' > /t; chmod +x /s /t"), check=True)
        missing = await container.run(["/s"])
        assert missing.exit_code in (126, 127)
        assert "/s" in missing.stderr
        # execve(2) refuses a file without a format; only a shell would run it as a script.
        assert (await container.run(["/t"])).exit_code == 126
        assert (await container.run(["sh", "/t"])).stdout == "ok\n"


async def test_reasons_are_told_apart(sb: Sandbox) -> None:
    assert (await sb.run(BUSYBOX, sh("exit 137"))).reason == "exit"
    assert (await sb.run(BUSYBOX, sh("kill -9 $$"))).reason == "signal"
    assert (await sb.run(BUSYBOX, ["sleep", "1000"], timeout=1)).reason == "timeout"
    # All of the guest's memory at once: as much as the kernel lets a process ask for, and more than it may use.
    greedy = "exec dd if=/dev/zero of=/dev/null count=1 bs=$(awk '/MemTotal/ {print $2 - 4096}' /proc/meminfo)K"
    assert (await sb.run(BUSYBOX, sh(greedy))).reason == "oom"


# --- output ---


async def test_binary_output_is_exact(sb: Sandbox) -> None:
    data = bytes(range(256)) * 300 + os.urandom(5000) + b"\r\n\0\xff\xfe"
    done = await sb.run(BUSYBOX, sh("cat; printf 'e\\000\\377' >&2"), input=data)
    assert done.stdout_bytes == data
    assert done.stderr_bytes == b"e\0\xff"
    assert done.stdout.endswith("\r\n\0��"), "what isn't UTF-8 is shown as U+FFFD"


async def test_large_output_is_whole(sb: Sandbox) -> None:
    # 50 MB in pieces of 1 MiB, each followed by a line on stderr.
    script = "for i in $(seq 50); do yes line-$i | head -c 1048576; echo $i >&2; done; exit 7"
    heard = 0

    def hear(data: bytes) -> None:
        nonlocal heard
        heard += len(data)

    done = await sb.run(BUSYBOX, sh(script), on_stdout=hear, timeout=300)
    expected = hashlib.sha256()
    for number in range(1, 51):
        line = b"line-%d\n" % number
        expected.update((line * (MIB // len(line) + 1))[:MIB])
    assert len(done.stdout_bytes) == heard == 50 * MIB
    assert hashlib.sha256(done.stdout_bytes).digest() == expected.digest()
    assert done.stderr == "".join(f"{number}\n" for number in range(1, 51))
    assert (done.exit_code, done.truncated) == (7, False)


async def test_output_beyond_the_limit_is_flagged(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, sh("head -c 3000000 /dev/zero; echo end >&2"), max_output=1_000_000)
    assert done.stdout_bytes == bytes(1_000_000)
    assert (done.stderr, done.truncated, done.exit_code) == ("end\n", True, 0)


async def test_output_comes_while_the_command_runs(sb: Sandbox) -> None:
    # The command only ends if its first words are heard before it does.
    async with sb.process(BUSYBOX, sh("echo ready; read word; echo got $word; echo bye >&2; exit 5")) as process:
        assert await anext(process.stdout) == b"ready\n"
        assert process.returncode is None
        await process.stdin.send(b"it\n")
        assert await anext(process.stdout) == b"got it\n"
        assert await process.wait() == 5
        assert await process.stderr.read() == b"bye\n"


async def test_a_conversation_of_many_turns(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, ["cat"]) as process:
        for number in range(100):
            await process.stdin.send(b"%d\n" % number)
            assert await anext(process.stdout) == b"%d\n" % number
        await process.stdin.aclose()
        assert await process.wait() == 0


async def test_callbacks_hear_both_streams(sb: Sandbox) -> None:
    heard: dict[str, bytes] = {"out": b"", "err": b""}

    def out(data: bytes) -> None:
        heard["out"] += data

    async def err(data: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        heard["err"] += data

    done = await sb.run(BUSYBOX, sh("echo a; echo b >&2; echo c"), on_stdout=out, on_stderr=err)
    assert heard == {"out": b"a\nc\n", "err": b"b\n"}
    assert (done.stdout, done.stderr) == ("a\nc\n", "b\n")


async def test_a_callback_s_error_kills_the_command(sb: Sandbox) -> None:
    def fail(data: bytes) -> None:
        raise KeyError("mine")

    async with sb.container(BUSYBOX) as container:
        with pytest.raises(KeyError, match="mine"):
            await container.run(sh("echo x; sleep 1000"), on_stdout=fail)
        assert await processes(container) == set()


# --- input ---


async def test_much_input(sb: Sandbox) -> None:
    data = os.urandom(8 * MIB)
    done = await sb.run(BUSYBOX, ["sha256sum"], input=data, check=True)
    assert done.stdout.split()[0] == hashlib.sha256(data).hexdigest()


async def test_much_input_and_output_at_once(sb: Sandbox) -> None:
    data = os.urandom(4 * MIB)
    assert (await sb.run(BUSYBOX, ["cat"], input=data)).stdout_bytes == data


async def test_input_that_is_not_read(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, sh("head -c 3; exit 4"), input=b"abc" + bytes(4 * MIB))
    assert (done.stdout, done.exit_code) == ("abc", 4)


async def test_no_input_is_an_end_of_file(sb: Sandbox) -> None:
    assert (await sb.run(BUSYBOX, sh("cat; readlink /proc/self/fd/0"))).stdout.startswith("pipe:")


# --- time ---


async def test_a_timeout_keeps_the_output_and_kills_the_tree(sb: Sandbox) -> None:
    script = "echo so far; echo so bad >&2; setsid sh -c 'trap \"\" TERM HUP INT; sleep 1001 & sleep 1002' & sleep 1003"
    async with sb.container(BUSYBOX) as container:
        before = time.monotonic()
        done = await cut_off(lambda seconds: container.run(sh(script), timeout=seconds), "so far\n", "so bad\n")
        assert time.monotonic() - before >= 1
        assert (done.reason, done.exit_code, done.signal) == ("timeout", 137, signal.SIGKILL)
        assert await processes(container) == set()
        assert (await container.run(["echo", "usable"], timeout=600)).stdout == "usable\n"


async def test_what_a_command_leaves_behind_does_not_keep_it(sb: Sandbox) -> None:
    # Its output is still held open by another process when it has ended.
    done = await sb.run(BUSYBOX, sh("sleep 1000 & echo started"), timeout=600)
    assert (done.reason, done.exit_code, done.stdout) == ("exit", 0, "started\n")
    async with sb.container(BUSYBOX) as container:
        done = await container.run(sh("sleep 1000 & echo started"), timeout=600)
        assert (done.reason, done.exit_code, done.stdout) == ("exit", 0, "started\n")
        assert await processes(container) == {"sleep"}, "in a container that stays, a daemon may live on"


async def test_leaving_a_process_kills_it_and_all_it_started(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        async with container.process(sh("setsid sleep 1000 & echo ready; sleep 1000")) as process:
            assert await anext(process.stdout) == b"ready\n"
        # The call was reset; the agent kills before it answers the next one about this container.
        while await processes(container):
            await anyio.lowlevel.checkpoint()


async def test_signals_reach_the_group(sb: Sandbox) -> None:
    script = "trap 'echo caught; exit 9' USR1; echo ready; while :; do sleep 0.1; done"
    async with sb.process(BUSYBOX, sh(script)) as process:
        assert await anext(process.stdout) == b"ready\n"
        await process.send_signal(signal.SIGUSR1)
        assert await process.wait() == 9
        assert await process.stdout.read() == b"caught\n"


async def test_terminate_and_kill(sb: Sandbox) -> None:
    async with sb.process(BUSYBOX, sh("trap '' TERM; echo ready; while :; do sleep 1000; done")) as process:
        assert await anext(process.stdout) == b"ready\n"
        await process.terminate()
        await process.kill()
        assert await process.wait() == 137


async def test_orphans_are_reaped(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        # Each sleep loses its parent at once and becomes init's.
        await container.run(sh("for i in $(seq 20); do (sleep 0.01 &) ; done"), check=True)
        while await processes(container):       # a zombie is among them
            pass


# --- containers ---


async def test_commands_of_a_container_share_its_files(sb: Sandbox) -> None:
    async with sb.container(BUSYBOX) as container:
        await container.run(sh("echo 'kept' > /file; mkdir -p /a/b; rm /etc/passwd"), check=True)
        assert (await container.run(["cat", "/file"])).stdout == "kept\n"
        assert (await container.run(["test", "-e", "/etc/passwd"])).exit_code == 1
        assert (await container.run(["ls", "/a"])).stdout == "b\n"
    fresh = await sb.run(BUSYBOX, sh("cat /file; test -e /etc/passwd"))
    assert fresh.exit_code == 0, "another container begins with the image as it is"
    assert "file" in fresh.stderr


async def test_containers_of_several_images_at_once(sb: Sandbox, demo_image: str) -> None:
    async with sb.container(BUSYBOX) as box, sb.container(f"oci:{demo_image}") as debian:
        await box.run(sh("echo box > /mine"), check=True)
        await debian.run(sh("echo debian > /mine"), check=True)
        assert (await box.run(["cat", "/mine"])).stdout == "box\n"
        assert (await debian.run(["cat", "/mine"])).stdout == "debian\n"
        assert (await box.run(["test", "-e", "/usr/bin/python3"])).exit_code == 1
        assert (await debian.run(["python3", "-c", "import sys; print(sys.version_info.major)"])).stdout == "3\n"
        # A third and a fourth while they are there.
        assert (await sb.run(BUSYBOX, ["test", "-e", "/mine"])).exit_code == 1
        assert (await sb.run(f"oci:{demo_image}", ["test", "-e", "/mine"])).exit_code == 1
        for container in (box, debian):
            assert "sleep" not in (await container.run(["ls", "/proc"])).stdout


async def test_images_in_turn(sb: Sandbox, demo_image: str) -> None:
    # The same disk slot shows another image each time: nothing may be left of the one before.
    for _ in range(3):
        assert (await sb.run(BUSYBOX, ["test", "-e", "/usr/bin/python3"])).exit_code == 1
        done = await sb.run(f"oci:{demo_image}", sh("cat /etc/os-release; sha256sum /usr/bin/python3.11 | cut -c1-8"))
        assert "debian" in done.stdout


async def test_many_commands_at_once(sb: Sandbox) -> None:
    results: dict[int, str] = {}

    async def run(number: int) -> None:
        results[number] = (await sb.run(BUSYBOX, sh(f"cat; echo {number}"), input=f"{number} ", check=True)).stdout

    async with anyio.create_task_group() as group:
        for number in range(12):
            group.start_soon(run, number)
    assert results == {number: f"{number} {number}\n" for number in range(12)}


async def test_many_commands_at_once_in_a_container(sb: Sandbox) -> None:
    results: dict[int, str] = {}
    async with sb.container(BUSYBOX) as container:
        async def run(number: int) -> None:
            results[number] = (await container.run(["cat"], input=str(number), check=True)).stdout

        async with anyio.create_task_group() as group:
            for number in range(12):
                group.start_soon(run, number)
    assert results == {number: str(number) for number in range(12)}


async def test_the_agent_keeps_nothing_of_what_has_ended(sb: Sandbox) -> None:
    running = sb._running
    assert running is not None
    await sb.run(BUSYBOX, ["true"])
    before = await idle(sb)
    async with sb.container(BUSYBOX) as container:
        for _ in range(10):
            await container.run(["true"])
            await sb.run(BUSYBOX, ["true"])
            async with sb.process(BUSYBOX, ["sleep", "1000"]):
                pass
    # What the last one had is closed when nobody waits.
    while (after := await running.agent.stats()).open_files > before.open_files:
        pass
    assert after.containers == {}


# --- the guest ---


async def test_the_kernel_is_the_guest_s(sb: Sandbox) -> None:
    done = await sb.run(BUSYBOX, ["uname", "-r"])
    assert done.stdout.strip() != os.uname().release
    assert "pykata" in done.stdout


async def test_sandboxes_have_kernels_of_their_own(sb: Sandbox) -> None:
    async with Sandbox(isolation="emulated") as other:
        boots = [
            (await sandbox.run(BUSYBOX, ["cat", "/proc/sys/kernel/random/boot_id"])).stdout for sandbox in (sb, other)
        ]
        names = [(await sandbox.run(BUSYBOX, ["hostname"])).stdout.strip() for sandbox in (sb, other)]
    assert len({*boots, BOOT_ID}) == 3
    assert names == ["shared", other.options.hostname]


async def test_the_clock_is_the_host_s(sb: Sandbox) -> None:
    before = time.time()
    done = await sb.run(BUSYBOX, ["date", "+%s"])
    after = time.time()
    assert before - 60 < int(done.stdout) < after + 1       # late by what a busy machine took to hand it over


async def test_env_directory_and_user(sb: Sandbox) -> None:
    done = await sb.run(
        BUSYBOX, sh("echo $GREETING; pwd; id -u; id -g"), env={"GREETING": "hi there"}, cwd="/usr", user="12:34"
    )
    assert done.stdout == "hi there\n/usr\n12\n34\n"


async def test_a_directory_that_is_missing_is_made(sb: Sandbox) -> None:
    assert (await sb.run(BUSYBOX, ["pwd"], cwd="/srv/deep/down")).stdout == "/srv/deep/down\n"


@pytest.mark.parametrize(("options", "said"), [
    ({"cwd": "/etc/passwd"}, 'process.cwd: "/etc/passwd" is no directory'),
    ({"cwd": "/etc/passwd/x"}, 'process.cwd: "/etc/passwd/x" is no directory'),
    ({"rlimits": {"nofile": 1 << 40}}, "process.rlimits: RLIMIT_NOFILE: 1099511627776 is more than a process here may"),
])  # fmt: skip
async def test_what_a_command_can_not_begin_with_is_named(sb: Sandbox, options: dict[str, Any], said: str) -> None:
    with pytest.raises(AgentRefusedError, match=said):
        await sb.run(BUSYBOX, ["true"], **options)
    assert (await sb.run(BUSYBOX, ["echo", "usable"])).stdout == "usable\n"


async def test_an_unknown_user_is_named(sb: Sandbox) -> None:
    with pytest.raises(AgentRefusedError, match='no user "nobody-of-this-name"'):
        await sb.run(BUSYBOX, ["true"], user="nobody-of-this-name")
    assert (await sb.run(BUSYBOX, ["echo", "usable"])).stdout == "usable\n"


async def test_a_sandbox_s_env_is_for_all(bundle: object) -> None:
    async with Sandbox(env={"A": "all", "B": "all"}, isolation="emulated", cpus=2, memory="320M") as sandbox:
        done = await sandbox.run(BUSYBOX, sh("echo $A $B; nproc; grep MemTotal /proc/meminfo"), env={"B": "one"})
    assert done.stdout.startswith("all one\n2\n")
    total = int(done.stdout.split()[-2])
    assert 260 * 1024 < total < 320 * 1024


def test_a_sandbox_in_a_thread_s_own_loop(bundle: object) -> None:
    said: list[str] = []

    async def use() -> None:
        async with Sandbox(isolation="emulated") as sandbox:
            said.append((await sandbox.run(BUSYBOX, ["echo", "from a thread"])).stdout)

    thread = threading.Thread(target=anyio.run, args=(use,))
    thread.start()
    thread.join()
    anyio.run(use)      # and then one in this thread: nothing of the first loop is in the way
    assert said == ["from a thread\n"] * 2


async def test_reused_after_exit(bundle: object) -> None:
    sandbox = Sandbox(isolation="emulated")
    for word in ("first", "second"):
        async with sandbox:
            assert (await sandbox.run(BUSYBOX, ["echo", word])).stdout == f"{word}\n"
    with pytest.raises(pykata.SandboxClosedError):
        await sandbox.run(BUSYBOX, ["true"])


async def test_readers_of_both_streams(sb: Sandbox) -> None:
    got: dict[str, int] = {}

    async def read(process: Process, name: str) -> None:
        got[name] = len(await getattr(process, name).read())

    async with sb.process(BUSYBOX, sh("head -c 3000000 /dev/zero & head -c 2000000 /dev/zero >&2; wait")) as process:
        async with anyio.create_task_group() as group:
            group.start_soon(read, process, "stdout")
            group.start_soon(read, process, "stderr")
        assert await process.wait() == 0
    assert got == {"stdout": 3_000_000, "stderr": 2_000_000}
