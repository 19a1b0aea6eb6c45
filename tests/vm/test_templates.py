
"""Sandboxes that go on from a template, with a real guest in them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata import Sandbox, SandboxClosedError, Template, TemplateWarning, boot, host, saved
from pykata.errors import BootTimeoutError, CommandFailedError, ConfigError, VMError
from pykata.host import cache_dir, file_hash
from pykata.hypervisors.qemu import QEMU
from pykata.hypervisors.qemu.vm import QemuVM
from pykata.net.network import Network
from pykata.templates import AGE
from tests.vm.conftest import BUSYBOX, clocked
from tests.vm.qemu_guest import check_confined, inherited, words

BOOT_ID = "/proc/sys/kernel/random/boot_id"
IDENTITY = (
    "hostname; cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id;"
    " head -c 16 /dev/urandom | md5sum; cat /run/pykata/generation"
)


def sandbox(**options: object) -> Sandbox:
    return Sandbox(isolation="emulated", template="auto", **options)  # type: ignore[arg-type]


def kept() -> list[Path]:
    """The templates in the cache."""
    return [state.parent for state in (cache_dir() / "templates").glob("*/state.json")]


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No template is there yet."""
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("empty")
async def test_what_qemu_has_of_a_machine_from_a_template() -> None:
    async with sandbox() as first:
        assert first._running is not None
        await first.run(BUSYBOX, ["true"])
    async with sandbox() as second, second.container(BUSYBOX):
        assert second.timings.start == "template"
        running = second._running
        assert running is not None
        pid = running.vm.pid
        check_confined(pid)
        image = re.sub(r"\d+", "", str(running.bundle.busybox))
        assert inherited(pid) == sorted(["/dev/null", "pipe:", "pipe:", "socket:", "socket:", image])
        told = words(pid)[1:]       # after QEMU's own name, which may be in anybody's home
        for path in {running.bundle.path, cache_dir(), Path.home()} - {Path("/")}:
            assert not any(str(path) in word for word in told)


async def test_a_guest_waits_awake_for_its_next_host() -> None:
    """Whoever goes on from there hasn't to be woken."""
    hypervisor = QEMU(accel="tcg", agent="serial")
    async with Sandbox(isolation="emulated", template="off", hypervisor=hypervisor) as sb:
        vm = sb._open.vm
        assert isinstance(vm, QemuVM)
        await sb._open.agent.park()
        for _ in range(5):
            await vm.pause()
            said = await vm._qmp.execute("human-monitor-command", {"command-line": "info registers"})
            assert "HLT=0" in str(said)
            await vm.resume()


async def identity(sb: Sandbox) -> list[str]:
    return await clocked(sb, IDENTITY)


@pytest.mark.usefixtures("empty")
async def test_the_first_is_booted_and_the_others_are_not() -> None:
    async with sandbox() as first:
        assert first.timings.start == "boot"
        assert "no template" in first.timings.why
        assert (await first.run(BUSYBOX, ["echo", "1"])).stdout == "1\n"
        (folder,) = kept()
        assert {oct(path.stat().st_mode & 0o777) for path in [folder, *folder.iterdir()]} == {"0o700", "0o600"}
        async with sandbox() as second, sandbox(memory=192) as other:
            assert second.timings.start == "template"
            assert (await second.run(BUSYBOX, ["echo", "2"])).stdout == "2\n"
            assert other.timings.start == "boot"        # of another kind
    assert len(kept()) == 2


async def test_no_two_are_alike() -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(sandbox())
        all_of_them = [await identity(await stack.enter_async_context(sandbox())) for _ in range(3)]
    for number, what in enumerate(["hostname", "/etc/hostname", "machine-id", "boot id", "urandom"]):
        assert len({each[number] for each in all_of_them}) == 3, what
    for each in all_of_them:
        assert each[0] == each[1]
        assert int(each[5]) > 0


async def test_containers_that_were_not_used_yet_have_the_names_of_their_guest() -> None:
    """They are written when something is started there, in a guest that may have become another one twice by then."""
    names = f"cat /etc/hosts /etc/hostname /etc/machine-id {BOOT_ID} /run/pykata/generation; hostname"
    async with Template(BUSYBOX, setup=[["true"]], isolation="emulated") as template, template.sandbox() as parent:
        (child,) = await parent.fork()
        async with child:
            told = []
            for sb in (child, parent):
                runs = sb.run(BUSYBOX, ["sh", "-c", names]), sb.main.run(["sh", "-c", names]), sb.shell(BUSYBOX, names)
                said = {(await run).stdout for run in runs}
                assert len(said) == 1
                told.append(said.pop().splitlines())
    for one in told:
        *hosts, hostname, _, _, generation, same = one
        assert hostname == same == hosts[-1].split()[-1]
        assert int(generation) > 0
    assert [a == b for a, b in zip(*told, strict=True)][-5:] == [False] * 5


async def test_options_hold_in_one_from_a_template() -> None:
    async with sandbox(), sandbox(hostname="named", env={"A": "1", "B": "2"}, disk="8M", timeout=30) as sb:
        assert sb.timings.start == "template"
        done = await sb.run(BUSYBOX, ["sh", "-c", "hostname; echo $A $B; df -m / | tail -1"], env={"B": "3"})
        name, env, root = done.stdout.splitlines()
        assert (name, env) == ("named", "1 3")
        assert root.split()[1] == "8"


@pytest.mark.usefixtures("empty")
async def test_what_a_sandbox_has_of_its_own_is_not_in_the_template() -> None:
    secret = f"s3cret-{time.time_ns()}"
    async with sandbox(env={"TOKEN": secret}, hostname="my-own-name") as first:
        assert (await first.run(BUSYBOX, ["sh", "-c", "echo $TOKEN"])).stdout.strip() == secret
    (folder,) = kept()
    memory = (folder / "memory").read_bytes()
    assert b"pykata-agent" in memory        # this would find it
    assert secret.encode() not in memory
    assert b"my-own-name" not in memory


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "not json"])
async def test_a_damaged_one_is_found_and_made_anew(how: str) -> None:
    async with sandbox():
        (folder,) = kept()
    match how:
        case "flipped":
            with (folder / "memory").open("r+b") as file:
                file.seek(5_000_000)
                file.write(b"\xff\x00\xff")
        case "truncated":
            (folder / "memory").write_bytes((folder / "memory").read_bytes()[:-1])
        case "missing":
            (folder / "devices").unlink()
        case _:
            (folder / "state.json").write_text("{")
    with pytest.warns(TemplateWarning, match="template was removed") as caught:
        async with sandbox() as sb:
            assert sb.timings.start == "boot"
    assert len([each for each in caught if each.category is TemplateWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", TemplateWarning)
        async with sandbox() as sb:
            assert sb.timings.start == "template"


@pytest.mark.usefixtures("empty")
async def test_it_stays_where_the_host_can_run_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sandbox():
        before = kept()
    with monkeypatch.context() as patch:
        limited, spawn = ["prlimit", "--as=200000000"], host.spawn
        patch.setattr(host, "spawn", lambda *args, **given: spawn(*args, **given | {"through": limited}))
        with pytest.raises(VMError, match="before it answered"):
            async with sandbox():
                pass
    assert kept() == before
    async with sandbox() as sb:
        assert sb.timings.start == "template"


@pytest.mark.usefixtures("empty")
async def test_a_disk_that_is_too_slow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sandbox():
        pass
    refused, read = threading.Event(), saved._read_memory
    monkeypatch.setattr(saved, "_read_memory", lambda *args: refused.wait() and read(*args))

    def too_late(*args: Any, **given: Any) -> BootTimeoutError:
        refused.set()
        return BootTimeoutError(*args, **given)

    monkeypatch.setattr(boot, "BootTimeoutError", too_late)
    with pytest.raises(BootTimeoutError, match=r"the saved guest wasn't read from disk within 0\.5 s"):
        async with sandbox(boot_timeout=0.5):
            pass


@pytest.mark.usefixtures("empty")
async def test_one_that_no_machine_can_go_on_from_is_removed() -> None:
    async with sandbox():
        (folder,) = kept()
    (folder / "devices").write_bytes(b"not what QEMU writes")
    state = json.loads((folder / "state.json").read_text().partition("\n")[2])
    text = json.dumps({**state, "devices": file_hash(folder / "devices")})
    (folder / "state.json").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    with pytest.warns(TemplateWarning, match="template was removed"):
        async with sandbox() as sb:
            assert (sb.timings.start, sb.timings.why) == ("boot", "its template failed")
    assert kept() == []


@pytest.mark.usefixtures("empty")
async def test_the_image_that_is_used_every_time_is_prepared() -> None:
    def waiting(sb: Sandbox) -> int:
        return sum(one.fresh for one in sb._open.containers.values())

    seen = []
    for number in range(4):
        async with sandbox(env={"N": str(number)}, hostname=f"box-{number}") as sb:
            seen.append((sb.timings.start, waiting(sb)))
            done = await sb.run(BUSYBOX, ["sh", "-c", "echo $N; hostname; cat /etc/hostname; echo x > /x"], check=True)
            assert done.stdout == f"{number}\nbox-{number}\nbox-{number}\n"
            assert (await sb.run(BUSYBOX, ["ls", "/x"])).exit_code != 0
    # Booted; the second that uses it; the first that expects it.
    assert seen == [("boot", 0), ("template", 0), ("template", 1), ("template", 1)]
    assert len(kept()) == 2
    async with sandbox(disk="8M") as sb:        # another container than the one that waits
        assert (sb.timings.start, waiting(sb)) == ("template", 0)
    async with Template(BUSYBOX, isolation="emulated") as template, template.sandbox() as sb:
        assert waiting(sb) == 1
    (with_container,) = [path for path in kept() if (path / "slot0").exists()]
    shutil.rmtree(with_container)
    async with sandbox() as sb:
        assert (sb.timings.start, waiting(sb)) == ("template", 1)


@pytest.mark.usefixtures("empty")
async def test_the_disk_of_one_with_a_container_is_checked() -> None:
    async def start() -> tuple[str, int]:
        async with sandbox() as sb:
            waiting = sum(one.fresh for one in sb._open.containers.values())
            done = await sb.run(BUSYBOX, ["sh", "-c", "cat /bin/* > /dev/null; ls /dev/null"])
            assert (done.stdout, done.stderr) == ("/dev/null\n", "")
            return sb.timings.start, waiting

    for expected in [("boot", 0), ("template", 0), ("template", 1)]:
        assert await start() == expected
    for how in ["flipped", "missing"]:
        (disk,) = (path / "slot0" for path in kept() if (path / "slot0").exists())
        data = bytearray(disk.read_bytes())
        disk.unlink()
        if how == "flipped":
            data[len(data) // 3] ^= 0xFF
            disk.write_bytes(data)
        with pytest.warns(TemplateWarning, match="template was removed.*slot0") as caught:
            assert await start() == ("template", 0)     # the bare one
        assert len([each for each in caught if each.category is TemplateWarning]) == 1
        assert await start() == ("template", 1)


KILLED = """
import anyio, os, signal
from pykata import Sandbox, saved

def write(folder, origin, write=saved.write):
    write(folder, origin)
    (folder / "state.json").unlink()
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with Sandbox(isolation="emulated", template="auto"):
        pass

saved.write = write
anyio.run(main)
"""


@pytest.mark.usefixtures("empty")
async def test_a_maker_that_was_killed_is_no_hindrance(tmp_path: Path) -> None:
    environment = os.environ | {"PYKATA_RUN": str(tmp_path / "run")}        # what is left there is for a gc
    killed = await anyio.run_process([sys.executable, "-c", KILLED], check=False, stderr=None, env=environment)
    assert killed.returncode == -signal.SIGKILL
    folder = cache_dir() / "templates"
    assert [path.name[:4] for path in folder.iterdir() if path.is_dir()] == ["tmp-"]
    for start in ("boot", "template"):
        async with sandbox() as sb:
            assert sb.timings.start == start
            assert (await sb.run(BUSYBOX, ["echo", "fine"])).stdout == "fine\n"
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1


@pytest.mark.usefixtures("empty")
async def test_where_a_template_does_not_fit_the_sandbox_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, origin: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saved, "write", full)
    sb = sandbox()
    with pytest.warns(TemplateWarning, match="templates can't be kept: .*No space left"):
        await sb.__aenter__()
    async with AsyncExitStack() as stack:
        stack.push_async_exit(sb)
        assert sb.timings.start == "boot"
        assert "No space left" in sb.timings.why
        assert (await sb.run(BUSYBOX, ["echo", "fine"])).stdout == "fine\n"
    assert not kept()


@pytest.mark.slow
async def test_a_hundred_one_after_the_other() -> None:
    """That nothing is left is what each test is checked for; here a little for each would be much."""
    async with Template(BUSYBOX, isolation="emulated") as template:
        for _ in range(5):
            async with template.sandbox():
                pass
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(100):
            async with template.sandbox() as sb:
                assert (await sb.run(BUSYBOX, ["echo", str(number)])).stdout == f"{number}\n"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 300        # KiB


@pytest.mark.usefixtures("empty")
async def test_the_least_recently_used_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sandbox(memory=64):
        pass
    (first,) = kept()
    size = sum(path.stat().st_size for path in first.iterdir())
    monkeypatch.setenv("PYKATA_TEMPLATES_SIZE", str(int(size * 1.5)))
    async with sandbox(memory=65):
        pass
    (second,) = kept()
    assert second != first


@pytest.mark.usefixtures("empty")
async def test_what_can_not_be_saved_is_booted_and_says_so() -> None:
    async with sandbox(hypervisor=QEMU(accel="tcg", agent="serial", machine="q35")) as first:
        assert first.timings.start == "boot"
    async with Sandbox(isolation="emulated", template="off") as off:
        assert (off.timings.start, off.timings.why) == ("boot", "")
    with pytest.raises(ConfigError, match="template="):
        Sandbox(template="always")  # type: ignore[arg-type]


# --- Template ---


async def test_a_template_with_commands() -> None:
    ticks = "(while :; do date +%s >> /ticking; sleep 0.1; done) &"
    setup = [["sh", "-c", "echo made $SECRET > /made"], ["sh", "-c", ticks]]
    async with Template(BUSYBOX, setup=setup, isolation="emulated", env={"SECRET": "x"}) as template:
        async with template.sandbox(env={"OWN": "1"}) as one, template.sandbox() as two:
            assert one.timings.start == "template"
            for sb in (one, two):
                done = await sb.main.run(["sh", "-c", "cat /made; sleep 0.5; tail -n 1 /ticking; echo $OWN$SECRET."])
                made, ticking, own = done.stdout.splitlines()
                assert made == "made x"
                assert abs(int(ticking) - time.time()) < 60         # by whoever it is written
                assert own == ("1." if sb is one else ".")
            await one.main.run(["sh", "-c", "echo changed > /made"])
            assert (await two.main.run(["cat", "/made"])).stdout == "made x\n"
            names = [(await sb.main.run(["sh", "-c", "hostname; cat /etc/hostname"])).stdout for sb in (one, two)]
            assert names == [f"{sb.options.hostname}\n" * 2 for sb in (one, two)]
        leftover = template.sandbox()
    with pytest.raises(SandboxClosedError):
        template.sandbox()
    with pytest.raises(SandboxClosedError, match="was left"):
        async with leftover:
            pass


async def test_what_was_set_up_has_the_names_of_whose_it_is_but_for_what_it_wrote_itself() -> None:
    setup = [["sh", "-c", "rm /etc/hostname; echo mine > /new; mv /new /etc/hosts"]]
    names = ["sh", "-c", "hostname; cat /etc/hosts; ls /etc/hostname; cat /etc/machine-id"]
    async with (
        Template(BUSYBOX, setup=setup, isolation="emulated", spares=0) as template,
        template.sandbox() as one, template.sandbox() as two,
    ):  # fmt: skip
        said = [(await sb.main.run(names)).stdout.split() for sb in (one, two)]
        assert [each[:-1] for each in said] == [[sb.options.hostname, "mine"] for sb in (one, two)]
        assert said[0][-1] != said[1][-1]
        # What a command changes between two forks is its container's own by then.
        for number in range(2):
            (child,) = await one.fork()
            async with child:
                found = (await child.main.run(names)).stdout.split()
                assert found[:2] == [child.options.hostname, "mine"]
                assert (found[-1] == "own") == bool(number)
                assert found[-1] != said[0][-1]
            await one.main.run(["sh", "-c", "echo own > /etc/machine-id"])


async def test_what_linux_does_first_after_two_seconds_has_been_done_in_a_template() -> None:
    async def stands_still(sb: Sandbox) -> None:
        await sb.pause()
        await anyio.sleep(AGE)          # as before its start: no time of the guest's
        await sb.resume()

    for setup in (None, stands_still):
        async with (
            Template(BUSYBOX, setup=setup, isolation="emulated", spares=0) as template, template.sandbox() as sb,
        ):  # fmt: skip
            up = (await sb.run(BUSYBOX, ["cat", "/proc/uptime"])).stdout
            assert float(up.split()[0]) > 2


async def test_the_first_command_takes_the_container_that_waits() -> None:
    async with Template(BUSYBOX, isolation="emulated") as template:
        async with template.sandbox(env={"A": "1"}) as sb:
            def waiting() -> int:
                return sum(one.fresh for one in sb._open.containers.values())

            assert waiting() == 1
            script = "echo $A $B $HOME; touch /x; ls /; cat; exit 3"
            done = await sb.run(BUSYBOX, ["sh", "-c", script], env={"B": "2"}, input="in")
            assert waiting() == 0
            again = await sb.run(BUSYBOX, ["sh", "-c", script], env={"B": "2"}, input="in")
            assert (done.exit_code, done.stdout) == (again.exit_code, again.stdout)
            assert done.stdout.startswith("1 2 /root\n")
        async with template.sandbox() as sb:        # another user than that of the process that waits
            assert (await sb.run(BUSYBOX, ["id", "-u"], user="1000", cwd="/tmp")).stdout == "1000\n"
        async with template.sandbox() as sb:
            assert (await sb.run(BUSYBOX, ["no-such-program"])).exit_code == 127
        async with template.sandbox() as sb:        # longer than what can be told to one that waits
            long = ["x" * 30_000] * 3
            assert (await sb.run(BUSYBOX, ["sh", "-c", "echo $*", "sh", *long])).stdout == " ".join(long) + "\n"


async def test_a_template_with_a_function_and_what_fails_in_it() -> None:
    async def setup(sb: Sandbox) -> None:
        said = (await sb.run(BUSYBOX, ["sh", "-c", "echo by a $WHAT"])).stdout
        await sb.main.files.write_bytes("/made", said.encode())
        read.append((await sb.main.run(["cat", BOOT_ID])).stdout.strip())
        await sb.main.start(["sh", "-c", "trap 'echo told > /told' USR1; touch /up; while :; do sleep 0.1; done"])
        await sb.main.run(["sh", "-c", "until [ -e /up ]; do sleep 0.1; done"])
        await sb.main.run(["false"], check=fails)

    fails, read = False, list[str]()
    options: dict[str, Any] = {"isolation": "emulated", "env": {"WHAT": "function"}, "timeout": 300, "memory": 200}
    async with Template(BUSYBOX, setup=setup, **options) as template, AsyncExitStack() as stack:
        signalled = template.sandbox(signal=signal.SIGUSR1, hostname="named")
        by_option = Sandbox(template=template, isolation="emulated", env={"WHAT": "option"})
        seen = []
        for sb in (signalled, by_option):
            await stack.enter_async_context(sb)
            assert sb.options.timeout == 300
            assert await sb.main.files.read_bytes("/made") == b"by a function\n"
            seen.append(await clocked(sb.main, f"cat {BOOT_ID}; hostname; echo $WHAT."))
        assert [each[1:] for each in seen] == [["named", "."], [by_option.options.hostname, "option."]]
        assert len({*read, *(each[0] for each in seen)}) == 3       # although it had been read
        assert await clocked(signalled.main, "until [ -s /told ]; do sleep 0.1; done; cat /told") == ["told"]
        assert (await signalled.run(BUSYBOX, ["echo", "on"])).stdout == "on\n"
        assert (await by_option.main.run(["ls", "/told"])).exit_code != 0
        assert (by_option.timings.start, by_option.options.memory) == ("template", 200)
        with pytest.raises(ConfigError, match="memory=512 isn't what the template has: 200"):
            Sandbox(template=template, memory=512)
        with pytest.raises(ConfigError, match="can't be detached"):
            await Sandbox(template=template).detach("none")
    with pytest.raises(SandboxClosedError, match="template is not open"):
        async with Sandbox(template=template):
            pass
    fails = True
    with pytest.raises(CommandFailedError):
        async with Template(BUSYBOX, setup=setup, isolation="emulated"):
            pass
    with pytest.raises(ConfigError, match="can't be awaited"):
        async with Template(BUSYBOX, setup=lambda sb: None, isolation="emulated"):  # type: ignore[arg-type, return-value]
            pass


@pytest.mark.parametrize(("options", "why"), [
    ({"setup": 42}, "setup=42"), ({"setup": "make"}, "setup='make'"), ({"hostname": "me"}, "hostname"),
    ({"network": "user"}, "network"), ({"network": Network("none", hosts={"db": "10.0.0.1"})}, "network"),
    ({"hypervisor": QEMU(agent="vsock")}, "vsock"),
])  # fmt: skip
async def test_what_no_template_can_have(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Template(BUSYBOX, isolation="emulated", **options)
    with pytest.raises(ConfigError, match="template=3"):
        Sandbox(template=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not from both"):
        Sandbox.restore("/nowhere", template=Template(BUSYBOX))


RACING = """
import anyio
from pykata import Sandbox

async def main():
    async with Sandbox(isolation="emulated") as sb:
        print(sb.timings.start, (await sb.run("builtin:busybox", ["echo", "fine"])).stdout.strip())

anyio.run(main)
"""


@pytest.mark.usefixtures("empty")
async def test_two_processes_race_for_the_first() -> None:
    said = []

    async def start() -> None:
        said.append((await anyio.run_process([sys.executable, "-c", RACING], stderr=None)).stdout)

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(start)
    # Who comes while the other makes it boots, who comes later needn't.
    assert b"boot fine\n" in said
    assert set(said) <= {b"boot fine\n", b"template fine\n"}
    assert [path for path in (cache_dir() / "templates").iterdir() if path.is_dir()] == kept()
    assert len(kept()) == 1
    async with sandbox() as sb:
        assert sb.timings.start == "template"
