"""The network that CNI plugins make, for a guest in the place of a container (CNI specification 1.0.0 and 0.4.0)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

from attrs import Factory, evolve, field, frozen

from pykata.errors import ConfigError
from pykata.host import finish
from pykata.net import cni_conf
from pykata.net.base import NetworkStrategy, Wanted
from pykata.net.cni_conf import NetworkList
from pykata.net.cni_run import Invocation, check_plugins, keep_result, kept_result
from pykata.net.leftovers import recorded
from pykata.net.netns import made, require
from pykata.net.tcfilter import redirected
from pykata.spec import Attachment, Port

log = logging.getLogger(__name__)


def _timeout(value: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"timeout={value!r} is no number of seconds")
    return float(value)


@frozen
class CNI(NetworkStrategy):
    """The network of a CNI configuration: its plugins are run as a container engine would run them.

    ::

        Sandbox(network=CNI("/etc/cni/net.d/10-lab.conflist"))
        Sandbox(network=Network(CNI("lab"), ports={8080: 80}))      # by the name of the network; with portmap in it

    ``conf`` is a file (a list of plugins or a single one), the name of a network in ``/etc/cni/net.d``, or what would
    be in such a file. The plugins are looked for in ``path``, or ``$CNI_PATH``, or where Debian and others install
    them. They get a namespace of its own, and ``interface`` in it is the guest's, with the addresses, routes and MAC
    that it has by then; name servers are those of the result. ``args`` are given as ``CNI_ARGS``. Each plugin has
    ``timeout`` seconds. DEL runs on every way out, and by ``pykata gc`` after a crash.

    It takes CAP_NET_ADMIN and CAP_SYS_ADMIN. Entering raises :class:`CNIError` for what a plugin refuses.
    """

    name: ClassVar[str] = "cni"
    enforces: ClassVar[bool] = True
    publishes: ClassVar[bool] = True

    conf: NetworkList = field(default=Factory(lambda: cni_conf.read("")), converter=cni_conf.read)
    path: tuple[str, ...] = field(default=(), converter=cni_conf.directories, kw_only=True)
    interface: str = field(default="eth0", kw_only=True)
    args: Mapping[str, str] = field(factory=dict, kw_only=True)
    timeout: float = field(default=60.0, converter=_timeout, kw_only=True)

    @asynccontextmanager
    async def attach(self, run_dir: Path, wanted: Wanted) -> AsyncIterator[Attachment]:
        require("NET_ADMIN", "SYS_ADMIN")
        check_plugins(self.conf, self.path)
        if wanted.ports and not self.conf.can("portMappings"):
            raise ConfigError(f"no plugin of the network {self.conf.name!r} publishes ports",
                              hint='portmap does, with "capabilities": {"portMappings": true}')
        async with AsyncExitStack() as stack:
            pin = run_dir / "netns"
            await stack.enter_async_context(recorded(run_dir, "pin", path=str(pin)))
            netns = await stack.enter_async_context(made(pin))
            invocation = Invocation(
                self.conf, self.path, f"pykata-{run_dir.name}", str(pin), self.interface, self.timeout,
                dict(self.args), [_mapping(each) for each in wanted.ports],
            )  # fmt: skip
            result = await stack.enter_async_context(_added(invocation, run_dir))
            names = _interfaces(result, str(pin)) or (self.interface,)
            attachment = await stack.enter_async_context(redirected(netns, run_dir, wanted, names))
            yield _with_names(attachment, result) + Attachment(published=wanted.ports)


@asynccontextmanager
async def _added(invocation: Invocation, run_dir: Path) -> AsyncIterator[Mapping[str, Any]]:
    """ADD, and CHECK whether it is so; DEL in any case."""
    async with recorded(run_dir, "cni", place=str(run_dir), **invocation.as_json()):
        result = await invocation.add()
        keep_result(run_dir, result)
        await invocation.check(result)
        yield result


async def deleted(place: str, **what: Any) -> None:
    """DEL for what was written down. A plugin that fails is logged, and the others have their turn."""
    invocation = Invocation.from_json(what)
    for error in await finish(invocation.delete(kept_result(Path(place)))):
        log.warning("after CNI's DEL something may be left: %s", error)


def _mapping(port: Port) -> dict[str, Any]:
    if not port.host:
        raise ConfigError(f"ports: CNI needs a number for the host's port of {port.guest}", hint="0 isn't one")
    return {"hostPort": port.host, "containerPort": port.guest, "protocol": port.protocol, "hostIP": port.address}


def _interfaces(result: Mapping[str, Any], netns: str) -> tuple[str, ...]:
    return tuple(each["name"] for each in result.get("interfaces", ()) if each.get("sandbox") == netns)


def _with_names(attachment: Attachment, result: Mapping[str, Any]) -> Attachment:
    dns = result.get("dns") or {}
    servers = attachment.nameservers or tuple(dns.get("nameservers") or ())
    search = tuple(dns.get("search") or ()) or ((dns["domain"],) if dns.get("domain") else ())
    return evolve(attachment, nameservers=servers, search=attachment.search or search)
