"""Packs a bundle into a wheel, so that ``pip install`` users never build (PyPA: binary distribution format 1.0)."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from pykata.guest.bundle import OUTPUTS, WHEEL, Bundle

_INIT = '"""The guest bundle of pykata: a kernel, the agent, and the builtin image, in the folder ``bundle``."""\n'
_METADATA = """\
Metadata-Version: 2.1
Name: pykata-guest
Version: {version}
Summary: The guest bundle of pykata: kernel, agent and builtin image
License: GPL-2.0-only AND Apache-2.0
Requires-Python: >=3.11
"""
_WHEEL = "Wheel-Version: 1.0\nGenerator: pykata\nRoot-Is-Purelib: false\nTag: {tag}\n"


def write_wheel(bundle: Bundle, out_dir: Path, version: str = "0.1.0") -> Path:
    """Write the wheel ``pykata_guest`` with this bundle. The same bundle gives the same bytes.

    The tag is that of any Linux: nothing in it runs on the host.
    """
    bundle.verify()
    tag = f"py3-none-manylinux_2_17_{bundle.architecture}"
    info = f"{WHEEL}-{version}.dist-info"
    members = {
        f"{WHEEL}/__init__.py": _INIT.encode(),
        **{f"{WHEEL}/bundle/{name}": (bundle.path / name).read_bytes() for name in (*OUTPUTS, "manifest.json")},
        f"{info}/METADATA": _METADATA.format(version=version).encode(),
        f"{info}/WHEEL": _WHEEL.format(tag=tag).encode(),
    }
    members[f"{info}/RECORD"] = _record(members, f"{info}/RECORD").encode()
    out_dir.mkdir(parents=True, exist_ok=True)
    return _zip(out_dir / f"{WHEEL}-{version}-{tag}.whl", members)


def _record(members: dict[str, bytes], itself: str) -> str:
    lines = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in members.items()]
    return "".join(lines) + f"{itself},,\n"


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    unfinished = path.with_suffix(".tmp")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(info, data)
    unfinished.replace(path)
    return path
