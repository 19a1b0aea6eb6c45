"""What a guest may reach, as it is written, and what that says of a destination."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykata import ConfigError, Network, Rate
from pykata.net.policy.decide import Judge
from pykata.net.policy.rules import parse_rules, policy_of


def judge(allow: list[str] | None, deny: list[str] | None = None, *, own: str = "192.0.2.9") -> Judge:
    policy = policy_of(allow, deny or [], None)
    assert policy is not None
    return Judge(policy, lambda address: str(address) == own)


def verdict(found: Judge, protocol: str, address: str, port: int, *names: str) -> str:
    decision = found.destination(protocol, ipaddress.ip_address(address), port, names)
    return decision.reason or decision.verdict


@pytest.mark.parametrize(
    ("entry", "protocol", "name", "network", "ports"),
    [
        ("pypi.org", "", "pypi.org", None, ()),
        ("PyPI.org.", "", "pypi.org", None, ()),
        ("*.debian.org:443", "", "*.debian.org", None, ((443, 443),)),
        ("10.0.0.0/8:443", "", "", "10.0.0.0/8", ((443, 443),)),
        ("udp:1.2.3.4:53", "udp", "", "1.2.3.4/32", ((53, 53),)),
        ("[2001:db8::/32]:8000-8999", "", "", "2001:db8::/32", ((8000, 8999),)),
        ("2001:db8::1", "", "", "2001:db8::1/128", ()),
        ("icmp:10.0.0.0/8", "icmp", "", "10.0.0.0/8", ()),
        ("db", "", "db", None, ()),
        ("münchen.example", "", "xn--mnchen-3ya.example", None, ()),
        ("*.münchen.example", "", "*.xn--mnchen-3ya.example", None, ()),
    ],
)
def test_entries(
    entry: str, protocol: str, name: str, network: str | None, ports: tuple[tuple[int, int], ...]
) -> None:
    (rule,) = parse_rules("allow", [entry])
    wanted = None if network is None else ipaddress.ip_network(network)
    assert (rule.protocol, rule.name, rule.network, rule.ports) == (protocol, name, wanted, ports)


@pytest.mark.parametrize(
    ("entry", "remedy"),
    [
        ("", "written as"), ("https://pypi.org/", "name of its host"), ("*", "leave allow out"),
        ("10.0.0.1/8", "give 10.0.0.0/8"), ("1.2.3", "written as"), ("300.1.1.1", "written as"),
        ("a..b", "written as"), ("*.*.example", "written as"), ("a.*.example", "written as"), ("a b", "written as"),
        ("example.org:0", "neither a port"), ("example.org:65536", "neither a port"),
        ("example.org:", "neither a port"),
        ("example.org:9-8", "neither a port"), ("example.org:٣", "neither a port"), ("[::1", "in brackets"),
        ("[1.2.3.4]:80", "only IPv6"), ("fe80::1%eth0", "neither a name"), ("udp:example.org", "no port"),
        ("icmp:example.org", "by address"), ("icmp:1.2.3.4:8", "by address"), ("x" * 64 + ".example", "written as"),
        (None, "is not text"), (b"x", "is not text"), (5, "is not text"),
    ],
)  # fmt: skip
def test_bad_entries_are_named(entry: object, remedy: str) -> None:
    for argument in ("allow", "deny"):
        with pytest.raises(ConfigError, match=remedy) as caught:
            Network(**{argument: [entry]})  # type: ignore[arg-type]
        assert f"{argument}: {entry!r}" in str(caught.value)


@pytest.mark.parametrize("given", ["pypi.org", b"pypi.org", 5])
def test_lists_that_are_none(given: object) -> None:
    with pytest.raises((ConfigError, TypeError), match="allow"):
        policy_of(given, [], None)  # type: ignore[arg-type]


@given(st.text(max_size=40))
def test_any_text_is_an_entry_or_refused(text: str) -> None:
    try:
        (rule,) = parse_rules("allow", [text])
    except ConfigError:
        return
    assert bool(rule.name) != (rule.network is not None)


@given(
    st.one_of(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(lambda each: f"[{each}]"), st.just("a.example")),
    st.integers(1, 65535), st.sampled_from(["tcp", "udp"]), st.integers(1, 65535),
)  # fmt: skip
def test_an_entry_with_a_port_is_about_that_port(host: str, port: int, protocol: str, other: int) -> None:
    (rule,) = parse_rules("allow", [f"{protocol}:{host}:{port}"])
    assert rule.admits(protocol, port)
    assert rule.admits(protocol, other) == (other == port)
    assert not rule.admits("udp" if protocol == "tcp" else "tcp", port)


@pytest.mark.parametrize("rate", [
    {"bits_per_second": 0}, {"bits_per_second": True}, {"bits_per_second": 1e6}, {"packets_per_second": 0},
    {"bits_per_second": 1 << 50},
])  # fmt: skip
def test_bad_rates(rate: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(rate))):
        Rate(**rate)
    with pytest.raises(ConfigError, match="rate="):
        Network(rate=5)  # type: ignore[arg-type]


# --- what it says ---


def test_names() -> None:
    found = judge(["pypi.org", "*.debian.org", "a.example:22"], ["secret.debian.org", "pypi.org:22"])
    assert [found.name(name).verdict for name in (
        "pypi.org", "deb.debian.org", "a.b.debian.org", "a.example", "debian.org", "xpypi.org", "pypi.org.evil.example",
        "secret.debian.org", "org", "",
    )] == ["pass"] * 4 + ["deny"] * 6  # fmt: skip


def test_names_have_the_ports_of_the_web_and_show_themselves() -> None:
    found = judge(["pypi.org", "git.example:22", "udp:time.example:123"])
    assert verdict(found, "tcp", "20.0.0.1", 443, "pypi.org") == "inspect"
    assert verdict(found, "tcp", "20.0.0.1", 22, "pypi.org") == "port"
    assert verdict(found, "udp", "20.0.0.1", 443, "pypi.org") == "port"
    assert verdict(found, "tcp", "20.0.0.1", 22, "git.example") == "inspect"
    assert verdict(found, "udp", "20.0.0.1", 123, "time.example") == "pass"
    assert verdict(found, "icmp", "20.0.0.1", 0, "pypi.org") == "port"
    assert verdict(found, "tcp", "20.0.0.1", 443) == "address"


def test_networks() -> None:
    found = judge(["10.0.0.0/8:443", "20.0.0.0/24", "udp:30.0.0.1"], ["20.0.0.9", "udp:20.0.0.0/24:53"])
    assert verdict(found, "tcp", "10.1.2.3", 443) == "pass"
    assert verdict(found, "udp", "10.1.2.3", 443) == "port"
    assert verdict(found, "tcp", "10.1.2.3", 80) == "port"
    assert [verdict(found, each, "20.0.0.1", 7) for each in ("tcp", "udp", "icmp")] == ["pass"] * 3
    assert verdict(found, "tcp", "20.0.0.9", 7) == "denied"
    assert verdict(found, "udp", "20.0.0.1", 53) == "denied"
    assert verdict(found, "udp", "30.0.0.1", 53) == "pass"
    assert verdict(found, "tcp", "30.0.0.1", 53) == "port"


@pytest.mark.parametrize("address", [
    "169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "127.0.0.1", "0.0.0.0", "224.0.0.1",  # noqa: S104
    "255.255.255.255", "fd00:ec2::254", "::1", "fe80::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "192.0.2.9",
])  # fmt: skip
def test_what_must_be_named(address: str) -> None:
    everything = judge(["0.0.0.0/0", "::/0"])
    assert verdict(everything, "tcp", address, 80) == "protected"
    assert verdict(judge(None, ["20.0.0.1"]), "tcp", address, 80) == "protected"
    assert verdict(judge([f"[{address}]:80" if ":" in address else f"{address}:80"]), "tcp", address, 80) == "pass"
    assert not everything.answer(ipaddress.ip_address(address))


def test_a_part_of_what_must_be_named_names_it() -> None:
    assert verdict(judge(["169.254.0.0/16"]), "tcp", "169.254.169.254", 80) == "pass"
    assert verdict(judge(["192.0.2.0/24"]), "tcp", "192.0.2.9", 80) == "protected"     # an address of this host
    assert verdict(judge(["192.0.2.0/24"]), "tcp", "192.0.2.8", 80) == "pass"


def test_answers_lead_outside_or_to_what_is_allowed_by_itself() -> None:
    found = judge(["a.example", "10.1.0.0/16:443"])
    for address, good in (("20.0.0.1", True), ("10.1.0.5", True), ("10.2.0.5", False), ("192.168.0.1", False),
                          ("fd00::1", False), ("2a00:1450::1", True), ("2002:a00:1::", False), ("100.64.0.1", False)):
        assert found.answer(ipaddress.ip_address(address)) == good, address


def test_without_allow_everything_is_allowed_that_is_not_denied() -> None:
    found = judge(None, ["evil.example", "20.0.0.0/24"])
    assert found.name("good.example").verdict == "pass"
    assert found.name("evil.example").verdict == "deny"
    assert verdict(found, "tcp", "20.0.0.1", 80) == "denied"
    assert verdict(found, "udp", "30.0.0.1", 80) == "pass"
    connection = found.destination("tcp", ipaddress.ip_address("30.0.0.1"), 443, ())
    assert (connection.verdict, connection.anything) == ("inspect", True)
    assert found.shown("evil.example", 443, connection).verdict == "deny"
    assert found.shown("good.example", 443, connection).verdict == "pass"


def test_changes() -> None:
    policy = policy_of(["a.example"], ["b.example"], None)
    assert policy is not None
    more = policy.with_allowed(["B.example", "c.example"])
    assert [rule.text for rule in more.allow or ()] == ["a.example", "b.example", "c.example"]
    assert more.deny == ()
    less = more.with_denied(["a.example"])
    assert [rule.text for rule in less.allow or ()] == ["b.example", "c.example"]
    with pytest.raises(ConfigError, match="'x y'"):
        policy.with_allowed(["x y"])


def test_no_end_of_rules() -> None:
    with pytest.raises(ConfigError, match="too many"):
        parse_rules("allow", [f"a{number}.example" for number in range(5000)])
