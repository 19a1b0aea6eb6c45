"""Makes layers and layouts for the tests of images, and looks into what became of them. It all goes by tarfile."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard
from attrs import evolve, field, frozen

from pykata.images.layer import Layer
from pykata.images.layers import write_layers
from pykata.images.limits import DEFAULT_LIMITS, Limits

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")      # cap_net_raw+ep


@frozen
class Item:
    """An entry of a tar, as a test writes it."""

    name: str
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 1_700_000_000
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(factory=dict)


def file(name: str, data: bytes = b"", **more: Any) -> Item:
    return Item(name, data=data, **more)


def folder(name: str, **more: Any) -> Item:
    return Item(name, tarfile.DIRTYPE, **{"mode": 0o755, **more})


def symlink(name: str, target: str, **more: Any) -> Item:
    return Item(name, tarfile.SYMTYPE, link=target, **{"mode": 0o777, **more})


def hardlink(name: str, target: str, **more: Any) -> Item:
    return Item(name, tarfile.LNKTYPE, link=target, **more)


def whiteout(name: str) -> Item:
    parent, slash, last = name.rpartition("/")
    return Item(f"{parent}{slash}.wh.{last}")


def opaque(name: str) -> Item:
    return Item(f"{name}/.wh..wh..opq" if name else ".wh..wh..opq")


def tar_of(items: Iterable[Item], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for item in items:
            info = tarfile.TarInfo(item.name)
            info.type, info.mode, info.uid, info.gid, info.mtime = item.kind, item.mode, item.uid, item.gid, item.mtime
            info.size, info.linkname = len(item.data), item.link
            info.devmajor, info.devminor = item.device
            info.pax_headers = {f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")
                                for name, value in item.xattrs.items()}
            tar.addfile(info, io.BytesIO(item.data))
    return out.getvalue()


def compress(data: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, mtime=0)
    return zstandard.compress(data) if compression == "zstd" else data


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def layer_of(tar: bytes, compression: str = "plain", **more: Any) -> Layer:
    """A layer in memory, with all that can be verified."""
    stored = compress(tar, compression)
    layer = Layer(digest_of(stored)[:16], lambda: io.BytesIO(stored), digest_of(stored), len(stored), digest_of(tar))
    return evolve(layer, **more)


def merged(layers: Sequence[Iterable[Item]], limits: Limits = DEFAULT_LIMITS) -> dict[str, Seen]:
    """What merging these layers gives, the lowest first."""
    return look(merged_tar([layer_of(tar_of(items)) for items in layers], limits))


def merged_tar(layers: Sequence[Layer], limits: Limits = DEFAULT_LIMITS) -> bytes:
    out = io.BytesIO()
    write_layers(layers, limits, out)
    return out.getvalue()


# --- what a tar has ---


@frozen
class Seen:
    """A file of a tar. ``names`` are all names of it."""

    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    data: str = ""
    size: int = 0
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[str, bytes], ...] = ()
    names: frozenset[str] = frozenset()


def look(tar: bytes, *, whole: bool = True) -> dict[str, Seen]:
    """Everything in a tar by path; the root is ``""``.

    No path may be there twice, nor, in a ``whole`` tar, before the directory that it is in.
    """
    found: dict[str, Seen] = {}
    groups: dict[str, set[str]] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), encoding="utf-8", errors="surrogateescape") as archive:
        for member in archive:
            name = "" if member.name in (".", "./") else member.name.removeprefix("./").rstrip("/")
            assert name not in found, f"{name!r} is there twice"
            parent = name.rpartition("/")[0]
            if whole and name:
                assert parent in found, f"{name!r} comes before its directory"
                assert found[parent].kind == tarfile.DIRTYPE, f"{name!r} isn't in a directory"
            if member.islnk():
                target = member.linkname.removeprefix("./")
                groups[target].add(name)
                groups[name] = groups[target]
                found[name] = found[target]
                continue
            groups[name] = {name}
            found[name] = _seen(archive, member)
    return {name: evolve(seen, names=frozenset(groups[name])) for name, seen in found.items()}


def _seen(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Seen:
    data = ""
    if member.isreg():
        content = archive.extractfile(member)
        assert content is not None
        data = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
    xattrs = {key.removeprefix("SCHILY.xattr."): value.encode("utf-8", "surrogateescape")
              for key, value in member.pax_headers.items() if key.startswith("SCHILY.xattr.")}
    node = member.ischr() or member.isblk()
    return Seen(
        kind=member.type if not member.isreg() else tarfile.REGTYPE, mode=member.mode, uid=member.uid, gid=member.gid,
        mtime=int(member.mtime), data=data, size=member.size if member.isreg() else 0,
        link=member.linkname if member.issym() else "", device=(member.devmajor, member.devminor) if node else (0, 0),
        xattrs=tuple(sorted(xattrs.items())),
    )


def look_into(squashfs: Path) -> dict[str, Seen]:
    """Everything in a squashfs."""
    tar = subprocess.run(["sqfs2tar", "--root-becomes", ".", squashfs], check=True, capture_output=True).stdout
    return look(tar)


# --- layouts ---


def config_of(tars: Sequence[bytes], **more: Any) -> dict[str, Any]:
    return {
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]}, **more,
    }


@frozen
class Layout:
    """An OCI layout on disk."""

    path: Path

    def blob(self, data: bytes, media_type: str = "", **more: Any) -> dict[str, Any]:
        """Write a blob; returns its descriptor."""
        digest = digest_of(data)
        path = self.path / "blobs" / digest.replace(":", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data), **more}

    def json(self, value: object, media_type: str, **more: Any) -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), media_type, **more)

    def manifest(
        self, tars: Sequence[bytes], *, compression: str = "gzip", config: Mapping[str, Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        """Write an image; returns the descriptor of its manifest."""
        suffix = "" if compression == "plain" else f"+{compression}"
        return self.json({
            "schemaVersion": 2,
            "config": self.json(config or config_of(tars), "application/vnd.oci.image.config.v1+json"),
            "layers": [self.blob(compress(tar, compression), LAYER_TYPE + suffix) for tar in tars],
        }, "application/vnd.oci.image.manifest.v1+json", **more)

    def index(self, manifests: Sequence[Mapping[str, Any]]) -> Layout:
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
        return self


def layout_of(path: Path, tars: Sequence[bytes], *, tag: str = "latest", **more: Any) -> Layout:
    """An OCI layout with one image."""
    path.mkdir(parents=True, exist_ok=True)
    layout = Layout(path)
    return layout.index([layout.manifest(tars, annotations={"org.opencontainers.image.ref.name": tag}, **more)])
