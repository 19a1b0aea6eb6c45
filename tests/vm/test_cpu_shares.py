"""The CPU controller of the guest, which makes all waiting longer: it is there for containers that ask for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pykata import Sandbox
from pykata.agent import v1
from pykata.requests import container_request

BUSYBOX = "builtin:busybox"
CGROUPS = {"destination": "/sys/fs/cgroup", "type": "cgroup2", "source": "cgroup"}
SHOW = ["sh", "-c", "cd /sys/fs/cgroup; cat cpu.weight; grep -c '^usage_usec' cpu.stat; cat cgroup.controllers"]


@pytest.mark.parametrize(("spec", "weight"), [
    ({"mounts": [{**CGROUPS, "options": ["ro"]}], "linux": {"resources": {"cpu": {"shares": 512}}}}, "20"),
    ({"mounts": [CGROUPS]}, "100"),     # it may make cgroups of its own, and limit them
])  # fmt: skip
async def test_it_is_there_for_who_asks(spec: dict[str, Any], weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Sandbox(isolation="emulated", template="off") as sb, sb.container(BUSYBOX) as usual:
        before = await usual.run(SHOW)
        assert before.stdout.split() == ["1", "memory", "pids"]

        def asking(*args: Any) -> v1.CreateContainerRequest:
            request = container_request(*args)
            request.oci_spec = json.dumps(spec).encode()
            return request

        monkeypatch.setattr("pykata.requests.container_request", asking)
        async with sb.container(BUSYBOX) as other:
            assert (await other.run(SHOW, check=True)).stdout.split() == [weight, "1", "cpu", "memory", "pids"]
        assert (await usual.run(SHOW, check=True)).stdout.split() == ["100", "1", "cpu", "memory", "pids"]


async def test_the_agent_is_more_important_and_what_it_starts_is_not() -> None:
    """The niceness (19) and the kind (41, the kernel's SCHED_OTHER) of a process, and of the first of its container."""
    show = ["sh", "-c", "cut -d' ' -f19,41 /proc/self/stat /proc/1/stat"]
    for template in ("off", "auto"):
        async with Sandbox(isolation="emulated", template=template) as sb, sb.container(BUSYBOX) as container:
            for number in range(4):         # one that is made beforehand comes third
                assert (await container.run(show, check=True)).stdout == "0 0\n0 0\n", (template, number)
