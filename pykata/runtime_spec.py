"""The OCI runtime specification's ``config.json`` for a container (runtime-spec 1.1, config.md, config-linux.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pykata.spec import ImageConfig

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What Docker gives a container that asks for nothing: enough for package managers and servers.
CAPABILITIES = (
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
)  # fmt: skip

# Files through which a container could read or change what belongs to the guest's kernel.
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
    "/sys/firmware",
)  # fmt: skip
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

PIDS_LIMIT = 4096
NOFILE = 65536

_NOTHING = ["nosuid", "noexec", "nodev"]


def _mount(destination: str, kind: str, *options: str) -> dict[str, object]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


MOUNTS = (
    _mount("/proc", "proc", *_NOTHING),
    _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
    _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
    _mount("/dev/shm", "tmpfs", *_NOTHING, "mode=1777", "size=65536k"),
    _mount("/dev/mqueue", "mqueue", *_NOTHING),
    _mount("/sys", "sysfs", *_NOTHING, "ro"),
    _mount("/sys/fs/cgroup", "cgroup", *_NOTHING, "relatime", "ro"),
)


def container_json(config: ImageConfig, *, hostname: str, env: Mapping[str, str], memory_limit: int) -> bytes:
    """``config.json`` of a container of an image with ``config``. ``memory_limit`` in bytes."""
    document = {
        "ociVersion": "1.1.0",
        "hostname": hostname,
        "root": {"path": "rootfs", "readonly": False},
        "process": _process(config, env),
        "mounts": MOUNTS,
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")],
            "resources": {"memory": {"limit": memory_limit}, "pids": {"limit": PIDS_LIMIT}},
            "maskedPaths": MASKED,
            "readonlyPaths": READONLY,
        },
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _process(config: ImageConfig, env: Mapping[str, str]) -> dict[str, object]:
    merged = {"PATH": DEFAULT_PATH, **config.env, **env}
    granted = dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES)
    return {
        "args": ["/"],                      # the specification wants one; each process brings its own
        "cwd": config.workdir or "/",
        "env": [f"{name}={value}" for name, value in merged.items()],
        "user": {"uid": 0, "gid": 0},
        "capabilities": granted,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": NOFILE, "hard": NOFILE}],
        "noNewPrivileges": False,           # sudo and ping work; what they reach is this guest
    }
