"""Images whose recipe runs commands: what they change becomes a layer, once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from pykata_cli import main

from pykata import BuildEvent, BuildFailedError, Network, Recipe, Sandbox, build_image, remove_image, sync
from pykata.images import resolve
from tests.outside import outside

pytestmark = pytest.mark.usefixtures("places")

BUSYBOX = Recipe(base="builtin:busybox")


async def made(recipe: Recipe, sb: Sandbox, name: str = "app:dev") -> list[tuple[int, str]]:
    """The steps that were not made before."""
    events: list[BuildEvent] = []
    await build_image(recipe, name, sandbox=sb, progress=events.append)
    assert {event.total for event in events} <= {len(recipe.steps)}
    return [(event.number, event.step) for event in events if event.status == "running"]


async def test_what_a_command_changes(sb: Sandbox) -> None:
    recipe = BUSYBOX.with_files({"/app/data": "data\n"}).with_env(WHO="me").with_workdir("/app")
    recipe = recipe.run("echo $WHO > who && cat data who > /both && rm data && chmod 700 /home", env={"WHO": "you"})
    recipe = recipe.with_user("1000").run(["sh", "-c", "id -u > /tmp/id"]).with_cmd(["sh", "-c", "echo $WHO; pwd"])
    assert [number for number, _ in await made(recipe, sb)] == [1, 2, 3]
    done = await sb.run("app:dev")
    assert (done.stdout, done.exit_code) == ("me\n/app\n", 0)
    looked = await sb.shell("app:dev", "cat /both /tmp/id; ls /app; stat -c %a /home", user="0")
    assert looked.stdout.split() == ["data", "you", "1000", "who", "700"]


async def test_each_step_is_made_once(sb: Sandbox, places: Path) -> None:
    first = BUSYBOX.run("cat /proc/sys/kernel/random/uuid > /one")
    assert await made(first.run("echo a > /two"), sb) == [(1, "run cat /proc/sys/kernel/random/uuid > /one"),
                                                           (2, "run echo a > /two")]
    one = (await sb.shell("app:dev", "cat /one")).stdout
    assert await made(first.run("echo b > /two"), sb, "other:dev") == [(2, "run echo b > /two")]
    assert (await sb.shell("other:dev", "cat /one")).stdout == one
    assert await made(first.run("echo a > /two"), sb, "third:dev") == []
    assert len(await made(Recipe(base="builtin:busybox").with_env(A="b").run("echo a > /two"), sb, "env:dev")) == 1
    for name in ("app:dev", "third:dev", "other:dev"):
        await remove_image(name)
    assert len(await made(first.run("echo a > /two"), sb)) == 2, "its layers are gone with the images that had them"
    assert list((places / "cache/images").glob("build-*")) == []


async def test_a_command_that_fails(sb: Sandbox, places: Path) -> None:
    recipe = BUSYBOX.run("echo out; echo made > /made; echo the reason >&2; exit 7")
    with pytest.raises(BuildFailedError, match=r"ended with exit code 7 .*the reason") as caught:
        await build_image(recipe, "app:dev", sandbox=sb)
    assert caught.value.completed.exit_code == 7
    assert sorted(caught.value.output.split()) == ["out", "reason", "the"]
    with pytest.raises(BuildFailedError, match="its time was up"):
        await build_image(BUSYBOX.run("sleep 1000", timeout=0.5), "app:dev", sandbox=sb)
    left = [path.name for path in (places / "cache/images").rglob("*") if path.is_file()]
    assert [name for name in left if name.endswith((".new", ".lock"))] == []
    assert list((places / "cache/images/names").glob("*")) == []


async def test_a_sandbox_of_its_own(places: Path) -> None:
    sandbox = Sandbox(isolation="emulated", memory=128)
    await build_image(BUSYBOX.run("free -m | awk 'NR == 2 {print $2}' > /memory; ls /sys/class/net > /net"), "app:dev",
                      sandbox=sandbox)
    async with sandbox:
        done = await sandbox.shell("app:dev", "cat /memory /net")
    memory, *interfaces = done.stdout.split()
    assert int(memory) < 128
    assert interfaces == ["lo"]


async def test_a_cache_with_a_colon_in_its_path(
    sb: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path / "of:all"))
    assert await made(BUSYBOX.run("echo a > /a"), sb) == [(1, "run echo a > /a")]
    assert (await sb.run("app:dev", ["cat", "/a"])).stdout == "a\n"


async def test_a_policy_holds_while_commands_run(places: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"from outside\n")

    async with outside() as there, there.tcp(serve, 8000), there.tcp(serve, 8001):
        sandbox = Sandbox(isolation="emulated", network=Network(allow=[f"{there.address}:8000"]))
        fetch = f"nc {there.address} 8000 < /dev/null > /fetched"
        await build_image(BUSYBOX.run(fetch), "app:dev", sandbox=sandbox)
        for denied in (f"nc {there.address} 8001 < /dev/null", "nslookup evil.example"):
            with pytest.raises(BuildFailedError, match=r"refused|NXDOMAIN|can't resolve"):
                await build_image(BUSYBOX.run(fetch).run(denied), "other:dev", sandbox=sandbox)
    async with Sandbox(isolation="emulated") as plain:
        assert (await plain.run("app:dev", ["cat", "/fetched"])).stdout == "from outside\n"


async def test_on_an_image_with_layers(sb: Sandbox, demo_image: str) -> None:
    from pykata import load_image

    await load_image(f"oci:{demo_image}", "debian:1")
    await made(Recipe(base="debian:1").run("python3 -c 'open(\"/made\", \"w\").write(\"by python\")'"), sb)
    assert (await sb.run("app:dev", ["cat", "/made"])).stdout == "by python"
    base = json.loads((Path(demo_image) / "index.json").read_bytes())["manifests"][0]
    assert (await resolve("debian:1", architecture="x86_64")).reference == "debian:1"
    assert base["digest"]


def test_the_command_line(places: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = places / "context"
    folder.mkdir()
    (folder / "hello").write_text("hello\n")
    lines = ("FROM builtin:busybox", "COPY hello /", "ARG WHO", "RUN echo $WHO >> /hello; cat /hello")
    (folder / "Dockerfile").write_text("\n".join(lines))
    (folder / "recipes.py").write_text('import pykata\napp = pykata.Recipe(base="app:1").run("rm /hello")\nother = 1\n')
    build = ["build", "--isolation", "emulated"]
    assert main([*build, "-t", "app:1", "--build-arg", "WHO=you", str(folder)]) == 0
    out, err = capfd.readouterr()
    assert out == "app:1\n"
    assert err.splitlines() == ["[1/2] files /hello", "[2/2] run echo $WHO >> /hello; cat /hello", "hello", "you"]
    assert main([*build, "-q", "-t", "app:2", f"{folder}/recipes.py:app"]) == 0
    assert capfd.readouterr() == ("app:2\n", "")
    assert main(["run", "--isolation", "emulated", "app:2", "--", "ls", "/hello"]) == 1
    capfd.readouterr()
    for wrong, why in ((f"{folder}/recipes.py:other", "is no pykata.Recipe"), (f"{folder}/none", "is not a directory")):
        assert main([*build, "-t", "app:3", wrong]) == 125
        assert why in capfd.readouterr().err
    (folder / "Dockerfile").write_text("FROM builtin:busybox\nRUN echo oh no; false\n")
    assert main([*build, "-t", "app:3", str(folder)]) == 125
    assert "'run echo oh no; false': '/bin/sh' ended with exit code 1 (oh no)" in capfd.readouterr().err


def test_without_async(places: Path) -> None:
    with sync.Sandbox(isolation="emulated") as sandbox:
        assert sync.build_image(BUSYBOX.run("echo made > /made"), "app:dev", sandbox=sandbox) == "app:dev"
        assert sandbox.run("app:dev", ["cat", "/made"]).stdout == "made\n"
    assert [image.name for image in sync.list_images()] == ["docker.io/library/app:dev"]
    assert sync.remove_image("app:dev") > 0
