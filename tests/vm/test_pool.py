"""Sandboxes that are ready before somebody asks."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator

import anyio
import pytest

from pykata import Pool, Sandbox, SandboxClosedError, Template
from pykata.errors import ConfigError
from pykata.pool import _Ready
from tests.vm.conftest import BUSYBOX


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is asked whether it answers, however slow all is: who comes meanwhile would have another one started."""
    monkeypatch.setattr("pykata.pool.CHECKED_EVERY", 600.0)


@pytest.fixture
async def template(bundle: object) -> AsyncIterator[Template]:
    async with Template(BUSYBOX, isolation="emulated", spares=0) as made:
        yield made


async def test_one_that_was_taken_is_replaced(template: Template) -> None:
    async with Pool(template, size=2) as pool:
        await pool.filled()
        async with pool.acquire() as one, pool.acquire() as other:
            assert pool.stats.in_use == 2
            assert one.options.hostname != other.options.hostname
            assert (await one.run(BUSYBOX, ["hostname"])).stdout.strip() == one.options.hostname
            await pool.filled()
        assert pool.stats.in_use == 0
        assert pool.stats.started == 4
    with pytest.raises(SandboxClosedError):
        async with pool.acquire():
            pass
    with pytest.raises(SandboxClosedError):
        await pool.filled()
    for wrong in (None, "x"):
        with pytest.raises(ConfigError, match="is not a Template"):
            Pool(wrong)  # type: ignore[arg-type]


async def test_who_waits_until_it_is_filled_hears_of_its_end(template: Template) -> None:
    told: list[str] = []

    async def wait(pool: Pool) -> None:
        with pytest.raises(SandboxClosedError):
            await pool.filled()
        told.append("left")

    async with anyio.create_task_group() as group, Pool(template, 1, limit=1) as pool, pool.acquire():
        group.start_soon(wait, pool)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
    assert told == ["left"]


async def test_one_that_hangs_is_given_to_nobody(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Pool(template, size=1) as pool:
        await pool.filled()
        hanging = pool._ready[0].sandbox._open.vm.pid
        os.kill(hanging, signal.SIGSTOP)
        monkeypatch.setattr("pykata.pool.CHECKED_EVERY", 0.1)
        pool._ready[0].watch.cancel()           # it is watched anew, with less patience
        pool._ready[0] = _Ready(pool._ready[0].sandbox)
        pool._changed.set()
        with anyio.fail_after(300):
            while not pool.stats.died and not any(one.is_asked for one in pool._ready):
                await anyio.lowlevel.checkpoint()
        async with pool.acquire() as sb:
            assert sb._open.vm.pid != hanging
            assert (await sb.run(BUSYBOX, ["echo", "alive"])).stdout == "alive\n"


async def test_one_that_died_is_given_to_nobody(template: Template) -> None:
    async with Pool(template, size=1) as pool:
        await pool.filled()
        first = pool._ready[0].sandbox._open.vm
        os.kill(first.pid, signal.SIGKILL)
        await first.died()
        with anyio.fail_after(300):
            while not pool.stats.died:
                await anyio.lowlevel.checkpoint()
        await pool.filled()
        assert (pool.stats.died, pool.stats.started) == (1, 2)
        async with pool.acquire() as sb:
            assert (await sb.run(BUSYBOX, ["echo", "alive"])).stdout == "alive\n"


async def test_one_that_died_a_moment_ago_is_given_to_nobody(template: Template) -> None:
    async with Pool(template, size=2) as pool:
        await pool.filled()
        first = pool._ready[0].sandbox._open.vm
        os.kill(first.pid, signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 the event loop shall not hear of it
        async with pool.acquire() as sb:
            assert sb._open.vm is not first
            assert (await sb.run(BUSYBOX, ["echo", "alive"])).stdout == "alive\n"


async def test_who_comes_first_is_served_first_and_there_is_a_limit(template: Template) -> None:
    order: list[int] = []
    most = 0
    async with Pool(template, size=1, limit=2) as pool:

        async def use(number: int) -> None:
            nonlocal most
            async with pool.acquire() as sb:
                order.append(number)
                most = max(most, pool.stats.in_use + pool.stats.ready)
                assert (await sb.run(BUSYBOX, ["true"])).exit_code == 0

        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(use, number)
                await anyio.lowlevel.checkpoint()
    assert order == sorted(order)
    assert most <= 2
    with pytest.raises(ConfigError, match="limit=1 is less than size=2"):
        Pool(template, size=2, limit=1)


async def test_a_wait_that_is_cancelled_takes_nothing(template: Template) -> None:
    async with Pool(template, size=1, limit=1) as pool:
        async with pool.acquire():
            with anyio.move_on_after(0.2) as waiting:
                async with pool.acquire():
                    pytest.fail("there is one only")
            assert waiting.cancelled_caught
            assert pool.stats.waiting == 0
        async with pool.acquire() as sb:
            assert (await sb.run(BUSYBOX, ["true"])).exit_code == 0


async def test_each_is_warmed_up_before_anybody_gets_it(template: Template) -> None:
    async def warm_up(sandbox: Sandbox) -> None:
        assert (await sandbox.run(BUSYBOX, ["touch", "/here"])).exit_code == 0

    async with Pool(template, size=1, warm_up=warm_up) as pool:
        await pool.filled()
        async with pool.acquire() as sb:
            waiting = [one.id for one in sb._open.containers.values() if one.fresh]
            assert len(waiting) == 1
            assert (await sb.run(BUSYBOX, ["test", "-e", "/here"])).exit_code == 1
            assert not any(one.fresh for one in sb._open.containers.values())
            assert (await sb.stats()).containers == {}


async def test_a_container_waits_however_many_warming_up_has_used(template: Template) -> None:
    async def warm_up(sandbox: Sandbox) -> None:
        for _ in range(3):
            await sandbox.run(BUSYBOX, ["true"], check=True)

    async with Pool(template, size=1, warm_up=warm_up) as pool, pool.acquire() as sb:
        assert sum(one.fresh for one in sb._open.containers.values()) == 1
        assert (await sb.run(BUSYBOX, ["echo", "mine"])).stdout == "mine\n"


async def test_whoever_waits_hears_why_warming_up_failed(template: Template) -> None:
    outcomes: list[BaseException | None] = [LookupError("no such model"), None]

    async def warm_up(sandbox: Sandbox) -> None:
        if (outcome := outcomes.pop(0) if outcomes else None) is not None:
            raise outcome

    async with Pool(template, size=1, limit=1, warm_up=warm_up) as pool:
        with pytest.raises(LookupError, match="no such model"):
            async with pool.acquire():
                pytest.fail("it wasn't warm")
        assert pool.stats.failed == 1
        async with pool.acquire() as sb:
            assert (await sb.run(BUSYBOX, ["true"])).exit_code == 0
    with pytest.raises(ConfigError, match="warm_up='yes' is not a function"):
        Pool(template, warm_up="yes")  # type: ignore[arg-type]
