"""``pykata run``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import pykata
from pykata_cli.bars import bars
from pykata_cli.networks import logged, network, published
from pykata_cli.printing import say, show
from pykata_cli.pull import registries
from pykata_cli.signals import Relay, relayed
from pykata_cli.streams import Streams, environment, forward_stdin
from pykata_cli.terminal import size
from pykata_cli.volume_option import volumes

log = logging.getLogger("pykata.cli")

FOREGROUND_ONLY = ("timeout", "interactive", "tty", "network_log")
DETACHED_ONLY = ("name", "own_command")


async def command(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code, or one of :mod:`pykata_cli.exits`."""
    _check(arguments)
    return await relayed(_detached if arguments.detach else _in_sandbox, arguments)


async def _in_sandbox(arguments: argparse.Namespace, relay: Relay) -> int:
    options = {"env": environment(arguments.env), "tty": arguments.tty and size(), **_process_options(arguments)}
    with bars(sys.stderr) as pulling:
        said = sandbox_options(arguments) | ({} if pulling is None else {"progress": pulling})
        sandbox = pykata.Sandbox(**said)
        command = sandbox.process(arguments.image, arguments.cmd or None, **options)    # it complains before we boot
        async with logged(arguments.network_log) as log_events, sandbox:
            log_events(sandbox.network)
            if arguments.publish:
                _tell(sandbox.network.ports)
            async with command as process:
                relay.process = process
                code = await Streams(process, forward_stdin(arguments), arguments.tty).run(arguments.timeout)
            log.debug("%s, %s isolation, %s", sandbox.accel, sandbox.isolation, sandbox.timings)
    return code


def _tell(ports: Sequence[pykata.Port]) -> None:
    """Say which ports were picked; those that were named are known."""
    for line in published(ports):
        say(line)


async def _detached(arguments: argparse.Namespace, relay: Relay) -> int:
    # The environment is that of the sandbox, so that `pykata exec` finds it as well.
    name = f"sandbox-{os.urandom(3).hex()}" if arguments.name is None else arguments.name
    options = {**_process_options(arguments), "own_command": arguments.own_command}
    with bars(sys.stderr) as pulling:
        sandbox = pykata.Sandbox(**sandbox_options(arguments), env=environment(arguments.env), progress=pulling)
        await sandbox.detach(name, arguments.image, arguments.cmd or None, **options)
    show(name)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    wrong = FOREGROUND_ONLY if arguments.detach else DETACHED_ONLY
    for name in wrong:
        if getattr(arguments, name) not in (None, False, []):
            how = "can't be combined with --detach" if arguments.detach else "needs --detach"
            raise pykata.ConfigError(f"--{name.replace('_', '-')} {how}")


def _process_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"cwd": arguments.cwd, "user": arguments.user}
    if arguments.entrypoint is not None:
        options["entrypoint"] = [arguments.entrypoint] if arguments.entrypoint else []
    return options


def sandbox_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of the Sandbox: only what was said, so that the defaults are the library's."""
    names = ("fs", "memory", "cpus", "disk", "hostname", "isolation", "template", "pull")
    said = {name: getattr(arguments, name) for name in names} | {"registries": registries(arguments)}
    said["network"] = network(arguments)
    said["volumes"] = volumes(arguments.volume) or None
    return {
        "hypervisor": hypervisor(arguments),
        **{name: value for name, value in said.items() if value is not None},
    }


def hypervisor(arguments: argparse.Namespace) -> Any:
    """The hypervisor by its name, or as a value where an option of its kind was given."""
    said = {name: value for name in ("machine", "accel") if (value := getattr(arguments, name)) is not None}
    if not said:
        return arguments.hypervisor
    if arguments.hypervisor != "qemu":
        raise pykata.ConfigError(f"{' and '.join(f'--{name}' for name in said)} isn't for {arguments.hypervisor}")
    return pykata.QEMU(**said)
