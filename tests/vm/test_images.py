"""Images from registries, daemons' archives and disk images, in a real guest."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from pykata import AgentRefusedError, ConfigError, ImageNotFoundError, Recipe, Sandbox, build_image
from tests.images_fixtures import config_of, file, folder, layout_of, symlink, tar_of
from tests.real_registry import push, registry

BUSYBOX = shutil.which("busybox") or ""
LOOK = ["sh", "-c", "cat /etc/hello; stat -c '%a %u %g' /etc/hello"]


def busybox_layer() -> bytes:
    names = ("sh", "cat", "stat", "id", "touch")
    return tar_of([
        folder("bin"), folder("etc"), *(symlink(f"bin/{name}", "busybox") for name in names),
        file("bin/busybox", Path(BUSYBOX).read_bytes(), mode=0o755), file("etc/hello", b"hello\n", mode=0o640, gid=7),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("registry")
    layout_of(folder / "l", [busybox_layer()])
    with registry(folder) as host:
        push(f"{folder}/l:latest", host, "busybox:1")
        yield host


async def test_an_image_from_a_registry(sb: Sandbox, host: str) -> None:
    for _ in range(2):
        done = await sb.run(f"{host}/busybox:1", LOOK)
        assert done.stdout == "hello\n640 0 7\n"


async def test_when_a_registry_is_asked(sb: Sandbox, host: str, tmp_path: Path) -> None:
    name = f"{host}/moving:1"
    with pytest.raises(ImageNotFoundError, match="isn't here, and"):
        await sb.run(name, LOOK, pull="never")
    with pytest.raises(ImageNotFoundError, match="has no moving:1"):
        await sb.run(name, LOOK)
    with pytest.raises(ConfigError, match="pull='sometimes' is unknown"):
        await sb.run(name, LOOK, pull="sometimes")  # type: ignore[arg-type]
    layout_of(tmp_path / "one", [busybox_layer()])
    layout_of(tmp_path / "two", [busybox_layer(), tar_of([file("etc/hello", b"two\n")])])
    await anyio.to_thread.run_sync(push, f"{tmp_path}/one:latest", host, "moving:1")
    assert (await sb.shell(name, "cat /etc/hello")).stdout == "hello\n"
    await anyio.to_thread.run_sync(push, f"{tmp_path}/two:latest", host, "moving:1")
    assert (await sb.shell(name, "cat /etc/hello", pull="never")).stdout == "hello\n"
    async with sb.container(name, pull="always") as container:
        assert (await container.shell("cat /etc/hello")).stdout == "two\n"
    async with sb.process(name, ["cat", "/etc/hello"], pull="never") as process:
        assert [piece async for piece in process.stdout] == [b"two\n"]


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A directory with what the other images have, but for its owners."""
    root = tmp_path / "rootfs"
    for name in ("bin", "etc", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in ("sh", "cat", "stat", "touch"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/hello").write_text("hello\n")
    (root / "etc/hello").chmod(0o640)
    return root


async def run(*command: str | Path) -> None:
    await anyio.to_thread.run_sync(partial(subprocess.run, command, check=True, capture_output=True))


async def test_an_ext4_disk(sb: Sandbox, rootfs: Path, tmp_path: Path) -> None:
    disk = tmp_path / "d.ext4"
    await run("mkfs.ext4", "-q", "-E", "root_owner=0:0", "-d", rootfs, disk, "16M")
    before = disk.read_bytes()
    assert (await sb.run(f"disk:{disk}", LOOK)).stdout.startswith("hello\n640 ")
    written = await sb.run(f"disk:{disk}", ["sh", "-c", "touch /etc/new && stat -c %s /etc/new"])
    assert written.stdout == "0\n"
    assert disk.read_bytes() == before


async def test_a_squashfs_disk(sb: Sandbox, rootfs: Path, tmp_path: Path) -> None:
    disk = tmp_path / "d.squashfs"
    await run("mksquashfs", rootfs, disk, "-all-root", "-quiet")
    assert (await sb.run(f"disk:{disk}", LOOK)).stdout == "hello\n640 0 0\n"


# --- what an image may claim ---


async def test_a_list_of_users_that_is_huge(sb: Sandbox, host: str, tmp_path: Path) -> None:
    line = b"nobody-%08d:x:1:1::/:/bin/sh\n"
    users = b"".join(line % number for number in range(200_000)) * 34     # 200 MB
    huge = tar_of([file("etc/passwd", users + b"last:x:77:77::/:/bin/sh\n"), file("etc/group", users)])
    base = busybox_layer()
    config = config_of([base, huge], config={"User": "last"})
    layout_of(tmp_path / "l", [base, huge], compression="zstd", config=config)
    # The agent reads the first part of it only, and the guest survives it.
    with pytest.raises(AgentRefusedError, match='no user "last" in the container'):
        await sb.run(f"oci:{tmp_path}/l", ["id", "-u"])
    assert (await sb.run(f"{host}/busybox:1", LOOK)).stdout == "hello\n640 0 7\n"


async def test_an_owner_above_two_billion(sb: Sandbox, tmp_path: Path) -> None:
    top = tar_of([file("etc/owned", b"x", uid=2**31 + 5, gid=2**32 - 2)])
    layout_of(tmp_path / "l", [busybox_layer(), top])
    done = await sb.run(f"oci:{tmp_path}/l", ["stat", "-c", "%u %g", "/etc/owned"])
    assert done.stdout == "2147483653 4294967294\n"
    with pytest.raises(AgentRefusedError, match='id "2147483653" is above 2147483647'):
        await sb.run(f"oci:{tmp_path}/l", ["id", "-u"], user=str(2**31 + 5))


@pytest.mark.slow
async def test_a_recipe_of_packages(sb: Sandbox, places: Path) -> None:
    recipe = Recipe(packages=("python3-minimal",)).with_files({"/app/main.py": "print(6 * 7)"}).with_env(A="b")
    reference = await build_image(recipe.with_cmd(["python3", "/app/main.py"]), "app:dev")
    assert (await sb.run(reference)).stdout == "42\n"
    assert (await sb.run(reference, ["sh", "-c", "echo $A; cat /etc/debian_version"])).stdout.startswith("b\n")
