"""Images of one's own: made, saved, pushed to real registries, pulled again."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

import pykata
from pykata import Recipe, Registries
from pykata.errors import ConfigError, ImageError, ImageNotFoundError, ImageReferenceError, ImageUnauthorizedError
from pykata.images import resolve
from tests.http_server import serving
from tests.images_fixtures import file, layout_of, tar_of
from tests.real_registry import (
    HTPASSWD,
    ISSUER,
    PASSWORD,
    SERVICE,
    USER,
    another,
    certificate,
    pulled,
    registry,
    tokens,
)

pytestmark = pytest.mark.usefixtures("places")

FILES: dict[str, bytes | str | Path] = {"/app/main.py": "print(1)", "/etc/app.conf": b"a=b\n"}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


async def in_thread(*command: str | Path) -> str:
    done = await anyio.to_thread.run_sync(partial(subprocess.run, command, check=True, capture_output=True, text=True))
    return str(done.stdout)


async def test_from_files() -> None:
    recipe = Recipe().with_files(FILES, mode=0o755, owner=(5, 6)).with_env(A="b").with_cmd(["/app/main.py"], user="5")
    assert await pykata.build_image(recipe, "app:dev") == "app:dev"
    image, names = await pulled("app:dev", pull="never")
    assert names == {"app", "app/main.py", "etc", "etc/app.conf"}
    assert image.config.cmd == ("/app/main.py",)
    assert image.config.env["A"] == "b"
    assert image.config.user == "5"
    [listed] = await pykata.list_images()
    assert listed.name == "docker.io/library/app:dev"


async def test_nothing_stays_of_what_was_removed(places: Path) -> None:
    recipe = Recipe().with_files(FILES)
    await pykata.build_image(recipe, "app:dev")
    await pykata.build_image(recipe.with_cmd(["x"]), "app:other")
    await pykata.remove_image("app:dev")
    assert len(list((places / "cache/images/steps").iterdir())) == 1
    await pykata.remove_image("app:other")
    assert [path for path in (places / "cache").rglob("*") if path.is_file()] == []


async def test_steps_are_told(places: Path) -> None:
    events: list[pykata.BuildEvent] = []

    def show(event: pykata.BuildEvent) -> None:
        events.append(event)
        raise RuntimeError("a callback that fails is no concern of the build")

    recipe = Recipe().with_files(FILES).with_files({"/tree": places / "home"})
    for name in ("app:dev", "app:again", "app:dev"):
        await pykata.build_image(recipe, name, progress=show)
    told = [(event.number, event.total, event.step, event.status) for event in events]
    first, second = "files /app/main.py and 1 more", "files /tree"
    assert told == [
        (1, 2, first, "running"), (1, 2, first, "done"), (2, 2, second, "running"), (2, 2, second, "done"),
        *[(1, 2, first, "cached"), (2, 2, second, "cached")] * 2,
    ]  # fmt: skip


async def test_the_same_recipe_is_made_once(places: Path) -> None:
    local = places / "local"
    local.write_bytes(b"one")
    recipe = Recipe().with_files({"/f": local})
    await pykata.build_image(recipe, "app:dev")
    first = (await pykata.list_images())[0].digest
    await pykata.build_image(recipe, "app:dev")
    assert (await pykata.list_images())[0].digest == first
    local.write_bytes(b"two")
    await pykata.build_image(recipe, "app:dev")
    assert (await pykata.list_images())[0].digest != first
    assert (await pulled("app:dev"))[1] == {"f"}


async def test_from_another_image(tmp_path: Path) -> None:
    layout_of(tmp_path / "l", [tar_of([file("base", b"x"), file("etc/app.conf", b"old")])])
    recipe = Recipe(base=f"oci:{tmp_path}/l").with_files(FILES).with_env(B="c")
    await pykata.build_image(recipe, "app:dev")
    image, names = await pulled("app:dev", pull="never")
    assert names == {"base", "app", "app/main.py", "etc", "etc/app.conf"}
    assert image.config.env == {"PATH": "/bin", "B": "c"}
    disk = tmp_path / "d.img"
    disk.write_bytes((bytes(1080) + b"\x53\xef").ljust(8192, b"\0"))
    with pytest.raises(ConfigError, match="is a disk of ext4"):
        await pykata.build_image(Recipe(base=f"disk:{disk}"), "other:dev")


async def test_from_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin/mmdebstrap"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\ncp {tmp_path}/tar $8\n")
    tool.chmod(0o755)
    (tmp_path / "tar").write_bytes(tar_of([file("usr/bin/python3", b"x", mode=0o755)]))
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin:/usr/sbin")
    recipe = Recipe(packages=("python3",), suite="bookworm", sources=("deb http://d.test bookworm main",))
    await pykata.build_image(recipe.with_packages("perl"), "app:dev", architecture="x86_64")
    assert (await pulled("app:dev"))[1] == {"usr", "usr/bin", "usr/bin/python3"}
    asked = (tmp_path / "asked").read_text()
    assert "--include=python3,perl" in asked
    assert "--architectures=amd64" in asked
    assert asked.strip().endswith("deb http://d.test bookworm main")
    assert [path.name for path in (tmp_path / "cache/images").iterdir() if path.name.startswith("build-")] == []


@pytest.mark.parametrize("wrong", [
    lambda: Recipe(packages=("a",), base="b"), lambda: Recipe(packages=("-o", "x")), lambda: Recipe(packages=("a;b",)),
    lambda: Recipe(suite="../x"), lambda: Recipe().with_files({"relative": b""}),
    lambda: Recipe().with_files({"/": b""}), lambda: Recipe().with_files({"/../x": b""}),
    lambda: Recipe().with_files({"/x": 5}),  # type: ignore[dict-item]
    lambda: Recipe().with_files({"/x": Path("/no/such/file")}),
])
def test_recipes_that_can_not_be_right(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        wrong()


async def test_names_that_can_not_be_right() -> None:
    for name in ("builtin:busybox", "./x", f"app@sha256:{'0' * 64}"):
        with pytest.raises(ImageReferenceError):
            await pykata.build_image(Recipe(), name)
    with pytest.raises(ImageNotFoundError):
        await pykata.push_image("app:none")


# --- elsewhere ---


async def test_saving(tmp_path: Path) -> None:
    await pykata.build_image(Recipe().with_files(FILES), "app:dev")
    await pykata.save_image("app:dev", tmp_path / "saved")
    saved = await resolve(f"oci:{tmp_path}/saved:dev", architecture="x86_64")
    assert saved.digest == (await resolve("app:dev", architecture="x86_64")).digest
    assert "Digest" in await in_thread("skopeo", "inspect", f"oci:{tmp_path}/saved:dev")
    with pytest.raises(ImageError, match="is there already"):
        await pykata.save_image("app:dev", tmp_path / "saved")
    assert [name for name in os.listdir(tmp_path) if name.startswith(".saving")] == []


async def test_pushing(upstream: str) -> None:
    await pykata.build_image(Recipe().with_files(FILES), "app:dev")
    for _ in range(2):
        digest = await pykata.push_image("app:dev", f"{upstream}/team/app:1")
    inspected = json.loads(await in_thread("skopeo", "inspect", "--tls-verify=false", f"docker://{upstream}/team/app:1"))
    assert inspected["Digest"] == digest
    assert (await pulled(f"{upstream}/team/app:1"))[1] == {"app", "app/main.py", "etc", "etc/app.conf"}


async def test_pushing_with_a_password(tmp_path: Path, places: Path) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    await pykata.build_image(Recipe().with_files(FILES), "app:dev")
    async with another(tmp_path / "r", htpasswd={"realm": "test", "path": str(tmp_path / "htpasswd")}) as host:
        with pytest.raises(ImageUnauthorizedError):
            await pykata.push_image("app:dev", f"{host}/app:1")
        allowed = Registries(credentials={host: (USER, PASSWORD)})
        await pykata.push_image("app:dev", f"{host}/app:1", registries=allowed)
        assert len((await pulled(f"{host}/app:1", registries=allowed))[1]) == 4


async def test_pushing_with_a_token(tmp_path: Path) -> None:
    by = await anyio.to_thread.run_sync(certificate, tmp_path)
    await pykata.build_image(Recipe().with_files(FILES), "app:dev")
    async with serving(tokens(by)) as server:
        auth = {"realm": f"http://{server.host}/token", "service": SERVICE, "issuer": ISSUER,
                "rootcertbundle": str(by.certificate)}
        async with another(tmp_path / "r", token=auth) as host:
            allowed = Registries(credentials={host: (USER, PASSWORD)})
            await pykata.push_image("app:dev", f"{host}/app:1", registries=allowed)
            assert "pull%2Cpush" in server.paths[-1]
            assert len((await pulled(f"{host}/app:1", registries=allowed))[1]) == 4
