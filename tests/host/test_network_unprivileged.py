"""User-mode networking takes no privileges: a user without any capability has it, and a policy at its tap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykata.net.user import DNS, GUEST

# A machine may keep /dev/net/tun to root: in a mount namespace of its own the test gets one as distributions have it.
OPEN_TUN = """
mount --make-rprivate / && mount -t tmpfs none /mnt && mknod -m 666 /mnt/tun c 10 200 &&
mount --bind /mnt/tun /dev/net/tun &&
exec setpriv --reuid 65533 --regid 65533 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs "$@"
"""
PROGRAM = """
import asyncio, json, os, socket, sys
from pathlib import Path
from pykata.net.base import Wanted
from pykata.net.policy.rules import policy_of
from pykata.net.ports import parse_ports
from pykata.net.user import UserNetwork

async def main():
    policy = policy_of(["192.0.2.1:80"], (), None) if sys.argv[2] == "policy" else None
    wanted = Wanted(ports=parse_ports([80]), policy=policy)
    async with UserNetwork().attach(Path(sys.argv[1]), wanted) as attachment:
        print(json.dumps({
            "capabilities": open("/proc/self/status").read().partition("CapEff:")[2].split()[0],
            "port": attachment.published[0].host, "addresses": attachment.interfaces[0].addresses,
            "nameservers": attachment.nameservers, "guards": len(attachment.guards),
            "tap": os.fstat(attachment.devices[0].fds[0]).st_rdev,
        }))

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["plain", "policy"])
def test_a_user_without_capabilities(kind: str) -> None:
    # Not below tmp_path, which is root's; nor the interpreter of a virtual environment in root's home.
    paths = os.pathsep.join(path for path in sys.path if path)
    run_dir = Path(os.environ["TMPDIR"]) / f"unprivileged-{kind}"
    run_dir.mkdir()
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    command = ["unshare", "--mount", "sh", "-c", OPEN_TUN, "sh", python, "-c", PROGRAM, str(run_dir), kind]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")
    finally:
        run_dir.rmdir()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert int(found["capabilities"], 16) == 0
    assert found["port"] > 0
    assert found["addresses"][0].startswith(GUEST)
    assert os.major(found["tap"]) == 10
    assert found["guards"] == (kind == "policy")
    assert (found["nameservers"] == [DNS]) == (kind == "plain")
