"""What works on this host, found out by doing it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import anyio
from attrs import frozen

from pykata.errors import PykataError
from pykata.fs.block import Block
from pykata.guest import find_bundle
from pykata.host import cache_dir, run_dir, run_root
from pykata.hypervisors.base import Hypervisor
from pykata.isolation import EmulationWarning, isolation_of
from pykata.sandbox import Sandbox
from pykata.strategies import strategy


@frozen
class CheckItem:
    """One thing that works or doesn't. ``detail`` is what was found, ``remedy`` what to do where it doesn't."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


@frozen
class CheckReport:
    """Everything that was looked at, in the order of a start."""

    items: tuple[CheckItem, ...]

    @property
    def ok(self) -> bool:
        """A sandbox can be used here."""
        return all(item.ok for item in self.items)


async def check(hypervisor: Hypervisor | str = "qemu") -> CheckReport:
    """Look at what a sandbox needs, then boot one and run a command in it.

    Never raises for what it finds: an item that failed says why, and what to do.
    """
    vmm = strategy(Hypervisor, "pykata.hypervisors", hypervisor)  # type: ignore[type-abstract]
    items = [
        _looked("directories", _directories),
        await anyio.to_thread.run_sync(_looked, "guest bundle", _bundle),     # it reads all of it
        await _hypervisor(vmm),
        _looked("image conversion", lambda: str(Block().tool())),
        await _networks(),
    ]
    return CheckReport((*items, await _probe(vmm)))


def _looked(name: str, look: Callable[[], str]) -> CheckItem:
    try:
        return CheckItem(name, True, look())
    except (PykataError, OSError) as error:
        return _failed(name, error)


def _failed(name: str, error: PykataError | OSError) -> CheckItem:
    if isinstance(error, PykataError):
        return CheckItem(name, False, error.message, error.hint)
    return CheckItem(name, False, str(error))


async def _hypervisor(vmm: Hypervisor) -> CheckItem:
    try:
        return CheckItem("hypervisor", True, f"{await vmm.found()}, {_accel(vmm)}")
    except (PykataError, OSError) as error:
        return _failed("hypervisor", error)


async def _networks() -> CheckItem:
    """A sandbox has none unless it is given one: that one of them lacks something is no failure."""
    from pykata.net.working import working  # it makes one, and what that takes to import is of no use to others

    try:
        async with run_dir() as directory:
            made = await working(directory)
    except (PykataError, OSError) as error:
        return _failed("networks", error)
    found = made.lacks
    works = ", ".join(f"user (by {made.via})" if name == "user" else name for name, why in found.items() if not why)
    reasons = dict.fromkeys(why for why in found.values() if why)
    lacks = [f"not {', '.join(name for name in found if found[name] == why)}: {why}" for why in reasons]
    return CheckItem("networks", True, "; ".join([works, *lacks]))


def _directories() -> str:
    return f"cache {_writable(cache_dir())}, run {_writable(run_root())}"


def _writable(path: Path) -> Path:
    probe = path / ".check"
    probe.touch()
    probe.unlink()
    return path


def _bundle() -> str:
    bundle = find_bundle()
    bundle.verify()
    return str(bundle.path)


def _accel(vmm: Hypervisor) -> str:
    accel = vmm.accel_here()
    return f"{accel}: {isolation_of(accel)} isolation"


async def _probe(vmm: Hypervisor) -> CheckItem:
    name = "a command in a virtual machine"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EmulationWarning)
            async with Sandbox(vmm) as sandbox:
                done = await sandbox.run("builtin:busybox", ["uname", "-r"], timeout=30, check=True)
                return CheckItem(name, True, f"kernel {done.stdout.strip()}, ready in {sandbox.timings.ready:.2f} s")
    except (PykataError, OSError) as error:
        return _failed(name, error)
