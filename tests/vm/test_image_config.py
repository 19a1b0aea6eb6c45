"""What an image's config says about a command, honoured in a real guest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pykata import AgentRefusedError, ConfigError, ImageUnsupportedError, Sandbox
from tests.images_fixtures import config_of, file, folder, layout_of, symlink, tar_of

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
app:x:1234:2345:an app:/home/app:/bin/sh
www:x:33:33::/var/www:/bin/sh
"""
GROUP = b"""root:x:0:
app:x:2345:
www:x:33:
adm:x:4:app,www
staff:x:50:app
"""

Make = Callable[..., str]


@pytest.fixture(scope="module")
def tar() -> bytes:
    """A layer with busybox and two users."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    return tar_of([
        folder("bin"), folder("etc"), folder("tmp", mode=0o1777), folder("home"), folder("work"),
        folder("home/app", uid=1234, gid=2345),
        file("bin/busybox", Path(busybox).read_bytes(), mode=0o755),
        *(symlink(f"bin/{name}", "busybox") for name in ("sh", "id", "env", "pwd", "echo", "cat", "touch", "ls")),
        file("etc/passwd", PASSWD), file("etc/group", GROUP),
    ])  # fmt: skip


@pytest.fixture
def make(tar: bytes, tmp_path: Path) -> Make:
    """Makes an image whose config is that of the test; returns its reference."""

    def make(**config: Any) -> str:
        layout_of(tmp_path / "image", [tar], config=config_of([tar], config=config))
        return f"oci:{tmp_path / 'image'}"

    return make


WHO = ["sh", "-c", "id -u; id -g; id -G; echo $HOME; pwd"]


async def test_cmd_alone(sb: Sandbox, make: Make) -> None:
    image = make(Cmd=["/bin/echo", "the", "default"])
    assert (await sb.run(image)).stdout == "the default\n"
    assert (await sb.run(image, ["/bin/echo", "mine"])).stdout == "mine\n"


async def test_entrypoint_with_arguments(sb: Sandbox, make: Make) -> None:
    image = make(Entrypoint=["/bin/echo", "always"], Cmd=["the", "default"])
    assert (await sb.run(image)).stdout == "always the default\n"
    assert (await sb.run(image, ["mine"])).stdout == "always mine\n"
    assert (await sb.run(image, ["mine"], entrypoint=["/bin/echo", "other"])).stdout == "other mine\n"
    assert (await sb.run(image, ["/bin/echo", "bare"], entrypoint=[])).stdout == "bare\n"
    assert (await sb.run(image, entrypoint=["/bin/echo", "alone"])).stdout == "alone\n", "its Cmd was for the other one"
    async with sb.container(image) as container:
        assert (await container.run(["/bin/echo", "bare"])).stdout == "bare\n"


async def test_no_command_at_all(sb: Sandbox, make: Make) -> None:
    with pytest.raises(ConfigError, match="no command"):
        await sb.run(make())
    assert (await sb.run(make(), ["/bin/echo", "hi"])).stdout == "hi\n"


async def test_env_and_path(sb: Sandbox, make: Make) -> None:
    image = make(Env=["PATH=/work:/bin", "A=image", "B=image", "EMPTY=", "WITH=a=b c"])
    done = await sb.run(image, ["env"], env={"B": "call"})
    env = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert env == {"PATH": "/work:/bin", "A": "image", "B": "call", "EMPTY": "", "WITH": "a=b c", "HOME": "/root"}
    # What isn't in the PATH of the image isn't found.
    assert (await sb.run(make(Env=["PATH=/work"]), ["env"])).exit_code == 127
    # Without one, it is the usual.
    usual = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    assert usual in (await sb.run(make(), ["env"])).stdout


@pytest.mark.parametrize(
    ("user", "who"),
    [
        ("", "0\n0\n0\n/root\n/\n"),
        ("app", "1234\n2345\n2345 4 50\n/home/app\n/\n"),
        ("1234", "1234\n2345\n2345 4 50\n/home/app\n/\n"),
        ("www:staff", "33\n50\n50\n/var/www\n/\n"),
        ("app:4", "1234\n4\n4\n/home/app\n/\n"),
        ("4242", "4242\n0\n0\n/\n/\n"),
        ("4242:4343", "4242\n4343\n4343\n/\n/\n"),
        ("0:adm", "0\n4\n4\n/root\n/\n"),
    ],
)
async def test_user(sb: Sandbox, make: Make, user: str, who: str) -> None:
    image = make(User=user)
    assert (await sb.run(image, WHO)).stdout == who
    async with sb.container(image) as container:
        assert (await container.run(WHO)).stdout == who
        assert (await container.run(["id", "-u"], user="www")).stdout == "33\n", "the call's comes before the image's"


@pytest.mark.parametrize("user", ["ghost", "app:ghosts", "app:", ":app", "-1", "4294967296", "1:2:3"])
async def test_a_user_that_is_not_there(sb: Sandbox, make: Make, user: str) -> None:
    with pytest.raises(AgentRefusedError, match="user"):
        await sb.run(make(User=user), ["id"])


async def test_users_are_those_of_the_container_as_it_is_now(sb: Sandbox, make: Make) -> None:
    async with sb.container(make()) as container:
        await container.run(["sh", "-c", "echo 'late:x:77:33::/tmp:/bin/sh' >> /etc/passwd"], check=True)
        assert (await container.run(WHO, user="late")).stdout == "77\n33\n33\n/tmp\n/\n"


async def test_a_passwd_that_leads_elsewhere(sb: Sandbox, make: Make) -> None:
    # The agent reads this file; it must not follow it out of the container.
    async with sb.container(make()) as container:
        script = "/bin/busybox rm /etc/passwd; /bin/busybox ln -s /proc/1/root/etc/passwd /etc/passwd"
        await container.run(["sh", "-c", script], check=True)
        try:
            said = (await container.run(["id", "-u"], user="app")).stdout
        except AgentRefusedError:
            return
        assert said == "1234\n", "found inside, or refused"


async def test_workdir(sb: Sandbox, make: Make) -> None:
    assert (await sb.run(make(WorkingDir="/work"), ["pwd"])).stdout == "/work\n"
    assert (await sb.run(make(WorkingDir="/not/there/yet"), ["pwd"])).stdout == "/not/there/yet\n"
    assert (await sb.run(make(WorkingDir="/work"), ["pwd"], cwd="/tmp")).stdout == "/tmp\n"
    async with sb.container(make(WorkingDir="/work")) as container:
        await container.run(["touch", "here"], check=True)
        assert (await container.run(["ls", "/work"])).stdout == "here\n"


async def test_a_missing_workdir_belongs_to_root(sb: Sandbox, make: Make) -> None:
    # As with Docker: who wants another owner has the directory in the image.
    image = make(WorkingDir="/home/app/new", User="app")
    assert (await sb.run(image, ["/bin/busybox", "stat", "-c", "%u %g %a", "."])).stdout == "0 0 755\n"


async def test_files_keep_their_owners_and_modes(sb: Sandbox, make: Make) -> None:
    stat = ["/bin/busybox", "stat", "-c", "%a %u %g %n", "/tmp", "/home/app", "/bin/busybox"]
    assert (await sb.run(make(), stat)).stdout == "1777 0 0 /tmp\n755 1234 2345 /home/app\n755 0 0 /bin/busybox\n"


async def test_what_the_config_says_besides(sb: Sandbox, make: Make) -> None:
    image = make(Cmd=["/bin/echo", "hi"], Labels={"a": "b"}, ExposedPorts={"80/tcp": {}}, Volumes={"/data": {}},
                 StopSignal="SIGQUIT", Healthcheck={"Test": ["NONE"]}, Unknown={"x": [1]})
    async with sb.container(image) as container:
        assert container.image.config.labels == {"a": "b"}
        assert container.image.config.stop_signal == "SIGQUIT"
    assert (await sb.run(image)).stdout == "hi\n"


async def test_an_image_for_another_machine(sb: Sandbox, tar: bytes, tmp_path: Path) -> None:
    config = json.loads(json.dumps(config_of([tar]))) | {"architecture": "riscv64"}
    layout_of(tmp_path / "image", [tar], config=config)
    with pytest.raises(ImageUnsupportedError, match="riscv64"):
        await sb.run(f"oci:{tmp_path / 'image'}", ["true"])
