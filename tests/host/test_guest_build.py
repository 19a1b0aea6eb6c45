"""Building the bundle's parts with the host's real tools. The whole kernel only with ``-m slow``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anyio
import pytest

from pykata.errors import BundleBuildError, ToolMissingError
from pykata.guest.agent import build_agent
from pykata.guest.busybox import build_busybox, busybox_inputs
from pykata.guest.inputs import host_arch
from pykata.guest.kernel import build_kernel
from pykata.guest.steps import need_tools, no_progress, run_logged
from pykata.host import file_hash, run_tool

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[2]


def running(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().split()[2] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_the_busybox_image_is_the_same_each_time(tmp_path: Path) -> None:
    sums = []
    for name in ("one", "two"):
        work = tmp_path / name
        work.mkdir()
        sums.append([file_hash(path) for path in await build_busybox(host_arch(), work, no_progress)])
    assert sums[0] == sums[1]


async def test_the_busybox_image_has_a_shell_and_users(tmp_path: Path) -> None:
    image, config = await build_busybox(host_arch(), tmp_path, no_progress)
    listed = (await run_tool(["rdsquashfs", "--describe", image])).decode()
    assert "slink bin/sh 0777 0 0 /bin/busybox" in listed
    assert "dir tmp 01777 0 0" in listed
    assert json.loads(config.read_text())["config"]["Cmd"] == ["sh"]


async def test_the_inputs_of_the_image_name_what_it_is_made_of() -> None:
    inputs = await busybox_inputs(host_arch())
    assert inputs["busybox"].startswith("BusyBox v")
    assert len(inputs["busybox.sha256"]) == 64


async def test_a_missing_tool_names_its_package() -> None:
    with pytest.raises(ToolMissingError) as caught:
        need_tools({"no-such-program": "no-such-package", "sh": "dash"})
    assert caught.value.hint == "apt-get install no-such-package"


async def test_a_failed_step_shows_the_end_of_its_log(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(BundleBuildError, match="sh exited with code 3") as caught:
        await run_logged(["sh", "-c", "echo one; echo two >&2; exit 3"], tmp_path / "log", on_line=lines.append)
    assert lines == ["one", "two"]
    assert caught.value.output == "one\ntwo\n"


async def test_a_cancelled_step_leaves_no_process(tmp_path: Path) -> None:
    started = anyio.Event()
    pids: list[str] = []

    def on_line(line: str) -> None:
        pids.append(line)
        started.set()

    async with anyio.create_task_group() as tasks:
        command = "sleep 1000 & echo $!; wait"
        tasks.start_soon(lambda: run_logged(["sh", "-c", command], tmp_path / "log", on_line=on_line))
        await started.wait()
        tasks.cancel_scope.cancel()
    # It was sent SIGKILL by now; on a busy machine it takes a moment to die of it.
    with anyio.fail_after(300):
        while running(pids[0]):  # noqa: ASYNC110  nobody tells us of the death of a grandchild  # noqa: ASYNC110 - no event tells of the death of a grandchild
            await anyio.sleep(0.01)


@pytest.mark.slow
async def test_the_agent_is_the_same_wherever_it_is_built(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("one", "a-longer-name")]
    for root in roots:              # both before a build, during which somebody may go on writing
        shutil.copytree(ROOT / "guest" / "agent", root / "guest" / "agent", ignore=shutil.ignore_patterns("target"))
    agents = [await build_agent(root, host_arch(), root, root.with_suffix(".target"), no_progress) for root in roots]
    assert file_hash(agents[0]) == file_hash(agents[1])


@pytest.mark.slow
async def test_the_kernel_is_the_same_wherever_it_is_built(tmp_path: Path) -> None:
    sums = []
    for name in ("one", "a-longer-name"):
        work = tmp_path / name
        work.mkdir()
        sums.append(file_hash(await build_kernel(ROOT, host_arch(), work, no_progress)))
    assert sums[0] == sums[1]
