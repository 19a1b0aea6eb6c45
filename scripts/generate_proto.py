"""Generates the Python messages beside each ``.proto``; with ``--check`` only says whether they are current.

The compiler plugin is pinned in the dev group of pyproject.toml. ``protoc`` comes from the system
(``apt install protobuf-compiler``): it only parses, so any release that knows proto3 gives the same result.

Only messages are generated. The client is written by hand above ``pykata.agent.channel``, see there for why.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTOS = (Path("pykata/agent/v1/agent.proto"), Path("pykata/files/v1/files.proto"))

# The compiler expects one pool of messages at the root of its output, which would be a module beside pykata.
FOREIGN_POOL = "\nfrom ....message_pool import default_message_pool\n"
OWN_POOL = "\ndefault_message_pool = betterproto2.MessagePool()\n"


def generate(proto: Path) -> str:
    """The text of the module generated from ``proto``."""
    scripts = str(Path(sys.executable).parent)  # where the plugin and ruff of this environment are
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [
                "protoc", f"--proto_path={ROOT}", f"--python_betterproto2_out={out}",
                "--python_betterproto2_opt=client_generation=none,server_generation=none", str(proto),
            ],
            check=True,
            env={**os.environ, "PATH": f"{scripts}:{os.environ.get('PATH', '/usr/bin')}"},
            stderr=subprocess.DEVNULL,  # the plugin reports each file that it writes
        )  # fmt: skip
        text = (Path(out) / proto.with_name("__init__.py")).read_text()
    if FOREIGN_POOL not in text:
        raise SystemExit("the compiler's output has changed: no message pool is imported in it")
    return text.replace(FOREIGN_POOL, OWN_POOL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and show a diff if it is stale")
    check = parser.parse_args().check
    stale = 0
    for proto in PROTOS:
        target, new = ROOT / proto.with_name("__init__.py"), generate(proto)
        if not check:
            target.write_text(new)
            continue
        old = target.read_text() if target.exists() else ""
        sys.stdout.writelines(
            difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"{proto}: checked in", "generated")
        )
        stale |= old != new
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
