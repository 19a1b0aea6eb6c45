"""What a caller may ask for, and what is refused with a name, a value and a remedy."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata.errors import ConfigError, ImageReferenceError, IsolationError, SandboxClosedError, UnknownStrategyError
from pykata.hypervisors.qemu import QEMU
from pykata.options import check_cmd, check_env, check_hostname
from pykata.sandbox import Sandbox
from pykata.sizes import parse_size
from pykata.spec import MIB
from pykata.templates import Template


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (256, 256 * MIB), (0.5, MIB // 2), ("512M", 512 * MIB), ("512", 512 * MIB), ("1.5G", 1536 * MIB),
        ("64MiB", 64 * MIB), ("64mb", 64 * MIB), ("1024K", MIB), ("4096B", 4096), (" 2 G ", 2048 * MIB),
        ("1T", MIB * MIB),
    ],
)  # fmt: skip
def test_a_size_is_mebibytes_or_text(value: object, size: int) -> None:
    assert parse_size("memory", value) == size


@pytest.mark.parametrize(
    "value",
    ["", "big", "-1", -1, "1X", None, True, "1 2", float("nan"), float("inf"), b"1M", 2**60,
     "9" * 400 + "G", "1048576T"],
)
def test_what_is_no_size_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match="memory="):
        parse_size("memory", value)


@given(st.text())
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert parse_size("disk", text) >= 0


@pytest.mark.parametrize("cmd", ["echo hi", b"echo", [], [""], ["a", 1], ["a\0b"], (), 5, ["a", "\udcff"]])
def test_a_command_is_a_list_of_text(cmd: Any) -> None:
    with pytest.raises(ConfigError, match="cmd"):
        check_cmd(cmd)


@pytest.mark.parametrize(
    "env",
    [{"": "x"}, {"A=B": "x"}, {"A": 1}, {"A": "\0"}, [("A", "B")], {1: "x"}, {"A": "\udcff"}, {"\udcff": "x"}],
)
def test_env_is_a_mapping_that_a_process_can_have(env: Any) -> None:
    with pytest.raises(ConfigError, match="env"):
        check_env(env)


@pytest.mark.parametrize("name", ["-a", "a-", "a.b", "ä", "x" * 64, "a b", "", 5, b"x"])
def test_a_hostname_is_one_label(name: Any) -> None:
    with pytest.raises(ConfigError, match="hostname="):
        check_hostname(name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hypervisor": "vmware"}, "qemu"),
        ({"fs": "nfs"}, "block"),
        ({"network": "carrier-pigeon"}, "none"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UnknownStrategyError) as caught:
        Sandbox(**arguments)
    assert said in caught.value.hint
    assert repr(next(iter(arguments.values()))) in caught.value.message


@pytest.mark.parametrize(
    "arguments",
    [
        {"memory": 8}, {"memory": "1K"}, {"memory": "much"}, {"cpus": 0}, {"cpus": 1.5}, {"cpus": True},
        {"cpus": 10_000}, {"disk": 0}, {"disk": "-1"},
        {"timeout": 0}, {"timeout": "1"}, {"timeout": float("nan")}, {"boot_timeout": -1},
        {"hostname": "no spaces"}, {"env": {"A=": ""}}, {"isolation": "some"}, {"hypervisor": 3}, {"network": None},
        {"timeout": 10**400}, {"boot_timeout": 10**400}, {"admission_timeout": 10**400},
        {"hostname": ""}, {"hostname": 0},
        {"registries": "host"}, {"registries": {}}, {"progress": "yes"}, {"progress": False},
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Sandbox(**arguments)


@pytest.mark.parametrize("image", [None, 0, b"builtin:busybox", Path("./images/app"), []])
async def test_an_image_is_named_by_text(image: Any) -> None:
    for use in (lambda: Sandbox().process(image, ["true"]), lambda: Template(image)):
        with pytest.raises(ImageReferenceError, match="image="):
            use()
    if image is not None:
        with pytest.raises(ImageReferenceError, match="image="):
            await Sandbox().detach("box", image)


@pytest.mark.parametrize(
    "wrong", [{"cwd": 0}, {"cwd": []}, {"pull": ""}, {"pull": 0}, {"entrypoint": ""}, {"entrypoint": 0}]
)
def test_what_is_no_value_at_all_is_not_taken_for_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sandbox().process("builtin:busybox", ["true"], **wrong)


@pytest.mark.parametrize("path", [None, 3, b"x", "", "a\0b"])
def test_a_path_of_this_machine(path: Any) -> None:
    with pytest.raises(ConfigError, match="path="):
        Sandbox.restore(path)


def test_a_strategy_is_a_value_or_its_name() -> None:
    assert Sandbox(QEMU(machine="q35")).options.hypervisor == QEMU(machine="q35")
    assert Sandbox("qemu").options.hypervisor == QEMU()


def test_a_closed_sandbox_says_so() -> None:
    with pytest.raises(SandboxClosedError):
        _ = Sandbox().accel


async def test_hardware_isolation_is_refused_without_kvm() -> None:
    with pytest.raises(IsolationError, match="hardware"):
        async with Sandbox(QEMU(accel="tcg"), isolation="hardware"):
            raise AssertionError("it was entered")
