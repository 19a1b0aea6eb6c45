"""What can be written on the command line. argparse: it costs no dependency and 10 ms."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from pykata_cli import exits
from pykata_cli.image_parser import add_image_commands, add_pull_policy, add_registry_options
from pykata_cli.network_parser import add_network
from pykata_cli.parser_detached import add_detached
from pykata_cli.parser_shared import add_identity, add_stdio, add_verbose, seconds
from pykata_cli.printing import show
from pykata_cli.volume_parser import add_volumes

EXITS = f"""\
exit codes:
  the command's own, 128 + N when signal N ended it, 126 or 127 when it can't be run or isn't there;
  {exits.TIMEOUT} when --timeout was over, {exits.PYKATA} when pykata or the virtual machine failed
"""

RUN_EXAMPLES = """\
examples:
  pykata run builtin:busybox -- uname -a
  pykata run ./images/debian-python -- python3 -c 'print(6 * 7)'
  pykata run -it builtin:busybox -- sh
  echo 'print(6 * 7)' | pykata run ./images/debian-python -- python3 -
  pykata run --detach --name worker ./images/debian-python -- python3 -m http.server
  pykata run --memory 1G --cpus 2 --timeout 30 --env KEY=value ./images/debian-python -- sh -c 'echo $KEY'
"""

CHECK_EXAMPLES = """\
examples:
  pykata check                    with a virtual machine that boots
  pykata check && make test       only where sandboxes run
"""

GUEST_EXAMPLES = """\
examples:
  pykata guest build
  pykata guest build --force      after the compiler was exchanged, say
  pykata guest info
"""

EXAMPLES = """\
examples:
  pykata check                               is this machine ready, and what would make it so?
  pykata guest build                         build the guest's kernel and agent, once
  pykata run builtin:busybox -- echo hello   run a command in a virtual machine of its own
  pykata run --detach --name box builtin:busybox, then: pykata exec box -- ls, pykata ps, pykata stop box
"""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints look like all of ours, and have our exit code."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation that works today would break when an option is added.
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def print_help(self, file: Any = None) -> None:
        show(self.format_help(), end="")

    def error(self, message: str) -> NoReturn:
        self.exit(exits.PYKATA, f"pykata: {message} (try: {self.prog} --help)\n")


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="pykata", description="Run container images in lightweight virtual machines.", epilog=EXAMPLES
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_run(commands)
    add_detached(commands)
    _add_check(commands)
    _add_guest(commands)
    add_image_commands(commands)
    add_volumes(commands)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of this call. A help text or a mistake raises SystemExit."""
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.prog = f"{parser.prog} {arguments.command}" if arguments.command else parser.prog
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command is None and not arguments.version:
        parser.error("say what to do: run, pull, exec, ps, stop, check, ...")
    if arguments.command in ("run", "exec") and arguments.cmd[:1] == ["--"]:
        del arguments.cmd[0]
    return arguments


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run", help="run a command of an image", usage="pykata run [OPTIONS] IMAGE [--] [COMMAND ...]",
        description="Run a command of an image in a virtual machine of its own.", epilog=RUN_EXAMPLES + "\n" + EXITS,
    )
    run.add_argument(
        "image", metavar="IMAGE",
        help="python:3.12-slim (in a registry), builtin:busybox, or the path of an OCI layout or an archive",
    )
    run.add_argument(
        "cmd", metavar="COMMAND", nargs=argparse.REMAINDER, help="default: what the image says; with --detach: none"
    ).required = False
    _add_machine(run.add_argument_group("the virtual machine"))
    add_network(run.add_argument_group("the network"))
    _add_process(run.add_argument_group("the command"))
    _add_detach(run.add_argument_group("leaving it to itself"))
    image = run.add_argument_group("the image")
    add_pull_policy(image)
    add_registry_options(image)
    add_verbose(run)


def _add_machine(group: Any) -> None:
    group.add_argument("--hypervisor", metavar="NAME", default="qemu", help="default: %(default)s")
    group.add_argument("--machine", metavar="TYPE", help="QEMU's machine type: microvm or q35")
    group.add_argument("--accel", metavar="NAME", help="what executes the guest: auto, kvm or tcg")
    group.add_argument("--fs", metavar="NAME", default="block", help="how it gets its files; default: %(default)s")
    group.add_argument("--memory", metavar="SIZE", help="such as 512M or 2G")
    group.add_argument("--cpus", metavar="N", type=int, help="virtual CPUs")
    group.add_argument("--disk", metavar="SIZE", help="size of the writable layer, such as 1G")
    group.add_argument(
        "--volume", metavar="SOURCE:PLACE[:ro]", action="append", default=[],
        help="a directory or file (with a / in it), or a named volume, at this place in the container",
    )
    group.add_argument("--hostname", metavar="NAME", help="the guest's name")
    group.add_argument(
        "--template", choices=("auto", "off"),
        help="auto, the default: go on from a guest of this kind that was booted once; off: boot",
    )
    group.add_argument(
        "--isolation", choices=("hardware", "emulated"),
        help="hardware: refuse to run without KVM; emulated: accept that without a warning",
    )


def _add_process(group: Any) -> None:
    add_identity(group)
    group.add_argument("--entrypoint", metavar="PROGRAM", help="in place of the image's entrypoint; empty for none")
    group.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, help="kill the command after this time; what it wrote is kept"
    )
    add_stdio(group)


def _add_detach(group: Any) -> None:
    group.add_argument(
        "-d", "--detach", action="store_true",
        help="leave it running and print its name; it ends when COMMAND does, or without one when it is stopped",
    )
    group.add_argument("--name", metavar="NAME", help="what it is called; default: something unique")
    group.add_argument("--own-command", action="store_true", help="run the image's own command")


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check", help="is this machine ready?",
        description="Look at everything pykata needs on this machine, and boot a virtual machine to see it work.",
        epilog=CHECK_EXAMPLES + f"\nexit codes:\n  0 when all is well, {exits.UNHEALTHY} when something is missing\n",
    )
    add_verbose(check)


def _add_guest(commands: Any) -> None:
    guest = commands.add_parser(
        "guest", help="the guest's kernel and agent", description="The guest bundle: kernel and agent of every guest.",
        epilog=GUEST_EXAMPLES,
    )
    verbs = guest.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    build = verbs.add_parser(
        "build", help="build it, unless it is there", description="Build the guest bundle from the sources, once.",
        epilog=GUEST_EXAMPLES,
    )
    build.add_argument("--force", action="store_true", help="build every part anew")
    add_verbose(build)
    info = verbs.add_parser(
        "info", help="where it is and what it is made of", description="Describe the guest bundle.",
        epilog=GUEST_EXAMPLES,
    )
    add_verbose(info)
