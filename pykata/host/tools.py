"""Where the programs of the host are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pykata.errors import ToolMissingError

# Where programs live that distributions keep out of a user's PATH: virtiofsd, and everything in sbin.
EXTRA_PATH = ("/usr/sbin", "/sbin", "/usr/libexec", "/usr/lib/qemu", "/usr/local/bin")


def find_tool(name: str, *, package: str, env_var: str | None = None) -> Path:
    """The path of the program ``name``, or what the environment variable ``env_var`` names instead.

    Raises :class:`~pykata.errors.ToolMissingError`, with the Debian ``package`` that has it as the hint.
    """
    if env_var and (named := os.environ.get(env_var)):
        found = shutil.which(named)
        if found is None:
            raise ToolMissingError(f"{env_var}={named!r} is not a program", hint=f"unset {env_var}, or correct it")
        return Path(found).absolute()
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(EXTRA_PATH))
    if found is None:
        raise ToolMissingError(f"{name} is not installed", hint=f"apt-get install {package}")
    return Path(found).absolute()
