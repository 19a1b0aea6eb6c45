"""Detached sandboxes for real: keeper, QEMU, and the command line over them."""

from __future__ import annotations

import gzip
import io
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from attrs import evolve

from pykata import Sandbox, ShareLostError, Template, VMDiedError, collect_garbage, find_detached, list_detached
from pykata.errors import ConfigError
from tests.vm.test_volumes import daemons

PYKATA = [sys.executable, "-m", "pykata_cli"]
BUSYBOX = "builtin:busybox"


def pykata(*argv: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PYKATA, *argv], input=stdin, capture_output=True, check=False)


@contextmanager
def detached(*cmd: str, name: str = "worker", options: tuple[str, ...] = ()) -> Iterator[str]:
    """A sandbox that the command line has started, and that is gone when the block is left."""
    tail = ["--", *cmd] if cmd else []
    started = pykata("run", "--isolation", "emulated", "--detach", "--name", name, *options, BUSYBOX, *tail)
    try:
        assert (started.returncode, started.stdout) == (0, f"{name}\n".encode()), started.stderr
        yield name
    finally:
        pykata("stop", "-t", "0", name)
        pykata("rm", name)


def dead(pid: int, patience: float = 300) -> bool:
    """Wait for the end of a process that isn't our child."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], patience)[0])
    finally:
        os.close(pidfd)


def test_a_life_on_the_command_line() -> None:
    script = "trap 'echo bye; exit 5' TERM; echo hello; echo oops >&2; sleep 1000 & wait"
    with detached("sh", "-c", script, options=("-e", "A=b")) as name:
        assert pykata("exec", "-w", "/tmp", name, "--", "sh", "-c", "echo $A; pwd; exit 7").stdout == b"b\n/tmp\n"
        assert pykata("exec", name, "--", "sh", "-c", "exit 7").returncode == 7
        assert pykata("exec", "-u", "nobody", name, "id", "-u").stdout == b"65534\n"
        assert pykata("exec", name, "cat", stdin=b"x" * 200_000).stdout == b"x" * 200_000
        assert b"sleep" in pykata("exec", name, "ps").stdout
        listed = pykata("ps").stdout.decode().splitlines()
        assert listed[0].split() == ["NAME", "STATUS", "AGE", "IMAGE", "COMMAND"]
        assert listed[1].startswith("worker  running  ")
        assert pykata("stop", "-t", "300", name).stdout == b"worker\n"
        assert pykata("ps").stdout.count(b"\n") == 1
        (ended,) = json.loads(pykata("ps", "--all", "--format", "json").stdout)
        assert (ended["name"], ended["phase"], ended["exit_code"]) == ("worker", "ended", 5)
        logs = pykata("logs", name)
        assert (logs.stdout, logs.stderr) == (b"hello\nbye\n", b"oops\n")
        refused = pykata("exec", name, "true")
        assert refused.returncode == 125
        assert b"has ended" in refused.stderr
    assert pykata("ps", "--all", "--format", "json").stdout == b"[]\n"


def test_copying_files(tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "a").write_bytes(os.urandom(100_000))
    (tmp_path / "sent" / "b").symlink_to("a")
    with detached() as name:
        assert pykata("cp", str(tmp_path / "sent"), f"{name}:/srv/data").returncode == 0
        assert pykata("exec", name, "sh", "-c", "ls /srv/data; echo more >> /srv/data/a").stdout == b"a\nb\n"
        assert pykata("cp", f"{name}:/srv/data/a", str(tmp_path / "one")).returncode == 0
        assert (tmp_path / "one").read_bytes() == (tmp_path / "sent" / "a").read_bytes() + b"more\n"
        assert pykata("cp", f"{name}:/srv/data", str(tmp_path / "all")).returncode == 0
        assert os.readlink(tmp_path / "all" / "b") == "a"
        out = pykata("cp", f"{name}:/srv/data", "-").stdout
        with tarfile.open(fileobj=io.BytesIO(out)) as tar:
            assert sorted(tar.getnames()) == ["data", "data/a", "data/b"]
            kept = tar.extractfile("data/a")
            assert kept is not None
            assert kept.read() == (tmp_path / "one").read_bytes()
        one = pykata("cp", f"{name}:/srv/data/a", "-").stdout
        with tarfile.open(fileobj=io.BytesIO(one)) as tar:
            assert tar.getnames() == ["a"]
        for number, content in enumerate((out, gzip.compress(out))):
            assert pykata("cp", "-", f"{name}:/back{number}", stdin=content).returncode == 0
            script = f"cmp /srv/data/a /back{number}/data/a && readlink /back{number}/data/b"
            said = pykata("exec", name, "sh", "-c", script)
            assert said.stdout == b"a\n"
        assert b"the tar can't be unpacked" in pykata("cp", "-", f"{name}:/bad", stdin=b"this is no tar" * 100).stderr
        inside = f"{name}:/nothing"
        for argv in ((inside, str(tmp_path)), ("a", "b"), (inside, inside), ("/none", f"{name}:/")):
            done = pykata("cp", *argv)
            assert done.returncode == 125
            assert done.stderr.startswith(b"pykata: ")
            assert b"bug" not in done.stderr


def test_stats() -> None:
    with detached("sh", "-c", "while :; do :; done") as name:
        table = pykata("stats", "--once").stdout.decode().splitlines()
        assert table[0].split() == ["NAME", "CONTAINER", "CPU", "CPU", "TIME", "MEMORY", "PEAK", "PROCESSES"]
        assert len(table) == 3
        said = json.loads(pykata("stats", "--once", "--format", "json", name).stdout)
        (container,) = said[name]["containers"].values()
        assert container["cpu"] > 0
        assert container["pids"] == 2
        assert 0 < container["memory"] <= container["memory_peak"] < said[name]["memory_total"]
        with subprocess.Popen([*PYKATA, "stats", name], stdout=subprocess.PIPE) as watcher:
            assert watcher.stdout is not None
            assert watcher.stdout.readline().startswith(b"NAME")
            assert pykata("kill", name).returncode == 0
            assert watcher.wait() == 0
    assert pykata("stats", "--once").stdout.count(b"\n") == 1


def test_ten_clients_at_once() -> None:
    with detached() as name:
        clients = [
            subprocess.Popen([*PYKATA, "exec", name, "sh", "-c", f"echo {number}; cat"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
            for number in range(10)
        ]  # fmt: skip
        said = [client.communicate(b"x" * 50_000)[0] for client in clients]
        assert said == [b"%d\n" % number + b"x" * 50_000 for number in range(10)]


def test_without_a_command_it_waits_for_exec() -> None:
    with detached() as name:
        assert pykata("exec", name, "sh", "-c", "echo kept > /file").returncode == 0
        assert pykata("exec", name, "cat", "/file").stdout == b"kept\n"
        keeper = find_detached(name).keeper
        assert keeper is not None
        assert pykata("kill", name).returncode == 0
        assert dead(keeper)
        assert list_detached() == []


def test_a_command_that_closes_its_output_runs_on() -> None:
    with detached("sh", "-c", "exec >&- 2>&-; sleep 1; exit 4") as name:
        handle = find_detached(name)
        assert handle.phase == "running"
        assert anyio.run(handle.wait).exit_code == 4


async def test_limits_of_its_command() -> None:
    limits: dict[str, int | tuple[int, int]] = {"nofile": 77, "core": (0, -1)}
    script = ["sh", "-c", "ulimit -n; ulimit -Sc; ulimit -Hc; sleep 1000"]
    handle = await Sandbox(isolation="emulated").detach("worker", BUSYBOX, script, rlimits=limits)
    try:
        said = ""
        async for piece in handle.logs(follow=True):
            if (said := said + piece.data.decode()).count("\n") == 3:
                break
        assert said == "77\n0\nunlimited\n"
    finally:
        await handle.stop(grace=0)
        await handle.remove()


async def test_of_a_snapshot(tmp_path: Path) -> None:
    setup = [["sh", "-c", "echo set up > /file"]]
    async with Template(BUSYBOX, setup=setup, isolation="emulated") as template, template.sandbox() as sb:
        await sb.snapshot(tmp_path / "saved")
    handle = await Sandbox.restore(tmp_path / "saved", isolation="emulated").detach("worker")
    try:
        async with Sandbox.connect("worker") as sb:
            assert (await sb.main.run(["cat", "/file"])).stdout == "set up\n"
            assert (await sb.run(BUSYBOX, ["echo", "hello"])).stdout == "hello\n"
    finally:
        await handle.stop()


async def test_volumes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host")
    sandbox = Sandbox(isolation="emulated", volumes={"/data": tmp_path})
    handle = await sandbox.detach("worker", BUSYBOX)
    try:
        async with Sandbox.connect("worker") as sb:
            assert (await sb.main.run(["cat", "/data/file"])).stdout == "of the host"
            assert (await sb.run(BUSYBOX, ["cat", "/data/file"])).stdout == "of the host"
            sb._open.options = evolve(sb._open.options, volumes={})     # whose error comes first
            for refused in (sb.fork(), sb.snapshot("/nowhere"), sb.pause(), sb.resume()):
                with pytest.raises(ConfigError, match="detached"):
                    await refused
    finally:
        await handle.stop()


async def test_a_volume_whose_server_ends(tmp_path: Path) -> None:
    """Who uses the sandbox hears of it, and so does who comes later."""
    handle = await Sandbox(isolation="emulated", volumes={"/v": tmp_path}).detach("worker", BUSYBOX)
    try:
        async with Sandbox.connect("worker") as sb, sb.main.process(["sh", "-c", "read x; exit 0"]) as process:
            assert (await sb.main.run(["touch", "/v/f"])).ok
            assert process.lost is None
            os.kill(min(daemons()), signal.SIGKILL)
            while (await sb.main.run(["sh", "-c", "echo x > /v/f"])).exit_code == 0:
                pass
            await process.stdin.send(b"\n")
            assert await process.wait() == 0
            assert isinstance(process.lost, ShareLostError)
            done = await sb.main.run(["true"])
            assert (done.exit_code, done.ok) == (0, False)
            with pytest.raises(ShareLostError, match=r"virtiofsd for .* was killed by SIGKILL"):
                await sb.run(BUSYBOX, ["true"])
        async with Sandbox.connect("worker") as sb:
            assert isinstance((await sb.main.run(["true"])).error, ShareLostError)
        told = await anyio.to_thread.run_sync(pykata, "exec", "worker", "true")
        assert told.returncode == 125
        assert b"files of the host are lost, because virtiofsd for " in told.stderr
        other = await anyio.to_thread.run_sync(pykata, "exec", "worker", "sh", "-c", "exit 3")
        assert other.returncode == 3
    finally:
        await handle.stop()


async def test_a_main_command_that_ends_well_without_its_files(tmp_path: Path) -> None:
    main = ["sh", "-c", "mkfifo /go; read x < /go; exit 0"]
    handle = await Sandbox(isolation="emulated", volumes={"/v": tmp_path}).detach("worker", BUSYBOX, main)
    async with Sandbox.connect("worker") as sb:
        os.kill(min(daemons()), signal.SIGKILL)
        while (await sb.main.run(["sh", "-c", "echo x > /v/f"])).exit_code == 0:
            pass
        await sb.main.run(["sh", "-c", "until [ -p /go ]; do sleep 1; done; echo > /go"])
        ended = await handle.wait()
    assert (ended.exit_code, ended.reason) == (0, "exit")
    assert ended.lost.startswith("files of the host are lost, because virtiofsd for ")
    listed = await anyio.to_thread.run_sync(pykata, "ps", "-a")
    assert b"ended (0, files lost)" in listed.stdout
    await handle.remove()


def test_following_the_logs_until_the_end() -> None:
    with (
        detached("sh", "-c", "echo ready; sleep 1000") as name,
        subprocess.Popen([*PYKATA, "logs", "-f", name], stdout=subprocess.PIPE) as follower,
    ):
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"ready\n"
        assert pykata("kill", "-s", "TERM", name).returncode == 0
        assert follower.wait() == 0


def test_errors_are_one_line() -> None:
    for argv in (("exec", "nobody", "true"), ("stop", "nobody"), ("kill", "-s", "NONSENSE", "x"), ("logs", "a/b"),
                 ("rm", "nobody"), ("run", "--name", "x", BUSYBOX), ("exec", "nobody"),
                 ("run", "--detach", "--timeout", "3", BUSYBOX)):  # fmt: skip
        done = pykata(*argv)
        assert done.returncode == 125
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("pykata: ")
        assert "bug" not in line


async def test_a_killed_keeper_takes_its_machine_with_it() -> None:
    handle = await Sandbox(isolation="emulated").detach("worker", BUSYBOX)
    assert handle.keeper is not None
    assert handle.vmm is not None
    async with Sandbox.connect("worker") as sb, sb.main.process(["sleep", "1000"]) as process:
        os.kill(handle.keeper, signal.SIGKILL)
        with pytest.raises(VMDiedError, match="keeper"):
            await process.wait()
    assert await anyio.to_thread.run_sync(dead, handle.vmm)
    assert b"lost (keeper killed)" in (await anyio.to_thread.run_sync(pykata, "ps")).stdout
    said = (await anyio.to_thread.run_sync(pykata, "gc")).stdout.decode().splitlines()
    assert len(said) == 2, "its own directory, and the machine's"
    assert all(line.startswith("removed /") for line in said)
    again = await Sandbox(isolation="emulated").detach("worker", BUSYBOX)
    await again.stop()


async def test_a_client_that_is_killed_takes_its_process_with_it() -> None:
    handle = await Sandbox(isolation="emulated").detach("worker", BUSYBOX)
    try:
        async with Sandbox.connect("worker") as sb:
            argv = [*PYKATA, "exec", "worker", "--", "sh", "-c", "echo ready; sleep 12345"]
            async with await anyio.open_process(argv) as client:
                assert client.stdout is not None
                assert await client.stdout.receive() == b"ready\n"
                client.kill()
            # The test's time limit is the patience: the keeper has to notice, and the guest to kill.
            while "12345" in (await sb.main.run(["ps"])).stdout:
                pass
    finally:
        await handle.stop(grace=0)
        await collect_garbage()     # the run directory of the one that was killed


async def test_a_machine_that_is_killed() -> None:
    handle = await Sandbox(isolation="emulated").detach("worker", BUSYBOX, ["sleep", "1000"])
    assert handle.vmm is not None
    async with Sandbox.connect("worker") as sb:
        os.kill(handle.vmm, signal.SIGKILL)
        with pytest.raises(VMDiedError, match="SIGKILL"):
            await sb.run(BUSYBOX, ["true"])
    ended = await handle.wait()
    assert (ended.phase, ended.reason) == ("ended", "vm_died")
    assert "SIGKILL" in ended.why
    await ended.remove()


def test_ctrl_c_at_the_start_leaves_nothing() -> None:
    argv = [*PYKATA, "run", "-v", "--detach", "--name", "worker", BUSYBOX]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert any(b"start: " in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait() == 128 + signal.SIGINT
    assert list_detached() == []


def test_two_processes_race_for_a_name() -> None:
    argv = [*PYKATA, "run", "--isolation", "emulated", "--detach", "--name", "worker", BUSYBOX]
    racers = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    try:
        said = [racer.communicate() for racer in racers]
        assert sorted(racer.returncode for racer in racers) == [0, 125]
        assert any(b"there is a sandbox 'worker' already" in error for _, error in said)
    finally:
        pykata("stop", "-t", "0", "worker")


def test_the_program_that_started_it_may_be_killed() -> None:
    script = (
        "import anyio, os, pykata, signal\n"
        "async def main():\n"
        f"    await pykata.Sandbox(isolation='emulated').detach('worker', {BUSYBOX!r}, ['sleep', '1000'])\n"
        "    async with pykata.Sandbox(isolation='emulated') as own:\n"
        f"        await own.run({BUSYBOX!r}, ['true'])\n"
        "        print(own._running.vm.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "anyio.run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    try:
        assert done.returncode == -signal.SIGKILL
        assert dead(int(done.stdout)), "its own machine ends with it"
        assert pykata("exec", "worker", "echo", "alive").stdout == b"alive\n"
    finally:
        pykata("stop", "-t", "0", "worker")
        pykata("rm", "worker")
        pykata("gc")


def test_the_log_is_bounded() -> None:
    with detached("sh", "-c", "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo the end; sleep 1000") as name:
        with subprocess.Popen([*PYKATA, "logs", "-f", name], stdout=subprocess.PIPE) as follower:
            assert follower.stdout is not None
            assert any(line.endswith(b"the end\n") for line in follower.stdout)
            follower.terminate()
        folder = Path(os.environ["PYKATA_STATE"], "sandboxes", name)
        assert sum(file.stat().st_size for file in folder.glob("log*")) <= 16 * 1024 * 1024
        kept = pykata("logs", name).stdout
        assert len(kept) > 7 * 1024 * 1024
        assert kept.endswith(b"x\nthe end\n")
