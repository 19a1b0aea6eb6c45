"""Makes the demo image: Debian with Python, as an OCI layout of two layers.

    scripts/make_demo_image.py [images/debian-python]

Debian's packages come from the sources that apt of this machine has; nothing is installed. The second layer removes
what a small image doesn't need and adds a user, so that merging layers is part of every demo. With the same packages
the result is the same, bit by bit. An image that is there already is left alone, unless it is of another recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

ROOT = Path(__file__).parent.parent
RECIPE = "1"                    # change it when the same packages give another image
EPOCH = 1735689600              # 2025-01-01, the time of everything that has no better one
PACKAGES = "python3-minimal,python3"
TOOLS = {"mmdebstrap": "mmdebstrap", "apt-get": "apt"}
ARCHITECTURES = {"x86_64": ("amd64", "amd64"), "aarch64": ("arm64", "arm64")}     # machine -> Debian's, OCI's

REMOVED = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "var/cache/apt",
    "var/cache/debconf",
)
EMPTIED = ("var/log", "var/lib/apt/lists")
USER = "app"
CONFIG = {
    "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
    "Cmd": ["python3"],
    "WorkingDir": "/",
    "Labels": {"org.opencontainers.image.title": "debian-python", "pykata.demo.recipe": RECIPE},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=ROOT / "images" / "debian-python")
    parser.add_argument("--force", action="store_true", help="make it again, even if it is there")
    arguments = parser.parse_args()
    path: Path = arguments.path
    if not arguments.force and recipe_of(path) == RECIPE:
        say(f"{path} is there already")
        return 0
    if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        print(f"make_demo_image: missing: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-image-", dir=path.parent) as work:
        layout = Path(work, "layout")
        make(layout, Path(work))
        if path.exists():
            shutil.rmtree(path)
        layout.chmod(0o755)
        layout.rename(path)
    say(f"{path} is ready")
    return 0


def recipe_of(path: Path) -> str | None:
    """The recipe of the image that is there, if there is one."""
    try:
        manifest = json.loads(read_blob(path, json.loads((path / "index.json").read_bytes())["manifests"][0]))
        config = json.loads(read_blob(path, manifest["config"]))
        return str(config["config"]["Labels"]["pykata.demo.recipe"])
    except (OSError, LookupError, ValueError):
        return None


def make(layout: Path, work: Path) -> None:
    debian, oci = ARCHITECTURES[os.uname().machine]
    base = work / "base.tar"
    bootstrap(base, debian)
    writer = Writer(layout)
    say("the first layer: packing what mmdebstrap made")
    with base.open("rb") as file:
        layers = [writer.layer(file)]
    say("the second layer: removing documentation, adding a user")
    layers.append(writer.layer(io.BytesIO(second_layer(base))))
    writer.image(layers, oci)


def bootstrap(tar: Path, architecture: str) -> None:
    codename, sources = apt_sources()
    say(f"mmdebstrap: Debian {codename} with {PACKAGES.replace(',', ', ')} (half a minute)")
    command = [
        "mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", f"--architectures={architecture}", "--format=tar",
        "--aptopt=Acquire::Languages none", codename, str(tar), *sources,
    ]
    subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH)})


def apt_sources() -> tuple[str, list[str]]:
    """The codename of this machine's Debian, and apt's own sources for it (none: mmdebstrap has a default)."""
    fields = "$(CODENAME)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)|$(ORIGIN)"
    listed = subprocess.run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"],
                            check=True, capture_output=True, text=True).stdout
    found = [line.split("|") for line in sorted(set(listed.splitlines()))]
    sources = [(codename, source) for codename, source, origin in found if origin.startswith("Debian")]
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    codename = release.get("VERSION_CODENAME", "stable").strip('"')
    return codename, [source for name, source in sources if name.split("-")[0] == codename]


def second_layer(base: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(base) as lower, tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **attributes: Any) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime = kind, len(data), EPOCH
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(data))

        def below(name: str) -> bytes:
            member = lower.extractfile(f"./{name}")
            assert member is not None
            return member.read()

        for name in REMOVED:
            parent, _, last = name.rpartition("/")
            add(f"{parent}/.wh.{last}")
        for name in EMPTIED:
            add(f"{name}/.wh..wh..opq")
        for name, line in (
            ("etc/passwd", f"{USER}:x:1000:1000::/home/{USER}:/bin/bash\n"), ("etc/group", f"{USER}:x:1000:\n"),
        ):
            add(name, data=below(name) + line.encode(), mode=0o644)
        add("etc/hostname", data=b"debian-python\n", mode=0o644)
        add(f"home/{USER}", tarfile.DIRTYPE, mode=0o755, uid=1000, gid=1000)
        add("usr/local/bin/python", tarfile.SYMTYPE, linkname="/usr/bin/python3", mode=0o777)
    return out.getvalue()


class Writer:
    """Writes an OCI layout (image-spec, image-layout.md)."""

    def __init__(self, layout: Path) -> None:
        self.layout = layout
        (layout / "blobs" / "sha256").mkdir(parents=True)

    def layer(self, tar: IO[bytes]) -> tuple[dict[str, object], str]:
        """Compress a layer; returns its descriptor and its diff_id."""
        plain = hashlib.sha256()
        with self._blob() as (file, written):
            with zstandard.ZstdCompressor(level=6, threads=-1).stream_writer(file, closefd=False) as compressed:
                while chunk := tar.read(1 << 20):
                    plain.update(chunk)
                    compressed.write(chunk)
            written["mediaType"] = "application/vnd.oci.image.layer.v1.tar+zstd"
        return written, f"sha256:{plain.hexdigest()}"

    def image(self, layers: list[tuple[dict[str, object], str]], architecture: str) -> None:
        config = self._json("application/vnd.oci.image.config.v1+json", {
            "created": "2025-01-01T00:00:00Z", "architecture": architecture, "os": "linux", "config": CONFIG,
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
        })
        manifest_type = "application/vnd.oci.image.manifest.v1+json"
        manifest = self._json(manifest_type, {
            "schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": [layer for layer, _ in layers],
        })
        manifest["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
        (self.layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
        (self.layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))

    def _json(self, media_type: str, value: object) -> dict[str, object]:
        with self._blob() as (file, written):
            file.write(json.dumps(value, indent=2).encode())
        return {"mediaType": media_type, **written}

    @contextmanager
    def _blob(self) -> Iterator[tuple[IO[bytes], dict[str, object]]]:
        """A file to write to, and its descriptor, which is filled in when the block is left."""
        blobs = self.layout / "blobs" / "sha256"
        written: dict[str, object] = {}
        part = blobs / "part"
        with part.open("wb") as file:
            yield file, written
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        written |= {"digest": f"sha256:{digest}", "size": part.stat().st_size}
        part.rename(blobs / digest)


def read_blob(layout: Path, descriptor: dict[str, str]) -> bytes:
    return (layout / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()


def say(text: str) -> None:
    print(f"make_demo_image: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
