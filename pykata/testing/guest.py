"""What a fake virtual machine boots, and the image that it runs: files that are there, and nothing in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO
from unittest import mock

from attrs import frozen

from pykata.fs.base import SharedFs
from pykata.guest.bundle import OUTPUTS
from pykata.guest.inputs import FORMAT, host_arch
from pykata.spec import Attachment, Disk, Image, ImageConfig, Mount

CONFIG = ImageConfig(env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, cmd=("true",))


@contextmanager
def fake_bundle(directory: Path) -> Iterator[Path]:
    """Makes a guest bundle in ``directory``, which sandboxes boot while the block runs; it has ``builtin:busybox``.

    ::

        with fake_bundle(tmp_path):
            async with Sandbox(FakeHypervisor(), FakeFs()) as sb:
                done = await sb.run("builtin:busybox", ["echo", "hello"])
    """
    image = {"Env": [f"{name}={value}" for name, value in CONFIG.env.items()], "Cmd": list(CONFIG.cmd)}
    config = {"architecture": "amd64", "os": "linux", "config": image}
    outputs = {}
    for name in OUTPUTS:
        content = json.dumps(config).encode() if name.endswith(".json") else name.encode()
        (directory / name).write_bytes(content)
        outputs[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest = {"format": FORMAT, "arch": host_arch(), "hash": "fake", "tree": "fake", "inputs": {}, "outputs": outputs}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with mock.patch.dict("os.environ", PYKATA_BUNDLE=str(directory)):
        yield directory


def fake_image(reference: str = "fake", config: ImageConfig = CONFIG) -> Image:
    """An image whose filesystem is empty."""

    def write_tar(out: IO[bytes]) -> None:
        out.write(bytes(1024))      # the end of an archive, and nothing before it

    digest = f"sha256:{hashlib.sha256(reference.encode()).hexdigest()}"
    return Image(reference=reference, digest=digest, config=config, architecture=host_arch(), write_tar=write_tar)


@frozen
class FakeFs(SharedFs):
    """Attaches any image as a disk that is never read."""

    @asynccontextmanager
    async def rootfs(self, image: Image, run_dir: Path) -> AsyncIterator[Attachment]:
        disk = Disk("rootfs", image.disk or Path("/dev/null"))
        yield Attachment(devices=(disk,), mounts=(Mount("rootfs", image.disk_type, options=("ro",)),))
