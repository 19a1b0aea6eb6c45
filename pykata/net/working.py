"""Which networks work on this host, and what the others lack."""

from __future__ import annotations

import os
import socket
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
    found["ping with user"] = _no_ping()
    return Working(found, via)


def _privileged() -> str:
    try:
        require("NET_ADMIN", "SYS_ADMIN")
    except HostError as error:
        return error.message
    return "" if os.access(TUN, os.R_OK | os.W_OK) else f"{TUN} can't be opened"


def _no_ping() -> str:
    """Why a guest's ping gets no answer by a program without privileges, which is no error but silence (icmp(7))."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP):
            return ""
    except OSError:
        return "the host doesn't allow it to this user's group: sysctl -w net.ipv4.ping_group_range='0 2147483647'"


def _lacks(tool: str, package: str) -> str:
    try:
        find_tool(tool, package=package)
    except HostError as error:
        return str(error)
    return ""
