"""Filesystems for a user without any privilege: a uid of its own, no capability, nobody's group, no KVM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykata.guest import Bundle

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="hardware: only root can become another user")

UID = 65_533
DROP = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "--inh-caps=-all",
        "--bounding-set=-all", "--no-new-privs"]
# Who is in a chroot may make no user namespace (user_namespaces(7), EPERM): as where they are switched off.
WITHOUT = ["unshare", "--mount", "sh", "-c", """
mount --make-rprivate / && mkdir "$HOME/all" && mount --rbind / "$HOME/all" && exec chroot "$HOME/all" "$@"
""", "sh"]
PROGRAM = """
import asyncio, json, os
from pathlib import Path
import fsspec
from pykata import *

HOME = Path(os.environ["HOME"])
MEMORY = fsspec.filesystem("memory")
MEMORY.makedirs("/m")
WRITE = "echo x > /v/x && cat /v/x; id -u"
READ = "cat /etc/what; echo y > /etc/what; cat /etc/what"
ROOT = f"dir:{HOME}/root"
TRIED = {
    "directory by virtio-fs": ({"/v": Bind(HOME / "a", via="virtiofs")}, WRITE, {}),
    "file": ({"/v": Bind(HOME / "f", readonly=True)}, "cat /v; echo x 2>&1 > /v | grep -c Read-only", {}),
    "directory by 9p": ({"/v": Bind(HOME / "b", via="9p")}, WRITE, {}),
    "disk": ({"/v": DiskImage(HOME / "disk", size="16M", files=50)}, WRITE, {}),
    "named": ({"/v": Named("named")}, WRITE, {}),
    "named with a size": ({"/v": Named("sized", size="8M")}, WRITE, {}),
    "fsspec": ({"/v": FsspecVolume(MEMORY, "/m")}, WRITE, {}),
    "image": ({"/v": ImageVolume(ROOT)}, "cat /v/etc/what", {}),
    "root filesystem as a disk": ({}, READ, {"fs": "block"}),
    "root filesystem by virtio-fs": ({}, READ, {"fs": "virtiofs"}),
    "root filesystem by 9p": ({}, READ, {"fs": "9p"}),
    "a device of root's": ({"/v": DiskImage("/dev/loop0")}, WRITE, {}),
}

async def tried(volumes, script, options):
    image = ROOT if options else "builtin:busybox"
    try:
        async with Sandbox(isolation="emulated", template="off", volumes=volumes, memory="128M", **options) as sb:
            done = await sb.run(image, ["sh", "-c", script])
            return done.stdout + done.stderr
    except PykataError as exc:
        return [type(exc).__name__, str(exc)]

async def main():
    assert open("/proc/self/status").read().partition("CapEff:")[2].split()[0].strip("0") == ""
    print(json.dumps({name: await tried(*what) for name, what in TRIED.items()}))

asyncio.run(main())
"""


@pytest.fixture
def home(bundle: Bundle) -> Iterator[Path]:
    """A home of that user, with an image, a guest to boot, and pykata: that of the tests may be root's."""
    home = Path(tempfile.mkdtemp(prefix="pk-user-", dir="/tmp"))
    try:
        for name in ("a", "b", "root/bin", "root/etc"):
            (home / name).mkdir(parents=True)
        (home / "f").write_text("file\n")
        (home / "root/etc/what").write_text("what\n")
        busybox = shutil.which("busybox")
        assert busybox is not None
        shutil.copy(busybox, home / "root/bin")
        for applet in ("sh", "cat", "id"):
            (home / "root/bin" / applet).symlink_to("busybox")
        shutil.copytree(bundle.kernel.parent, home / "bundle")
        subprocess.run(["chown", "--recursive", f"{UID}:{UID}", home], check=True)
        yield home
    finally:
        shutil.rmtree(home)


def results(home: Path, *around: str) -> dict[str, str | list[str]]:
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(home), "TMPDIR": str(home), "PYKATA_BUNDLE": str(home / "bundle"),
    }  # fmt: skip
    done = subprocess.run([*around, *DROP, python, "-c", PROGRAM], capture_output=True, text=True, check=False,
                          env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    found: dict[str, str | list[str]] = json.loads(done.stdout)
    return found


DENIED = ["NotPermittedError", "can't open the volume /dev/loop0: Permission denied"]
WITHOUT_NAMESPACES = {
    "directory by 9p": "x\n0\n", "disk": "x\n0\n", "named with a size": "x\n0\n", "fsspec": "x\n0\n",
    "image": "what\n", "root filesystem as a disk": "what\ny\n", "a device of root's": DENIED,
}  # fmt: skip


def test_all_filesystems(home: Path) -> None:
    assert results(home) == {
        **WITHOUT_NAMESPACES, "directory by virtio-fs": "x\n0\n", "file": "file\n1\n", "named": "x\n0\n",
        "root filesystem by virtio-fs": "what\ny\n", "root filesystem by 9p": "what\ny\n",
    }  # fmt: skip
    for made in ("a/x", "b/x", "disk"):
        assert (home / made).stat().st_uid == UID


def test_where_no_user_namespace_can_be_made(home: Path) -> None:
    found = results(home, *WITHOUT)
    for name, result in found.items():
        if name in WITHOUT_NAMESPACES:
            assert result == WITHOUT_NAMESPACES[name], name
        else:
            assert isinstance(result, list), (name, result)
            kind, said = result
            assert kind == "NotPermittedError", result
            assert "no user namespace can be made: Operation not permitted (Bind(via='9p'), DiskImage" in said
    assert len(found) == len(WITHOUT_NAMESPACES) + 5
