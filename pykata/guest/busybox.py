"""Makes the builtin image ``busybox``: something to run where no registry can be reached."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

from pykata.errors import BundleBuildError
from pykata.guest.inputs import host_arch
from pykata.guest.steps import Progress, need_tools, run_quiet
from pykata.host import file_hash, run_tool

RECIPE = "1"
"""Of this file: change it when the same inputs give another image."""

_TOOLS = {"busybox": "busybox-static", "tar2sqfs": "squashfs-tools-ng"}
_GOARCH = {"x86_64": "amd64", "aarch64": "arm64"}
_FOLDERS = ("bin", "dev", "etc", "home", "proc", "root", "run", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var")
_MODES = {"root": 0o700, "tmp": 0o1777, "var/tmp": 0o1777}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


async def busybox_inputs(arch: str) -> dict[str, str]:
    """Everything the image depends on, by name."""
    need_tools(_TOOLS)
    if arch != host_arch():
        raise BundleBuildError(f"the busybox of this machine isn't one for {arch}", hint=f"build on {arch}")
    program = _program()
    return {
        "recipe": RECIPE,
        "busybox": (await run_quiet([str(program)])).splitlines()[0],
        "busybox.sha256": file_hash(program),
        "tar2sqfs": (await run_quiet(["tar2sqfs", "--version"])).splitlines()[0],
    }


async def build_busybox(arch: str, work: Path, progress: Progress) -> tuple[Path, Path]:
    """Make the image below ``work``: its filesystem and its OCI config."""
    progress("busybox", 0, 1, "making the busybox image")
    applets = (await run_quiet([str(_program()), "--list-full"])).split()
    image, config = work / "busybox.squashfs", work / "busybox.json"
    options = ["--quiet", "--force", "--num-jobs", "1", "--defaults", "mtime=0", "--compressor", "lz4"]
    await run_tool(["tar2sqfs", *options, image], input=rootfs_tar(_program().read_bytes(), applets))
    config.write_text(json.dumps(_config(arch), indent=2) + "\n")
    progress("busybox", 1, 1, "made the busybox image")
    return image, config


def rootfs_tar(busybox: bytes, applets: list[str]) -> bytes:
    """The image's files: busybox with a link for each applet (``bin/ls``), and the least of /etc."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted((*_FOLDERS, "tmp", "var/tmp")):
            _add(tar, name, tarfile.DIRTYPE, _MODES.get(name, 0o755))
        _add(tar, "bin/busybox", tarfile.REGTYPE, 0o755, busybox)
        for name in sorted(set(applets) - {"bin/busybox"}):
            _add(tar, name, tarfile.SYMTYPE, 0o777, link="/bin/busybox")
        for name, text in _FILES.items():
            _add(tar, name, tarfile.REGTYPE, 0o644, text.encode())
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, kind: bytes, mode: int, data: bytes = b"", link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size, info.linkname = kind, mode, len(data), link
    tar.addfile(info, io.BytesIO(data))


def _config(arch: str) -> dict[str, object]:
    # OCI image-spec, config.md
    return {
        "architecture": _GOARCH[arch],
        "os": "linux",
        "config": {"Env": [f"PATH={_PATH}"], "Cmd": ["sh"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": []},
    }


def _program() -> Path:
    found = shutil.which("busybox")
    if found is None:
        raise BundleBuildError("busybox isn't installed", hint="apt-get install busybox-static")
    return Path(found)
