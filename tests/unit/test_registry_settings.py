"""Where a registry is, who is trusted, whose credentials are used: what Docker, Podman and the caller say."""

from __future__ import annotations

import base64
import json
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata.errors import ConfigError, ImageUnauthorizedError, RegistryError, RegistryUnreachableError
from pykata.images import Pulling, resolve
from pykata.images.name import Name
from pykata.images.registry.credentials import Credentials, find_credentials
from pykata.images.registry.settings import Endpoint, find_settings, is_this_machine
from pykata.spec import Registries
from tests.http_server import Answer, serving
from tests.images_fixtures import file, tar_of
from tests.registry_fixtures import offer

HUB = Name("docker.io", "library/python", "3")


@pytest.fixture(autouse=True)
def conf(places: Path) -> Path:
    """The file that says where registries are."""
    return places / "registries.conf"


# --- where ---


def test_without_a_word() -> None:
    settings = find_settings(None)
    assert settings.endpoints(HUB) == [Endpoint("docker.io", "registry-1.docker.io", "library/python")]
    assert settings.endpoints(Name("localhost:5000", "a")) == [Endpoint("localhost:5000", "localhost:5000", "a", True)]
    assert settings.endpoints(Name("r.test", "a/b")) == [Endpoint("r.test", "r.test", "a/b")]


def test_what_the_caller_says() -> None:
    settings = find_settings(Registries(insecure=("r.test:1",), mirrors={"docker.io": ("m.test/hub", "r.test:1")}))
    assert settings.endpoints(HUB) == [
        Endpoint("m.test", "m.test", "hub/library/python"), Endpoint("r.test:1", "r.test:1", "library/python", True),
        Endpoint("docker.io", "registry-1.docker.io", "library/python"),
    ]  # fmt: skip


def test_registries_conf(conf: Path) -> None:
    conf.write_text("""
        unqualified-search-registries = ["elsewhere.test"]
        [[registry]]
        prefix = "r.test/team"
        location = "r.test/team"
        insecure = true
        [[registry]]
        location = "r.test"
        [[registry.mirror]]
        location = "m.test:5000"
        insecure = true
        [[registry]]
        location = "bad.test"
        blocked = true
    """)
    settings = find_settings(None)
    assert settings.endpoints(Name("r.test", "team/app")) == [Endpoint("r.test", "r.test", "team/app", True)]
    assert settings.endpoints(Name("r.test", "teams/app")) == [
        Endpoint("m.test:5000", "m.test:5000", "teams/app", True), Endpoint("r.test", "r.test", "teams/app"),
    ]  # fmt: skip
    assert settings.endpoints(Name("bad.test", "a")) == []
    assert len(settings.endpoints(HUB)) == 1


def test_a_registry_that_is_blocked(conf: Path) -> None:
    conf.write_text('[[registry]]\nlocation = "bad.test"\nblocked = true\n')
    with pytest.raises(RegistryError, match=r"bad\.test is blocked in registries\.conf"):
        anyio.run(partial(resolve, "bad.test/app", architecture="x86_64"))


@pytest.mark.parametrize("text", [
    "nonsense", "registry = 1", "[[registry]]\nlocation = 1", "[[registry]]\nmirror = [1]",
    "[[registry]]\n[[registry.mirror]]\ninsecure = true",
])
def test_a_registries_conf_that_is_none(conf: Path, text: str) -> None:
    conf.write_text(text)
    with pytest.raises(ConfigError, match="registries.conf"):  # noqa: RUF043
        find_settings(None)


@pytest.mark.parametrize(("host", "here"), [
    ("localhost", True), ("localhost:5000", True), ("127.0.0.1:80", True), ("127.1.2.3", True), ("[::1]:5000", True),
    ("::1", False), ("localhost.test", False), ("10.0.0.1", False), ("docker.io", False), ("[fd00::1]", False),
])
def test_this_machine(host: str, here: bool) -> None:
    assert is_this_machine(host) == here


# --- whose credentials ---


def encoded(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path: Path, **config: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("registry", "key"), [
    ("docker.io", "https://index.docker.io/v1/"), ("docker.io", "docker.io"), ("docker.io", "index.docker.io"),
    ("r.test:5000", "r.test:5000"), ("r.test", "https://r.test"), ("r.test", "https://r.test/v2/"),
    ("r.test", "r.test/a"), ("r.test", "r.test/a/b"),
])
async def test_what_docker_calls_a_registry(places: Path, registry: str, key: str) -> None:
    docker = places / "home/.docker/config.json"
    write(docker, auths={key: encoded("u", "p:q"), "r.test/other": encoded("no", "no")})
    found = await find_credentials(registry, "a/b", {})
    assert found.credentials == Credentials("u", "p:q", source=str(docker))


async def test_the_order_of_the_files(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(places / "run"))
    files = [places / "run/containers/auth.json", places / "home/.config/containers/auth.json",
             places / "home/.docker/config.json"]
    for path in reversed(files):
        write(path, auths={"r.test": encoded(path.parent.parent.name, "p")})
        found = await find_credentials("r.test", "a", {})
        assert found.credentials is not None
        assert found.credentials.source == str(path)
    assert (await find_credentials("other.test", "a", {})).tried == tuple(map(str, files))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(places / "own.json"))
    assert await find_credentials("r.test", "a", {}) == await find_credentials("other.test", "a", {})
    given = await find_credentials("r.test", "a", {"r.test": ("me", "secret")})
    assert given.credentials is not None
    assert "secret" not in repr(given)


@pytest.mark.parametrize("text", [
    "nonsense", "[]", '{"auths": []}', '{"auths": {"r.test": []}}', '{"auths": {"r.test": {"auth": "?"}}}',
    '{"auths": {"r.test": {"auth": 5}}}', '{"auths": {"r.test": {}}}', '{"credsStore": 5}', '{"credHelpers": []}',
    '{"credsStore": "../../bin/sh"}', '{"credsStore": "not-here"}', "[" * 100_000,
])
async def test_files_that_are_of_no_use(places: Path, text: str) -> None:
    (places / "home/.docker/config.json").write_text(text)
    assert (await find_credentials("r.test", "a", {})).credentials is None


@pytest.mark.parametrize(("script", "expected"), [
    ("""echo '{"Username": "u", "Secret": "p"}'""", Credentials("u", "p", source="docker-credential-test")),
    ("""echo '{"Username": "<token>", "Secret": "t"}'""",
     Credentials("", "", "t", "docker-credential-test")),
    ("echo credentials not found in native keychain; exit 1", None), ("echo nonsense", None), ("echo '[]'", None),
    ("""echo '{"Username": 1, "Secret": 2}'""", None), ("""echo '{"Username": "u"}'""", None),
])
async def test_helpers(
    places: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: Credentials | None
) -> None:
    helper = places / "bin/docker-credential-test"
    helper.parent.mkdir()
    helper.write_text(f"#!/bin/sh\n{script}\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin")
    write(places / "home/.docker/config.json", credsStore="test")
    found = await find_credentials("r.test", "a", {})
    assert found.credentials == expected
    assert found.tried[1].startswith("docker-credential-test")


async def test_the_error_says_where_it_looked(places: Path) -> None:
    made = offer(tar_of([file("a")]))
    made.override = lambda request: Answer(b"", 401, {"WWW-Authenticate": "Basic"})
    write(places / "home/.docker/config.json", credsStore="not-here", auths={"other.test": encoded("u", "p")})
    async with serving(made) as server:
        with pytest.raises(ImageUnauthorizedError, match="without credentials: there are none for it in") as caught:
            await resolve(f"{server.host}/app", architecture="x86_64")
    assert caught.value.tried == (
        str(places / "home/.docker/config.json"), "docker-credential-not-here (it failed)")


# --- proxies ---


async def test_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = offer(tar_of([file("a")]))

    def proxy(request: Any) -> Answer:
        if request.method == "CONNECT":
            return Answer(b"", 403)
        return made(request) if request.path.startswith("http://registry.invalid/") else Answer(b"", 500)

    async with serving(proxy) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://{server.host}")
        how = Pulling(registries=Registries(insecure=("registry.invalid",)))
        await resolve("registry.invalid/app:1", architecture="x86_64", how=how)
        assert server.paths[0] == "registry.invalid:443"
        with pytest.raises(RegistryUnreachableError, match=r"the proxy doesn't connect registry\.invalid.*NO_PROXY"):
            await resolve("registry.invalid/app:1", architecture="x86_64", how=Pulling(pull="always"))
        # This machine's own ports aren't the proxy's to look for.
        before = len(server.requests)
        with pytest.raises(RegistryUnreachableError, match="can't connect"):
            await resolve("127.0.0.1:1/app:1", architecture="x86_64")
        assert len(server.requests) == before
