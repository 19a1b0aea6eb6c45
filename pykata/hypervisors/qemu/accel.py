"""What can execute a guest's instructions here."""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import re
from pathlib import Path

from pykata.errors import HostError, NotPermittedError
from pykata.spec import Accel

KVM = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")
KVM_GET_API_VERSION = 0xAE00        # _IO(KVMIO, 0x00), linux/kvm.h
KVM_API_VERSION = 12                # constant since Linux 2.6.22; Documentation/virt/kvm/api.rst


def choose(wanted: str) -> Accel:
    """``"auto"`` is KVM where it works, else TCG. Raises HostError if ``"kvm"`` is wanted and doesn't."""
    if wanted == "tcg":
        return "tcg"
    problem = kvm_problem()
    if problem is None:
        return "kvm"
    if wanted == "kvm":
        raise problem
    return "tcg"


def kvm_problem() -> HostError | None:
    """Why KVM can't run our guests here, or None if it can.

    That ``/dev/kvm`` exists says little: inside some sandboxes it does, answers, and runs an ordinary kernel so slowly
    that it seems to hang. The CPU flag is what tells.
    """
    if platform.machine() != "x86_64":
        return HostError(f"KVM of this {platform.machine()} host can't run the x86-64 guest", hint="accel='tcg' can")
    try:
        device = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return NotPermittedError(f"this user may not open {KVM}", hint="add the user to the group of /dev/kvm")
    except OSError as exc:
        return HostError(f"can't open {KVM}: {exc.strerror}", hint="turn virtualization on in the firmware")
    try:
        version = fcntl.ioctl(device, KVM_GET_API_VERSION)
    except OSError as exc:
        return HostError(f"{KVM} doesn't answer: {exc.strerror}")
    finally:
        os.close(device)
    if version != KVM_API_VERSION:
        return HostError(f"{KVM} speaks version {version} of its API, not {KVM_API_VERSION}")
    if not cpu_flags() & {"vmx", "svm"}:
        return HostError(f"the CPU has neither vmx nor svm, so {KVM} can't run an ordinary kernel",
                         hint="turn nested virtualization on, or use accel='tcg'")
    return None


def kvm_groups() -> tuple[int, ...]:
    """The group that an unprivileged VMM needs to open ``/dev/kvm``, if it needs one."""
    found = KVM.stat()
    return (found.st_gid,) if found.st_mode & 0o006 != 0o006 else ()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The flags of the first CPU. Read once: on a host with many cores the file takes milliseconds."""
    found = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


@functools.cache
def tsc_khz() -> int | None:
    """The frequency of the guest's time stamp counter under TCG, which is the host's own; None if that isn't constant.

    Linux computes its BogoMIPS from the frequency: two loops a tick of the counter.
    """
    found = re.search(r"^bogomips\s*:\s*([\d.]+)$", CPUINFO.read_text(), re.MULTILINE)
    if found is None or "constant_tsc" not in cpu_flags():
        return None
    return int(float(found[1]) * 1000 / 2)


