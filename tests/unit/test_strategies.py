"""From a name to a strategy: ours, those of other distributions, and what is neither."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from pykata.errors import ConfigError, UnknownStrategyError
from pykata.net.base import NetworkStrategy
from pykata.net.none import NoNetwork
from pykata.strategies import OURS, strategy

GROUP = "pykata.networks"


class Pigeon(NoNetwork):
    """A network from elsewhere."""


class Stone:
    """No network at all."""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entry points of another distribution, and one that can't be imported."""
    found = [
        EntryPoint("pigeon", f"{__name__}:Pigeon", GROUP),
        EntryPoint("stone", f"{__name__}:Stone", GROUP),
        EntryPoint("gone", "no_such_module:Thing", GROUP),
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: [p for p in found if p.group == group])


def network(choice: object) -> NetworkStrategy:
    found: object = strategy(NetworkStrategy, GROUP, choice)
    assert isinstance(found, NetworkStrategy)
    return found


def test_a_value_is_itself() -> None:
    mine = Pigeon()
    assert network(mine) is mine


def test_ours_need_no_installed_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: pytest.fail("the metadata was read"))
    assert network("none") == NoNetwork()


def test_what_is_installed_is_what_we_name() -> None:
    # The table in strategies.py and pyproject.toml say the same.
    declared = {group: {point.name: point.value for point in entry_points(group=group)} for group in OURS}
    assert declared == OURS


@pytest.mark.usefixtures("registered")
def test_another_distribution_s_strategy_is_found_by_its_name() -> None:
    assert type(network("pigeon")) is Pigeon


@pytest.mark.usefixtures("registered")
def test_an_unknown_name_lists_ours_and_theirs() -> None:
    with pytest.raises(UnknownStrategyError, match="no network named 'smoke'") as caught:
        network("smoke")
    assert caught.value.hint == f"known: {', '.join(sorted({*OURS[GROUP], 'gone', 'pigeon', 'stone'}))}"


@pytest.mark.usefixtures("registered")
def test_what_is_registered_as_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'stone' is registered as .*, which is no Network"):
        network("stone")


@pytest.mark.usefixtures("registered")
def test_what_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'gone'.*no_such_module"):
        network("gone")


@pytest.mark.parametrize("choice", [None, 3, NoNetwork, b"none", ["none"]])
def test_neither_a_value_nor_a_name(choice: object) -> None:
    with pytest.raises(ConfigError, match="network="):
        network(choice)


@pytest.mark.parametrize("name", ["", "None", "none ", "../none", "pykata.net.none:NoNetwork", "\0"])
def test_a_name_is_taken_as_it_is(name: str) -> None:
    with pytest.raises(UnknownStrategyError):
        network(name)


def test_importing_pykata_imports_no_agent_protocol() -> None:
    # It takes longer than all the rest together, and can be done while a guest boots.
    script = "import sys, pykata; print([m for m in ('h2', 'betterproto2', 'qemu.qmp', 'httpx') if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
