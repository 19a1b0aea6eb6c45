"""PID 1 of the nested machine: makes it a host for pykata, then runs the programs it is asked for, one at a time.

It talks to the test over a virtio-serial port, a JSON object per line. From here: ``{"ready": {...}}`` once, then for
each program any number of ``{"output": text}`` and one ``{"exit": code}``. To here: ``{"argv": [...], "env": {...}}``.
It uses the standard library only: what is in ``/work`` is what the test is about.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

PORT = "nested"
MODULES = ("virtio_console", "kvm_amd", "vhost_vsock", "vsock_loopback", "loop", "tun")
MOUNTS = (
    ("proc", "/proc", ""), ("sysfs", "/sys", ""), ("devtmpfs", "/dev", ""), ("devpts", "/dev/pts", "ptmxmode=666"),
    ("tmpfs", "/dev/shm", ""), ("tmpfs", "/run", "mode=755"), ("tmpfs", "/tmp", "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", ""), ("debugfs", "/sys/kernel/debug", ""),
)  # fmt: skip


def main() -> None:
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root", LC_ALL="C.UTF-8")
    for kind, where, options in MOUNTS:
        os.makedirs(where, exist_ok=True)
        command("mount", "-t", kind, kind, where, *(["-o", options] if options else []))
    for module in MODULES:
        command("modprobe", module)
    command("ip", "link", "set", "lo", "up")
    # What udev's rules of Debian (50-udev-default.rules) do to these two.
    for device, group in (("/dev/kvm", "kvm"), ("/dev/vhost-vsock", "kvm")):
        permit(device, group)
    with open(port(), "r+b", buffering=0) as control:
        tell(control, {"ready": {"release": os.uname().release, "devices": devices()}})
        for line in lines(control):
            serve(control, json.loads(line))


def command(*argv: str) -> None:
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(f"nested: {' '.join(argv)}: {done.stdout.strip()}", file=sys.stderr)


def permit(device: str, group: str) -> None:
    with suppress(FileNotFoundError):
        gid = next(int(line.split(":")[2]) for line in Path("/etc/group").read_text().splitlines()
                   if line.startswith(f"{group}:"))  # fmt: skip
        os.chown(device, 0, gid)
        os.chmod(device, 0o660)


def devices() -> list[str]:
    return [name for name in ("/dev/kvm", "/dev/vhost-vsock", "/dev/vsock") if Path(name).exists()]


def port() -> str:
    for named in Path("/sys/class/virtio-ports").glob("*/name"):
        if named.read_text().strip() == PORT:
            return f"/dev/{named.parent.name}"
    raise FileNotFoundError(f"no virtio-serial port is named {PORT}")


def lines(control: IO[bytes]) -> Iterator[bytes]:
    pending = b""
    while data := control.read(65536):
        *whole, pending = (pending + data).split(b"\n")
        yield from whole


def tell(control: IO[bytes], message: dict[str, Any]) -> None:
    left = memoryview(json.dumps(message).encode() + b"\n")
    while left:
        left = left[control.write(left):]


def serve(control: IO[bytes], request: dict[str, Any]) -> None:
    # A session of its own, so that what a killed program leaves can be told from us.
    program = subprocess.Popen(
        request["argv"], cwd="/work", env={**os.environ, **request["env"]}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert program.stdout is not None
    with program.stdout as output, closing(os.pidfd_open(program.pid)) as ended:
        while True:
            # What the program left running may hold the pipe for ever: its own end is what counts.
            readable, _, _ = select.select([output.fileno(), ended], [], [])
            if output.fileno() not in readable:
                break
            if not (data := os.read(output.fileno(), 16384)):
                break
            tell(control, {"output": data.decode(errors="backslashreplace")})
    code = program.wait()
    reap()
    tell(control, {"exit": code})


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
