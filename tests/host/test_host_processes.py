# ruff: noqa: ASYNC230, ASYNC240 - the loops of these tests have nothing else to do
"""Processes, directories and tools of a real host."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata import host
from pykata.errors import ToolFailedError, ToolMissingError
from pykata.host import orphans

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(true: Callable[[], bool], seconds: float = 300) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(autouse=True)
def own_run_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKATA_RUN", str(tmp_path / "run"))


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    fds = set(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert set(os.listdir("/proc/self/fd")) == fds      # that no process is left is checked after every test


def test_small_pages_are_for_who_is_spawned() -> None:
    def allowed(status: str) -> str:
        return status.partition("THP_enabled:")[2].split()[0]       # proc_pid_status(5)

    async def main() -> None:
        own = allowed(Path("/proc/self/status").read_text())
        for small, theirs in ((True, "0"), (False, own)):
            status = ["/bin/cat", "/proc/self/status"]
            async with host.spawn(status, stdout=host.PIPE, small_pages=small) as process:
                assert process.stdout
                assert allowed((await process.stdout.receive()).decode()) == theirs
            assert allowed(Path("/proc/self/status").read_text()) == own

    run(main)


def test_streams_and_exit_code() -> None:
    async def main() -> None:
        async with host.spawn(["/bin/sh", "-c", "cat; exit 3"], stdin=host.PIPE, stdout=host.PIPE) as process:
            assert process.stdin
            assert process.stdout
            data = os.urandom(300_000)
            async with anyio.create_task_group() as tasks:
                async def feed() -> None:
                    assert process.stdin
                    await process.stdin.send(data)
                    await process.stdin.aclose()
                tasks.start_soon(feed)
                got = b"".join([chunk async for chunk in process.stdout])
            assert got == data
            assert await process.wait() == 3 == process.returncode
    run(main)


PATIENT = host.KillPolicy("patient", signal.SIGTERM, grace=300)


@pytest.mark.parametrize(("policy", "said"), [(host.KILL, b""), (PATIENT, b"bye")])
def test_leaving_ends_it_by_its_policy(policy: host.KillPolicy, said: bytes, tmp_path: Path) -> None:
    async def main() -> None:
        script = f"trap 'printf bye > {tmp_path}/said; exit' TERM; echo up; while :; do sleep 0.01; done"
        async with host.spawn(["/bin/sh", "-c", script], stdout=host.PIPE, env=host.TOOL_ENV, kill=policy) as process:
            assert process.stdout
            assert await process.stdout.receive() == b"up\n"
        assert process.returncode is not None
        assert not Path(f"/proc/{process.pid}").exists()
    run(main)
    assert (tmp_path / "said").read_bytes() == said if said else not (tmp_path / "said").exists()


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    async def main() -> None:
        policy = host.KillPolicy("quick", signal.SIGTERM, grace=0.1)
        script = "trap '' TERM; echo up; while :; do sleep 0.01; done"
        async with host.spawn(["/bin/sh", "-c", script], stdout=host.PIPE, env=host.TOOL_ENV, kill=policy) as process:
            assert process.stdout
            await process.stdout.receive()
        assert process.returncode == -signal.SIGKILL
        assert host.describe_exit(process.returncode) == "was killed by SIGKILL"
    run(main)


def test_its_children_go_too() -> None:
    async def main() -> None:
        script = "sleep 1000 & echo $!; exit"
        async with host.spawn(["/bin/sh", "-c", script], stdout=host.PIPE, env=host.TOOL_ENV) as p:
            assert p.stdout
            child = int(await p.stdout.receive())
            await p.wait()
            assert alive(child)
        assert eventually(lambda: not alive(child))
    run(main)


def test_environment_and_descriptors_are_empty() -> None:
    async def main() -> None:
        with open("/dev/zero", "rb") as leaked:
            os.set_inheritable(leaked.fileno(), True)
            script = "import os; print(sorted(os.environ), os.listdir('/proc/self/fd'))"
            async with host.spawn([sys.executable, "-I", "-S", "-c", script], stdout=host.PIPE) as process:
                assert process.stdout
                assert (await process.stdout.receive()).decode() in {
                    "[] ['0', '1', '2', '3']\n", "['LC_CTYPE'] ['0', '1', '2', '3']\n"}    # PEP 538 sets LC_CTYPE
    run(main)


@root
def test_an_identity_is_unprivileged() -> None:
    async def main() -> None:
        with host.ephemeral_identity(groups=[7]) as identity, host.ephemeral_identity() as other:
            assert identity
            assert other
            assert identity.uid != other.uid
            async with host.spawn(["/bin/cat", "/proc/self/status"], stdout=host.PIPE, identity=identity) as process:
                assert process.stdout
                status = dict(line.split(":\t", 1) for line in (await process.stdout.receive()).decode().splitlines())
        assert status["Uid"].split() == status["Gid"].split() == [str(identity.uid)] * 4
        assert status["Groups"].split() == ["7"]
        assert status["NoNewPrivs"] == "1"
        assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    run(main)


@pytest.mark.parametrize("identity", ["None", pytest.param("who", marks=root)])
def test_it_dies_with_the_parent(identity: str, tmp_path: Path) -> None:
    script = f"""
        import asyncio, os, signal
        from pykata import host
        async def main():
            with host.ephemeral_identity() as who:
                async with host.run_dir() as path, host.spawn(["/bin/sh", "-c", "echo up; exec sleep 1000"],
                        stdout=host.PIPE, env=host.TOOL_ENV, identity={identity}) as process:
                    await process.stdout.receive()
                    print(process.pid, path, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, check=False,
                          cwd=Path(host.__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    pid, path = done.stdout.decode().split()
    assert eventually(lambda: not alive(int(pid)))
    assert host.abandoned_run_dirs() == [Path(path)]


ORPHANED = """
    import asyncio, os, sys
    from pykata import host
    from pykata.host import orphans
    orphans._hides_processes = lambda: {hidden}
    async def main():
        wait = 'echo $$ > "$0/new" && mv "$0/new" "$0/pid" && read line < "$0/go"; exec "$@"'
        with host.ephemeral_identity() as who:
            async with host.spawn(["/bin/sleep", "1000"], through=["/bin/sh", "-c", wait, sys.argv[1]],
                                  env=host.TOOL_ENV, identity={identity}, quick={quick}) as process:
                await process.wait()
    asyncio.run(main())
"""


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.parametrize(("quick", "hidden"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("identity", ["None", pytest.param("who", marks=root)])
def test_it_is_not_executed_for_a_parent_that_has_ended(
    identity: str, quick: bool, hidden: bool, reaped: bool, tmp_path: Path
) -> None:
    """Killed before the process could ask the kernel to be killed with it."""
    os.mkfifo(tmp_path / "go")
    script = textwrap.dedent(ORPHANED.format(identity=identity, quick=quick, hidden=hidden))
    parent = subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=Path(host.__file__).parents[1])
    assert eventually((tmp_path / "pid").exists)
    orphan = int((tmp_path / "pid").read_text())
    ended = os.pidfd_open(orphan)
    go = os.open(tmp_path / "go", os.O_RDWR)        # which waits for no reader, should it have ended already
    parent.kill()
    os.waitid(os.P_PID, parent.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    os.write(go, b"go\n")
    try:
        assert select.select([ended], [], [], 300)[0] == [ended]
    finally:
        with suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)
        os.close(go)
        os.close(ended)
        with suppress(ChildProcessError):
            parent.wait()


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_there_is_no_other_environment(shell: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever ``sh`` is: each shell has variables of its own."""
    if (found := shutil.which(shell)) is None:
        pytest.skip(f"there is no {shell}")
    (tmp_path / "sh").symlink_to(found)
    for tool in ("env", "setpriv"):
        (tmp_path / tool).symlink_to(host.find_tool(tool, package="coreutils"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(orphans, "_find_shell", orphans._find_shell.__wrapped__)

    async def main() -> None:
        env = {"LC_ALL": "C.UTF-8", "TWO": "words, say"}
        async with host.spawn(["/usr/bin/env"], stdout=host.PIPE, env=env) as process:
            assert process.stdout is not None
            assert sorted((await process.stdout.receive()).splitlines()) == [b"LC_ALL=C.UTF-8", b"TWO=words, say"]
    run(main)


@root
def test_it_is_found_where_processes_are_hidden() -> None:
    """By a user who can't see our process in /proc."""
    script = """
        import asyncio
        from pykata import host
        async def main():
            with host.ephemeral_identity() as who:
                async with host.spawn(["/bin/echo", "found"], stdout=host.PIPE, identity=who, quick=True) as process:
                    print((await process.stdout.receive()).decode(), end="")
        asyncio.run(main())
    """
    mounted = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    argv = ["unshare", "--mount", "sh", "-c", mounted, "sh", sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, cwd=Path(host.__file__).parents[1])
    assert done.stdout == b"found\n"


def test_run_dir_goes_whatever_happened() -> None:
    async def main() -> None:
        with suppress(ZeroDivisionError):
            async with host.run_dir() as path:
                assert stat.S_IMODE(path.stat().st_mode) == 0o700
                assert json.loads((path / "owner").read_text())["pid"] == os.getpid()
                assert host.abandoned_run_dirs() == []
                (path / "sub").mkdir()
                (path / "sub" / "file").touch(0o000)
                raise ZeroDivisionError
        assert not path.exists()
        assert [p.name for p in path.parent.iterdir()] == []
    run(main)


def test_an_old_pid_is_no_owner() -> None:
    async def main() -> None:
        async with host.run_dir() as path:
            owner = json.loads((path / "owner").read_text())
            (path / "owner").write_text(json.dumps(owner | {"start": owner["start"] - 1}))
            assert host.abandoned_run_dirs() == [path]
    run(main)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("delay", range(0, 40, 2))
def test_cancelled_at_any_time(delay: int, times: int) -> None:
    """Both kinds of cancellation, also during the clean-up, leave no process and no descriptor."""
    async def body() -> None:
        async with host.run_dir() as path, host.spawn(["/bin/sleep", "1000"], cwd=path) as process:
            pids.append(process.pid)
            await process.wait()

    async def main() -> None:
        task = asyncio.ensure_future(body())
        for _ in range(times):
            await asyncio.sleep(delay / 4000)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with anyio.move_on_after(delay / 4000):
            await body()
        assert not any(host.run_root().iterdir())

    pids: list[int] = []
    run(main)
    assert not any(map(alive, pids))


def test_run_tool() -> None:
    async def main() -> None:
        data = os.urandom(200_000)
        assert await host.run_tool(["cat"], input=data) == data
        assert await host.run_tool([Path("/bin/true")], input=data) == b""
        with pytest.raises(ToolFailedError, match=r"^sh exited with code 7: no luck$") as caught:
            await host.run_tool(["sh", "-c", "echo fine; echo oh >&2; echo no luck >&2; exit 7"])
        assert caught.value.output == "oh\nno luck\n"
        with pytest.raises(ToolFailedError, match=r"^sh was killed by SIGSEGV$"):
            await host.run_tool(["sh", "-c", "kill -SEGV $$"])
        with pytest.raises(ToolFailedError, match=r"sleep took longer than 0\.05 s"):
            await host.run_tool(["sleep", "1000"], timeout=0.05)
        with pytest.raises(ToolFailedError, match="cat wrote more than 1000 bytes"):
            await host.run_tool(["cat", "/dev/zero"], limit=1000)
        with pytest.raises(ToolMissingError):
            await host.run_tool(["/no/such/tool"])
    run(main)


def test_find_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.find_tool("sh", package="dash").name == "sh"
    with pytest.raises(ToolMissingError, match=r"nosuch is not installed \(apt-get install some\)"):
        host.find_tool("nosuch", package="some")
    monkeypatch.setenv("PYKATA_NOSUCH", "/bin/true")
    assert host.find_tool("nosuch", package="some", env_var="PYKATA_NOSUCH") == Path("/bin/true")
    monkeypatch.setenv("PYKATA_NOSUCH", "/etc/passwd")
    with pytest.raises(ToolMissingError, match="PYKATA_NOSUCH='/etc/passwd' is not a program"):
        host.find_tool("nosuch", package="some", env_var="PYKATA_NOSUCH")
