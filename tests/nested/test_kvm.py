"""The paths that this machine's own CPU can't take: KVM, and the agent over vsock.

Each test here runs one file of ``inside`` with pytest in the nested machine, which must end with every test passed.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from pykata.guest import Bundle
from tests import conftest
from tests.nested.image import debian
from tests.nested.machine import Machine, nested_machine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
async def machine(bundle: Bundle) -> AsyncIterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        # The tests' own cache is empty, and a Debian takes minutes.
        patch.setenv("PYKATA_CACHE", conftest.USER_CACHE) if conftest.USER_CACHE else patch.delenv("PYKATA_CACHE")
        system = await debian()
    async with nested_machine(system, bundle) as booted:
        yield booted


async def test_the_machine_has_what_it_is_for(machine: Machine) -> None:
    assert {"/dev/kvm", "/dev/vhost-vsock"} <= set(machine.devices)


@pytest.mark.parametrize("part", ["kvm", "vsock"])
async def test_inside(machine: Machine, part: str) -> None:
    # The plugins write to /work, which is read-only.
    pytest_inside = ["python3", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    done = await machine.run(
        *pytest_inside, "-v", "--durations=0", "--color=no", f"tests/nested/inside/{part}.py",
        env={"CI": os.environ.get("CI", "")}, timeout=1800,
    )  # fmt: skip
    print(done.output)
    assert done.code == 0, f"see the output of pytest in the nested machine, and its console:\n{machine.console()}"
