"""Credentials for a registry, where Docker and Podman keep them: files, and helper programs that the files name.

docker-login(1), "Credential stores" and "Credential helpers"; containers-auth.json(5). What is found is never written
anywhere, nor put into a message; only where it was looked for is.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from pykata import host
from pykata.errors import HostError, ToolFailedError
from pykata.images.name import DOCKER_HUB

HELPER_TIMEOUT = 30.0           # seconds; a helper may ask the user, but not for ever
MAX_FILE = 1024 * 1024

_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_FORMS = ("{}", "https://{}", "https://{}/v1/", "https://{}/v2/")
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_TOKEN_USER = "<token>"         # noqa: S105  what helpers call the user of an identity token


@frozen
class Credentials:
    """A user with a password, or an identity token. ``source`` is where they were found."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    source: str = ""

    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


@frozen
class Found:
    """The credentials for a registry, if there are any, and where they were looked for."""

    credentials: Credentials | None
    tried: tuple[str, ...]


async def find_credentials(registry: str, repository: str, given: Mapping[str, tuple[str, str]]) -> Found:
    """The first that fit; ``given`` are the caller's own. A helper that fails is as one that knows nothing."""
    if registry in given:
        return Found(Credentials(*given[registry], source="Registries.credentials"), ("Registries.credentials",))
    tried: list[str] = []
    for path in auth_files():
        config = _read(path)
        if config is None:
            continue
        tried.append(str(path))
        helper = _helper_of(config, registry)
        if helper and (found := await _ask(helper, registry, tried)) is not None:
            return Found(found, tuple(tried))
        if (found := _in_file(config, registry, repository, path)) is not None:
            return Found(found, tuple(tried))
    return Found(None, tuple(tried))


def auth_files() -> Iterator[Path]:
    """Where credentials may be, in order: what is named, Podman's, Docker's."""
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(named)
        return
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime, "containers", "auth.json")
    yield Path("~/.config/containers/auth.json").expanduser()
    yield Path(os.environ.get("DOCKER_CONFIG") or Path("~/.docker").expanduser(), "config.json")


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _keys(registry: str) -> tuple[str, ...]:
    """What a registry may be called in a file. Docker keeps that of Docker Hub under its first version's address."""
    names = (_DOCKER_HUB_KEY, DOCKER_HUB, "index.docker.io") if registry == DOCKER_HUB else (registry,)
    return tuple(form.format(name) for name in names for form in _FORMS)


def _helper_of(config: Mapping[str, Any], registry: str) -> str:
    helpers = config.get("credHelpers")
    named = next((helpers[key] for key in _keys(registry) if key in helpers), "") if isinstance(helpers, dict) else ""
    helper = named or config.get("credsStore", "")
    return helper if isinstance(helper, str) and _HELPER.fullmatch(helper) else ""


async def _ask(helper: str, registry: str, tried: list[str]) -> Credentials | None:
    """docker-credential-helpers: ``get`` reads the address of the server, and writes JSON."""
    program = f"docker-credential-{helper}"
    tried.append(program)
    server = _DOCKER_HUB_KEY if registry == DOCKER_HUB else registry
    try:
        tool = host.find_tool(program, package="golang-docker-credential-helpers")
        # It is the user's own program, and finds its keyring by the user's environment.
        answer = await host.run_tool([tool, "get"], input=server.encode(), timeout=HELPER_TIMEOUT, env=dict(os.environ))
        found = json.loads(answer)
        user, secret = found["Username"], found["Secret"]
    except ToolFailedError:
        return None             # it has none for this server
    except (HostError, ValueError, LookupError, TypeError):
        tried[-1] += " (it failed)"
        return None
    if not isinstance(user, str) or not isinstance(secret, str):
        return None
    if user == _TOKEN_USER:
        return Credentials(identity_token=secret, source=program)
    return Credentials(user, secret, source=program)


def _in_file(config: Mapping[str, Any], registry: str, repository: str, path: Path) -> Credentials | None:
    auths = config.get("auths")
    if not isinstance(auths, dict):
        return None
    # Podman has credentials for a part of a registry, too; the closest ones win.
    parts = repository.split("/")
    closer = [f"{registry}/{'/'.join(parts[:n])}" for n in range(len(parts), 0, -1)]
    entry = next((auths[key] for key in (*closer, *_keys(registry)) if isinstance(auths.get(key), dict)), None)
    return _decoded(entry, str(path)) if entry is not None else None


def _decoded(entry: Mapping[str, Any], source: str) -> Credentials | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credentials(identity_token=token, source=source)
    try:
        user, colon, password = base64.b64decode(entry.get("auth", ""), validate=True).decode().partition(":")
    except (binascii.Error, ValueError, TypeError):
        return None
    return Credentials(user, password.strip("\0"), source=source) if colon else None
