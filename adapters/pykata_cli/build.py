"""``pykata build``."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pykata
from pykata_cli.bars import bars
from pykata_cli.printing import show, tell
from pykata_cli.pull import registries

DOCKERFILE = "Dockerfile"
OPTIONS = ("network", "memory", "disk", "isolation", "pull")


async def command(arguments: argparse.Namespace) -> int:
    """Make an image; prints its name."""
    recipe = find_recipe(arguments)
    said: dict[str, Any] = {name: getattr(arguments, name) for name in OPTIONS} | {"registries": registries(arguments)}
    with bars(sys.stderr) as pulling:
        options = {name: value for name, value in said.items() if value is not None}
        sandbox = pykata.Sandbox(**options, progress=None if arguments.quiet else pulling)
        name = await pykata.build_image(
            recipe, arguments.tag, architecture=arguments.architecture, sandbox=sandbox,
            progress=None if arguments.quiet else told,
        )
    show(name)
    return 0


def find_recipe(arguments: argparse.Namespace) -> pykata.Recipe:
    """What was asked for: a recipe in a Python file, or a Dockerfile."""
    args = dict(_pair(text) for text in arguments.build_arg)
    match = re.fullmatch(r"(.+\.py):(\w+)", arguments.source)
    if match is None:
        context = Path(arguments.source)
        if not context.is_dir():
            hint = "a directory with a Dockerfile, or FILE.py:NAME"
            raise pykata.ConfigError(f"{context} is not a directory", hint=hint)
        file = Path(arguments.file) if arguments.file else context / DOCKERFILE
        return pykata.Recipe.from_dockerfile(file, context=context, args=args)
    if arguments.file or args:
        raise pykata.ConfigError("--file and --build-arg are for a Dockerfile")
    path, name = Path(match[1]), match[2]
    if not path.is_file():
        raise pykata.ConfigError(f"there is no file {path}")
    found = runpy.run_path(str(path)).get(name)
    if not isinstance(found, pykata.Recipe):
        raise pykata.ConfigError(f"{name} in {path} is no pykata.Recipe", hint=f"{name} = pykata.Recipe(...)")
    return found


def told(event: pykata.BuildEvent) -> None:
    """Say on stderr what is done, and what the commands write."""
    if event.status == "output":
        tell(sys.stderr, event.output)
    elif event.status in ("running", "cached"):
        text = "".join(c if c.isprintable() else " " for c in event.step)
        cached = " (made before)" if event.status == "cached" else ""
        tell(sys.stderr, f"[{event.number}/{event.total}] {text}{cached}\n")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise pykata.ConfigError(f"--build-arg {text!r} has no value", hint="NAME=VALUE")
    return name, value
