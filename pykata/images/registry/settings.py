"""Where a registry is reached, and how much it is trusted: what the caller says, and the files of Docker and Podman.

containers-registries.conf(5), containers-certs.d(5); Docker trusts the registries of its own machine the same way.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from pykata.errors import ConfigError
from pykata.images.name import DOCKER_HUB, Name
from pykata.spec import Registries

DOCKER_HUB_HOST = "registry-1.docker.io"

_CERTS = (
    Path("~/.config/containers/certs.d"), Path("~/.config/docker/certs.d"), Path("/etc/containers/certs.d"),
    Path("/etc/docker/certs.d"),
)


@frozen
class Endpoint:
    """A place that has the repository of an image. ``host`` may have a port; ``registry`` is whose credentials fit."""

    registry: str
    host: str
    repository: str
    insecure: bool = False

    def __str__(self) -> str:
        return self.host


@frozen
class Settings:
    """What the caller said, and the tables of ``registries.conf``."""

    registries: Registries
    tables: tuple[Mapping[str, Any], ...] = ()

    def endpoints(self, name: Name) -> list[Endpoint]:
        """Where to look for an image, in order: mirrors first."""
        found: list[Endpoint] = []
        for place in self.registries.mirrors.get(name.registry, ()):
            found.append(self._endpoint(place, name.repository))
        table = self._table(name)
        for mirror in table.get("mirror", ()):
            found.append(self._endpoint(str(mirror["location"]), name.repository, bool(mirror.get("insecure"))))
        if not table.get("blocked"):
            found.append(self._endpoint(name.registry, name.repository, bool(table.get("insecure"))))
        return found

    def own(self, name: Name) -> Endpoint:
        """The registry itself, to push to."""
        return self._endpoint(name.registry, name.repository, bool(self._table(name).get("insecure")))

    def _endpoint(self, place: str, repository: str, insecure: bool = False) -> Endpoint:
        host, _, prefix = place.partition("/")
        insecure = insecure or host in self.registries.insecure or is_this_machine(host)
        where = DOCKER_HUB_HOST if host == DOCKER_HUB else host
        return Endpoint(host, where, f"{prefix.rstrip('/')}/{repository}" if prefix else repository, insecure)

    def _table(self, name: Name) -> Mapping[str, Any]:
        """That of the longest prefix of the name. Tables that rename what they match aren't used."""
        full, longest = f"{name.registry}/{name.repository}", ("", dict[str, Any]())
        for table in self.tables:
            prefix = str(table.get("prefix") or table.get("location", ""))
            matches = full == prefix or full.startswith(prefix.rstrip("/") + "/")
            if matches and table.get("location", prefix) == prefix and len(prefix) > len(longest[0]):
                longest = prefix, dict(table)
        return longest[1]


def find_settings(registries: Registries | None) -> Settings:
    """Raises :class:`~pykata.errors.ConfigError` for a ``registries.conf`` that can't be read."""
    return Settings(registries or Registries(), tuple(_tables()))


def _tables() -> Iterator[Mapping[str, Any]]:
    if named := os.environ.get("CONTAINERS_REGISTRIES_CONF"):
        files = [Path(named)]
    else:
        files = [Path("~/.config/containers/registries.conf").expanduser(), Path("/etc/containers/registries.conf")]
    for path in files:
        try:
            listed = tomllib.loads(path.read_text()).get("registry", [])
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            continue
        except (OSError, ValueError) as exc:
            raise ConfigError(f"can't read {path}: {exc}", hint="correct it, or name another one in "
                              "CONTAINERS_REGISTRIES_CONF") from exc
        if not isinstance(listed, list) or not all(_is_table(one) for one in listed):
            raise ConfigError(f"{path} has a [[registry]] that isn't one", hint="see containers-registries.conf(5)")
        yield from listed
        return


def _is_table(table: object) -> bool:
    if not isinstance(table, dict):
        return False
    mirrors = table.get("mirror", [])
    places = [table.get("prefix", ""), table.get("location", "")]
    if not isinstance(mirrors, list) or not all(isinstance(mirror, dict) for mirror in mirrors):
        return False
    return all(isinstance(place, str) for place in (*places, *(mirror.get("location") for mirror in mirrors)))


def tls_context(registries: Registries, host: str, insecure: bool) -> ssl.SSLContext:
    """The authorities of this machine, those that the caller and ``certs.d`` name for this host, our certificate."""
    context = ssl.create_default_context()
    try:
        if registries.ca_file is not None:
            context.load_verify_locations(registries.ca_file)
        for folder in _CERTS:
            certificates = folder.expanduser() / host
            for path in sorted(certificates.glob("*.crt")) if certificates.is_dir() else ():
                context.load_verify_locations(path)
            for path in sorted(certificates.glob("*.cert")) if certificates.is_dir() else ():
                context.load_cert_chain(path, path.with_suffix(".key"))
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"can't use the certificates for {host}: {exc}") from exc
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def is_this_machine(host: str) -> bool:
    """Whether a host, with or without a port, is this machine by its name alone."""
    name = bare_host(host)
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def bare_host(host: str) -> str:
    """A host without its port and without the brackets of IPv6."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
