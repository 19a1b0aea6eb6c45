"""What sandboxes of one template must not have in common, where the template is old enough that it isn't luck."""

from __future__ import annotations

from contextlib import AsyncExitStack

import anyio
import pytest

from pykata import Sandbox, Template, restore
from tests.vm.conftest import BUSYBOX, clocked

AGE = 155.0         # seconds; clones of a guest that is a few seconds old have differed by luck
WHAT = "head -c 16 /dev/urandom | md5sum; cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id"
NAMES = "hostname; cat /etc/machine-id"


@pytest.mark.slow
async def test_clones_of_an_old_template_differ_and_would_not_without_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def grow_old(sb: Sandbox) -> None:
        await sb.main.run(["cat", "/proc/sys/kernel/random/boot_id"], check=True)
        await anyio.sleep(AGE)

    async def asked(script: str) -> list[list[str]]:
        async with AsyncExitStack() as stack:
            clones = [await stack.enter_async_context(template.sandbox()) for _ in range(10)]
            return [await clocked(sb, script) for sb in clones]

    async with Template(BUSYBOX, setup=grow_old, isolation="emulated") as template:
        answers = await asked(f"{WHAT}; {NAMES}")
        for column, what in enumerate(["urandom", "uuid", "boot id", "host name", "machine-id"]):
            assert len({answer[column] for answer in answers}) == 10, what

        class NoSeed:
            urandom = staticmethod(lambda size: b"")

        monkeypatch.setattr(restore, "os", NoSeed)
        answers = await asked(WHAT)
        assert len({answer[0] for answer in answers}) < 10
