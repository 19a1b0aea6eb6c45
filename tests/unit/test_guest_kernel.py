"""The kernel's config: what was asked for and what Kconfig made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykata.errors import ConfigError
from pykata.guest.inputs import kernel_files, source_tree
from pykata.guest.kernel import dropped_options, kernel_inputs, parse_config, source_pin

ROOT = Path(__file__).resolve().parents[2]


def test_a_config_has_values_and_options_that_are_off() -> None:
    text = '# a comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="x y"\nCONFIG_D=64\n'
    assert parse_config(text) == {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_C": '"x y"', "CONFIG_D": "64"}


def test_a_dropped_option_is_named_with_what_was_asked() -> None:
    fragments = ["CONFIG_A=y\nCONFIG_B=y\n", "# CONFIG_C is not set\n# CONFIG_D is not set\n"]
    assert dropped_options("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\n", fragments) == ["CONFIG_B=y", "CONFIG_C=n"]


def test_a_later_fragment_wins() -> None:
    assert dropped_options("CONFIG_A=y\n", ["# CONFIG_A is not set\n", "CONFIG_A=y\n"]) == []


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_no_two_fragments_ask_for_opposite_things(arch: str) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for path in kernel_files(ROOT, arch):
        for name, value in parse_config(path.read_text()).items() if path.suffix == ".config" else ():
            assert seen.setdefault(name, (value, path.name))[0] == value, f"{name}: {path.name}, {seen[name][1]}"


def test_there_are_no_modules_and_no_vsock_loopback() -> None:
    options = parse_config("".join(p.read_text() for p in kernel_files(ROOT, "x86_64") if p.suffix == ".config"))
    assert options["CONFIG_MODULES"] == "n"
    assert options["CONFIG_VSOCKETS_LOOPBACK"] == "n"


def test_the_sources_of_this_package_are_found() -> None:
    assert source_tree() == ROOT
    assert source_pin(ROOT)["package"] == "linux-source-6.12"


@pytest.mark.anyio
async def test_an_architecture_without_a_kernel_is_a_typed_error() -> None:
    with pytest.raises(ConfigError, match="'sparc'"):
        await kernel_inputs(ROOT, "sparc")
