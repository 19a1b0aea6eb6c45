"""QEMU's command line, which nothing that a user says can bend; and the options that lead to it."""

from __future__ import annotations

import json
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata.errors import ConfigError, ToolMissingError
from pykata.hypervisors.qemu import QEMU
from pykata.hypervisors.qemu.command import Descriptors, command, kernel_arguments
from pykata.spec import Device, Disk, Nic, SerialTransport, VMSpec, VsockTransport

Machine = Literal["microvm", "q35"]

# What QEMU's option syntax, a shell and JSON each take for their own.
special = st.sampled_from([*",=:;'\"\\ \n\t{}[]/-x0$`|&<>#é\u2028"])
hostile = st.text(special, min_size=1, max_size=20) | st.text(min_size=1)


def spec(*devices: Device, transport: Any = None, cpus: int = 1) -> VMSpec:
    if transport is None:
        end = socket.socket.__new__(socket.socket)     # none is opened: nothing looks at it
        transport = SerialTransport(end, end)
    return VMSpec(Path("/kernel"), Path("/initrd"), transport, devices=devices, cpus=cpus)


def build(spec: VMSpec, machine: Machine = "microvm", **options: Any) -> list[str]:
    disks = [one for one in spec.devices if isinstance(one, Disk)]
    handles = Descriptors((30, 31), 32, 33, disks=tuple((40 + n,) for n in range(len(disks))))
    defaults: dict[str, Any] = {"slots": 2, "reclaim": True, "tsc_khz": 2_000_000}
    return command(Path("/bin/qemu"), machine, "tcg", spec, handles, **(defaults | options))


def options_of(argv: list[str], name: str) -> list[str]:
    return [value for option, value in pairwise(argv) if option == name]


def devices_of(argv: list[str]) -> list[dict[str, Any]]:
    return [json.loads(value) for value in options_of(argv, "-device")]


@given(tag=hostile, path=hostile, mac=hostile, key=hostile, value=hostile)
def test_no_string_leaves_its_place(tag: str, path: str, mac: str, key: str, value: str) -> None:
    devices = (Disk(tag, Path(path)), Nic("net", mac, {"type": "user", key: value}))
    argv = build(spec(*devices))
    plain = build(spec(Disk("tag", Path("path")), Nic("net", "mac", {"type": "user", "key": "value"})))
    # As many words, the same ones but for three, and those are JSON whose values are what was given.
    assert len(argv) == len(plain)
    differing = [(one, two) for one, two in zip(argv, plain, strict=True) if one != two]
    assert len(differing) <= 3
    assert all(isinstance(json.loads(one), dict) for one, _ in differing)
    by_driver = {device["driver"]: device for device in devices_of(argv)}
    assert by_driver["virtio-net-device"]["mac"] == mac
    assert tag in [device.get("serial") for device in devices_of(argv)]
    if key not in ("type", "id"):
        assert [json.loads(netdev) for netdev in options_of(argv, "-netdev")] == [
            {"type": "user", "id": "net0", key: value}
        ]
    # A path isn't even there.
    assert argv == build(spec(Disk(tag, Path("/elsewhere")), devices[1]))


def test_a_backend_cant_take_another_id() -> None:
    argv = build(spec(Nic("net", "mac", {"type": "user", "id": "control"})))
    assert [json.loads(netdev)["id"] for netdev in options_of(argv, "-netdev")] == ["net0"]


@pytest.mark.parametrize("machine", ["microvm", "q35"])
def test_what_every_machine_has(machine: Machine) -> None:
    argv = build(spec(), machine)
    assert argv[0] == "/bin/qemu"
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(argv)
    assert options_of(argv, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert options_of(argv, "-kernel") == ["/proc/self/fd/30"]
    assert options_of(argv, "-initrd") == ["/proc/self/fd/31"]
    assert options_of(argv, "-qmp") == ["chardev:control"]
    assert "socket,id=control,fd=32" in options_of(argv, "-chardev")
    assert "socket,id=agent,fd=33" in options_of(argv, "-chardev")
    ports = [device for device in devices_of(argv) if device["driver"] == "virtserialport"]
    assert [port["name"] for port in ports] == ["pykata.agent.0"]
    suffix = "-device" if machine == "microvm" else "-pci"
    assert all(device["driver"].endswith(suffix) for device in devices_of(argv) if device["driver"] != "virtserialport")
    # Nothing is opened by path, nothing listens, nothing has a default that looks at content.
    assert not [word for word in argv if "path=" in word or "server=" in word or "-drive" in word or "format=" in word]


def test_slots() -> None:
    argv = build(spec(), slots=3)
    nodes = [json.loads(node) for node in options_of(argv, "-blockdev")]
    assert [node["driver"] for node in nodes] == ["null-co"] * 3
    assert all(node["read-only"] for node in nodes)
    disks = [device for device in devices_of(argv) if device["driver"] == "virtio-blk-device"]
    assert [(disk["id"], disk["serial"], disk["drive"]) for disk in disks] == [
        (f"slot{n}", f"slot{n}", f"empty{n}") for n in range(3)
    ]
    assert not options_of(build(spec(), slots=0), "-blockdev")


def test_disks_are_raw_and_their_descriptors_in_sets() -> None:
    disks = (Disk("a", Path("/a")), Disk("b", Path("/b"), readonly=False))
    handles = Descriptors((30, 31), 32, 33, disks=((40,), (41, 42)))
    argv = command(Path("qemu"), "microvm", "tcg", spec(*disks), handles, slots=0, reclaim=False, tsc_khz=None)
    assert options_of(argv, "-add-fd") == ["fd=40,set=0", "fd=41,set=1", "fd=42,set=1"]
    nodes = [json.loads(node) for node in options_of(argv, "-blockdev")]
    assert [(node["driver"], node["file"]["driver"]) for node in nodes] == [("raw", "file")] * 2
    assert [node["file"]["filename"] for node in nodes] == ["/dev/fdset/0", "/dev/fdset/1"]
    assert [node["read-only"] for node in nodes] == [True, False]
    assert handles.all() == (30, 31, 32, 33, 40, 41, 42)


def test_how_much_translated_code_is_kept() -> None:
    assert options_of(build(spec()), "-accel") == ["tcg,tb-size=64"]
    assert options_of(build(spec(), code_cache=6), "-accel") == ["tcg,tb-size=6"]


@pytest.mark.parametrize("aio", ["io_uring", "threads"])
def test_how_disks_are_waited_for(aio: str) -> None:
    argv = build(spec(Disk("a", Path("/a")), Disk("b", Path("/b"), "qcow2")), aio=aio)
    files = [node["file"] for value in options_of(argv, "-blockdev") if "file" in (node := json.loads(value))]
    assert [file["aio"] for file in files] == [aio, "threads"]


def test_vsock() -> None:
    end = socket.socket.__new__(socket.socket)
    with Path("/dev/null").open("rb", buffering=0) as device:
        argv = build(spec(transport=VsockTransport(end, port=1, cid=77, device=device)))
    assert {"driver": "vhost-vsock-device", "guest-cid": 77, "vhostfd": "33"} in devices_of(argv)
    assert "pykata.vsock=1" in options_of(argv, "-append")[0].split()
    assert not [chardev for chardev in options_of(argv, "-chardev") if "agent" in chardev]


def test_an_emulated_cpu_says_that_it_copies_slowly() -> None:
    assert options_of(build(spec()), "-cpu") == ["max,-erms,-fsrm"]


def test_kernel_arguments() -> None:
    slow = kernel_arguments("microvm", "tcg", spec(), 2_000_000).split()
    assert {"panic=-1", "reboot=t", "tsc=reliable", "tsc_early_khz=2000000", "acpi=off"} <= set(slow)
    unknown = kernel_arguments("q35", "tcg", spec(), None).split()
    assert not [word for word in unknown if word.startswith(("tsc", "acpi"))]
    fast = kernel_arguments("q35", "kvm", spec(cpus=2), 5).split()
    assert not [word for word in fast if word.startswith(("tsc", "rcu"))]


@pytest.mark.parametrize(("options", "said"), [
    ({"machine": "pc"}, r"machine='pc' is unknown \(choose one of 'microvm', 'q35'\)"),
    ({"accel": "hvf"}, r"accel='hvf' is unknown \(choose one of 'auto', 'kvm', 'tcg'\)"),
    ({"agent": "tcp"}, r"agent='tcp' is unknown \(choose one of 'auto', 'serial', 'vsock'\)"),
    ({"disk_slots": 7}, r"disk_slots=7 is not a number from 0 to 6 \(machine='q35' has room for more\)"),
    ({"disk_slots": -1}, "disk_slots=-1 is not"),
    ({"disk_slots": True}, "disk_slots=True is not"),
    ({"code_cache": 3}, "code_cache=3 is not a number of MiB from 4 to 2047"),
    ({"code_cache": "64"}, "code_cache='64' is not"),
    ({"disk_slots": "3"}, "disk_slots='3' is not"),
])  # fmt: skip
def test_options_that_cant_be_right(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QEMU(**options)


def test_options() -> None:
    assert QEMU().features.disk_slots == 5
    assert QEMU("q35", disk_slots=20).features.disk_slots == 20
    assert QEMU(binary="/opt/qemu") == QEMU(binary=Path("/opt/qemu"))
    assert hash(QEMU()) == hash(QEMU())


@pytest.mark.parametrize(("asked", "said"), [
    ({"cpus": 0}, "cpus=0 is not a number from 1 to 64"),
    ({"memory": 8}, "memory=8 MiB is too little"),
    ({"devices": (Disk("a", Path("a")),) * 2}, "must differ"),
    ({"devices": (Disk("a" * 21, Path("a")),)}, "at most 20 bytes"),
    ({"devices": tuple(Disk(str(n), Path("a")) for n in range(9))}, r"9 devices don't fit .*use machine='q35'"),
])  # fmt: skip
async def test_machines_that_cant_be(asked: dict[str, Any], said: str) -> None:
    machine = QEMU(accel="tcg", disk_slots=2)
    async with machine.transport(Path()) as transport:
        with pytest.raises(ConfigError, match=said):
            async with machine.boot(VMSpec(Path("k"), Path("i"), transport, **asked), Path()):
                pass


async def test_no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("pykata.host.tools.EXTRA_PATH", ())
    for machine, said in (
        (QEMU(accel="tcg"), r"qemu-system-x86_64 is not installed \(apt-get install qemu-system-x86\)"),
        (QEMU(accel="tcg", binary="/no/qemu"), "binary='/no/qemu' is not a program"),
    ):
        async with machine.transport(Path()) as transport:
            with pytest.raises(ToolMissingError, match=said):
                async with machine.boot(VMSpec(Path("k"), Path("i"), transport), Path()):
                    pass
