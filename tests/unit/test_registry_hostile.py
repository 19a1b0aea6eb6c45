"""Registries that lie: each answer is refused with a typed error, and nothing of it stays in the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata.errors import (
    ImageCorruptError,
    ImageError,
    ImageNotFoundError,
    ImageUnauthorizedError,
    ImageUnsupportedError,
    RegistryError,
)
from pykata.images import Pulling, resolve
from pykata.images.limits import DEFAULT_LIMITS, Limits
from pykata.images.registry import http
from pykata.spec import Image, Registries
from tests.http_server import Answer, Handler, Request, json_answer, serving
from tests.images_fixtures import (
    LAYER_TYPE,
    Item,
    compress,
    config_of,
    digest_of,
    file,
    folder,
    hardlink,
    look,
    symlink,
    tar_of,
)
from tests.registry_fixtures import (
    CONFIG_TYPE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    Offer,
    bearer,
    offer,
    on,
    stored,
)

pytestmark = pytest.mark.usefixtures("places")

LAYER = tar_of([file("etc/a", b"a")])
SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
DOCKER_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
QUICK = Registries(timeout=20.0, retries=0)


async def names(handler: Handler, reference: str = "app:1", *, limits: Limits = DEFAULT_LIMITS, **how: Any) -> set[str]:
    """What is in an image of this registry."""
    async with serving(handler) as server:
        return await names_at(f"{server.host}/{reference}", limits=limits, **how)


async def names_at(reference: str, *, limits: Limits = DEFAULT_LIMITS, **how: Any) -> set[str]:
    image = await resolve(reference, architecture="x86_64", limits=limits, how=Pulling(**{"registries": QUICK, **how}))
    return set(look(await anyio.to_thread.run_sync(written, image))) - {""}


def written(image: Image) -> bytes:
    import io

    out = io.BytesIO()
    assert image.write_tar is not None
    image.write_tar(out)
    return out.getvalue()


async def test_the_registry_of_these_tests() -> None:
    assert await names(offer(LAYER)) == {"etc", "etc/a"}


# --- manifests ---


def document(value: Any, media_type: str = MANIFEST_TYPE) -> Offer:
    made = Offer()
    made.document(value, media_type, "1")
    return made


def changed(**more: Any) -> Offer:
    """A registry with one image, whose manifest is changed."""
    made = Offer()
    made.document(made.manifest(LAYER, **more), MANIFEST_TYPE, "1")
    return made


def nested(depth: int) -> Offer:
    made = Offer()
    inner = made.image(LAYER, tag="inner")
    for _ in range(depth):
        inner = made.document({"mediaType": INDEX_TYPE, "manifests": [inner]}, INDEX_TYPE, "1")
    return made


def disguised() -> Offer:
    """An index whose manifest is an index."""
    made = Offer()
    inner = made.document({"manifests": [made.image(LAYER, tag="inner")]}, INDEX_TYPE)
    inner["mediaType"] = MANIFEST_TYPE
    made.document({"mediaType": INDEX_TYPE, "manifests": [inner]}, INDEX_TYPE, "1")
    return made


def misjudged(**more: Any) -> Offer:
    """An index that says something wrong about its manifest."""
    made = Offer()
    made.document({"mediaType": INDEX_TYPE, "manifests": [made.image(LAYER, tag="i") | more]}, INDEX_TYPE, "1")
    return made


@pytest.mark.parametrize(("handler", "error", "message"), [
    (document(b"not JSON"), ImageCorruptError, "is not JSON"),
    (document(b"[" * 100_000), ImageCorruptError, "is not JSON"),
    (document([]), ImageCorruptError, "is .*, not an object"),
    (document({}, "text/html"), ImageUnsupportedError, "of the media type 'text/html'"),
    (document({}, ""), ImageUnsupportedError, "of the media type ''"),
    (document({"schemaVersion": 1}, SCHEMA_1), ImageUnsupportedError, "the old schema 1"),
    (document({"schemaVersion": 1}, "application/json"), ImageUnsupportedError, "the old schema 1"),
    (document({}), ImageUnsupportedError, "not of an image"),
    (document({"config": {}}), ImageCorruptError, "digest is None, not a digest"),
    (document({"config": {"digest": "md5:00"}}), ImageUnsupportedError, "can't be verified"),
    (changed(mediaType=INDEX_TYPE), ImageCorruptError, "says that it is .*index"),
    (changed(mediaType=DOCKER_TYPE), ImageCorruptError, "says that it is .*v2"),
    (changed(manifests=[]), ImageCorruptError, "is both an index and a manifest"),
    (document({"manifests": [], "layers": []}, INDEX_TYPE), ImageCorruptError, "is both an index and a manifest"),
    (document({"manifests": []}, INDEX_TYPE), ImageUnsupportedError, "not for linux/amd64"),
    (document({"manifests": "x"}, INDEX_TYPE), ImageCorruptError, "not an array"),
    (nested(6), ImageCorruptError, "nested more than 4 deep"),
    (disguised(), ImageUnsupportedError, "not of an image"),
    (misjudged(size=7), ImageCorruptError, "instead of 7"),
    (misjudged(digest="sha256:" + "0" * 64), ImageNotFoundError, "has no app@sha256:000"),
    (changed(layers=[{"mediaType": "application/x-what", "digest": digest_of(LAYER), "size": 1}]),
     ImageUnsupportedError, "of the media type 'application/x-what'"),
    (changed(layers=[]), ImageCorruptError, "names 1 layers, its manifest 0"),
    (changed(config={"mediaType": CONFIG_TYPE, "digest": digest_of(b"none"), "size": 4}), ImageNotFoundError, "blob"),
    (changed(config={"mediaType": CONFIG_TYPE, "digest": digest_of(LAYER), "size": len(LAYER)}),
     ImageCorruptError, "not JSON"),
    (changed(config={"mediaType": CONFIG_TYPE, "digest": digest_of(LAYER), "size": 2**62}),
     ImageCorruptError, "more than 4194304"),
])
async def test_manifests(handler: Offer, error: type[ImageError], message: str, places: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        await names(handler)
    assert caught.value.reference.endswith("/app:1")
    assert stored(places) == []


async def test_an_index_of_too_many_manifests() -> None:
    one = {"mediaType": MANIFEST_TYPE, "digest": digest_of(b""), "size": 2}
    with pytest.raises(ImageCorruptError, match="more than 1000 manifests"):
        await names(document({"manifests": [one] * 1001}, INDEX_TYPE))


async def test_indexes_in_indexes_are_fine_to_a_depth() -> None:
    assert await names(nested(3)) == {"etc", "etc/a"}


async def test_another_manifest_than_was_asked_for() -> None:
    made = offer(LAYER)
    wanted = "sha256:" + "1" * 64
    made.manifests[wanted] = made.manifests["1"]
    with pytest.raises(ImageCorruptError, match=f"instead of {wanted}"):
        await names(made, f"app@{wanted}")


async def test_another_manifest_than_the_registry_says() -> None:
    made = offer(LAYER)
    raw, media_type = made.manifests["1"]
    headers = {"Content-Type": media_type, "Docker-Content-Digest": "sha256:" + "2" * 64}
    made.override = on("/manifests/", Answer(raw, headers=headers))
    with pytest.raises(ImageCorruptError, match="instead of sha256:222"):
        await names(made)


@pytest.mark.parametrize("where", ["/manifests/1", "/blobs/"])
async def test_answers_without_an_end(where: str) -> None:
    made = offer(LAYER)
    made.override = on(where, Answer(b"", headers={"Content-Type": MANIFEST_TYPE}, endless=True))
    with pytest.raises(ImageError, match="more than"):
        await names(made)


async def test_a_registry_that_knows_no_head() -> None:
    made = offer(LAYER)
    made.override = lambda request: Answer(b"", 405) if request.method == "HEAD" else None
    async with serving(made) as server:
        for _ in range(2):
            assert await names_at(f"{server.host}/app:1", pull="always") == {"etc", "etc/a"}


async def test_referrers_are_of_no_interest() -> None:
    made = Offer()
    subject = made.image(LAYER, tag="other")
    made.image(LAYER, subject=subject, artifactType="application/x-signature", annotations={"a": "b"})
    assert await names(made) == {"etc", "etc/a"}


async def test_hostile_labels() -> None:
    made = Offer()
    labels = {"\x1b[31m": "\x00"[:0] + "\x1b]0;x\x07", "x" * 10_000: "y" * 1_000_000}
    config = config_of([LAYER], config={"Labels": labels})
    described = made.blob(json.dumps(config).encode(), CONFIG_TYPE)
    made.document(made.manifest(LAYER) | {"config": described}, MANIFEST_TYPE, "1")
    assert await names(made) == {"etc", "etc/a"}
    described = made.blob(json.dumps(config_of([LAYER], config={"Labels": {"a": "\0"}})).encode(), CONFIG_TYPE)
    made.document(made.manifest(LAYER) | {"config": described}, MANIFEST_TYPE, "1")
    with pytest.raises(ImageCorruptError, match="NUL"):
        await names(made)


# --- layers ---


@pytest.mark.parametrize(("items", "message"), [
    ([file("../escape", b"x")], r"entry '\.\./escape': its path has '\.\.' in it"),
    ([file("a/../../b", b"x")], r"'\.\.' in it"),
    ([symlink("up", "/"), file("up/etc/passwd", b"x")], "'up' in its path is a symlink"),
    ([symlink("up", ".."), hardlink("b", "up/etc/passwd")], "which isn't a file"),
    ([hardlink("b", "../../etc/shadow")], r"'\.\.' in it"),
    ([file("n" * 10_000, b"x")], "has 10000 bytes, more than"),
    ([Item("x", kind=b"V")], "its type b'V'"),
    ([file("f", b"x"), file("f/below", b"x")], "'f' in its path is a file"),
])
async def test_layers(items: list[Item], message: str, places: Path) -> None:
    tar = tar_of(items)
    with pytest.raises(ImageCorruptError, match=f"layer {digest_of(tar)} is refused: entry .*{message}|{message}"):
        await names(offer(tar))
    assert stored(places) == []


async def test_a_trick_across_layers(places: Path) -> None:
    lower, upper = tar_of([symlink("var", "/etc")]), tar_of([file("var/passwd", b"x")])
    with pytest.raises(ImageCorruptError, match=f"layer {digest_of(upper)} is refused: entry 'var/passwd'"):
        await names(offer(lower, upper))
    assert stored(places) == []


async def test_what_is_kept_of_names() -> None:
    raw = b"\xff\xfe".decode("utf-8", "surrogateescape")
    tar = tar_of([folder("d"), file(f"d/{raw}", b"x"), file("d/twice", b"1"), file("d/twice", b"22"),
                  file("/absolute", b"x", uid=2**31 + 5, mode=0o4755)])
    made = offer(tar)
    async with serving(made) as server:
        image = await resolve(f"{server.host}/app:1", architecture="x86_64")
        seen = look(await anyio.to_thread.run_sync(written, image))
    assert set(seen) == {"", "d", f"d/{raw}", "d/twice", "absolute"}
    assert seen["d/twice"].size == 2
    assert (seen["absolute"].uid, seen["absolute"].mode) == (2**31 + 5, 0o4755)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
async def test_bombs(compression: str, places: Path) -> None:
    tar = tar_of([file("zeros", bytes(20_000_000))])
    assert len(compress(tar, compression)) < 100_000
    with pytest.raises(ImageCorruptError, match="its layers have more than 1000000 bytes"):
        await names(offer(tar, compression=compression), limits=Limits(size=1_000_000))
    assert stored(places) == []


async def test_a_layer_of_the_wrong_size(places: Path) -> None:
    made = Offer()
    manifest = made.manifest(LAYER)
    for size, message in ((len(LAYER) - 1, f"more than {len(LAYER) - 1} bytes"), (len(LAYER) + 1, "bytes instead of")):
        manifest["layers"][0]["size"] = size
        made.document(manifest, MANIFEST_TYPE, "1")
        with pytest.raises(ImageCorruptError, match=message):
            await names(made)
        assert [path for path in stored(places) if path.suffix != ".part"] == []


async def test_a_truncated_layer() -> None:
    made = Offer()
    packed = compress(LAYER, "gzip")[:-10]
    layer = made.blob(packed, f"{LAYER_TYPE}+gzip")
    made.document(made.manifest(LAYER) | {"layers": [layer]}, MANIFEST_TYPE, "1")
    with pytest.raises(ImageCorruptError, match=f"layer {digest_of(packed)} is damaged: truncated gzip"):
        await names(made)


async def test_urls_of_layers_are_not_followed() -> None:
    async with serving(lambda request: Answer(LAYER)) as elsewhere:
        made = Offer()
        manifest = made.manifest(LAYER)
        manifest["layers"][0]["urls"] = [f"http://{elsewhere.host}/layer"]
        made.document(manifest, MANIFEST_TYPE, "1")
        assert await names(made) == {"etc", "etc/a"}
        manifest["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
        made.document(manifest, MANIFEST_TYPE, "1")
        with pytest.raises(ImageUnsupportedError, match="foreign"):
            await names(made)
        assert elsewhere.requests == []


# --- redirects ---

PASSWORD = ("alice", "very secret")


async def test_a_redirect_takes_no_credentials_along() -> None:
    made, behind = offer(LAYER), offer(LAYER)
    made.override = lambda request: (
        None if "authorization" in request.headers else Answer(b"", 401, {"WWW-Authenticate": 'Basic realm="x"'}))
    async with serving(behind) as elsewhere, serving(lambda request: redirected(request)) as server:

        def redirected(request: Request) -> Answer:
            if "/blobs/" in request.path and "authorization" in request.headers:
                return Answer(b"", 307, {"Location": f"http://{elsewhere.host}{request.path}?signature=x"})
            return made(request)

        behind.override = lambda request: (
            Answer(behind.blobs[request.path.split("/")[-1].split("?")[0]]) if "?" in request.path else None)
        registries = Registries(credentials={server.host: PASSWORD}, retries=0)
        assert await names_at(f"{server.host}/app:1", registries=registries) == {"etc", "etc/a"}
        assert server.seen("authorization") != []
        assert len(elsewhere.requests) == 2
        assert elsewhere.seen("authorization") == []


@pytest.mark.parametrize(("location", "message"), [
    ("", "redirects more than 5 times"),
    ("file:///etc/passwd", "which isn't secure"),
    ("ftp://127.0.0.1/x", "which isn't secure"),
    ("http://user:secret@127.0.0.1/x", "which no registry should"),
    ("http://[::1", "Invalid URL in location"),
])
async def test_redirects(location: str, message: str) -> None:
    made = offer(LAYER)
    made.override = on("/blobs/", Answer(b"", 302, {"Location": location}))
    with pytest.raises(RegistryError, match=message) as caught:
        await names(made)
    assert "secret" not in str(caught.value)


async def test_a_redirect_to_a_private_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async def private(host: str) -> bool:
        return host == "169.254.169.254"

    monkeypatch.setattr(http, "_is_private", private)
    made = offer(LAYER)
    made.override = on("/blobs/", Answer(b"", 302, {"Location": "http://169.254.169.254/latest/meta-data"}))
    with pytest.raises(RegistryError, match=r"redirects to http://169\.254\.169\.254/latest/meta-data, a private addr"):
        await names(made)


@pytest.mark.parametrize(("host", "private"), [
    ("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.1.2.3", True), ("192.168.0.1", True),
    ("169.254.169.254", True), ("fd00::1", True), ("fe80::1", True), ("100.64.0.1", True), ("8.8.8.8", False),
    ("2001:4860:4860::8888", False), ("no-such-host.invalid", False),
])
async def test_private_places(host: str, private: bool) -> None:
    assert await http._is_private(host) == private


# --- tokens ---


def wants(**headers: str) -> Offer:
    """A registry that wants a token, which is no good."""
    made = offer(LAYER)
    made.override = lambda request: Answer(b"", 401, headers)
    return made


@pytest.mark.parametrize("realm", ["ftp://127.0.0.1/t", "", "token", "http://", "http://user:pw@127.0.0.1/t", "http://[::1"])
async def test_realms_that_are_none(realm: str) -> None:
    with pytest.raises(RegistryError, match=r"which isn't secure|which is no address"):
        await names(wants(**bearer(realm)))


async def test_a_realm_that_is_not_secure_for_a_registry_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    from pykata.images.registry.auth import _realm
    from pykata.images.registry.settings import Endpoint

    endpoint, url = Endpoint("registry.test", "registry.test", "app"), httpx.URL("https://registry.test/v2/")
    with pytest.raises(RegistryError, match="which isn't secure"):
        await _realm("http://tokens.test/t", endpoint, url)
    with pytest.raises(RegistryError, match="a private address"):
        await _realm("https://10.0.0.1/t", endpoint, url)
    assert str(await _realm("https://tokens.invalid/t", endpoint, url)) == "https://tokens.invalid/t"


@pytest.mark.parametrize(("answer", "message"), [
    (Answer(b"x"), "gives no token"),
    (json_answer({}), "gives a token that isn't one"),
    (json_answer({"token": "a\r\nX-Evil: 1"}), "gives a token that isn't one"),
    (json_answer({"token": 5}), "gives no token"),
    (Answer(endless=True), "sends a token of more than 65536 bytes"),
    (Answer(b"", 302, {"Location": "http://127.0.0.1:1/"}), "answers 302"),
    (Answer(b"", 500), "answers 500"),
])
async def test_answers_that_are_no_tokens(answer: Answer, message: str) -> None:
    async with serving(lambda request: answer) as tokens:
        with pytest.raises(RegistryError, match=message):
            await names(wants(**bearer(f"http://{tokens.host}/t")))


@pytest.mark.parametrize("expires", [None, 0, -1, "soon", True, 10**30])
async def test_a_token_that_is_refused_ends_it(expires: Any) -> None:
    async with serving(lambda request: json_answer({"access_token": "t", "expires_in": expires})) as tokens:
        with pytest.raises(ImageUnauthorizedError):
            await names(wants(**bearer(f"http://{tokens.host}/t")))
        assert len(tokens.requests) == 1


@pytest.mark.parametrize("challenge", [
    "", "Negotiate", "Bearer", 'Bearer realm="', "x" * 90_000, 'Digest realm="x"', ",",
])
async def test_challenges_that_nobody_can_answer(challenge: str) -> None:
    with pytest.raises((ImageUnauthorizedError, RegistryError)):
        await names(wants(**{"WWW-Authenticate": challenge}))
