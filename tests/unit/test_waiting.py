"""A container that waits for the next run of an image, over fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from pykata import Sandbox, SandboxClosedError
from pykata.testing import FakeFs, FakeHypervisor, FakeVM

pytestmark = pytest.mark.usefixtures("guest")

BUSYBOX = "builtin:busybox"


@pytest.fixture
async def sb() -> AsyncIterator[Sandbox]:
    async with Sandbox(FakeHypervisor(), FakeFs()) as sandbox:
        yield sandbox


@pytest.fixture
def other(tmp_path: Path) -> str:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "hostname").write_text("other\n")
    return f"dir:{root}"


async def settled(sb: Sandbox) -> list[str]:
    """Those that wait, once nothing is being made any more."""
    running = sb._open
    await running.settled()
    for _ in range(100):
        await anyio.lowlevel.checkpoint()
    async with running.making:
        return [one.id for one in running.containers.values() if one.fresh]


def agents(sb: Sandbox) -> set[str]:
    machine = sb._open.vm
    assert isinstance(machine, FakeVM)
    return set(machine.agent.containers)


async def test_after_two_runs_in_a_row_a_container_waits_for_the_next(sb: Sandbox) -> None:
    await sb.run(BUSYBOX, ["echo", "one"])
    assert await settled(sb) == []
    await sb.run(BUSYBOX, ["echo", "two"])
    (waiting,) = await settled(sb)
    async with sb.process(BUSYBOX, ["cat"]):
        assert agents(sb) == {waiting}
        assert await settled(sb) == []
    (another,) = await settled(sb)
    assert another != waiting
    assert agents(sb) == {another}


async def test_it_is_gone_before_another_image_is_used(sb: Sandbox, other: str) -> None:
    for _ in range(2):
        await sb.run(BUSYBOX, ["echo"])
    (waiting,) = await settled(sb)
    async with sb.container(other) as container:
        assert agents(sb) == {container.id}
        assert await settled(sb) == []
    await sb.run(BUSYBOX, ["echo"])
    assert await settled(sb) == []
    assert waiting not in agents(sb)


async def test_no_container_waits_while_the_images_alternate(sb: Sandbox, other: str) -> None:
    for image in (BUSYBOX, other) * 3:
        await sb.run(image, ["echo"])
        assert await settled(sb) == []


async def test_one_that_cannot_be_made_is_nobody_s_trouble(sb: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: object) -> None:
        raise SandboxClosedError("no more containers")

    await sb.run(BUSYBOX, ["echo"])
    with monkeypatch.context() as patch:
        patch.setattr(sb._open.agent, "create_container", refuse)
        await sb.run(BUSYBOX, ["echo"])
        assert await settled(sb) == []
    assert (await sb.run(BUSYBOX, ["echo", "well"])).stdout == "well\n"
    assert len(await settled(sb)) == 1


async def test_one_that_was_taken_is_left_to_who_took_it(sb: Sandbox, other: str) -> None:
    for _ in range(2):
        await sb.run(BUSYBOX, ["echo"])
    (waiting,) = await settled(sb)
    async with sb.process(BUSYBOX, ["cat"]) as process:
        await sb.run(BUSYBOX, ["echo"])     # another is made
        await settled(sb)
        assert waiting in agents(sb)
        await sb.run(other, ["echo"])       # and has to go
        await settled(sb)
        assert waiting in agents(sb)
        await process.stdin.send(b"alive\n")
        await process.stdin.aclose()
        assert await process.wait() == 0
    await sb._open.settled()
    assert waiting not in agents(sb)
