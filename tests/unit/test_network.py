"""What a caller may ask of a network, and what is refused before anything starts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata import QEMU, Network, NoNetwork, Port, Sandbox, UserNetwork
from pykata.errors import ConfigError, UnknownStrategyError
from pykata.net.names import check_hosts, check_search, check_servers, servers_for_guests
from pykata.net.ports import parse_ports, port
from pykata.net.running import RunningNetwork
from pykata.spec import Attachment, Interface
from pykata.strategies import OURS


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (80, Port(80)), ("80", Port(80)), ("8080:80", Port(80, 8080)), ("8080:80/udp", Port(80, 8080, protocol="udp")),
        ("10.0.0.1:8080:80", Port(80, 8080, "10.0.0.1")), ("127.0.0.1::80", Port(80)),
        ("[::1]:8080:80", Port(80, 8080, "::1")),
        ("[::1]:80", Port(80, 0, "::1")), (Port(1, 2, "::"), Port(1, 2, "::")), ("0:80", Port(80)),
    ],
)  # fmt: skip
def test_a_port(given: object, found: Port) -> None:
    assert port(given) == found


def test_ports_as_a_mapping() -> None:
    ports = parse_ports({8080: 80, ("127.0.0.1", 0): "53/udp", ("::1", 81): 81})
    assert ports == (Port(80, 8080), Port(53, 0, protocol="udp"), Port(81, 81, "::1"))


@pytest.mark.parametrize(
    "given",
    [
        "80", 80, ["x"], [0], [65536], ["80/sctp"], ["a:80"], ["1.2.3:80:80"], ["::1:80:80"], [-1], [True], [None],
        [80.0],
        {8080: "1:80"}, {"8080": 80}, {True: 80}, {("x", 1): 2}, {8080: None}, [Port(0)], ["80:80", "80:81"], ["٨٠"],
        ["1" * 5000], [Port(80, protocol="icmp")],  # type: ignore[arg-type]
        [b"80"], range(1, 400),
    ],
)  # fmt: skip
def test_what_is_no_port_is_named(given: Any) -> None:
    with pytest.raises(ConfigError, match="ports"):
        Network(ports=given)


@given(st.text(alphabet="0123456789:/.[]udptc "))
def test_any_text_is_a_port_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        found = port(text)
        assert 1 <= found.guest <= 65535
        assert 0 <= found.host <= 65535


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (check_servers, "1.1.1.1"), (check_servers, ["x"]), (check_servers, ["127.0.0.53"]), (check_servers, ["::1"]),
        (check_servers, ["::"]), (check_servers, ["fe80::1%eth0"]), (check_servers, ["1.1.1.1"] * 4),
        (check_servers, [1]), (check_search, ["a b"]), (check_search, ["a\nnameserver x"]), (check_search, ["-a"]),
        (check_search, "a.example"), (check_search, ["a..b"]), (check_search, [""]), (check_search, ["a"] * 33),
        (check_hosts, {"a b": "1.1.1.1"}), (check_hosts, {"a": "x"}), (check_hosts, {"a": None}), (check_hosts, ["a"]),
        (check_hosts, {"": "1.1.1.1"}), (check_hosts, {"a\n": "1.1.1.1"}), (check_hosts, {1: "1.1.1.1"}),
    ],
)  # fmt: skip
def test_names_that_cannot_be(check: Any, bad: Any) -> None:
    with pytest.raises(ConfigError):
        check(bad)


def test_names_are_as_the_guest_needs_them() -> None:
    assert check_servers(["2001:DB8::0:1"]) == ("2001:db8::1",)
    assert check_hosts({"db_1.corp": "10.0.0.5"}) == {"db_1.corp": "10.0.0.5"}
    assert check_search(("a.example", "b_c")) == ("a.example", "b_c")


def test_a_sandbox_takes_a_name_a_strategy_or_all_of_it() -> None:
    for network in ("user", UserNetwork(), Network(), Network(UserNetwork()), Network("user")):
        assert Sandbox(network=network).options.network == Network(UserNetwork())
    assert Sandbox().options.network.strategy == NoNetwork()
    assert Sandbox(network=Network("none", hosts={"a": "1.2.3.4"})).options.network.hosts == {"a": "1.2.3.4"}


def test_what_a_strategy_cannot_do_names_those_that_can() -> None:
    with pytest.raises(ConfigError, match="'none' can't publish ports") as caught:
        Sandbox(network=Network("none", ports=[80]))
    assert "user" in caught.value.hint
    with pytest.raises(ConfigError, match="'none' can't enforce"):
        Sandbox(network=Network("none", allow=["pypi.org"]))
    with pytest.raises(ConfigError, match="'none' has no use for dns"):
        Sandbox(network=Network("none", dns=["1.1.1.1"]))
    with pytest.raises(UnknownStrategyError):
        Sandbox(network=Network("pigeon"))
    with pytest.raises(ConfigError, match="via='tor'"):
        UserNetwork(via="tor")  # type: ignore[arg-type]


def test_a_running_network_without_a_policy() -> None:
    attachment = Attachment(
        interfaces=(Interface("52:54:00:00:00:01", "eth0", addresses=("10.0.0.2/24", "fd00::2/64")),),
        published=(Port(80, 8080),),
    )
    network = RunningNetwork.of(attachment)
    assert network.addresses == ("10.0.0.2", "fd00::2")
    assert network.ports == (Port(80, 8080),)


async def test_its_policy_cannot_be_changed() -> None:
    network = RunningNetwork.of(Attachment())
    with pytest.raises(ConfigError, match="no policy"):
        await network.allow("pypi.org")
    with pytest.raises(ConfigError, match="no policy"):
        _ = [event async for event in network.events()]


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("nameserver 10.0.0.53\nnameserver 127.0.0.1\n", "", ("10.0.0.53",)),
        ("nameserver 127.0.0.53\noptions edns0\n", "nameserver 192.0.2.1\nnameserver fe80::1%2\n", ("192.0.2.1",)),
        ("# none\nnameserver\nnameserver x\n", "", ()),
        ("".join(f"nameserver 10.0.0.{n}\n" for n in range(1, 6)), "", ("10.0.0.1", "10.0.0.2", "10.0.0.3")),
    ],
)
def test_name_servers_that_a_guest_can_reach(
    first: str, second: str, found: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (tmp_path / "first", tmp_path / "second", tmp_path / "missing")
    for file, text in zip(files, (first, second), strict=False):
        file.write_text(text)
    monkeypatch.setattr("pykata.net.names.RESOLV_CONFS", files)
    assert servers_for_guests() == found


def test_qemu_has_every_network_of_ours() -> None:
    assert set(QEMU().features.networks) == set(OURS["pykata.networks"])
