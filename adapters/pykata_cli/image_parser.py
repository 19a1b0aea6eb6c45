"""What can be written on the command line about images of registries."""

from __future__ import annotations

from typing import Any

from pykata_cli.parser_shared import add_format, add_verbose

BUILD_EXAMPLES = """\
examples:
  pykata build -t app:dev                               of ./Dockerfile
  pykata build -t app:dev --network user --memory 2G    with a network for RUN
  pykata build -t app:dev recipes.py:app                of app = pykata.Recipe(...) in recipes.py
"""

PULL_EXAMPLES = """\
examples:
  pykata pull python:3.12-slim
  pykata pull --quiet --architecture aarch64 debian:bookworm
  pykata pull --insecure registry.test:5000 registry.test:5000/team/app
"""
IMAGES_EXAMPLES = """\
examples:
  pykata images
  pykata images --format json | jq -r '.[].name'
"""
RMI_EXAMPLES = """\
examples:
  pykata rmi python:3.12-slim
"""
PUSH_EXAMPLES = """\
examples:
  pykata push registry.test:5000/team/app:1
  pykata push app:dev registry.test:5000/team/app:1
"""
SAVE_EXAMPLES = """\
examples:
  pykata save python:3.12-slim ./python         an OCI layout
  pykata save app:dev app.tar                   the same in one file
"""
LOAD_EXAMPLES = """\
examples:
  pykata load -t app:dev ./app.tar
  pykata load -t app:1 docker-daemon:app:1
"""

NAME = "such as python:3.12-slim, or registry.test:5000/team/app"


def add_image_commands(commands: Any) -> None:
    """``pull``, ``images``, ``rmi``, ``build``, ``push``, ``save`` and ``load``."""
    pull = commands.add_parser(
        "pull", help="get an image from its registry",
        description="Get an image from its registry, and make it ready for sandboxes.",
        epilog=PULL_EXAMPLES,
    )
    pull.add_argument("image", metavar="IMAGE", help=NAME)
    _add_architecture(pull)
    pull.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    add_registry_options(pull)
    add_verbose(pull)
    images = commands.add_parser(
        "images", help="the images that were pulled", description="List the images that were pulled.",
        epilog=IMAGES_EXAMPLES,
    )
    add_format(images, "sizes in bytes, times in seconds since 1970")
    add_verbose(images)
    rmi = commands.add_parser(
        "rmi", help="remove images that were pulled", description="Remove images.", epilog=RMI_EXAMPLES
    )
    rmi.add_argument("images", metavar="IMAGE", nargs="+", help=NAME)
    add_verbose(rmi)
    _add_build(commands)
    _add_elsewhere(commands)


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build", help="make an image of your own", epilog=BUILD_EXAMPLES,
        description="Make an image of a Dockerfile or of a pykata.Recipe. Its commands are run in a sandbox.",
    )
    build.add_argument(
        "source", metavar="DIR|FILE.py:NAME", nargs="?", default=".",
        help="a directory with a Dockerfile and what it copies (default: this one), or a recipe in a Python file",
    )
    build.add_argument("-t", "--tag", metavar="NAME", required=True, help="what it is called, such as app:dev")
    build.add_argument("-f", "--file", metavar="FILE", help="the Dockerfile; default: DIR/Dockerfile")
    build.add_argument("--build-arg", metavar="NAME=VALUE", action="append", default=[], help="for an ARG; repeatable")
    build.add_argument("--network", metavar="NAME", help="for its commands; default: none")
    build.add_argument("--memory", metavar="SIZE", help="of the sandbox that runs its commands, such as 2G")
    build.add_argument("--disk", metavar="SIZE", help="what one of its commands may write, such as 1G")
    build.add_argument("--isolation", choices=("hardware", "emulated"), help="as for run")
    build.add_argument("-q", "--quiet", action="store_true", help="show no progress and no output")
    _add_architecture(build)
    add_pull_policy(build)
    add_registry_options(build)
    add_verbose(build)


def _add_elsewhere(commands: Any) -> None:
    push = commands.add_parser(
        "push", help="put an image into a registry", description="Put an image into a registry.", epilog=PUSH_EXAMPLES
    )
    push.add_argument("image", metavar="IMAGE", help="one that was pulled or made")
    push.add_argument("to", metavar="NAME", nargs="?", help="where; default: its own name")
    add_registry_options(push)
    add_verbose(push)
    save = commands.add_parser(
        "save", help="write an image to disk", description="Write an image as an OCI layout.", epilog=SAVE_EXAMPLES
    )
    save.add_argument("image", metavar="IMAGE", help="one that was pulled or made")
    save.add_argument("path", metavar="PATH", help="a new directory, or a new archive if it ends in .tar")
    add_verbose(save)
    load = commands.add_parser(
        "load", help="keep an image that is on disk or in Docker",
        description="Keep an image that is elsewhere on this machine, under a name.", epilog=LOAD_EXAMPLES,
    )
    load.add_argument("source", metavar="IMAGE", help="such as ./app.tar, oci:DIR:TAG, docker-daemon:app:1, tar:FILE")
    load.add_argument("-t", "--tag", metavar="NAME", required=True, help="what it is called from now on")
    _add_architecture(load)
    add_verbose(load)


def _add_architecture(group: Any) -> None:
    group.add_argument(
        "--architecture", metavar="NAME", help="the guest's architecture: x86_64 or aarch64; default: this machine's"
    )


def add_registry_options(group: Any) -> None:
    """How registries are reached."""
    group.add_argument(
        "--insecure", metavar="HOST", action="append", default=[],
        help="a registry that may speak plain HTTP or have any certificate; repeatable",
    )
    group.add_argument("--ca-file", metavar="FILE", help="certificates of further authorities, PEM")


def add_pull_policy(group: Any) -> None:
    """When a registry is asked."""
    group.add_argument(
        "--pull", choices=("missing", "always", "never"), help="when to ask the image's registry; default: missing"
    )
