"""Machines that a template keeps ready for the sandboxes to come."""

from __future__ import annotations

import os
import signal
from contextlib import AsyncExitStack

import pytest

from pykata import AdmissionError, Sandbox, Template, host
from pykata.errors import ConfigError
from pykata.host import Room
from pykata.hypervisors.qemu.vm import QemuVM
from pykata.spares import Spare, Spares
from pykata.spec import MIB
from tests.vm.conftest import BUSYBOX
from tests.vm.test_templates import identity


async def ready(template: Template) -> Spare:
    assert isinstance(template._spares, Spares)
    await template._spares.filled()
    return template._spares._ready[0]


def pid(machine: Spare | Sandbox) -> int:
    vm = machine._open.vm if isinstance(machine, Sandbox) else machine.machine.vm
    assert vm is not None
    return vm.pid


async def test_one_that_was_taken_is_replaced() -> None:
    async with Template(BUSYBOX, isolation="emulated") as template:
        spare = pid(await ready(template))
        async with template.sandbox(env={"OWN": "1"}) as sb:
            assert pid(sb) == spare
            assert sb.timings.start == "template"
            done = await sb.run(BUSYBOX, ["sh", "-c", "hostname; cat /etc/hostname; echo $OWN"])
            assert done.stdout == f"{sb.options.hostname}\n" * 2 + "1\n"
            async with template.sandbox() as other:
                assert pid(other) != spare
            assert pid(await ready(template)) != spare


async def test_each_is_another_guest() -> None:
    async with Template(BUSYBOX, isolation="emulated") as template, AsyncExitStack() as stack:
        spares, seen = [], []
        for _ in range(3):
            spares.append(pid(await ready(template)))
            sb = await stack.enter_async_context(template.sandbox())
            assert pid(sb) == spares[-1]
            seen.append(await identity(sb))
    for number, what in enumerate(["hostname", "/etc/hostname", "machine-id", "boot id", "urandom"]):
        assert len({each[number] for each in seen}) == 3, what


async def test_one_that_died_is_given_to_nobody() -> None:
    async with Template(BUSYBOX, isolation="emulated") as template:
        spare = await ready(template)
        assert spare.machine.vm is not None
        os.kill(pid(spare), signal.SIGKILL)
        await spare.machine.vm.died()
        async with template.sandbox() as sb:
            assert pid(sb) != pid(spare)
            assert (await sb.run(BUSYBOX, ["echo", "alive"])).stdout == "alive\n"
        assert pid(await ready(template)) != pid(spare)


async def test_processes_of_a_template_execute_nothing_before_they_are_somebodys() -> None:
    setup = [["sh", "-c", "(while :; do hostname >> /names; sleep 0.1; done) &"]]
    async with Template(BUSYBOX, setup=setup, isolation="emulated") as template:
        spare = await ready(template)
        assert isinstance(spare.machine.vm, QemuVM)
        status = await spare.machine.vm._qmp.execute("query-status")
        assert isinstance(status, dict)
        assert not status["running"]
        async with template.sandbox() as sb:
            assert pid(sb) == pid(spare)
            script = "until tail -n 1 /names | grep -q $(hostname); do sleep 0.1; done; echo running"
            assert (await sb.main.run(["sh", "-c", script])).stdout == "running\n"


async def test_a_rehearsal_leaves_nothing_behind() -> None:
    look = "echo $$; cat /sys/fs/cgroup/pids.peak; ls /sys/fs/cgroup; ls -d /proc/[0-9]*; cat /proc/*/comm; env"
    said = []
    for spares in (0, 1):
        async with Template(BUSYBOX, isolation="emulated", spares=spares) as template:
            if spares:
                spare = await ready(template)
                assert spare.machine.rehearsed
            async with template.sandbox() as sb, sb.container(BUSYBOX) as other:
                assert sb.containers == {}
                assert list((await sb.stats()).containers) == [other.id]
                done = await sb.run(BUSYBOX, ["sh", "-c", look], check=True)
                said.append(done.stdout.replace(sb.options.hostname, "HOST"))
                assert await other.changes() == []
                assert any(one.rehearsal for one in sb._open.containers.values()) == (not spares)
    assert said[0] == said[1]


async def test_a_setup_that_has_ended_is_no_reason_to_stand_still() -> None:
    async with Template(BUSYBOX, setup=[["sh", "-c", "echo made > /file"]], isolation="emulated") as template:
        spare = await ready(template)
        assert spare.machine.rehearsed
        async with template.sandbox() as sb:
            assert pid(sb) == pid(spare)
            assert (await sb.main.run(["cat", "/file"])).stdout == "made\n"
            assert (await sb.run(BUSYBOX, ["test", "-e", "/file"])).exit_code == 1


async def test_one_is_given_up_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Template(BUSYBOX, isolation="emulated") as template:
        spare, spares = await ready(template), template._spares
        assert isinstance(spares, Spares)
        assert spare.machine.vm is not None
        with monkeypatch.context() as patched:
            patched.setattr(host, "room", lambda: Room(1024 * MIB, 0))
            with pytest.raises(AdmissionError):
                async with Sandbox(isolation="emulated", template="off", admission_timeout=0.5):
                    pass
        assert "its memory was needed" in str(await spare.machine.vm.died())
        spares.refill()
        assert pid(await ready(template)) != pid(spare)


async def test_a_sandbox_outlives_its_template() -> None:
    async with AsyncExitStack() as stack:
        async with Template(BUSYBOX, isolation="emulated") as template:
            spare = pid(await ready(template))
            sb = await stack.enter_async_context(template.sandbox())
        assert pid(sb) == spare
        assert (await sb.run(BUSYBOX, ["echo", "still"])).stdout == "still\n"


async def test_none_are_kept_where_none_are_wanted() -> None:
    async with Template(BUSYBOX, isolation="emulated", spares=0) as template:
        assert template._spares is None
        async with template.sandbox() as sb:
            assert (await sb.run(BUSYBOX, ["echo", "up"])).stdout == "up\n"
    for wrong in (-1, True, "1"):
        with pytest.raises(ConfigError, match="spares="):
            Template(BUSYBOX, spares=wrong)  # type: ignore[arg-type]
