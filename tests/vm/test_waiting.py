"""A container that waits for the next run of an image, in a real guest."""

from __future__ import annotations

import anyio

from pykata import Sandbox
from pykata.guest import Bundle
from tests.vm.conftest import BUSYBOX


async def waiting(sb: Sandbox) -> str:
    """The one that waits, once it is there."""
    with anyio.fail_after(300):
        while True:
            async with sb._open.making:
                if found := [one.id for one in sb._open.containers.values() if one.fresh]:
                    return found[0]
            await anyio.lowlevel.checkpoint()


async def test_each_run_has_a_container_that_nothing_has_run_in(bundle: Bundle) -> None:
    async with Sandbox(isolation="emulated", env={"MINE": "yes"}) as sb:
        for number in range(5):
            done = await sb.run(BUSYBOX, ["sh", "-c", "ls /mark; touch /mark; echo $MINE $0", str(number)])
            assert done.stdout == f"yes {number}\n"
            if number:
                await waiting(sb)
                assert (await sb.stats()).containers == {}


async def test_other_containers_of_the_image_share_its_disk(bundle: Bundle) -> None:
    async with Sandbox(isolation="emulated") as sb:
        for _ in range(3):
            await sb.run(BUSYBOX, ["true"], check=True)
        await waiting(sb)
        assert len(sb._open.containers) == 1
        async with sb.container(BUSYBOX) as same:
            assert (await same.run(["echo", "same"])).stdout == "same\n"


async def test_a_fork_and_a_pause_find_it_whole(bundle: Bundle) -> None:
    async with Sandbox(isolation="emulated") as sb:
        for _ in range(2):
            await sb.run(BUSYBOX, ["true"], check=True)
        await sb.pause()
        await sb.resume()
        (child,) = await sb.fork()
        async with child:
            assert (await child.run(BUSYBOX, ["echo", "child"])).stdout == "child\n"
        assert (await sb.run(BUSYBOX, ["echo", "parent"])).stdout == "parent\n"
