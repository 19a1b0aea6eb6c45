"""The third process of a kind in a container is made by a stem, and can't be told from the others."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator

import anyio
import pytest

from pykata import Container, Sandbox
from tests.vm.conftest import cut_off

BUSYBOX = "builtin:busybox"


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


async def grown(container: Container, user: str | None = None) -> None:
    """Enough runs for a stem."""
    for _ in range(3):
        await container.run(["true"], user=user, check=True)


@pytest.fixture
async def container(sb: Sandbox) -> AsyncIterator[Container]:
    async with sb.container(BUSYBOX) as made:
        await grown(made)
        yield made


async def out(container: Container, script: str, **how: object) -> str:
    return (await container.run(sh(script), check=True, **how)).stdout  # type: ignore[arg-type]


TELL = """
grep -E -v '^(P?Pid|Tgid|NS.*id|FDSize|SigQ|Vm.*|Rss.*|Hugetlb.*|.*ctxt_switches):' /proc/self/status
cat /proc/self/cgroup /proc/self/limits /proc/self/oom_score_adj
for one in ipc mnt net pid pid_for_children user uts; do readlink /proc/self/ns/$one; done
ls /proc/self/fd | wc -l; umask; pwd; env | sort; id; ls -l /proc/self/fd/0 | cut -c 1-10
set -- $(cat /proc/$$/stat); echo parent $4 terminal $7 $8 priority ${18} ${19} policy ${41}
test $5 = $$ && test $6 = $$
"""


@pytest.mark.parametrize("user", ["root", "1000:1000"])
async def test_nothing_tells_it_from_others(sb: Sandbox, user: str) -> None:
    async with sb.container(BUSYBOX) as container:
        first = await out(container, TELL, user=user)
        await grown(container, user)
        assert await out(container, TELL, user=user) == first
        assert "Seccomp:\t2" in first


async def processes(container: Container) -> list[str]:
    return (await out(container, "echo /proc/[0-9]*")).split()


async def test_it_cannot_be_seen_or_killed(container: Container) -> None:
    assert len(await processes(container)) == 2, "init and the shell"
    for _ in range(3):
        assert "No such process" in (await container.run(sh("kill -9 -1"))).stderr
        assert await out(container, "echo here") == "here\n"


async def test_a_user_is_looked_up_anew_when_the_files_change(container: Container) -> None:
    await out(container, "echo web:x:1000:1000::/srv:/bin/sh >> /etc/passwd")
    await grown(container, "web")
    assert await out(container, "id -u; echo $HOME", user="web") == "1000\n/srv\n"
    await out(container, "sed -i s/1000:1000::.srv/1001:1001::\\\\/new/ /etc/passwd")
    assert await out(container, "id -u; echo $HOME", user="web") == "1001\n/new\n"
    await out(container, "echo extra:x:77:web >> /etc/group")
    assert await out(container, "id -G", user="web") == "1001 77\n"


async def test_a_directory_that_is_made_anew(container: Container) -> None:
    for number in range(3):
        assert await out(container, "pwd; ls; touch file", cwd="/work/here") == "/work/here\n"
        await out(container, f"rm -r /work; test {number} = 1 || mkdir -p /work/here")


async def test_what_cannot_be_executed(container: Container) -> None:
    for cmd, code, said in (
        (["no-such-program"], 127, "pykata: no-such-program: command not found\n"),
        (["/etc/passwd"], 126, "pykata: /etc/passwd: permission denied\n"),
        (["/no/such"], 127, "pykata: /no/such: no such file or directory\n"),
    ):
        for _ in range(2):
            done = await container.run(cmd)
            assert (done.exit_code, done.stderr, done.stdout) == (code, said, "")


async def test_a_tree_that_is_killed_takes_the_stem_along(container: Container) -> None:
    script = sh("echo so far; sleep 1000 & sleep 1000")
    for _ in range(3):
        await cut_off(lambda seconds: container.run(script, timeout=seconds), "so far\n")
        await grown(container)
    assert len(await processes(container)) == 2


async def test_what_is_left_in_the_background(container: Container) -> None:
    for number in range(4):
        assert await out(container, f"sleep 1000 > /dev/null 2>&1 & echo {number}") == f"{number}\n"
        await grown(container)
    assert await out(container, "pidof sleep | wc -w") == "4\n"
    await out(container, "killall sleep")
    await grown(container)
    assert len(await processes(container)) == 2


async def test_signals_reach_what_it_made(container: Container) -> None:
    for _ in range(2):
        script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.01; done"
        async with container.process(sh(script)) as it:
            assert await anext(it.stdout) == b"ready\n"
            await it.send_signal(signal.SIGTERM)
            assert await it.stdout.read() == b"caught\n"
            assert await it.wait() == 3


async def test_others_than_it_can_make(container: Container) -> None:
    assert (await container.run(sh("test -t 0 && echo terminal"), tty=True)).stdout == "terminal\r\n"
    assert await out(container, "ulimit -n", rlimits={"nofile": 99}) == "99\n"
    assert (await container.run([*sh("echo ${#0} ${#1}"), "x" * 50_000, "y" * 50_000])).stdout == "50000 50000\n"
    assert await out(container, "cat", input="some") == "some"
    assert await out(container, "echo usable") == "usable\n"


async def test_many_at_once_on_several_processors() -> None:
    async with Sandbox(isolation="emulated", cpus=2) as sandbox, sandbox.container(BUSYBOX) as container:
        await grown(container)

        async def some(worker: int) -> None:
            for number in range(15):
                assert await out(container, f"echo {worker} {number}") == f"{worker} {number}\n"

        async with anyio.create_task_group() as tasks:
            for worker in range(4):
                tasks.start_soon(some, worker)
