"""QEMU: runs everywhere, with KVM or without."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from attrs import Attribute, evolve, field, frozen

from pykata import transport as transports
from pykata.errors import ConfigError, HostError, ToolMissingError
from pykata.host import find_tool
from pykata.hypervisors.base import VM, Hypervisor
from pykata.hypervisors.qemu import accel as accels
from pykata.hypervisors.qemu import command, version
from pykata.spec import MIB, Accel, Disk, Features, NineP, Pmem, Transport, VhostFs, VMSpec

__all__ = ["QEMU"]

# Each costs 4 ms of boot under TCG on microvm, 12 ms on q35. On microvm 8 virtio devices fit: these, the agent's, the
# balloon and one network device.
SLOTS: dict[command.Machine, int] = {"microvm": 5, "q35": 5}
KSM = Path("/sys/kernel/mm/ksm/run")
LEAST_CODE, MOST_CODE = 4, 2047     # MiB of translated code, QEMU's own limit at the upper end
PAGES_OF_PMEM = 64      # bytes mapped for each byte of the guest's memory that keeps account of them (struct page)
SERIAL_LENGTH = 20      # bytes of a disk's serial; VIRTIO_BLK_ID_BYTES


def _one_of(*choices: str) -> Any:
    def check(instance: object, attribute: Attribute[str], value: object) -> None:
        if value not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            raise ConfigError(f"{attribute.name}={value!r} is unknown", hint=f"choose one of {known}")

    return check


def _slots(instance: QEMU, attribute: Attribute[int | None], value: object) -> None:
    most = command.TRANSPORTS[instance.machine] - 2
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most):
        raise ConfigError(f"disk_slots={value!r} is not a number from 0 to {most}",
                          hint="machine='q35' has room for more" if instance.machine == "microvm" else "")


def _code(instance: QEMU, attribute: Attribute[int], value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not LEAST_CODE <= value <= MOST_CODE:
        raise ConfigError(f"code_cache={value!r} is not a number of MiB from {LEAST_CODE} to {MOST_CODE}")


def _check_ksm() -> None:
    """Merging that was asked for must happen (mm/ksm.rst)."""
    try:
        runs = KSM.read_text().strip() == "1"
    except OSError as exc:
        raise HostError("ksm=True: this host's kernel can't merge memory", hint="leave ksm out") from exc
    if not runs:
        raise HostError("ksm=True: merging is switched off on this host", hint=f"its root can: echo 1 > {KSM}")


def _path(value: object) -> Path | None:
    if value is None or isinstance(value, str | os.PathLike):
        return None if value is None else Path(value)
    raise ConfigError(f"binary={value!r} is not a path")


def _flag(instance: QEMU, attribute: Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name}={value!r} is neither True nor False")


@frozen
class QEMU(Hypervisor):
    """Virtual machines of QEMU 7.2 or later.

    ::

        Sandbox(hypervisor=QEMU(machine="q35", accel="kvm"))

    ``machine="microvm"`` boots fastest; ``"q35"`` has PCI and takes more devices. ``accel="auto"`` is KVM where it
    works and emulation (TCG) elsewhere. ``binary`` is searched in ``PATH`` unless ``$PYKATA_QEMU`` or this names it.
    ``disk_slots`` is the number of images that can be in the machine at the same time. ``reclaim`` gives memory that
    the guest has freed back to the host. ``ksm`` has the host's kernel merge pages of the same content with those of
    all other programs that ask for that too, whoever's they are: it saves memory, and lets each guest find out by the
    time a write takes what others have in theirs. So only for guests that may know each other's secrets. ``code_cache``
    is how many MiB an emulated machine keeps of the guest's code as the emulator has translated it; what doesn't fit is
    translated again. A sandbox from a template that has run one small command needs 13, and 7 more for the next; with 6
    it takes a third less memory altogether, 1.5 times the CPU time for its first command, and four times that for later
    ones. ``agent`` is
    how the agent is reached: ``"vsock"`` where the host has it, else a ``"serial"`` port. The port is between this
    guest and us alone, while a guest with vsock can also reach whatever else listens there on the host, if it gets past
    the seccomp filter of its containers.
    """

    machine: command.Machine = field(default="microvm", validator=_one_of("microvm", "q35"))
    accel: Literal["auto", "kvm", "tcg"] = field(default="auto", validator=_one_of("auto", "kvm", "tcg"))
    binary: Path | None = field(default=None, converter=_path)
    disk_slots: int | None = field(default=None, validator=_slots)
    reclaim: bool = field(default=True, validator=_flag)
    ksm: bool = False
    code_cache: int = field(default=64, validator=_code)
    agent: Literal["auto", "serial", "vsock"] = field(default="auto", validator=_one_of("auto", "serial", "vsock"))

    @property
    def features(self) -> Features:
        return Features(
            name="qemu",
            disk_slots=self._slots(),
            filesystems=("block", "virtiofs", "9p"),
            networks=("none", "user", "tcfilter", "bridge", "macvtap", "cni", "vhostuser"),
            templates=self._can_save(),
            max_cpus=64,        # of the guest's kernel, CONFIG_NR_CPUS
        )

    def accel_here(self) -> Accel:
        return accels.choose(self.accel)

    def saving(self, identity: Mapping[str, str] | None = None) -> QEMU:
        if self.accel_here() != "tcg":
            raise ConfigError("machines under KVM can't be saved yet", hint="accel='tcg' can, or template='off'")
        if self.agent == "vsock":
            raise ConfigError("a machine with agent='vsock' can't be saved", hint="agent='serial' can")
        # What the guest frees can't be given back while others go on from the same memory, and its reports cost time.
        return evolve(self, agent="serial", reclaim=identity is not None and identity["reclaim"] == "True")

    def like(self, identity: Mapping[str, str]) -> QEMU:
        if identity["hypervisor"] != "qemu":
            return self
        like = evolve(self, machine=identity["machine"])  # type: ignore[arg-type]  # which is checked
        slots = int(identity["slots"])
        return like if like._slots() == slots else evolve(like, disk_slots=slots)

    def identity(self) -> dict[str, str]:
        return {
            "hypervisor": "qemu", "build": version.build(self._binary()), "machine": self.machine,
            "accel": self.accel_here(), "slots": str(self._slots()), "reclaim": str(self.reclaim),
            "tsc_khz": str(accels.tsc_khz()), "arguments": command.fingerprint(self.machine, self.accel_here()),
        }  # fmt: skip

    @asynccontextmanager
    async def transport(self, run_dir: Path) -> AsyncIterator[Transport]:
        if self.agent == "vsock" or (self.agent == "auto" and transports.vsock_available()):
            with transports.vsock() as vsock:
                yield vsock
        else:
            with transports.serial() as serial:
                yield serial

    @asynccontextmanager
    async def boot(self, spec: VMSpec, run_dir: Path) -> AsyncIterator[VM]:
        from pykata.hypervisors.qemu.vm import start

        self._check(spec)
        slots = self._slots_beside(spec)
        binary, accel = self._binary(), self.accel_here()
        started = start(binary, self.machine, accel, spec, slots=slots, reclaim=self.reclaim, ksm=self.ksm,
                        code_cache=self.code_cache)
        async with started as vm:
            yield vm

    async def found(self) -> str:
        binary = self._binary()
        number = await version.of_binary(binary)
        version.check(number, binary)
        return f"QEMU {version.text(number)} ({binary})"

    def _can_save(self) -> bool:
        try:
            self.saving()
        except (ConfigError, HostError):
            return False
        return True

    def _slots_beside(self, spec: VMSpec) -> int:
        """Slots for which the other devices leave room: one at least, unless a number was asked for."""
        room = command.TRANSPORTS[self.machine] - self.reclaim - 1 - len(spec.devices)
        return self._slots() if self.disk_slots is not None else max(1, min(room, self._slots()))

    def _slots(self) -> int:
        return SLOTS[self.machine] if self.disk_slots is None else self.disk_slots

    def _binary(self) -> Path:
        if self.binary is None:
            return find_tool("qemu-system-x86_64", package="qemu-system-x86", env_var="PYKATA_QEMU")
        try:
            return find_tool(str(self.binary), package="qemu-system-x86")
        except ToolMissingError as exc:
            message = f"binary={str(self.binary)!r} is not a program"
            raise ToolMissingError(message, hint="name QEMU's, or leave it out") from exc

    def _check(self, spec: VMSpec) -> None:
        """What would else be a message of QEMU's, or a guest that never answers."""
        if not 1 <= spec.cpus <= self.features.max_cpus:
            raise ConfigError(f"cpus={spec.cpus} is not a number from 1 to {self.features.max_cpus}")
        if self.ksm:
            _check_ksm()
        if spec.memory < 64:
            raise ConfigError(f"memory={spec.memory} MiB is too little", hint="64 MiB is the least")
        if self.machine == "microvm" and any(isinstance(device, Pmem) for device in spec.devices):
            raise ConfigError("microvm has no place for device='pmem'", hint="QEMU(machine='q35') has, or device='blk'")
        mapped = sum(device.size for device in spec.devices if isinstance(device, Pmem))
        if mapped // PAGES_OF_PMEM > spec.memory * MIB // 4:
            raise ConfigError(f"memory={spec.memory} MiB is too little to map {mapped // MIB} MiB by device='pmem'",
                              hint=f"memory={4 * mapped // PAGES_OF_PMEM // MIB} or more, or device='blk'")
        room = command.TRANSPORTS[self.machine] - self._slots_beside(spec) - self.reclaim - 1
        if len(spec.devices) > room:
            machine = "machine='q35', " if self.machine == "microvm" else "fewer volumes, "
            raise ConfigError(f"{len(spec.devices)} devices don't fit into {self.machine}, which has room for {room}",
                              hint=f"use {machine}fewer disk_slots or reclaim=False; directories of one cache mode "
                                   "are one device together, by virtio-fs")
        tags = [device.tag for device in spec.devices if isinstance(device, Disk | VhostFs | NineP)]
        if len(set(tags)) != len(tags) or any(not 0 < len(tag.encode()) <= SERIAL_LENGTH for tag in tags):
            raise ConfigError(f"the tags of devices {tags!r} must differ and have at most {SERIAL_LENGTH} bytes")
