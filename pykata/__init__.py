"""Run container images in lightweight virtual machines, each with a kernel of its own.

::

    async with pykata.Sandbox() as sb:
        done = await sb.run("builtin:busybox", ["uname", "-a"])
        print(done.stdout)
"""

from pykata.boot import EmulationWarning
from pykata.check import CheckItem, CheckReport, check
from pykata.completed import Completed
from pykata.container import Container
from pykata.detached.handle import Detached, collect_garbage, find_detached, list_detached
from pykata.detached.logs import LogPiece
from pykata.errors import (
    AgentError,
    AgentLostError,
    AgentProtocolError,
    AgentRefusedError,
    AgentTimeoutError,
    BootError,
    BootTimeoutError,
    BundleBuildError,
    BundleDamagedError,
    BundleError,
    BundleMissingError,
    CommandFailedError,
    ConfigError,
    DetachedEndedError,
    DetachedError,
    DetachedLostError,
    DetachedNotFoundError,
    DetachedTakenError,
    DiskFullError,
    GuestPanicError,
    HostError,
    ImageCorruptError,
    ImageError,
    ImageInUseError,
    ImageNotFoundError,
    ImageReferenceError,
    ImageUnauthorizedError,
    ImageUnsupportedError,
    IsolationError,
    NotPermittedError,
    PykataError,
    RateLimitedError,
    RegistryError,
    RegistryTLSError,
    RegistryUnreachableError,
    SandboxClosedError,
    ToolFailedError,
    ToolMissingError,
    ToolTooOldError,
    UnknownStrategyError,
    VMDiedError,
    VMError,
)
from pykata.fs.block import Block
from pykata.guest import Bundle, build_bundle, find_bundle
from pykata.hypervisors.qemu import QEMU
from pykata.net.none import NoNetwork
from pykata.process import Process
from pykata.sandbox import Sandbox
from pykata.spec import Features, Image, ImageConfig, PullEvent, Registries, Timings
from pykata.stock import StoredImage, list_images, pull_image, remove_image

__all__ = [
    "QEMU",
    "AgentError",
    "AgentLostError",
    "AgentProtocolError",
    "AgentRefusedError",
    "AgentTimeoutError",
    "Block",
    "BootError",
    "BootTimeoutError",
    "Bundle",
    "BundleBuildError",
    "BundleDamagedError",
    "BundleError",
    "BundleMissingError",
    "CheckItem",
    "CheckReport",
    "CommandFailedError",
    "Completed",
    "ConfigError",
    "Container",
    "Detached",
    "DetachedEndedError",
    "DetachedError",
    "DetachedLostError",
    "DetachedNotFoundError",
    "DetachedTakenError",
    "DiskFullError",
    "EmulationWarning",
    "Features",
    "GuestPanicError",
    "HostError",
    "Image",
    "ImageConfig",
    "ImageCorruptError",
    "ImageError",
    "ImageInUseError",
    "ImageNotFoundError",
    "ImageReferenceError",
    "ImageUnauthorizedError",
    "ImageUnsupportedError",
    "IsolationError",
    "LogPiece",
    "NoNetwork",
    "NotPermittedError",
    "Process",
    "PullEvent",
    "PykataError",
    "RateLimitedError",
    "Registries",
    "RegistryError",
    "RegistryTLSError",
    "RegistryUnreachableError",
    "Sandbox",
    "SandboxClosedError",
    "StoredImage",
    "Timings",
    "ToolFailedError",
    "ToolMissingError",
    "ToolTooOldError",
    "UnknownStrategyError",
    "VMDiedError",
    "VMError",
    "build_bundle",
    "check",
    "collect_garbage",
    "find_bundle",
    "find_detached",
    "list_detached",
    "list_images",
    "pull_image",
    "remove_image",
]
