"""Makes the initial RAM disk: the agent and the little a kernel wants to start it."""

from __future__ import annotations

from pathlib import Path

from pykata.guest.cpio import character_device, directory, newc, program

# The kernel opens /dev/console for PID 1 before anything could be mounted; the agent mounts the others.
_FOLDERS = ("dev", "proc", "run", "sys", "tmp")


def write_initrd(agent: Path, target: Path) -> None:
    """Write the RAM disk that starts the program ``agent``: an uncompressed cpio, the fastest to read under TCG."""
    entries = [directory(name) for name in _FOLDERS]
    entries += [character_device("dev/console", 5, 1), program("init", agent.read_bytes())]
    target.write_bytes(newc(sorted(entries, key=lambda entry: entry.name)))
