"""Network configurations of CNI (specification 1.0.0, section 1)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from pykata.errors import ConfigError

FOLDER = Path("/etc/cni/net.d")
PLUGINS = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0")
LARGEST = 1 << 20       # bytes of a file


@frozen
class NetworkList:
    """A network: its plugins, each with its own part of the configuration, in their order."""

    name: str
    version: str
    plugins: tuple[Mapping[str, Any], ...]
    checks: bool = True

    def can(self, capability: str) -> bool:
        """Does a plugin take this from who runs it?"""
        return any(each.get("capabilities", {}).get(capability) for each in self.plugins)


def read(conf: NetworkList | Mapping[str, Any] | str | Path) -> NetworkList:
    """The network of a file, of a name, or of what would be in the file. Raises ConfigError."""
    if isinstance(conf, NetworkList):
        return conf
    if isinstance(conf, Mapping):
        return _parsed(conf, "conf")
    if not conf:
        raise ConfigError("cni needs a configuration", hint='CNI("/etc/cni/net.d/10-lab.conflist"), or a name')
    path = Path(conf)
    if isinstance(conf, str) and "/" not in conf and not path.exists():
        return _named(conf)
    return _file(path)


def _named(name: str) -> NetworkList:
    files = sorted(FOLDER.glob("*.conf*")) if FOLDER.is_dir() else []
    known = []
    for file in files:
        found = _file(file)
        if found.name == name:
            return found
        known.append(found.name)
    raise ConfigError(f"there is no CNI network {name!r} in {FOLDER}", hint=f"known: {', '.join(known) or 'none'}")


def _file(path: Path) -> NetworkList:
    try:
        with path.open() as file:
            return _parsed(json.loads(file.read(LARGEST)), str(path))
    except OSError as exc:
        raise ConfigError(f"can't read the CNI configuration {path}: {exc.strerror}") from exc
    except ValueError as exc:
        if isinstance(exc, ConfigError):
            raise
        raise ConfigError(f"{path} is not JSON: {exc}") from exc


def _parsed(conf: Mapping[str, Any], where: str) -> NetworkList:
    plugins = conf.get("plugins", [conf]) if isinstance(conf, Mapping) else None
    version = conf.get("cniVersion", "0.3.0") if isinstance(conf, Mapping) else ""
    if version not in VERSIONS:
        raise ConfigError(f"{where}: cniVersion {version!r} is none that we speak", hint=", ".join(VERSIONS))
    if not isinstance(plugins, list) or not plugins or not all(isinstance(each, Mapping) for each in plugins):
        raise ConfigError(f"{where}: there are no plugins")
    if not isinstance(conf.get("name"), str) or not conf["name"]:
        raise ConfigError(f"{where}: the network has no name")
    for each in plugins:
        kind = each.get("type")
        if not isinstance(kind, str) or not kind or "/" in kind:
            raise ConfigError(f"{where}: the plugin type {kind!r} is no name of a program")
    return NetworkList(conf["name"], version, tuple(plugins), not conf.get("disableCheck", False))


def directories(path: str | Sequence[str]) -> tuple[str, ...]:
    """Where plugins are looked for."""
    given = [path] if isinstance(path, str) else list(path)
    return tuple(given) or tuple(filter(None, os.environ.get("CNI_PATH", "").split(":"))) or PLUGINS
