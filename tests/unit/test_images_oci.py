"""OCI layouts and archives of docker save: finding the image that is meant, and verifying what says what it is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from pykata.errors import ImageCorruptError, ImageError, ImageNotFoundError, ImageReferenceError, ImageUnsupportedError
from pykata.images import resolve
from pykata.images.config import chain_id
from pykata.spec import Image
from tests.images_fixtures import LAYER_TYPE, Layout, config_of, digest_of, file, layout_of, look, tar_of, whiteout

FOREIGN_TYPE = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
INDEX = "application/vnd.oci.image.index.v1+json"
TAG = "org.opencontainers.image.ref.name"
BASE = tar_of([file("etc/a", b"a"), file("etc/b", b"b")])
TOP = tar_of([whiteout("etc/a"), file("etc/c", b"c")])


async def find(reference: str, architecture: str = "x86_64") -> Image:
    return await resolve(reference, architecture=architecture)


def files(image: Image) -> set[str]:
    out = io.BytesIO()
    assert image.write_tar is not None
    image.write_tar(out)
    return set(look(out.getvalue()))


def empty(path: Path) -> Layout:
    path.mkdir()
    return Layout(path)


# --- layouts ---


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
async def test_an_image(tmp_path: Path, compression: str) -> None:
    layout_of(tmp_path / "l", [BASE, TOP], compression=compression)
    image = await find(f"oci:{tmp_path}/l")
    assert image.reference == f"oci:{tmp_path}/l"
    assert (image.config.cmd, image.config.env) == (("/bin/sh",), {"PATH": "/bin"})
    assert (image.architecture, image.disk) == ("x86_64", None)
    assert image.digest == chain_id([digest_of(BASE), digest_of(TOP)])
    assert files(image) == {"", "etc", "etc/b", "etc/c"}
    assert (await find(f"{tmp_path}/l:latest")).digest == image.digest


async def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    layout_of(tmp_path / "a", [BASE], compression="gzip")
    layout_of(tmp_path / "b", [BASE], compression="zstd", config=config_of([BASE], config={"Cmd": ["other"]}))
    layout_of(tmp_path / "c", [TOP])
    a, b, c = [await find(f"oci:{tmp_path}/{name}") for name in "abc"]
    assert a.digest == b.digest != c.digest


async def test_tags(tmp_path: Path) -> None:
    layout = empty(tmp_path / "l")
    layout.index([layout.manifest([BASE], annotations={TAG: "one"}), layout.manifest([TOP], annotations={TAG: "two"})])
    assert (await find(f"oci:{tmp_path}/l:two")).digest == digest_of(TOP)
    with pytest.raises(ImageReferenceError, match=r"more than one image \(add one of :one, :two\)"):
        await find(f"oci:{tmp_path}/l")
    with pytest.raises(ImageNotFoundError, match=r"no image 'three' \(it has one, two\)"):
        await find(f"oci:{tmp_path}/l:three")


async def test_a_digest_in_place_of_a_tag(tmp_path: Path) -> None:
    layout = empty(tmp_path / "l")
    chosen = layout.manifest([TOP])
    layout.index([layout.manifest([BASE]), chosen])
    assert (await find(f"oci:{tmp_path}/l:{chosen['digest']}")).digest == digest_of(TOP)


async def test_an_image_for_several_platforms(tmp_path: Path) -> None:
    layout = empty(tmp_path / "l")
    arm = config_of([TOP], architecture="arm64", variant="v8")

    def platform(architecture: str, **more: str) -> dict[str, Any]:
        return {"platform": {"os": "linux", "architecture": architecture, **more}}

    inner = layout.json({"manifests": [
        layout.json({}, "application/vnd.oci.image.manifest.v1+json", **platform("unknown")),      # an attestation
        layout.json({}, "application/vnd.oci.image.manifest.v1+json", **platform("amd64", os="windows")),
        layout.json({}, "application/vnd.oci.image.manifest.v1+json", **platform("amd64", variant="v4")),
        layout.manifest([TOP], config=arm, **platform("arm64", variant="v8")),
        layout.manifest([TOP], **platform("amd64", variant="v2")),
        layout.manifest([BASE], **platform("amd64")),
    ]}, INDEX)
    layout.index([layout.json({"manifests": [inner]}, INDEX, annotations={TAG: "v1"})])
    assert (await find(f"oci:{tmp_path}/l:v1")).digest == digest_of(BASE)
    assert (await find(f"oci:{tmp_path}/l:v1", "aarch64")).digest == digest_of(TOP)
    with pytest.raises(ImageUnsupportedError, match=r"not for linux/riscv64 .*linux/amd64, .*linux/arm64/v8"):
        await find(f"oci:{tmp_path}/l", "riscv64")


async def test_an_image_for_another_platform_without_saying_so_in_the_index(tmp_path: Path) -> None:
    layout_of(tmp_path / "l", [BASE], config=config_of([BASE], architecture="arm64"))
    with pytest.raises(ImageUnsupportedError, match="it is for linux/arm64, not for linux/amd64") as caught:
        await find(f"oci:{tmp_path}/l")
    assert caught.value.reference == f"oci:{tmp_path}/l"


async def test_an_index_that_is_nested_too_deep(tmp_path: Path) -> None:
    layout = empty(tmp_path / "l")
    inner = layout.manifest([BASE])
    for _ in range(6):
        inner = layout.json({"manifests": [inner]}, INDEX)
    layout.index([inner])
    with pytest.raises(ImageCorruptError, match="nested"):
        await find(f"oci:{tmp_path}/l")


@pytest.mark.parametrize(("each", "indexes", "why"), [(200, 40, "more than 1000 manifests"), (1, 200, "50 indexes")])
async def test_an_index_of_too_many(tmp_path: Path, each: int, indexes: int, why: str) -> None:
    layout = empty(tmp_path / "l")
    inner = layout.json({"manifests": [layout.manifest([BASE])] * each}, INDEX)
    layout.index([inner] * indexes)
    with pytest.raises(ImageCorruptError, match=why):
        await find(f"oci:{tmp_path}/l")


async def test_what_is_no_layout(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 2000)
    for reference, error in (
        (f"oci:{tmp_path}/nothing", ImageNotFoundError), (f"oci:{tmp_path}", ImageNotFoundError),
        (f"oci:{tmp_path}/file", ImageCorruptError), (f"oci:{tmp_path}/file/x", ImageNotFoundError),
        (f"{tmp_path}/nothing", ImageNotFoundError), (str(tmp_path), ImageReferenceError),
    ):
        with pytest.raises(error) as caught:
            await find(reference)
        assert caught.value.reference == reference


@pytest.mark.parametrize("index", [
    b"", b"[]", b"{}", b'{"manifests": {}}', b'{"manifests": [1]}', b'{"manifests": [{}]}',
    b'{"manifests": [{"digest": "sha256:x", "size": 1}]}',
])
async def test_an_index_that_is_damaged(tmp_path: Path, index: bytes) -> None:
    layout_of(tmp_path / "l", [BASE])
    (tmp_path / "l" / "index.json").write_bytes(index)
    with pytest.raises(ImageError) as caught:
        await find(f"oci:{tmp_path}/l")
    assert not isinstance(caught.value, ImageReferenceError)


@pytest.mark.parametrize("which", ["manifest", "config"])
@pytest.mark.parametrize("how", ["wrong", "longer", "shorter", "missing", "fifo", "directory"])
async def test_metadata_that_is_damaged(tmp_path: Path, which: str, how: str) -> None:
    layout = layout_of(tmp_path / "l", [BASE])
    digest = json.loads((layout.path / "index.json").read_bytes())["manifests"][0]["digest"]
    if which == "config":
        digest = json.loads((layout.path / "blobs" / digest.replace(":", "/")).read_bytes())["config"]["digest"]
    blob = layout.path / "blobs" / digest.replace(":", "/")
    raw = blob.read_bytes()
    blob.unlink()
    match how:
        case "wrong":
            blob.write_bytes(raw.replace(b"sha256", b"sha512"))
        case "longer":
            blob.write_bytes(raw + b" ")
        case "shorter":
            blob.write_bytes(raw[:-1])
        case "fifo":
            os.mkfifo(blob)
        case "directory":
            blob.mkdir()
    with pytest.raises(ImageCorruptError):
        await find(f"oci:{tmp_path}/l")


async def test_a_manifest_that_says_it_is_huge_isn_t_read(tmp_path: Path) -> None:
    layout = layout_of(tmp_path / "l", [BASE])
    index = json.loads((layout.path / "index.json").read_bytes())
    index["manifests"][0]["size"] = 2**40
    layout.index(index["manifests"])
    with pytest.raises(ImageCorruptError, match="more than 4194304"):
        await find(f"oci:{tmp_path}/l")


@pytest.mark.parametrize(("change", "error"), [
    ({"config": None}, ImageUnsupportedError), ({"layers": []}, ImageCorruptError),
    ({"layers": None}, ImageCorruptError), ({"layers": "x"}, ImageCorruptError),
    ({"layers": [{"mediaType": f"{LAYER_TYPE}+crypt", "digest": digest_of(b""), "size": 0}]}, ImageUnsupportedError),
    ({"layers": [{"mediaType": FOREIGN_TYPE, "digest": digest_of(b""), "size": 0}]}, ImageUnsupportedError),
    ({"layers": [{"mediaType": LAYER_TYPE, "digest": digest_of(b"")}]}, ImageCorruptError),
])
async def test_a_manifest_that_can_t_be(tmp_path: Path, change: dict[str, Any], error: type[ImageError]) -> None:
    layout = empty(tmp_path / "l")
    manifest = {"config": layout.json(config_of([BASE]), "application/vnd.oci.image.config.v1+json"),
                "layers": [layout.blob(BASE, LAYER_TYPE)]}
    layout.index([layout.json(manifest | change, "application/vnd.oci.image.manifest.v1+json")])
    with pytest.raises(error):
        await find(f"oci:{tmp_path}/l")


async def test_a_layer_that_is_missing_or_damaged_is_found_when_it_is_read(tmp_path: Path) -> None:
    layout = layout_of(tmp_path / "l", [BASE], compression="plain")
    blob = layout.path / "blobs" / digest_of(BASE).replace(":", "/")
    blob.write_bytes(BASE[:-1] + b"x")
    image = await find(f"oci:{tmp_path}/l")
    with pytest.raises(ImageCorruptError) as caught:
        files(image)
    assert caught.value.digest == digest_of(BASE)
    blob.unlink()
    with pytest.raises(ImageCorruptError, match="is missing"):
        files(image)


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


def test_a_layout_in_a_tar(tmp_path: Path) -> None:
    layout = layout_of(tmp_path / "l", [BASE, TOP])
    run("tar", "-C", str(layout.path), "-cf", f"{tmp_path}/l.tar", ".")
    for reference in (f"oci:{tmp_path}/l.tar", f"{tmp_path}/l.tar", f"{tmp_path}/l.tar:latest"):
        assert files(anyio.run(find, reference)) == {"", "etc", "etc/b", "etc/c"}
    with (tmp_path / "l.tar").open("r+b") as archive:
        archive.truncate(5000)
    with pytest.raises(ImageCorruptError, match="truncated"):
        anyio.run(find, f"{tmp_path}/l.tar")


# --- archives of docker save ---


def archive(
    path: Path, members: Sequence[tuple[str, bytes | str]], manifests: Sequence[dict[str, Any]]
) -> None:
    """A tar of files, and of symlinks (text)."""
    with tarfile.open(path, "w") as tar:
        for name, content in [*members, ("manifest.json", json.dumps(manifests).encode())]:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def saved(path: Path, images: dict[str, list[bytes]]) -> None:
    members: dict[str, bytes | str] = {}
    manifests = []
    for tag, tars in images.items():
        config = json.dumps(config_of(tars)).encode()
        names = []
        for tar in tars:
            names.append(f"{digest_of(tar)[7:]}/layer.tar")
            members[names[-1]] = tar
        members[f"{digest_of(config)[7:]}.json"] = config
        manifests.append({"Config": f"{digest_of(config)[7:]}.json", "RepoTags": [tag], "Layers": names})
    archive(path, list(members.items()), manifests)


async def test_an_archive(tmp_path: Path) -> None:
    saved(tmp_path / "a.tar", {"app:1": [BASE, TOP]})
    path = f"{tmp_path}/a.tar"
    for reference in (f"docker-archive:{path}", f"docker-archive:{path}:app:1", f"docker-archive:{path}:1", path):
        image = await find(reference)
        assert files(image) == {"", "etc", "etc/b", "etc/c"}
        assert image.digest == chain_id([digest_of(BASE), digest_of(TOP)])
    with pytest.raises(ImageNotFoundError, match=r"no image '2' \(it has app:1\)"):
        await find(f"docker-archive:{tmp_path}/a.tar:2")


async def test_an_archive_of_several_images(tmp_path: Path) -> None:
    saved(tmp_path / "a.tar", {"app:1": [BASE], "app:2": [TOP], "other:2": [BASE, TOP]})
    assert (await find(f"docker-archive:{tmp_path}/a.tar:1")).digest == digest_of(BASE)
    assert (await find(f"docker-archive:{tmp_path}/a.tar:app:2")).digest == digest_of(TOP)
    for reference in (f"docker-archive:{tmp_path}/a.tar", f"docker-archive:{tmp_path}/a.tar:2"):
        with pytest.raises(ImageReferenceError, match="app:1, app:2, other:2"):
            await find(reference)


async def test_layers_that_images_share_by_symlinks(tmp_path: Path) -> None:
    config = json.dumps(config_of([BASE, BASE])).encode()
    archive(tmp_path / "a.tar", [("one/layer.tar", BASE), ("two/layer.tar", "../one/layer.tar"), ("c.json", config)],
            [{"Config": "c.json", "Layers": ["one/layer.tar", "two/layer.tar"]}])
    assert files(await find(f"{tmp_path}/a.tar")) == {"", "etc", "etc/a", "etc/b"}


async def test_a_symlink_to_itself_or_out_of_the_archive(tmp_path: Path) -> None:
    config = json.dumps(config_of([BASE])).encode()
    for target in ("l", "/etc/passwd", "../../../../etc/passwd", "nothing"):
        archive(tmp_path / "a.tar", [("l", target), ("c.json", config)], [{"Config": "c.json", "Layers": ["l"]}])
        image = await find(f"{tmp_path}/a.tar")
        with pytest.raises(ImageCorruptError, match="its layer 'l' is missing"):
            files(image)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "x/../../secret"])
async def test_names_that_lead_out_of_a_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text('{"rootfs": "secret"}')
    (tmp_path / "d" / "x").mkdir(parents=True)
    (tmp_path / "d" / "manifest.json").write_text(json.dumps([{"Config": name, "Layers": []}]))
    with pytest.raises(ImageCorruptError, match=r"its config .* is missing"):
        await find(f"{tmp_path}/d")


@pytest.mark.parametrize(("manifests", "error"), [
    ([], ImageNotFoundError), ({}, ImageError), ([1], ImageError), ([{}], ImageError),
    ([{"Config": "none.json", "Layers": []}], ImageCorruptError), ([{"Config": 5, "Layers": []}], ImageCorruptError),
    ([{"Config": "c.json", "Layers": []}], ImageCorruptError),
    ([{"Config": "c.json", "Layers": "l"}], ImageCorruptError),
    ([{"Config": "c.json", "RepoTags": "x", "Layers": ["l"]}], ImageCorruptError),
    ([{"Config": "0" * 64 + ".json", "Layers": ["l"]}], ImageCorruptError),
])
async def test_an_archive_that_is_damaged(tmp_path: Path, manifests: Any, error: type[ImageError]) -> None:
    config = json.dumps(config_of([BASE])).encode()
    archive(tmp_path / "a.tar", [("l", BASE), ("c.json", config), ("0" * 64 + ".json", config)], manifests)
    with pytest.raises(error):
        await find(f"docker-archive:{tmp_path}/a.tar")


async def test_a_layer_of_an_archive_that_isn_t_its_diff_id(tmp_path: Path) -> None:
    config = json.dumps(config_of([BASE])).encode()
    archive(tmp_path / "a.tar", [("l", TOP), ("c.json", config)], [{"Config": "c.json", "Layers": ["l"]}])
    image = await find(f"{tmp_path}/a.tar")
    with pytest.raises(ImageCorruptError, match="diff_id"):
        files(image)


def test_what_skopeo_makes_of_it(tmp_path: Path) -> None:
    """The same image by way of another program's idea of the formats."""
    layout_of(tmp_path / "l", [BASE, TOP])
    path = str(tmp_path)
    for target in (f"docker-archive:{path}/d.tar:app:1", f"oci-archive:{path}/o.tar:app", f"oci:{path}/o:app"):
        run("skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{path}/l:latest", target)
    expected = anyio.run(find, f"oci:{path}/l")
    for reference in (f"{path}/d.tar", f"docker-archive:{path}/d.tar:app:1", f"{path}/o.tar:app", f"oci:{path}/o"):
        image = anyio.run(find, reference)
        assert (image.digest, files(image)) == (expected.digest, files(expected))
        assert image.config == expected.config


async def test_an_error_of_what_is_in_an_image_names_the_image(tmp_path: Path) -> None:
    reference = f"oci:{tmp_path}/l"
    layout_of(tmp_path / "l", [BASE], config=config_of([BASE], config={"Env": {"A": "1"}}))
    with pytest.raises(ImageCorruptError) as caught:
        await find(reference)
    assert str(caught.value) == f"{reference}: {caught.value.message}"
    layout_of(tmp_path / "m", [BASE])
    with pytest.raises(ImageUnsupportedError, match="/m: it is for linux/"):
        await find(f"{tmp_path}/m", architecture="aarch64")


def test_an_image_is_named_once() -> None:
    for said in ("oci:/a is nothing", "/a is nothing"):
        assert str(ImageCorruptError(said, reference="oci:/a", hint="x")) == f"{said} (x)"
    assert str(ImageCorruptError("it is nothing")) == "it is nothing"
