"""CNI, with Debian's plugins and some of the tests' own."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata.errors import CNIError, ConfigError, ToolMissingError
from pykata.net import netns
from pykata.net.base import Wanted
from pykata.net.cni import CNI
from pykata.net.cni_conf import PLUGINS
from pykata.net.leftovers import undo_all
from pykata.net.netlink import netlink
from pykata.spec import Port
from tests.cni_chain import BRIDGE, chain, without_bridge
from tests.host.stand_in import stand_in
from tests.worlds import ping, run


@pytest.fixture
def sandbox_dir(tmp_path: Path) -> Path:
    path = tmp_path / "0123456789"
    path.mkdir()
    return path


@pytest.fixture
async def no_bridge() -> AsyncIterator[None]:
    yield
    await without_bridge()


async def rules() -> str:
    with netns.opened() as host:
        return await run(host, "iptables-save") + await run(host, "ip6tables-save")


@pytest.mark.usefixtures("no_bridge")
async def test_both_families(tmp_path: Path, sandbox_dir: Path) -> None:
    async with CNI(chain(tmp_path, six=True)).attach(sandbox_dir, Wanted()) as attachment:
        (interface,) = attachment.interfaces
        assert interface.addresses == ("10.66.0.2/24", "fd66::2/64")
        assert {each.gateway for each in interface.routes} == {"10.66.0.1", "fd66::1"}
        async with stand_in(attachment) as guest:
            for gateway in ("10.66.0.1", "fd66::1"):
                assert "1 packets received" in await ping(guest, gateway)


@pytest.mark.parametrize("version", ["0.4.0", "1.0.0"])
@pytest.mark.usefixtures("no_bridge")
async def test_bridge_portmap_and_firewall(tmp_path: Path, sandbox_dir: Path, version: str) -> None:
    wanted = Wanted(ports=(Port(80, 18080),))
    async with CNI(chain(tmp_path, version)).attach(sandbox_dir, wanted) as attachment:
        (interface,) = attachment.interfaces
        assert interface.addresses == ("10.66.0.2/24",)
        assert {each.gateway for each in interface.routes} == {"10.66.0.1"}
        assert interface.mtu == 1400
        assert (attachment.nameservers, attachment.search) == (("10.66.0.1",), ("lab.test",))
        assert attachment.published == wanted.ports
        assert "18080" in await rules()
        async with stand_in(attachment) as guest:
            assert "1 packets received" in await ping(guest, "10.66.0.1")
            with netns.opened() as host:
                assert "1 packets received" in await ping(host, "10.66.0.2")
            assert await _through(guest, 18080) == b"hello"
    said = await rules()
    assert "18080" not in said
    assert "10.66.0.2" not in said
    assert not [each for each in (tmp_path / "ipam" / "lab").iterdir() if each.name.startswith("10.")]


async def _through(guest: netns.Netns, port: int) -> bytes:
    """What a server in the guest says to who comes through the host's port."""
    loop = asyncio.get_running_loop()
    with netns.socket_in(guest, socket.AF_INET, socket.SOCK_STREAM) as server, socket.socket() as client:
        server.bind(("10.66.0.2", 80))
        server.listen()
        for each in (server, client):
            each.setblocking(False)
        with anyio.fail_after(300):
            await loop.sock_connect(client, ("127.0.0.1", port))
            connection, _ = await loop.sock_accept(server)
            with connection:
                await loop.sock_sendall(connection, b"hello")
            return await loop.sock_recv(client, 100)


@pytest.mark.usefixtures("no_bridge")
async def test_what_a_killed_process_left_is_deleted(tmp_path: Path, sandbox_dir: Path) -> None:
    async with CNI(chain(tmp_path)).attach(sandbox_dir, Wanted(ports=(Port(80, 18081),))):
        await undo_all(sandbox_dir)
        assert "18081" not in await rules()
        assert not (sandbox_dir / "netns").exists()
        with netns.opened() as host:
            async with netlink(host) as kernel:
                bridge = await kernel.link(BRIDGE)
                assert not [each for each in await kernel.links() if each.master == bridge.index]


# --- plugins of our own ---

PLUGIN = """#!/bin/sh
echo "$CNI_COMMAND ${0##*/} $(cat)" >> LOG
{ case "$CNI_COMMAND" in %s esac; } 2>/dev/null
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    folder = tmp_path / "plugins"
    folder.mkdir()
    return folder


def plugin(folder: Path, name: str, cases: str) -> None:
    path = folder / name
    path.write_text(PLUGIN.replace("LOG", str(folder.parent / "log")) % cases)
    path.chmod(0o755)


def calls(tmp_path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for line in (tmp_path / "log").read_text().splitlines():
        command, name, conf = line.split(" ", 2)
        yield command, name, json.loads(conf)


def conf(*types: str) -> dict[str, Any]:
    return {"cniVersion": "1.0.0", "name": "own", "plugins": [{"type": each} for each in types]}


RESULT = '{"cniVersion": "1.0.0", "ips": []}'
REFUSAL = '{"cniVersion": "1.0.0", "code": 11, "msg": "try again", "details": "no room"}'


async def test_a_refusal_is_told_and_everything_is_deleted(tmp_path: Path, sandbox_dir: Path, plugins: Path) -> None:
    plugin(plugins, "good", f"ADD) echo '{RESULT}';; DEL) echo no; exit 3;;")
    plugin(plugins, "bad", f"ADD) echo '{REFUSAL}'; exit 1;;")
    with pytest.raises(CNIError, match="the CNI plugin bad failed: try again: no room") as caught:
        async with CNI(conf("good", "bad"), path=[str(plugins)]).attach(sandbox_dir, Wanted()):
            pass
    assert (caught.value.code, caught.value.msg, caught.value.details) == (11, "try again", "no room")
    made = list(calls(tmp_path))
    assert [each[:2] for each in made] == [("ADD", "good"), ("ADD", "bad"), ("DEL", "bad"), ("DEL", "good")]
    assert made[1][2]["prevResult"] == json.loads(RESULT)
    assert made[0][2] == {"cniVersion": "1.0.0", "name": "own", "type": "good"}


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ("ADD) echo what;;", "its result is no JSON object"),
        ("ADD) echo oops >&2; exit 4;;", "it ended with code 4"),
        ("ADD) kill -9 $$;;", "it ended with code -9"),
        ("ADD) sleep 1000;;", "it took longer than 5 s"),
        (f"ADD) echo '{RESULT}';; CHECK) echo '{REFUSAL}'; exit 1;;", "try again"),
    ],
)
async def test_what_plugins_do_wrong(
    tmp_path: Path, sandbox_dir: Path, plugins: Path, cases: str, message: str
) -> None:
    plugin(plugins, "bad", cases)
    timeout = 5.0 if "sleep" in cases else 300.0
    with pytest.raises(CNIError, match=message):
        async with CNI(conf("bad"), path=[str(plugins)], timeout=timeout).attach(sandbox_dir, Wanted()):
            pass
    assert [each[0] for each in calls(tmp_path)][-1] == "DEL"


async def test_a_plugin_that_is_not_there(sandbox_dir: Path) -> None:
    for wrong in (conf("nosuch"), {**conf(), "plugins": [{"type": "bridge", "ipam": {"type": "nosuch"}}]}):
        with pytest.raises(ToolMissingError, match="the CNI plugin 'nosuch' is in none of"):
            async with CNI(wrong, path=PLUGINS).attach(sandbox_dir, Wanted()):
                pass
    assert not (sandbox_dir / "netns").exists()


def test_configurations(tmp_path: Path) -> None:
    file = tmp_path / "10-own.conflist"
    file.write_text(json.dumps(conf("a", "b")))
    assert CNI(file).conf.name == "own"
    assert [each["type"] for each in CNI(str(file)).conf.plugins] == ["a", "b"]
    assert CNI({"cniVersion": "0.4.0", "name": "one", "type": "a"}).conf.plugins[0]["type"] == "a"
    file.write_text("{")
    for wrong, message in (
        ("", "cni needs a configuration"), (file, "is not JSON"), (tmp_path / "nosuch", "can't read"),
        ("nosuch", "there is no CNI network 'nosuch'"), ({**conf("a"), "cniVersion": "9"}, "cniVersion '9'"),
        (conf(), "there are no plugins"), (conf("../a"), "no name of a program"), ({"type": "a"}, "has no name"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            CNI(wrong)
    with pytest.raises(ConfigError, match="timeout=0"):
        CNI(conf("a"), timeout=0)


async def test_ports_need_a_plugin_for_them(tmp_path: Path, sandbox_dir: Path, plugins: Path) -> None:
    plugin(plugins, "good", f"ADD) echo '{RESULT}';;")
    with pytest.raises(ConfigError, match="no plugin of the network 'own' publishes ports"):
        async with CNI(conf("good"), path=[str(plugins)]).attach(sandbox_dir, Wanted(ports=(Port(80, 8080),))):
            pass
