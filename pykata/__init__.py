"""Run container images in lightweight virtual machines, each with a kernel of its own.

::

    async with pykata.Sandbox() as sb:
        done = await sb.run("builtin:busybox", ["uname", "-a"])
        print(done.stdout)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pykata.background import Background
    from pykata.boot import TemplateWarning
    from pykata.built_images import build_image, load_image, push_image, save_image
    from pykata.completed import Completed
    from pykata.container import Container
    from pykata.detached.handle import Detached, collect_garbage, find_detached, list_detached
    from pykata.detached.logs import LogPiece
    from pykata.errors import (
        AddressesExhaustedError,
        AdmissionError,
        AgentError,
        AgentLostError,
        AgentProtocolError,
        AgentRefusedError,
        AgentTimeoutError,
        BootError,
        BootTimeoutError,
        BuildFailedError,
        BundleBuildError,
        BundleDamagedError,
        BundleError,
        BundleMissingError,
        CNIError,
        CommandFailedError,
        ConfigError,
        DetachedEndedError,
        DetachedError,
        DetachedLostError,
        DetachedNotFoundError,
        DetachedTakenError,
        DiskFullError,
        FileDeniedError,
        FileError,
        FileIsDirectoryError,
        FileMissingError,
        FileNotDirectoryError,
        FilePresentError,
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
        NetworkError,
        NotPermittedError,
        PortInUseError,
        PykataError,
        RateLimitedError,
        RegistryError,
        RegistryTLSError,
        RegistryUnreachableError,
        SandboxClosedError,
        SavedDamagedError,
        SavedElsewhereError,
        SavedMissingError,
        ShareLostError,
        ToolFailedError,
        ToolMissingError,
        ToolTooOldError,
        UnknownStrategyError,
        UnsafeTreeError,
        VMDiedError,
        VMError,
        VolumeInUseError,
    )
    from pykata.files import FileChange, FileEntry, FileEvent, Files, FileStat, Transfer
    from pykata.fs.block import Block
    from pykata.fs.ninep import NineP
    from pykata.fs.virtiofs import VirtioFS
    from pykata.guest import Bundle, build_bundle, find_bundle
    from pykata.hypervisors.qemu import QEMU
    from pykata.images.recipe import Recipe
    from pykata.isolation import EmulationWarning
    from pykata.net.base import NetworkStrategy
    from pykata.net.bridge import Bridge
    from pykata.net.cni import CNI
    from pykata.net.macvtap import MacVTap
    from pykata.net.network import Network
    from pykata.net.none import NoNetwork
    from pykata.net.policy.rules import Rate
    from pykata.net.running import RunningNetwork
    from pykata.net.tcfilter import TCFilter
    from pykata.net.user import UserNetwork
    from pykata.net.vhost_user import VhostUser
    from pykata.pool import Pool, PoolStats
    from pykata.probe import CheckItem, CheckReport, check
    from pykata.process import Process
    from pykata.pull_view import PullView
    from pykata.pulled_images import StoredImage, list_images, pull_image, remove_image
    from pykata.sandbox import Sandbox
    from pykata.spec import (
        BuildEvent,
        Features,
        Image,
        ImageConfig,
        NetworkEvent,
        Port,
        PullEvent,
        Registries,
        Terminal,
        Timings,
    )
    from pykata.stats import ContainerStats, Stats
    from pykata.templates import Template
    from pykata.volumes import (
        Bind,
        DiskImage,
        FsspecVolume,
        ImageVolume,
        Named,
        StoredVolume,
        Tmpfs,
        describe_volumes,
        list_volumes,
        remove_volume,
    )

__all__ = [
    "CNI",
    "QEMU",
    "AddressesExhaustedError",
    "AdmissionError",
    "AgentError",
    "AgentLostError",
    "AgentProtocolError",
    "AgentRefusedError",
    "AgentTimeoutError",
    "Background",
    "Bind",
    "Block",
    "BootError",
    "BootTimeoutError",
    "Bridge",
    "BuildEvent",
    "BuildFailedError",
    "Bundle",
    "BundleBuildError",
    "BundleDamagedError",
    "BundleError",
    "BundleMissingError",
    "CNIError",
    "CheckItem",
    "CheckReport",
    "CommandFailedError",
    "Completed",
    "ConfigError",
    "Container",
    "ContainerStats",
    "Detached",
    "DetachedEndedError",
    "DetachedError",
    "DetachedLostError",
    "DetachedNotFoundError",
    "DetachedTakenError",
    "DiskFullError",
    "DiskImage",
    "EmulationWarning",
    "Features",
    "FileChange",
    "FileDeniedError",
    "FileEntry",
    "FileError",
    "FileEvent",
    "FileIsDirectoryError",
    "FileMissingError",
    "FileNotDirectoryError",
    "FilePresentError",
    "FileStat",
    "Files",
    "FsspecVolume",
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
    "ImageVolume",
    "IsolationError",
    "LogPiece",
    "MacVTap",
    "Named",
    "Network",
    "NetworkError",
    "NetworkEvent",
    "NetworkStrategy",
    "NineP",
    "NoNetwork",
    "NotPermittedError",
    "Pool",
    "PoolStats",
    "Port",
    "PortInUseError",
    "Process",
    "PullEvent",
    "PullView",
    "PykataError",
    "Rate",
    "RateLimitedError",
    "Recipe",
    "Registries",
    "RegistryError",
    "RegistryTLSError",
    "RegistryUnreachableError",
    "RunningNetwork",
    "Sandbox",
    "SandboxClosedError",
    "SavedDamagedError",
    "SavedElsewhereError",
    "SavedMissingError",
    "ShareLostError",
    "Stats",
    "StoredImage",
    "StoredVolume",
    "TCFilter",
    "Template",
    "TemplateWarning",
    "Terminal",
    "Timings",
    "Tmpfs",
    "ToolFailedError",
    "ToolMissingError",
    "ToolTooOldError",
    "Transfer",
    "UnknownStrategyError",
    "UnsafeTreeError",
    "UserNetwork",
    "VMDiedError",
    "VMError",
    "VhostUser",
    "VirtioFS",
    "VolumeInUseError",
    "build_bundle",
    "build_image",
    "check",
    "collect_garbage",
    "describe_volumes",
    "find_bundle",
    "find_detached",
    "list_detached",
    "list_images",
    "list_volumes",
    "load_image",
    "pull_image",
    "push_image",
    "remove_image",
    "remove_volume",
    "save_image",
]

# Imported when they are first used: all of them take 0.1 s, and who only wants an error needs none of the rest.
# What isn't named here is in pykata.errors.
_HOMES = {
    "pykata.background": "Background",
    "pykata.boot": "TemplateWarning",
    "pykata.built_images": "build_image load_image push_image save_image",
    "pykata.completed": "Completed",
    "pykata.container": "Container",
    "pykata.detached.handle": "Detached collect_garbage find_detached list_detached",
    "pykata.detached.logs": "LogPiece",
    "pykata.files": "FileChange FileEntry FileEvent Files FileStat Transfer",
    "pykata.fs.block": "Block",
    "pykata.fs.ninep": "NineP",
    "pykata.fs.virtiofs": "VirtioFS",
    "pykata.guest": "Bundle build_bundle find_bundle",
    "pykata.hypervisors.qemu": "QEMU",
    "pykata.images.recipe": "Recipe",
    "pykata.isolation": "EmulationWarning",
    "pykata.net.base": "NetworkStrategy",
    "pykata.net.bridge": "Bridge",
    "pykata.net.cni": "CNI",
    "pykata.net.macvtap": "MacVTap",
    "pykata.net.network": "Network",
    "pykata.net.none": "NoNetwork",
    "pykata.net.policy.rules": "Rate",
    "pykata.net.running": "RunningNetwork",
    "pykata.net.tcfilter": "TCFilter",
    "pykata.net.user": "UserNetwork",
    "pykata.net.vhost_user": "VhostUser",
    "pykata.probe": "CheckItem CheckReport check",
    "pykata.pool": "Pool PoolStats",
    "pykata.process": "Process",
    "pykata.pull_view": "PullView",
    "pykata.pulled_images": "StoredImage list_images pull_image remove_image",
    "pykata.sandbox": "Sandbox",
    "pykata.spec": "BuildEvent Features Image ImageConfig NetworkEvent Port PullEvent Registries Terminal Timings",
    "pykata.stats": "ContainerStats Stats",
    "pykata.templates": "Template",
    "pykata.volumes": (
        "Bind DiskImage FsspecVolume ImageVolume Named StoredVolume Tmpfs describe_volumes list_volumes remove_volume"
    ),
}

if not TYPE_CHECKING:       # a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module 'pykata' has no attribute {name!r}")
        home = next((module for module, names in _HOMES.items() if name in names.split()), "pykata.errors")
        globals()[name] = value = getattr(import_module(home), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
