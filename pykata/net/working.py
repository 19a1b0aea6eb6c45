"""Which networks work on this host, and what the others lack."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pykata.errors import HostError
from pykata.host import find_tool
from pykata.net.base import Wanted
from pykata.net.netns import require
from pykata.net.tap import TUN
from pykata.net.user import UserNetwork

PRIVILEGED = ("tcfilter", "bridge", "macvtap", "cni")


async def working(run_dir: Path) -> Mapping[str, str]:
    """What each network lacks, or nothing, by its name; ``policy`` is what keeps one. That of ``user`` is made."""
    found = {"none": ""}
    try:
        async with UserNetwork().attach(run_dir, Wanted()):
            found["user"] = ""
    except (HostError, OSError) as error:
        found["user"] = str(error)
    why = _privileged()
    found |= dict.fromkeys(PRIVILEGED, why)
    found["policy"] = _lacks("nft", "nftables")
    return found


def _privileged() -> str:
    try:
        require("NET_ADMIN", "SYS_ADMIN")
    except HostError as error:
        return error.message
    return "" if os.access(TUN, os.R_OK | os.W_OK) else f"{TUN} can't be opened"


def _lacks(tool: str, package: str) -> str:
    try:
        find_tool(tool, package=package)
    except HostError as error:
        return str(error)
    return ""
