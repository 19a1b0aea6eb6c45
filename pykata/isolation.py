"""What keeps a guest in on this machine: hardware virtualization, or emulation, of which we warn."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

from pykata.admission import check_memory
from pykata.errors import IsolationError
from pykata.options import Options
from pykata.spec import MIB, Accel, Isolation


class EmulationWarning(UserWarning):
    """Sandboxes of this process run under emulation, which QEMU doesn't count as a security boundary."""


def isolation_of(accel: Accel) -> Isolation:
    """What keeps a guest in, by what executes it."""
    return "hardware" if accel == "kvm" else "emulated"


_warned = False


def check_here(options: Options) -> None:
    """Refuse what this machine can't be asked for. Raises ConfigError and IsolationError."""
    check_isolation(options)
    check_memory(options.memory * MIB)


def check_isolation(options: Options) -> None:
    """Refuse where hardware isolation was asked for and there is none; warn once where there is none."""
    global _warned
    isolation = isolation_of(options.hypervisor.accel_here())
    if options.isolation == "hardware" and isolation != "hardware":
        raise IsolationError(
            "isolation='hardware' was asked for, and this host has no usable hardware virtualization",
            hint="run on a host with KVM (pykata check says what is missing), or leave isolation out",
        )
    if options.isolation is None and isolation == "emulated" and not _warned:
        _warned = True
        warnings.warn(
            "no usable KVM: sandboxes run under emulation, which QEMU doesn't count as a security boundary; "
            "pass isolation='hardware' to refuse that, isolation='emulated' to accept it",
            EmulationWarning, stacklevel=_outside(),
        )  # fmt: skip


def _outside() -> int:
    """The ``stacklevel`` of who entered the sandbox, for a warning of our caller's."""
    ours = (str(Path(__file__).parent), contextlib.__file__)
    frame, level = sys._getframe(1), 1
    while frame.f_code.co_filename.startswith(ours) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    return level
