"""Which networks work on this host, and what the others lack."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from pykata.errors import HostError
from pykata.host import find_tool
from pykata.net.base import Wanted
from pykata.net.netns import require
from pykata.net.tap import TUN
from pykata.net.user import UserNetwork

PRIVILEGED = ("tcfilter", "bridge", "macvtap", "cni")


@frozen
class Working:
    """What each network lacks, or nothing, by its name, and what makes the connections of ``user``."""

    lacks: Mapping[str, str]
    via: str


async def working(run_dir: Path) -> Working:
    """Look which networks work: that of ``user`` is made. ``policy`` is what keeps one."""
    found, via = {"none": ""}, ""
    try:
        async with UserNetwork().attach(run_dir, Wanted()) as made:
            found["user"], via = "", "".join(made.via)
    except (HostError, OSError) as error:
        found["user"] = str(error)
    why = _privileged()
    found |= dict.fromkeys(PRIVILEGED, why)
    found["policy"] = _lacks("nft", "nftables")
    return Working(found, via)


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
