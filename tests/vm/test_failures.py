"""What goes wrong before and during a boot, and with images: each a typed error, naming its part. Nothing is left."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import pykata
from pykata import (
    QEMU,
    BootError,
    BootTimeoutError,
    Bundle,
    BundleDamagedError,
    BundleMissingError,
    ConfigError,
    DiskFullError,
    HostError,
    ImageCorruptError,
    ImageNotFoundError,
    Sandbox,
    Template,
    ToolFailedError,
    ToolMissingError,
    ToolTooOldError,
)
from pykata.host import run_root
from tests.conftest import ROOT
from tests.images_fixtures import Layout, config_of, file, layout_of, tar_of

BUSYBOX = "builtin:busybox"
GUARD = 300.0
"""Seconds in which everything here is over, also on a busy machine; what hangs, hangs for longer."""


async def refused(sandbox: Sandbox) -> Exception:
    """The error with which a sandbox doesn't boot."""
    with anyio.fail_after(GUARD), pytest.raises(Exception) as caught:  # noqa: PT011 - looked at by the caller
        async with sandbox:
            raise AssertionError("it booted")
    assert list(run_root().glob("[!.]*")) == []
    return caught.value


@pytest.fixture
def spawned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The command lines that were started since."""
    return lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("spawn: ")]


# --- before anything starts ---


async def test_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spawned: Callable[[], list[str]]) -> None:
    monkeypatch.delenv("PYKATA_BUNDLE")
    monkeypatch.setenv("PYKATA_CACHE", str(tmp_path))
    error = await refused(Sandbox(isolation="emulated"))
    assert isinstance(error, BundleMissingError)
    assert str(tmp_path) in str(error)
    assert "pykata guest build" in error.hint
    assert spawned() == []


@pytest.fixture
def own_bundle(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle to break."""
    path = tmp_path / "bundle"
    shutil.copytree(bundle.path, path)
    monkeypatch.setenv("PYKATA_BUNDLE", str(path))
    return path


def rewrite(bundle: Path, name: str, content: bytes) -> None:
    """Put another file into a bundle whose manifest agrees with it."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["outputs"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["vmlinux", "initrd.cpio", "busybox.squashfs", "busybox.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "longer"])
async def test_a_damaged_bundle(own_bundle: Path, spawned: Callable[[], list[str]], name: str, damage: str) -> None:
    path = own_bundle / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + (1 if damage == "longer" else -1))
    error = await refused(Sandbox(isolation="emulated"))
    assert isinstance(error, BundleDamagedError)
    assert name in str(error)
    assert "PYKATA_BUNDLE" in error.hint
    assert spawned() == []


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"format": 99}', "\0"])
async def test_a_damaged_manifest(own_bundle: Path, manifest: str) -> None:
    (own_bundle / "manifest.json").write_text(manifest)
    error = await refused(Sandbox(isolation="emulated"))
    assert isinstance(error, BundleDamagedError | BundleMissingError)
    assert str(own_bundle) in str(error)


async def test_an_image_that_cannot_be_used(
    tmp_path: Path, spawned: Callable[[], list[str]]
) -> None:
    """Where it is known before a machine is started, none is."""
    tar = tar_of([file("data", os.urandom(100_000))])
    damaged = layout_of(tmp_path / "damaged", [tar])
    layer = max((damaged.path / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(layer.read_bytes())
    content[len(content) // 2] ^= 1
    layer.write_bytes(content)
    layout_of(tmp_path / "commandless", [tar], config=config_of([tar], config={}))
    for reference, kind, cmd in (
        ("builtin:nothing", ImageNotFoundError, ["true"]),
        (f"oci:{tmp_path / 'missing'}", ImageNotFoundError, ["true"]),
        (f"oci:{damaged.path}", ImageCorruptError, ["true"]),
        (f"oci:{tmp_path / 'commandless'}", ConfigError, None),
    ):
        sandbox = Sandbox(isolation="emulated")
        sandbox.process(reference, cmd)
        assert isinstance(await refused(sandbox), kind)
        with pytest.raises(kind):
            await Sandbox(isolation="emulated").detach("never", reference, cmd, own_command=True)
        if cmd is not None:         # else there is nothing wrong with it
            with pytest.raises(kind):
                await Template(reference, isolation="emulated").__aenter__()
        assert list(run_root().glob("[!.]*")) == []
    assert pykata.list_detached() == []
    words = " ".join(spawned())
    assert "tar2sqfs" in words
    assert "-nodefaults" not in words
    assert "pykata.keeper" not in words


async def test_more_memory_than_there_is(spawned: Callable[[], list[str]]) -> None:
    for sandbox in (
        Sandbox(isolation="emulated", memory="100000G"),
        Sandbox(isolation="emulated", memory="100000G", template="off"),
    ):
        error = await refused(sandbox)
        assert isinstance(error, ConfigError)
        assert f"memory={100_000 * 1024} MiB is more than this machine has: " in str(error)
        assert error.hint
    with pytest.raises(ConfigError, match="more than this machine has"):
        await Sandbox(isolation="emulated", memory="100000G").detach("never", BUSYBOX)
    with pytest.raises(ConfigError, match="more than this machine has"):
        await Template(BUSYBOX, isolation="emulated", memory="100000G").__aenter__()
    with pytest.raises(ConfigError, match="cpus=1000 is too many for qemu"):
        Sandbox(isolation="emulated", cpus=1000)
    assert spawned() == []


async def test_no_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = await refused(Sandbox(QEMU(binary="/no/such/qemu"), isolation="emulated"))
    assert isinstance(error, ToolMissingError)
    assert "/no/such/qemu" in str(error)
    monkeypatch.setenv("PYKATA_QEMU", str(tmp_path / "qemu"))
    error = await refused(Sandbox(isolation="emulated"))
    assert isinstance(error, ToolMissingError)
    assert "PYKATA_QEMU" in str(error)
    monkeypatch.delenv("PYKATA_QEMU")
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    (tmp_path / "setpriv").symlink_to(setpriv)
    monkeypatch.setenv("PATH", str(tmp_path))
    error = await refused(Sandbox(isolation="emulated"))
    assert isinstance(error, ToolMissingError)
    assert "qemu-system-x86_64 is not installed" in str(error)
    assert "apt-get install" in error.hint


def program(path: Path, script: str) -> QEMU:
    """A QEMU that is a script."""
    path.write_text(f"#!/bin/sh\n{textwrap.dedent(script)}")
    path.chmod(0o755)
    # QEMU runs as another user.
    for parent in (path, *path.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    return QEMU(binary=path)


async def test_a_qemu_that_is_too_old(tmp_path: Path) -> None:
    old = program(tmp_path / "qemu", """
        [ "$1" = --version ] && echo 'QEMU emulator version 5.2.0 (Debian 1:5.2)' && exit
        echo "qemu: -nodefaults: something it doesn't know" >&2
        exit 1
    """)
    error = await refused(Sandbox(old, isolation="emulated"))
    assert isinstance(error, ToolTooOldError)
    assert "QEMU 5.2" in str(error)
    assert "7.2" in error.hint


async def test_a_program_that_is_no_qemu(tmp_path: Path) -> None:
    other = program(tmp_path / "qemu", "echo 'I am a teapot'; exit 0")
    error = await refused(Sandbox(other, isolation="emulated"))
    assert isinstance(error, ToolFailedError)
    assert "no QEMU" in str(error)


async def test_a_qemu_that_fails_says_why(tmp_path: Path) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    failing = program(tmp_path / "qemu", f"""
        [ "$1" = --version ] && exec {qemu} --version
        echo 'qemu: could not do it: No such luck' >&2
        exit 3
    """)
    error = await refused(Sandbox(failing, isolation="emulated"))
    assert isinstance(error, BootError)
    assert "No such luck" in str(error)
    assert "3" in str(error)


@pytest.mark.parametrize("variable", ["PYKATA_RUN", "PYKATA_CACHE"])
async def test_directories_of_somebody_else(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "/proc/sys/mine")
    if variable == "PYKATA_CACHE":
        monkeypatch.delenv("PYKATA_BUNDLE")
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is below
        await Sandbox(isolation="emulated").__aenter__()
    assert isinstance(caught.value, HostError)
    assert variable in str(caught.value)


def test_an_unprivileged_user(bundle: Bundle, tmp_path: Path) -> None:
    """All of it works without root; what isn't theirs is refused with a name."""
    home = Path(tempfile.mkdtemp(prefix="pykata-test-", dir="/tmp"))
    home.chmod(0o755)
    shutil.copytree(bundle.path, home / "bundle")
    script = textwrap.dedent("""
        import asyncio, importlib, os, pkgutil, sys
        import anyio._backends._asyncio, concurrent.futures.thread, encodings.idna, pykata
        # Everything, as this Python may be in a directory that only root can read.
        for module in pkgutil.walk_packages(pykata.__path__, "pykata."):
            importlib.import_module(module.name)
        uid = 64321
        os.mkdir(os.environ["HOME_OF_IT"] + "/run", 0o700)
        os.chown(os.environ["HOME_OF_IT"] + "/run", uid, uid)
        os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)

        async def main():
            async with pykata.Sandbox(isolation="emulated") as sb:
                done = await sb.run("builtin:busybox", ["sh", "-c", "echo hi; id -u"], check=True)
                pid = sb._running.vm.pid
                status = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
                print(done.stdout.split(), status["Uid"].split()[0] == str(uid), int(status["CapEff"], 16))
            os.environ["PYKATA_RUN"] = "/run/pykata-of-root"
            try:
                async with pykata.Sandbox(isolation="emulated"):
                    pass
            except pykata.NotPermittedError as error:
                print("refused", "/run/pykata-of-root" in str(error))
        asyncio.run(main())
    """)
    env = {
        **os.environ, "PYKATA_BUNDLE": str(home / "bundle"), "PYKATA_RUN": str(home / "run"), "HOME_OF_IT": str(home),
        "PYTHONPATH": str(ROOT), "PYKATA_CACHE": str(home / "run" / "cache"),
    }  # fmt: skip
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=GUARD,
                              check=False)
    finally:
        shutil.rmtree(home)
    assert done.stderr == ""
    assert done.stdout == "['hi', '0'] True 0\nrefused True\n"


# --- a boot that fails ---


async def test_a_kernel_that_is_none(own_bundle: Path) -> None:
    rewrite(own_bundle, "vmlinux", b"this is no kernel\n" * 1000)
    error = await refused(Sandbox(isolation="emulated", template="off"))
    assert isinstance(error, BootError)
    assert "QEMU exited with code 1" in str(error)


async def test_a_kernel_that_is_damaged_inside(own_bundle: Path) -> None:
    # Its headers are whole, its code isn't: it crashes before it can say anything.
    content = bytearray((own_bundle / "vmlinux").read_bytes())
    content[4096 : len(content) // 2] = bytes(len(content) // 2 - 4096)
    rewrite(own_bundle, "vmlinux", bytes(content))
    error = await refused(Sandbox(isolation="emulated", template="off", boot_timeout=3))
    assert isinstance(error, BootError)


async def test_a_guest_that_panics_as_it_boots(own_bundle: Path) -> None:
    rewrite(own_bundle, "initrd.cpio", bytes(1024))
    error = await refused(Sandbox(isolation="emulated", template="off"))
    assert isinstance(error, BootError)
    assert "panic" in str(error)
    assert "Kernel panic - not syncing" in error.console


async def test_a_guest_that_never_answers(tmp_path: Path) -> None:
    paused = program(tmp_path / "qemu", f'exec {shutil.which("qemu-system-x86_64")} "$@" -S')
    error = await refused(Sandbox(paused, isolation="emulated", boot_timeout=2))
    assert isinstance(error, BootTimeoutError)
    assert isinstance(error, TimeoutError)
    assert "within 2 s" in str(error)
    assert "boot_timeout" in error.hint


async def test_a_qemu_that_never_answers(tmp_path: Path) -> None:
    stuck = program(tmp_path / "qemu", "kill -STOP $$")
    error = await refused(Sandbox(stuck, isolation="emulated", boot_timeout=1))
    assert isinstance(error, BootTimeoutError)
    assert "within 1 s" in str(error)


async def test_a_qemu_that_is_killed_as_it_boots(tmp_path: Path) -> None:
    killed = program(tmp_path / "qemu", f"""
        (PATH={os.environ["PATH"]} sleep 0.5; kill -9 $$) &
        exec {shutil.which("qemu-system-x86_64")} "$@" -S
    """)
    error = await refused(Sandbox(killed, isolation="emulated"))
    assert isinstance(error, BootError)
    assert "SIGKILL" in str(error)


# --- images ---


async def test_images_that_are_not_there(sb: Sandbox, tmp_path: Path) -> None:
    for reference in ("oci:./no/such/layout", f"oci:{tmp_path}", "builtin:nothing", f"tar:{tmp_path / 'x.tar'}"):
        with pytest.raises(ImageNotFoundError) as caught:
            await sb.run(reference, ["true"])
        assert caught.value.reference == reference
    assert (await sb.run(BUSYBOX, ["echo", "usable"])).stdout == "usable\n"


async def test_a_damaged_layer_is_named(sb: Sandbox, tmp_path: Path) -> None:
    tar = tar_of([file("data", os.urandom(100_000))])
    layout: Layout = layout_of(tmp_path / "image", [tar])
    blobs = sorted((layout.path / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    layer = blobs[-1]
    content = bytearray(layer.read_bytes())
    content[len(content) // 2] ^= 1
    layer.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ImageCorruptError, match=layer.name[:12]) as caught:
            await sb.run(f"oci:{layout.path}", ["true"])
        assert caught.value.digest == f"sha256:{layer.name}"
    layer.unlink()
    with pytest.raises((ImageCorruptError, ImageNotFoundError), match=layer.name[:12]):
        await sb.run(f"oci:{layout.path}", ["true"])
    assert (await sb.run(BUSYBOX, ["echo", "usable"])).stdout == "usable\n"


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A filesystem with 4 MiB of room."""
    path = tmp_path / "tiny"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tiny", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def files_below(path: Path) -> list[Path]:
    return [found for found in path.rglob("*") if found.is_file() and found.stat().st_size > 0]


async def test_a_full_disk_while_an_image_is_converted(
    sb: Sandbox, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(tmp_path / "image", [tar_of([file("big", os.urandom(16 * 1024 * 1024))])])
    monkeypatch.setenv("PYKATA_CACHE", str(tiny))
    with anyio.fail_after(GUARD), pytest.raises(DiskFullError) as caught:
        await sb.run(f"oci:{layout.path}", ["true"])
    assert str(tiny) in str(caught.value)
    assert files_below(tiny) == [], "what was begun is gone"
    assert (await sb.run(BUSYBOX, ["echo", "usable"])).stdout == "usable\n"


async def test_no_room_for_a_run_directory(bundle: Bundle, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny / "run").mkdir(mode=0o700)
    monkeypatch.setenv("PYKATA_RUN", str(tiny / "run"))
    (tiny / "fill").write_bytes(bytes(4 * 1024 * 1024))
    error = await refused(Sandbox(isolation="emulated"))
    assert isinstance(error, DiskFullError)
    assert "PYKATA_RUN" in error.hint


async def test_bad_arguments_start_nothing(bundle: Bundle, spawned: Callable[[], list[str]]) -> None:
    wrong: list[dict[str, Any]] = [{"memory": 8}, {"cpus": 0}, {"hypervisor": "vmware"}, {"cpus": 1000}]
    for arguments in wrong:
        with pytest.raises(ConfigError):
            Sandbox(**arguments)
    assert spawned() == []
