"""The messages that ask the agent for containers and processes.

Kept apart from those who send them: importing the generated messages takes longer than all the rest of pykata, so it
happens while the virtual machine boots.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import asdict

from pykata.agent import v1
from pykata.command import Command
from pykata.rootfs import Prepared
from pykata.running import Running
from pykata.spec import Attachment, Disk, Mount, Pmem
from pykata.volumes.attached import places

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WINDOW = 1024 * 1024
"""Bytes of stdout, and of stderr, that are kept unread on the host; beyond it the process waits, as with a pipe."""


def setup_request(hostname: str, attachment: Attachment) -> v1.SetupRequest:
    """The one message that makes a booted guest ready; clock and entropy are filled in as it is sent."""
    disks = {device.tag: device.tag for device in attachment.devices if isinstance(device, Disk)}
    mapped = [device.tag for device in attachment.devices if isinstance(device, Pmem)]
    disks |= {tag: f"pmem{number}" for number, tag in enumerate(mapped)}
    return v1.SetupRequest(
        hostname=hostname,
        interfaces=[
            v1.Interface(
                mac=interface.mac,
                name=interface.name,
                mtu=interface.mtu,
                addresses=list(interface.addresses),
                routes=[v1.Route(destination=r.destination, gateway=r.gateway) for r in interface.routes],
                neighbours=[v1.Neighbour(address=address, mac=mac) for address, mac in interface.neighbours],
            )
            for interface in attachment.interfaces
        ],
        mounts=[mount_message(mount, disks) for mount in attachment.mounts],
        nameservers=list(attachment.nameservers),
        hosts=dict(attachment.hosts),
        search=list(attachment.search),
    )


def mount_message(mount: Mount, serials: Mapping[str, str]) -> v1.Mount:
    """A mount as the agent is told of it; ``serials`` are those of the plugged disks, by tag."""
    message = v1.Mount(type=mount.type, target=mount.target, options=list(mount.options))
    if mount.source in serials:
        message.disk_serial = serials[mount.source]
    else:
        message.tag = mount.source
    return message


def container_request(
    running: Running, container: str, rootfs: Prepared, *, waits: bool = False, explored: bool = False
) -> v1.CreateContainerRequest:
    """A container on a plugged root filesystem.

    In one that ``waits``, a process waits for its command; ``explored``, it has looked up what that may be.
    """
    options = running.options
    config = rootfs.image.config
    # Without the sandbox's own: the container may go on in another one, whose affair that isn't.
    env = {"PATH": DEFAULT_PATH, **config.env}
    return v1.CreateContainerRequest(
        id=container,
        rootfs=v1.Rootfs(
            lowers=[mount_message(mount, rootfs.serials) for mount in rootfs.attachment.mounts],
            writable_bytes=options.disk,
            data=list(rootfs.attachment.content),
        ),
        usual=v1.Usual(
            env=[f"{name}={value}" for name, value in env.items()],
            cwd=config.workdir,
            memory_limit=running.memory_limit,
            volumes=[v1.Volume(**asdict(place)) for place in places(options.volumes)],
        ),
        waiting=v1.Process(id="waiting", user=rootfs.image.config.user) if waits else None,
        explored=explored,
    )  # fmt: skip


def start_request(
    running: Running, container: str, args: tuple[str, ...], command: Command, *, user: str,
    create: v1.CreateContainerRequest | None = None, last: bool = False, lingers: bool = False,
) -> v1.Start:  # fmt: skip
    """A process in a container, which is made for it when ``create`` is given. ``last``: it is there for it alone.

    ``lingers``: it stays after that until it is told to go.
    """
    process = process_message(running, args, command, user)
    return v1.Start(
        container_id=container,
        process=process,
        create=create,
        last=last,
        lingers=lingers,
        window=WINDOW,
        # A terminal has no end before the process is there.
        stdin_closed=not command.stdin and command.terminal is None,
        collected=command.collected,
    )


def detached_request(
    running: Running, container: str, args: tuple[str, ...], command: Command, *, user: str, log: int
) -> v1.Start:
    """A process that outlives the call; ``log`` bytes of its output are kept."""
    return v1.Start(
        container_id=container, process=process_message(running, args, command, user), detached=True, log=log
    )


def process_message(running: Running, args: tuple[str, ...], command: Command, user: str) -> v1.Process:
    """A process, with an id of its own."""
    terminal = command.terminal
    env = {**running.options.env, **command.env}
    return v1.Process(
        id=running.new_id("p"),
        args=list(args),
        env=[f"{name}={value}" for name, value in env.items()],
        cwd=command.cwd,
        user=command.user or user,
        rlimits=[v1.Rlimit(type=name, soft=soft, hard=hard) for name, soft, hard in command.rlimits],
        terminal=None if terminal is None else v1.Terminal(rows=terminal.rows, cols=terminal.cols),
    )
