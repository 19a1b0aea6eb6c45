"""The guest bundle: the kernel and the RAM disk that a sandbox boots, and the image that comes with them."""

from __future__ import annotations

from pathlib import Path

from pykata.guest.bundle import Bundle, find_bundle, load_bundle
from pykata.guest.evict import evict, in_use
from pykata.guest.steps import Progress, no_progress

__all__ = ["Bundle", "build_bundle", "evict", "find_bundle", "in_use", "load_bundle", "write_wheel"]


async def build_bundle(*, architecture: str = "", progress: Progress = no_progress, force: bool = False) -> Bundle:
    """Build the bundle of the source tree; see :func:`pykata.guest.build.build_bundle`."""
    from pykata.guest.build import build_bundle  # booting a sandbox doesn't need it

    return await build_bundle(architecture=architecture, progress=progress, force=force)


def write_wheel(bundle: Bundle, out_dir: Path, version: str = "0.1.0") -> Path:
    """Pack a bundle into a wheel; see :func:`pykata.guest.wheel.write_wheel`."""
    from pykata.guest.wheel import write_wheel

    return write_wheel(bundle, out_dir, version)
