"""Images from a real registry on loopback: every way to be let in, every compression, every pull policy."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykata.errors import (
    ImageNotFoundError,
    ImageUnauthorizedError,
    ImageUnsupportedError,
    RegistryTLSError,
    RegistryUnreachableError,
)
from pykata.images.config import chain_id
from pykata.images.registry import settings
from pykata.spec import PullEvent, Registries
from tests.http_server import serving
from tests.images_fixtures import Layout, config_of, digest_of, file, layout_of, tar_of, whiteout
from tests.real_registry import (
    HTPASSWD,
    ISSUER,
    PASSWORD,
    SERVICE,
    USER,
    Certificate,
    another,
    certificate,
    pulled,
    push,
    pushed,
    registry,
    tokens,
)

pytestmark = pytest.mark.usefixtures("places")

BASE = tar_of([file("etc/a", b"a" * 50_000), file("etc/b", b"b")])
TOP = tar_of([whiteout("etc/a"), file("etc/c", b"c")])
INDEX = "application/vnd.oci.image.index.v1+json"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that is open to everybody, with a few images."""
    folder = tmp_path_factory.mktemp("registry")
    with registry(folder) as host:
        for compression in ("plain", "gzip", "zstd"):
            layout_of(folder / compression, [BASE, TOP], compression=compression)
            push(f"{folder / compression}:latest", host, f"app:{compression}")
        push(f"{folder / 'gzip'}:latest", host, "library/team/app:latest")
        several = Layout(folder / "several")
        arm = config_of([TOP], architecture="arm64")
        several.path.mkdir()
        several.index([several.json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [
            several.manifest([TOP], config=arm, platform={"os": "linux", "architecture": "arm64", "variant": "v8"}),
            several.manifest([BASE], platform={"os": "linux", "architecture": "amd64"}),
        ]}, INDEX, annotations={"org.opencontainers.image.ref.name": "latest"})])
        push(f"{several.path}:latest", host, "app:several")
        yield host

@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
async def test_an_image(host: str, compression: str) -> None:
    image, names = await pulled(f"{host}/app:{compression}")
    assert names == {"etc", "etc/b", "etc/c"}
    assert image.reference == f"{host}/app:{compression}"
    assert image.digest == chain_id([digest_of(BASE), digest_of(TOP)])
    assert (image.config.cmd, image.config.env) == (("/bin/sh",), {"PATH": "/bin"})


async def test_an_image_for_several_platforms(host: str) -> None:
    assert (await pulled(f"{host}/app:several"))[0].digest == digest_of(BASE)
    assert (await pulled(f"{host}/app:several", "aarch64"))[0].digest == digest_of(TOP)
    with pytest.raises(ImageUnsupportedError, match=r"not for linux/riscv64 \(it is for linux/amd64, linux/arm64/v8\)"):
        await pulled(f"{host}/app:several", "riscv64")


async def test_by_digest(host: str, places: Path) -> None:
    await pulled(f"{host}/app:gzip")
    [record] = [json.loads(path.read_bytes()) for path in (places / "cache/images/names").iterdir()]
    image, _ = await pulled(f"{host}/app@{record['top']}")
    assert image.digest == chain_id([digest_of(BASE), digest_of(TOP)])
    with pytest.raises(ImageNotFoundError, match=f"{host} has no app@sha256:0000"):
        await pulled(f"{host}/app@sha256:{'0' * 64}")


async def test_what_is_not_there(host: str) -> None:
    with pytest.raises(ImageNotFoundError, match=f"{host} has no app:none") as caught:
        await pulled(f"{host}/app:none")
    assert caught.value.reference == f"{host}/app:none"
    with pytest.raises(ImageNotFoundError, match="has no nothing:latest"):
        await pulled(f"{host}/nothing")


async def test_the_second_time_nothing_is_asked(tmp_path: Path) -> None:
    layout_of(tmp_path / "l", [BASE])
    async with another(tmp_path / "r", tmp_path / "l") as host:
        first, _ = await pulled(f"{host}/app:1")
    again, names = await pulled(f"{host}/app:1")
    assert first == again
    assert names == {"etc", "etc/a", "etc/b"}
    with pytest.raises(RegistryUnreachableError, match=r"can't connect to 127\.0\.0\.1"):
        await pulled(f"{host}/app:1", pull="always")


async def test_pull_always_and_never(tmp_path: Path, host: str) -> None:
    with pytest.raises(ImageNotFoundError, match='isn\'t here, and pull="never"'):
        await pulled(f"{host}/moving:1", pull="never")
    layout_of(tmp_path / "one", [BASE])
    layout_of(tmp_path / "two", [TOP])
    await pushed(tmp_path / "one", host, "moving:1")
    assert (await pulled(f"{host}/moving:1"))[0].digest == digest_of(BASE)
    await pushed(tmp_path / "two", host, "moving:1")
    assert (await pulled(f"{host}/moving:1"))[0].digest == digest_of(BASE)
    assert (await pulled(f"{host}/moving:1", pull="always"))[0].digest == digest_of(TOP)
    assert (await pulled(f"{host}/moving:1", pull="always"))[0].digest == digest_of(TOP)
    assert (await pulled(f"{host}/moving:1", pull="never"))[0].digest == digest_of(TOP)


async def test_progress(host: str) -> None:
    events: list[PullEvent] = []
    await pulled(f"{host}/app:gzip", progress=events.append)
    assert {event.reference for event in events} == {f"{host}/app:gzip"}
    assert {event.status for event in events} == {"downloading", "downloaded", "converted"}
    assert sum(event.status == "downloaded" for event in events) == 2
    assert all(event.done <= event.total for event in events)


async def test_layers_that_are_here_are_not_downloaded_again(host: str, places: Path) -> None:
    await pulled(f"{host}/app:gzip")
    for kept in (places / "cache/rootfs").iterdir():
        kept.unlink()
    events: list[PullEvent] = []
    await pulled(f"{host}/library/team/app", progress=events.append)
    assert [event.status for event in events] == ["exists", "exists", "converted"]


# --- who is let in ---


@pytest.fixture(scope="module")
def by(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return certificate(tmp_path_factory.mktemp("certificates"))


def log_in(places: Path, host: str, password: str = PASSWORD, **more: Any) -> None:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    config = {"auths": {host: {"auth": auth}}, **more}
    (places / "home/.docker/config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that wants a password."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "htpasswd").write_text(HTPASSWD)
    layout_of(folder / "l", [BASE])
    with registry(folder, htpasswd={"realm": "test", "path": str(folder / "htpasswd")}) as host:
        push(f"{folder}/l:latest", host, "app:1", credentials=f"{USER}:{PASSWORD}")
        yield host


async def test_a_password_of_docker_login(guarded: str, places: Path) -> None:
    log_in(places, guarded)
    assert (await pulled(f"{guarded}/app:1"))[1] == {"etc", "etc/a", "etc/b"}


async def test_a_password_that_is_given(guarded: str) -> None:
    registries = Registries(credentials={guarded: (USER, PASSWORD)})
    assert "correct" not in repr(registries)
    assert (await pulled(f"{guarded}/app:1", registries=registries))[1] == {"etc", "etc/a", "etc/b"}


async def test_no_password(guarded: str) -> None:
    with pytest.raises(ImageUnauthorizedError, match="without credentials: there are none on this machine") as caught:
        await pulled(f"{guarded}/app:1")
    assert caught.value.tried == ()
    assert f"docker login {guarded}" in caught.value.hint


async def test_a_wrong_password(guarded: str, places: Path) -> None:
    log_in(places, guarded, "battery staple")
    with pytest.raises(ImageUnauthorizedError, match=r"with the credentials from .*config\.json") as caught:
        await pulled(f"{guarded}/app:1")
    assert caught.value.tried == (str(places / "home/.docker/config.json"),)
    assert "battery" not in str(caught.value)


@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
async def test_a_credential_helper(guarded: str, places: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    helper = places / "bin" / "docker-credential-test"
    helper.parent.mkdir()
    answer = json.dumps({"Username": USER, "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\n[ $1 = get ] && [ $(cat) = {guarded} ] && echo '{answer}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin:/usr/sbin")
    config = {key: "test" if key == "credsStore" else {guarded: "test"}}
    (places / "home/.docker/config.json").write_text(json.dumps(config))
    assert (await pulled(f"{guarded}/app:1"))[1] == {"etc", "etc/a", "etc/b"}


async def test_an_auth_file_of_podman(guarded: str, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(places, guarded)
    (places / "home/.docker/config.json").rename(places / "auth.json")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(places / "auth.json"))
    assert (await pulled(f"{guarded}/app:1"))[1] == {"etc", "etc/a", "etc/b"}


def token_auth(by: Certificate, realm: str) -> dict[str, str]:
    return {"realm": realm, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": str(by.certificate)}


async def test_tokens(tmp_path: Path, places: Path, by: Certificate) -> None:
    layout_of(tmp_path / "l", [BASE])
    async with another(tmp_path / "open", tmp_path / "l"):
        pass
    # The second one takes over the data of the first.
    async with (
        serving(tokens(by)) as server,
        another(tmp_path / "open", token=token_auth(by, f"http://{server.host}/token")) as host,
    ):
        with pytest.raises(ImageUnauthorizedError, match="gives no token for it"):
            await pulled(f"{host}/app:1")
        log_in(places, host)
        assert (await pulled(f"{host}/app:1"))[1] == {"etc", "etc/a", "etc/b"}
        assert f"scope=repository%3Aapp%3Apull&service={SERVICE}" in server.paths[-1]
        before = len(server.requests)
        token = {"auths": {host: {"identitytoken": PASSWORD}}}
        (places / "home/.docker/config.json").write_text(json.dumps(token))
        await pulled(f"{host}/app:1", pull="always")
        assert [request.method for request in server.requests[before:]] == ["POST"]


async def test_tokens_for_everybody(tmp_path: Path, by: Certificate) -> None:
    layout_of(tmp_path / "l", [BASE])
    async with another(tmp_path / "open", tmp_path / "l"):
        pass
    async with (
        serving(tokens(by, anonymous=True)) as server,
        another(tmp_path / "open", token=token_auth(by, f"http://{server.host}/token")) as host,
    ):
        assert (await pulled(f"{host}/app:1"))[1] == {"etc", "etc/a", "etc/b"}
        assert server.seen("authorization") == []


# --- TLS ---


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, by: Certificate) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("secure")
    layout_of(folder / "l", [BASE])
    with registry(folder, tls=by) as host:
        push(f"{folder}/l:latest", host, "app:1")
        yield host


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if loopback were another machine: nothing about it is trusted."""
    monkeypatch.setattr(settings, "is_this_machine", lambda host: False)


@pytest.mark.usefixtures("far")
async def test_a_certificate_of_an_authority_that_is_given(secure: str, by: Certificate) -> None:
    with pytest.raises(RegistryTLSError, match=r"the certificate of 127\.0\.0\.1 isn't valid: .*local issuer"):
        await pulled(f"{secure}/app:1")
    registries = Registries(ca_file=by.authority)
    assert (await pulled(f"{secure}/app:1", registries=registries))[1] == {"etc", "etc/a", "etc/b"}


@pytest.mark.usefixtures("far")
async def test_a_certificate_that_docker_would_take(secure: str, by: Certificate, places: Path) -> None:
    folder = places / "home/.config/docker/certs.d" / secure
    folder.mkdir(parents=True)
    (folder / "ca.crt").write_bytes(by.authority.read_bytes())
    assert (await pulled(f"{secure}/app:1"))[1] == {"etc", "etc/a", "etc/b"}


@pytest.mark.usefixtures("far")
async def test_an_insecure_registry(secure: str, host: str) -> None:
    with pytest.raises(RegistryTLSError, match="speak plain HTTP"):
        await pulled(f"{host}/app:gzip")
    assert (await pulled(f"{host}/app:gzip", registries=Registries(insecure=(host,))))[1] == {"etc", "etc/b", "etc/c"}
    assert (await pulled(f"{secure}/app:1", registries=Registries(insecure=(secure,))))[1] == {"etc", "etc/a", "etc/b"}


async def test_this_machine_needs_no_certificate(secure: str) -> None:
    assert (await pulled(f"{secure}/app:1"))[1] == {"etc", "etc/a", "etc/b"}


# --- mirrors ---


async def test_mirrors(host: str, places: Path) -> None:
    (places / "registries.conf").write_text(f"""
        [[registry]]
        location = "docker.io"
        [[registry.mirror]]
        location = "127.0.0.1:1"
        [[registry.mirror]]
        location = "{host}"
    """)
    # The mirror has library/team/app, as Docker Hub would: the one before it isn't there.
    assert (await pulled("library/team/app"))[1] == {"etc", "etc/b", "etc/c"}


async def test_a_mirror_with_a_path(host: str) -> None:
    registries = Registries(mirrors={"registry.invalid": (f"{host}/library",)})
    assert (await pulled("registry.invalid/team/app", registries=registries))[1] == {"etc", "etc/b", "etc/c"}
