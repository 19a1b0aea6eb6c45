"""What can be written on the command line about images of registries."""

from __future__ import annotations

from typing import Any

from pykata_cli.parser_shared import add_verbose

NAME = "such as python:3.12-slim, or registry.test:5000/team/app"


def add_image_commands(commands: Any) -> None:
    """``pull``, ``images`` and ``rmi``."""
    pull = commands.add_parser(
        "pull", help="get an image from its registry",
        description="Get an image from its registry, and make it ready for sandboxes.",
    )
    pull.add_argument("image", metavar="IMAGE", help=NAME)
    pull.add_argument(
        "--arch", metavar="NAME", help="the guest's architecture: x86_64 or aarch64; default: this machine's"
    )
    pull.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    add_registry_options(pull)
    add_verbose(pull)
    images = commands.add_parser(
        "images", help="the images that were pulled", description="List the images that were pulled."
    )
    images.add_argument("--json", action="store_true", help="as JSON, sizes in bytes, times in seconds since 1970")
    add_verbose(images)
    rmi = commands.add_parser("rmi", help="remove images that were pulled", description="Remove images.")
    rmi.add_argument("images", metavar="IMAGE", nargs="+", help=NAME)
    add_verbose(rmi)


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
