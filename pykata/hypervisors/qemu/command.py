"""The command line of QEMU, whole, in :func:`command`.

Two rules keep it safe. Whatever has a name or an option of someone else's in it is JSON, where a comma is a comma. And
QEMU opens nothing by path: every file, socket and device comes as a descriptor that we opened.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from attrs import field, frozen

from pykata.hypervisors.qemu.aio import Aio
from pykata.spec import MIB, Accel, Disk, Nic, NineP, Pmem, SerialTransport, VhostFs, VhostNet, VMSpec, VsockTransport

Machine = Literal["microvm", "q35"]

PORT = "pykata.agent.0"
SLOT_FDSETS = 500           # the first fdset of a slot's; below are those of the disks
EMPTY_SIZE = 1 << 40        # bytes; of a disk slot

MACHINES: Mapping[Machine, str] = {
    # No ACPI: it costs 35 ms of boot, and QEMU 10's microvm with ACPI triple-faults now and then. The guest gets its
    # devices on the command line (QEMU appends them) and its CPUs from an MP table. The RTC stays: the kernel waits a
    # second for a missing one.
    "microvm": "microvm,acpi=off,rtc=on,x-option-roms=off,dump-guest-core=off",
    "q35": "q35,smm=off,vmport=off,i8042=off,sata=off,smbus=off,usb=off,graphics=off,dump-guest-core=off",
}
FIRMWARE: Mapping[Machine, str] = {"microvm": "qboot.rom", "q35": "qboot.rom"}     # 60 ms faster than SeaBIOS on q35
ACCELS: Mapping[Accel, str] = {
    "kvm": "kvm",
    # Translated code may take a gigabyte by default, and it is the guest that fills it. Python starts no slower with 64
    # MiB (with 16, by a quarter).
    "tcg": "tcg,tb-size={}",
}
BUS: Mapping[Machine, str] = {"microvm": "device", "q35": "pci"}        # virtio-blk-device, virtio-blk-pci
OFFLOADS = ("csum", "guest_csum", "gso", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo", "host_tso4", "host_tso6",
            "host_ecn", "host_ufo")
TRANSPORTS: Mapping[Machine, int] = {"microvm": 8, "q35": 28}           # virtio devices that fit, without ACPI


@frozen
class Descriptors:
    """The descriptors that QEMU inherits. ``disks`` has those of each disk of the spec, in its order.

    ``start`` is what it starts from: kernel and RAM disk, or memory and devices of a saved machine. ``slots`` are the
    disks that such a machine had in its slots, by number.
    """

    start: tuple[int, int]
    control: int
    agent: int
    disks: tuple[tuple[int, ...], ...] = ()
    nics: tuple[int, ...] = ()
    slots: Mapping[int, int] = field(factory=dict)
    shares: tuple[int, ...] = ()
    directories: tuple[int, ...] = ()
    mapped: tuple[int, ...] = ()

    def all(self) -> tuple[int, ...]:
        groups = (*self.disks, self.nics, self.slots.values(), self.shares, self.directories, self.mapped)
        return (*self.start, self.control, self.agent, *itertools.chain(*groups))


# Everything that the accelerator can: without ARAT an idle guest keeps ticking. But an emulated ``rep movsb`` goes byte
# by byte, and a guest that is told that it is fast copies with it: output came at 56 MB/s, and comes at 138 without.
CPUS: dict[Accel, str] = {"kvm": "max", "tcg": "max,-erms,-fsrm"}


def command(
    binary: Path,
    machine: Machine,
    accel: Accel,
    spec: VMSpec,
    given: Descriptors,
    *,
    slots: int,
    reclaim: bool,
    tsc_khz: int | None,
    ksm: bool = False,
    code_cache: int = 64,
    aio: Aio = "threads",
) -> list[str]:
    """The argv for a virtual machine. Starts nothing and opens nothing."""
    bus = BUS[machine]
    return [
        str(binary),
        "-nodefaults",
        "-no-user-config",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-display", "none",
        # A guest that panics or powers off resets the machine, which ends QEMU.
        "-no-reboot",
        *(("-S",) if spec.paused else ()),
        "-machine", _machine(machine, spec, ksm=ksm),
        *_memory(spec),
        "-bios", FIRMWARE[machine],
        "-accel", ACCELS[accel].format(code_cache),
        "-cpu", CPUS[accel],
        "-smp", str(spec.cpus),
        "-m", _sizes(spec),
        # virtio-mmio's default is the interface of 2011, which vhost-user refuses.
        "-global", "virtio-mmio.force-legacy=false",
        *(_saved(spec, given) if spec.saved else _kernel(machine, accel, spec, given, tsc_khz)),
        # The guest's console is our stdout. Its stdin is /dev/null: nobody types.
        "-chardev", "stdio,id=console,signal=off",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=control,fd={given.control}",
        # What all versions take: 11.1 warns of -mon, and what is to replace that is new in it.
        "-qmp", "chardev:control",
        *_agent(bus, spec, given.agent),
        # Memory that the guest frees goes back to the host within seconds. It costs no boot time that can be measured.
        *(device(f"virtio-balloon-{bus}", **{"free-page-reporting": True}) if reclaim else ()),
        *_disks(bus, spec, given.disks, aio),
        *_slots(bus, slots, spec.saved.slots if spec.saved else {}, given.slots, aio),
        *_nics(bus, spec),
        *_switches(bus, spec),
        *_shares(bus, spec, given.shares),
        *_directories(bus, spec, given.directories),
        *_mapped(bus, spec, given.mapped),
    ]  # fmt: skip


def fingerprint(machine: Machine, accel: Accel) -> str:
    """What of the command line is ours to choose, as a hash: another release of pykata may choose otherwise."""
    nothing = VMSpec(Path(), Path(), VsockTransport(None, 0, 0, None))  # type: ignore[arg-type]
    words = command(Path(), machine, accel, nothing, Descriptors((0, 0), 0, 0), slots=1, reclaim=True, tsc_khz=None)
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def _machine(machine: Machine, spec: VMSpec, *, ksm: bool) -> str:
    # Nothing is merged unasked with what other guests have in their memory: who shares pages with someone can find out
    # by the time a write takes.
    # And what is saved of its devices has no description, which QEMU would miss when it is loaded.
    options = f"{MACHINES[machine]},mem-merge={'on' if ksm else 'off'},suppress-vmdesc=on"
    return f"{options},memory-backend=ram" if spec.saved or _is_shared(spec) else options


def _kernel(
    machine: Machine, accel: Accel, spec: VMSpec, given: Descriptors, tsc_khz: int | None
) -> Iterator[str]:
    kernel, initrd = given.start
    yield from ("-kernel", f"/proc/self/fd/{kernel}", "-initrd", f"/proc/self/fd/{initrd}")
    yield from ("-append", kernel_arguments(machine, accel, spec, tsc_khz))


def _saved(spec: VMSpec, given: Descriptors) -> Iterator[str]:
    """The memory is mapped privately: what the guest writes is its own. It runs as soon as its devices are loaded."""
    memory, devices = given.start
    backend = {"qom-type": "memory-backend-file", "id": "ram", "size": spec.memory * MIB,
               "mem-path": f"/proc/self/fd/{memory}", "share": False}
    yield from ("-object", json.dumps(backend), "-incoming", f"fd:{devices}")
    # What is saved is the devices and nothing else: see :mod:`.state`.
    yield from ("-global", "migration.send-configuration=off")


def kernel_arguments(machine: Machine, accel: Accel, spec: VMSpec, tsc_khz: int | None) -> str:
    """The kernel's command line. Nothing in it comes from a user: it would be code that runs as the guest's root."""
    words = [
        "console=ttyS0",
        "loglevel=4",       # errors and what is worse, a panic too; the rest costs boot time
        "panic=-1",         # reboot at once
        "reboot=t",         # by a triple fault, which works on every machine
    ]
    if accel == "tcg" and tsc_khz:
        # Calibrating the TSC against another emulated clock hangs at random.
        words += ["tsc=reliable", f"tsc_early_khz={tsc_khz}"]
    if machine == "microvm":
        words.append("acpi=off")                # what isn't there need not be looked for
    if spec.cpus == 1:
        # Without it an unmount waits for the next ticks: mount and umount 20 ms, unshare 16 ms; with it 5 ms each. With
        # more CPUs it has to interrupt the others, and gains nothing.
        words.append("rcupdate.rcu_expedited=1")
    if isinstance(spec.transport, VsockTransport):
        words.append(f"pykata.vsock={spec.transport.port}")     # the agent dials it
    return " ".join(words)


def _agent(bus: str, spec: VMSpec, descriptor: int) -> Iterator[str]:
    transport = spec.transport
    if isinstance(transport, SerialTransport):
        yield from ("-chardev", f"socket,id=agent,fd={descriptor}")
        # max_ports is 31 by default; the guest's driver makes queues for all of them.
        yield from device(f"virtio-serial-{bus}", id="serial", max_ports=2)
        yield from device("virtserialport", bus="serial.0", nr=1, chardev="agent", name=PORT)
    else:
        yield from device(f"vhost-vsock-{bus}", **{"guest-cid": transport.cid, "vhostfd": str(descriptor)})


def _disks(bus: str, spec: VMSpec, descriptors: tuple[tuple[int, ...], ...], aio: Aio) -> Iterator[str]:
    disks = [one for one in spec.devices if isinstance(one, Disk)]
    for number, (disk, group) in enumerate(zip(disks, descriptors, strict=True)):
        for descriptor in group:
            yield from ("-add-fd", f"fd={descriptor},set={number}")
        yield from ("-blockdev", json.dumps(image_node(f"disk{number}", number, disk, aio)))
        # An error of the host's, such as a full filesystem, is one of the guest's too: by default QEMU pauses for it.
        errors = {"rerror": "report", "werror": "report"}
        yield from device(f"virtio-blk-{bus}", id=f"disk{number}", drive=f"disk{number}", serial=disk.tag, **errors)


def _slots(
    bus: str, count: int, disks: Mapping[int, Disk], plugged: Mapping[int, int], aio: Aio
) -> Iterator[str]:
    """Disks without content, whose content is exchanged while the machine runs: see :mod:`.slots`."""
    for number in range(count):
        yield from ("-blockdev", json.dumps(empty_node(number)))
        drive = empty_name(number)
        if number in plugged:
            drive = node_name(number)
            yield from ("-add-fd", f"fd={plugged[number]},set={SLOT_FDSETS + number}")
            yield from ("-blockdev", json.dumps(image_node(drive, SLOT_FDSETS + number, disks[number], aio)))
        yield from device(
            f"virtio-blk-{bus}", id=slot_name(number), drive=drive, serial=slot_name(number),
            **{"num-queues": 1, "discard": False, "write-zeroes": False},
        )  # fmt: skip


def _nics(bus: str, spec: VMSpec) -> Iterator[str]:
    nics = [one for one in spec.devices if isinstance(one, Nic)]
    for number, nic in enumerate(nics):
        for backend in (*nic.beside, {**nic.backend, "id": f"net{number}"}):
            yield from ("-netdev", json.dumps(backend))
        # romfile: a PCI card would bring a boot ROM for PXE, which nobody waits for.
        rom = {"romfile": ""} if bus == "pci" else {}
        yield from device(f"virtio-net-{bus}", netdev=f"net{number}", mac=nic.mac, **rom)


def _switches(bus: str, spec: VMSpec) -> Iterator[str]:
    nics = [one for one in spec.devices if isinstance(one, VhostNet)]
    for number, nic in enumerate(nics):
        # By a path: QEMU gives descriptors to nobody on a connection that it was handed.
        yield from ("-chardev", f"socket,id=switch{number},path=/proc/self/fd/{nic.place}")
        backend = {"type": "vhost-user", "id": f"switched{number}", "chardev": f"switch{number}", "queues": nic.queues}
        yield from ("-netdev", json.dumps(backend))
        options: dict[str, object] = {} if nic.offload else dict.fromkeys(OFFLOADS, False)
        if nic.queues > 1:
            options["mq"] = True
        if bus == "pci":
            options |= {"romfile": "", "vectors": 2 * nic.queues + 2}
        yield from device(f"virtio-net-{bus}", netdev=f"switched{number}", mac=nic.mac, **options)


def _memory(spec: VMSpec) -> Iterator[str]:
    if _is_shared(spec):
        # The daemon reads and writes the guest's memory itself, so it must be a file that both can map.
        backend = {"qom-type": "memory-backend-memfd", "id": "ram", "size": spec.memory * MIB, "share": True}
        yield from ("-object", json.dumps(backend))


def _is_shared(spec: VMSpec) -> bool:
    return any(isinstance(one, VhostFs | VhostNet) for one in spec.devices)


def _shares(bus: str, spec: VMSpec, descriptors: tuple[int, ...]) -> Iterator[str]:
    shares = [one for one in spec.devices if isinstance(one, VhostFs)]
    for number, (share, descriptor) in enumerate(zip(shares, descriptors, strict=True)):
        yield from ("-chardev", f"socket,id=share{number},fd={descriptor}")
        yield from device(f"vhost-user-fs-{bus}", chardev=f"share{number}", tag=share.tag, **{"queue-size": 1024})


def _directories(bus: str, spec: VMSpec, descriptors: tuple[int, ...]) -> Iterator[str]:
    shares = [one for one in spec.devices if isinstance(one, NineP)]
    for number, (share, descriptor) in enumerate(zip(shares, descriptors, strict=True)):
        # "none": what the guest makes belongs to who runs QEMU, and a guest's chown changes nothing; "passthrough"
        # would need a QEMU that may give files away. "remap": what is mounted below has inode numbers of its own; but
        # QEMU looks at each file when a directory is read.
        devices = "forbid" if share.is_whole else "remap"
        readonly = ",readonly=on" if share.readonly else ""
        yield from ("-fsdev", f"local,id=directory{number},path=/proc/self/fd/{descriptor},"
                              f"security_model={share.security},multidevs={devices}{readonly}")
        yield from device(f"virtio-9p-{bus}", fsdev=f"directory{number}", mount_tag=share.tag)


def _mapped(bus: str, spec: VMSpec, descriptors: tuple[int, ...]) -> Iterator[str]:
    files = [one for one in spec.devices if isinstance(one, Pmem)]
    for number, (file, descriptor) in enumerate(zip(files, descriptors, strict=True)):
        # Private, for a file that was opened for reading: nobody writes, so no page is ever copied.
        backend = {"qom-type": "memory-backend-file", "id": f"mapped{number}", "size": file.size, "readonly": True,
                   "mem-path": f"/proc/self/fd/{descriptor}", "share": False}
        yield from ("-object", json.dumps(backend))
        yield from device(f"virtio-pmem-{bus}", id=f"pmem{number}", memdev=f"mapped{number}")


def _sizes(spec: VMSpec) -> str:
    """The guest's memory, and up to where addresses are needed for what it maps beside that."""
    mapped = sum(one.size for one in spec.devices if isinstance(one, Pmem)) // MIB
    return f"{spec.memory}M,slots=1,maxmem={spec.memory + mapped}M" if mapped else f"{spec.memory}M"


def device(driver: str, **options: object) -> tuple[str, str]:
    return "-device", json.dumps({"driver": driver, **options})


def slot_name(number: int) -> str:
    return f"slot{number}"


def node_name(number: int) -> str:
    return f"image{number}"


def empty_name(number: int) -> str:
    return f"empty{number}"


def empty_node(number: int) -> dict[str, object]:
    """What is in a slot that holds no disk.

    Its size is what the guest takes for the size of every disk in this slot, for good. So it is huge: a read-only
    filesystem knows its own size.
    """
    return {"driver": "null-co", "node-name": empty_name(number), "size": EMPTY_SIZE, "read-only": True}


def image_node(name: str, fdset: int, disk: Disk, aio: Aio = "threads") -> dict[str, object]:
    """An image behind the descriptors of an fdset; both drivers named, so that no content can choose another.

    A qcow2 that names a file that it was written over gets none (blockdev-add, BlockdevOptionsGenericCOWFormat). It is
    left to threads: by io_uring, a QEMU that was killed more often took tables with it that the last writes need.
    """
    driver = "host_device" if disk.is_device else "file"
    file = {"driver": driver, "filename": f"/dev/fdset/{fdset}", "read-only": disk.readonly, "locking": "off",
            "aio": aio if disk.format == "raw" else "threads"}  # fmt: skip
    alone = {"backing": None} if disk.format == "qcow2" else {}
    return {"driver": disk.format, "node-name": name, "read-only": disk.readonly, "file": file, **alone}
