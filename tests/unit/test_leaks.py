"""The check that a test leaves nothing: each kind of leak is made on purpose, and must be found."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from tests import leaks
from tests.blocking import Blocking
from tests.conftest import PLACES
from tests.hanging import HangError, limited


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaks on purpose isn't waited for."""
    monkeypatch.setattr(leaks, "SETTLE", 0.0)


@contextmanager
def found(kind: str, text: str) -> Iterator[None]:
    """The block leaks something of this kind, described with this text."""
    before = leaks.snapshot(PLACES)
    yield
    lines = leaks.left(before, PLACES)
    assert any(line.startswith(f"{kind}: ") and text in line for line in lines), lines


@contextmanager
def sleeper(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv or ("sleep", "1000"), stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_nothing_left_is_nothing_found() -> None:
    before = leaks.snapshot(PLACES)
    with sleeper(), socket.socket(), tempfile.NamedTemporaryFile():
        pass
    assert leaks.left(before, PLACES) == []


@pytest.mark.usefixtures("fast")
def test_child() -> None:
    with found("process", "sleep 1000"):
        process = subprocess.Popen(["sleep", "1000"])
    process.kill()
    process.wait()


@pytest.mark.usefixtures("fast")
def test_orphaned_grandchild() -> None:
    # The shell ends; what it started is given to the reaper, which is this process.
    with found("process", "sleep 1001"):
        done = subprocess.run(
            ["sh", "-c", "sleep 1001 >/dev/null 2>&1 & echo $!"], check=True, capture_output=True, text=True
        )
    os.kill(int(done.stdout), 9)
    os.waitpid(int(done.stdout), 0)


def test_a_zombie_is_no_leak() -> None:
    before = leaks.snapshot(PLACES)
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert leaks.left(before, PLACES) == []
    process.wait()


@pytest.mark.usefixtures("fast")
def test_thread() -> None:
    stop = threading.Event()
    with found("thread", "forgotten"):
        thread = threading.Thread(target=stop.wait, name="forgotten")
        thread.start()
    stop.set()
    thread.join()


async def test_an_idle_worker_thread_is_no_leak() -> None:
    before = leaks.snapshot(PLACES)
    await anyio.to_thread.run_sync(int)
    assert leaks.left(before, PLACES) == []


def test_descriptor(tmp_path: Path) -> None:
    with found("descriptor", "forgotten.txt"):
        file = (tmp_path / "forgotten.txt").open("w")
    file.close()


def test_descriptor_of_a_socket_has_its_name() -> None:
    with found("descriptor", f"{PLACES.run}/forgotten.sock"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{PLACES.run}/forgotten.sock")
    listener.close()
    os.unlink(f"{PLACES.run}/forgotten.sock")


def test_socket_of_another_process() -> None:
    path = f"{PLACES.run}/theirs.sock"
    program = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({path!r}); print(flush=True); input()"
    before = leaks.snapshot(PLACES)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.unlink(path)         # the file is gone, the socket isn't
        assert f"socket: {path}" in leaks.difference(before, leaks.snapshot(PLACES))
        process.kill()


@pytest.mark.parametrize("place", ["run", "tmp"])
def test_file(place: str) -> None:
    path = getattr(PLACES, place) / "forgotten"
    with found("file", str(path)):
        path.mkdir()
    path.rmdir()


def test_unfinished_cache_entry() -> None:
    path = PLACES.cache / "images" / "tmp-forgotten"
    with found("file", "tmp-forgotten"):
        path.mkdir(parents=True)
    path.rmdir()
    path.parent.rmdir()


def test_finished_cache_entry_is_no_leak() -> None:
    before = leaks.snapshot(PLACES)
    path = PLACES.cache / "finished"
    path.touch()
    assert leaks.left(before, PLACES) == []
    path.unlink()


async def test_task() -> None:
    known = asyncio.all_tasks()
    task = asyncio.create_task(anyio.sleep_forever(), name="forgotten")
    assert any("forgotten" in line for line in leaks.other_tasks(known))
    task.cancel()
    await asyncio.wait([task])
    assert leaks.other_tasks(known) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: mounting needs root")
def test_mount() -> None:
    target = PLACES.run / "mounted"
    target.mkdir()
    with found("mount", str(target)):
        subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)
    subprocess.run(["umount", target], check=True)
    target.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: loop devices need root")
def test_loop_device() -> None:
    backing = PLACES.tmp / "backing"
    backing.write_bytes(bytes(1024 * 1024))
    with found("loop device", str(backing)):
        done = subprocess.run(["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True)
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)
    backing.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: network interfaces need root")
def test_interface() -> None:
    name = f"pk{os.getpid() % 10**7}"
    with found("interface", name):
        subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)
    subprocess.run(["ip", "link", "delete", name], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: network interfaces need root")
@pytest.mark.parametrize("alone", [True, False])
def test_rules_and_disciplines(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "_alone", lambda kind: alone)
    name = f"pk{os.getpid() % 10**7}"
    with found("nftables table", f"pykata-{name} of family 1"):
        subprocess.run(["nft", "add", "table", "inet", f"pykata-{name}"], check=True)
    subprocess.run(["nft", "delete", "table", "inet", f"pykata-{name}"], check=True)
    subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)
    with found("queueing discipline", f"ingress of interface {socket.if_nametoindex(name)}"):
        subprocess.run(["tc", "qdisc", "add", "dev", name, "ingress"], check=True)
    subprocess.run(["ip", "link", "delete", name], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: network interfaces need root")
def test_what_others_make_meanwhile_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(leaks, "_alone", lambda kind: False)
    name = f"other{os.getpid() % 10**7}"
    before = leaks.snapshot(PLACES)
    subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)
    try:
        subprocess.run(["tc", "qdisc", "add", "dev", name, "ingress"], check=True)
        subprocess.run(["nft", "add", "table", "inet", name], check=True)
        assert leaks.left(before, PLACES) == []
        monkeypatch.setattr(leaks, "_alone", lambda kind: kind == "net")
        assert {line.partition(":")[0] for line in leaks.left(before, PLACES)} == {
            "interface", "nftables table", "queueing discipline",
        }  # fmt: skip
    finally:
        subprocess.run(["nft", "delete", "table", "inet", name], check=False)
        subprocess.run(["ip", "link", "delete", name], check=True)


async def test_a_blocking_call_is_found() -> None:
    import time

    with Blocking() as blocking:
        time.sleep(0)           # noqa: ASYNC251  no more than a yield
        time.sleep(0.001)       # noqa: ASYNC251
        await anyio.to_thread.run_sync(time.sleep, 0.001)
    assert [line.split(" in ")[0] for line in blocking.found] == ["blocking: sleep"]


async def inner_wait() -> None:
    await anyio.sleep_forever()


async def outer_wait() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(inner_wait, name="the inner one")


async def test_a_hanging_test_ends_and_says_where() -> None:
    with pytest.raises(HangError, match=r"task the inner one:\n  .*\n  \S*test_leaks.py:\d+ inner_wait") as raised:
        await limited(outer_wait(), 0.01)
    assert "outer_wait" in str(raised.value)


# --- the fixtures themselves ---

INNER = """
import pytest, subprocess, asyncio, anyio, time
from pathlib import Path
from tests import leaks
from tests.conftest import *
from tests.conftest import PLACES
from tests.hanging import HangError, limited
leaks.SETTLE = 0.0
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest("from tests.conftest import *\n")
    pytester.makeini("[pytest]\nanyio_mode = auto\nmarkers =\n  vm: boots\n")
    return pytester


def test_a_leaking_test_fails(inner: pytest.Pytester) -> None:
    inner.makepyfile(INNER + """
def test_leaks():
    (PLACES.run / "left-here").mkdir()

async def test_leaks_task():
    leaked = asyncio.create_task(anyio.sleep_forever(), name="left-task")

async def test_blocks():
    time.sleep(0.001)

def test_fine():
    pass
""")
    result = inner.runpytest_subprocess()
    result.assert_outcomes(passed=2, failed=2, errors=1)
    result.stdout.fnmatch_lines_random(["*file: */run/left-here", "*task: left-task*", "*blocking: sleep*"])


@pytest.mark.parametrize(("reason", "ci", "outcome"), [
    ("not today", "", {"skipped": 1}),
    ("not today", "true", {"failed": 1}),
    ("hardware: no KVM", "true", {"skipped": 1}),
])
def test_a_skip_fails_in_ci(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, reason: str, ci: str, outcome: dict[str, int]
) -> None:
    if ci:
        monkeypatch.setenv("CI", ci)
    inner.makepyfile(f"import pytest\ndef test_skips():\n    pytest.skip({reason!r})\n")
    inner.runpytest_subprocess().assert_outcomes(**outcome)


def test_a_skipped_module_fails_in_ci(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    inner.makepyfile("import pytest\npytest.importorskip('there_is_no_such_module')\ndef test_it():\n    pass\n")
    assert inner.runpytest_subprocess().ret != 0


def test_the_console_of_an_error_is_in_the_report(inner: pytest.Pytester) -> None:
    inner.makepyfile(INNER + """
def test_fails():
    error = RuntimeError("no boot")
    error.console = "Kernel panic - not syncing"
    raise error
""")
    inner.runpytest_subprocess().stdout.fnmatch_lines(["*console of the RuntimeError*", "Kernel panic*"])
