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
