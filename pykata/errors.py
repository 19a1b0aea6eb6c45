"""Every error that pykata raises on purpose.

::

    PykataError
    ├── ConfigError (ValueError)          an argument can't be right; nothing was started
    │   └── UnknownStrategyError          a hypervisor, filesystem or network by a name nobody registered
    ├── HostError                         this machine lacks something
    │   ├── ToolMissingError              a program isn't installed
    │   ├── ToolTooOldError               a program is installed in a version that can't do it
    │   ├── ToolFailedError               a program of the host ended badly; carries the tail of what it said
    │   ├── NotPermittedError             this user may not do it
    │   ├── NetworkError                  a network can't be made or used as asked
    │   │   ├── AddressesExhaustedError   every address of a network is taken
    │   │   ├── CNIError                  a CNI plugin failed; carries its code, message and details
    │   │   └── PortInUseError            a port of the host that was to be published is taken
    │   ├── IsolationError                hardware isolation was asked for, and there is none
    │   ├── AdmissionError (TimeoutError) there is no memory for another sandbox; carries who has which
    │   ├── DiskFullError                 no space left where it was needed
    │   ├── SavedDamagedError             a saved guest on disk isn't what was written
    │   ├── SavedMissingError (FileNotFoundError)
    │   ├── SavedElsewhereError           it was saved on a machine of another kind: its QEMU, CPU, options differ
    │   └── VolumeInUseError              another sandbox, or this machine, has a disk and one would write
    ├── BundleError                       the guest bundle (kernel, initrd)
    │   ├── BundleMissingError
    │   ├── BundleDamagedError
    │   └── BundleBuildError
    ├── ImageError                        a container image; carries the reference
    │   ├── ImageReferenceError (ValueError)
    │   ├── ImageNotFoundError
    │   ├── ImageCorruptError             a blob or layer isn't what its digest or format says
    │   ├── ImageUnsupportedError         valid, but for another platform or of a kind we can't run
    │   ├── ImageInUseError               it can't be removed while a sandbox has it
    │   ├── BuildFailedError              a command of its recipe failed; carries the end of what it wrote
    │   ├── ImageUnauthorizedError        its registry wants other credentials; carries which were tried
    │   └── RegistryError                 its registry
    │       ├── RegistryUnreachableError  ... doesn't answer, or stops in the middle of it
    │       ├── RegistryTLSError          ... can't prove that it is who it should be
    │       └── RateLimitedError          ... wants fewer requests; carries when it wants the next
    ├── VMError                           the virtual machine; carries the tail of the guest's console
    │   ├── BootError                     it never got as far as the agent
    │   │   └── BootTimeoutError (TimeoutError)
    │   └── VMDiedError                   it was running, and ended
    │       ├── GuestPanicError           ... because the guest's kernel panicked
    │       └── ShareLostError            ... because the process ended that served it files or its network;
    │                                     without files by virtio-fs it goes on
    ├── AgentError                        the agent in the guest
    │   ├── AgentLostError                the connection ended
    │   ├── AgentProtocolError            the guest sent what the protocol doesn't allow
    │   ├── AgentTimeoutError (TimeoutError)
    │   └── AgentRefusedError             it answered, and said no; carries the gRPC status
    ├── DetachedError                     a detached sandbox; carries its name
    │   ├── DetachedNotFoundError         there is none of this name
    │   ├── DetachedTakenError            another one has this name
    │   ├── DetachedEndedError            it has ended, so nothing can be done in it
    │   └── DetachedLostError             its keeper was killed, and its virtual machine with it
    ├── FileError (OSError)               a file of a container; carries errno and the path
    │   ├── FileMissingError (FileNotFoundError)
    │   ├── FilePresentError (FileExistsError)
    │   ├── FileDeniedError (PermissionError)
    │   ├── FileIsDirectoryError (IsADirectoryError)
    │   └── FileNotDirectoryError (NotADirectoryError)
    ├── UnsafeTreeError                   what came from a container can't be written to the host safely
    ├── SandboxClosedError                used before it was entered or after it was left
    └── CommandFailedError                ``check=True`` or :meth:`Completed.check`; carries the Completed

Cancellation is never translated. A message names the thing and its value; ``hint`` is the remedy, where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pykata.completed import Completed


class PykataError(Exception):
    """Base of every error of pykata. ``hint`` says what to do about it, or is empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(PykataError, ValueError):
    """An argument can't be right. Raised before anything is started."""


class UnknownStrategyError(ConfigError):
    """No hypervisor, filesystem or network is registered under this name."""


class HostError(PykataError):
    """The host lacks something that is needed."""


class ToolMissingError(HostError):
    """A program isn't installed."""


class ToolTooOldError(HostError):
    """A program is installed, but in a version that can't do what is needed."""


class ToolFailedError(HostError):
    """A program of the host ended badly. ``output`` is the end of what it wrote."""

    def __init__(self, message: str, *, output: str = "", hint: str = "") -> None:
        super().__init__(f"{message}: {last}" if (last := last_line(output)) else message, hint=hint)
        self.output = output


class NotPermittedError(HostError):
    """The user may not do this on this host."""


class NetworkError(HostError):
    """A network of the host isn't there, can't be made, or isn't what was asked for."""


class AddressesExhaustedError(NetworkError):
    """Every address that a network has for sandboxes is taken."""


class PortInUseError(NetworkError):
    """A port of the host that was to be published is taken by another program, or another sandbox."""


class CNIError(NetworkError):
    """A CNI plugin failed. ``plugin``, ``code``, ``msg`` and ``details`` are what it said (CNI spec, "Error")."""

    def __init__(self, plugin: str, *, code: int = 0, msg: str, details: str = "", hint: str = "") -> None:
        super().__init__(f"the CNI plugin {plugin} failed: {msg}" + (f": {details}" if details else ""), hint=hint)
        self.plugin, self.code, self.msg, self.details = plugin, code, msg, details


class IsolationError(HostError):
    """Hardware isolation was asked for on a host that can't give it."""


class AdmissionError(HostError, TimeoutError):
    """The host has no memory for another sandbox, and had none in time. ``used`` has a line for each process of this
    user that has sandboxes, the largest first."""

    def __init__(self, message: str, *, used: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.used = tuple(used)


class DiskFullError(HostError):
    """A filesystem of the host has no space left."""


class SavedDamagedError(HostError):
    """A saved guest on disk isn't what was written, or not all of it."""


class SavedMissingError(HostError, FileNotFoundError):
    """There is no saved guest at a path."""


class SavedElsewhereError(HostError):
    """A guest was saved by another QEMU, on another CPU or with other options, and can't go on here."""


class VolumeInUseError(HostError):
    """Another sandbox, in whatever process, or this machine itself has the disk, and one of them would write to it; or
    a sandbox has the named volume that was to be removed."""


class BundleError(PykataError):
    """Something is wrong with the guest bundle."""


class BundleMissingError(BundleError):
    """There is no guest bundle on this machine."""


class BundleDamagedError(BundleError):
    """A file of the guest bundle isn't what its manifest says."""


class BundleBuildError(BundleError):
    """Building the guest bundle failed. ``output`` is the end of the build's log."""

    def __init__(self, message: str, *, output: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.output = output


class ImageError(PykataError):
    """Something is wrong with an image. ``reference`` is the image as the caller named it."""

    reference: str = ""

    def __init__(self, message: str, *, reference: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reference = reference


class ImageReferenceError(ImageError, ValueError):
    """The image's name can't be parsed, or names a kind of source that doesn't exist."""


class ImageNotFoundError(ImageError):
    """There is no such image where the reference points."""


class ImageCorruptError(ImageError):
    """A blob or a layer isn't what its digest or its format says. ``digest`` names it."""

    def __init__(self, message: str, *, digest: str = "", reference: str = "", hint: str = "") -> None:
        super().__init__(message, reference=reference, hint=hint)
        self.digest = digest

    def __str__(self) -> str:
        return _of_image(self.reference, super().__str__())


class ImageUnsupportedError(ImageError):
    """The image is valid, but we can't run it: another platform, an unknown compression."""

    def __str__(self) -> str:
        return _of_image(self.reference, super().__str__())


class ImageInUseError(ImageError):
    """The image can't be removed: a sandbox, in whatever process, has it."""


class BuildFailedError(ImageError):
    """A command of a recipe didn't end with exit code 0.

    ``output`` is the end of what it wrote to stdout and stderr, ``completed`` how it ended.
    """

    def __init__(self, message: str, *, completed: Completed, output: str = "", reference: str = "") -> None:
        super().__init__(message, reference=reference, hint=last_line(output))
        self.completed = completed
        self.output = output


class ImageUnauthorizedError(ImageError):
    """The registry refuses the image to these credentials. ``tried`` says where they came from, never what they are."""

    def __init__(self, message: str, *, tried: tuple[str, ...] = (), reference: str = "", hint: str = "") -> None:
        super().__init__(message, reference=reference, hint=hint)
        self.tried = tried


class RegistryError(ImageError):
    """The image's registry answered what it shouldn't: a failure of its own, a redirect that isn't followed."""


class RegistryUnreachableError(RegistryError):
    """The registry can't be connected, doesn't answer, or ends in the middle of an answer, several times."""


class RegistryTLSError(RegistryError):
    """The registry's certificate isn't valid, or it speaks no TLS."""


class RateLimitedError(RegistryError):
    """The registry wants fewer requests. ``retry_after`` is when it takes the next, in seconds, if it said so."""

    def __init__(
        self, message: str, *, retry_after: float | None = None, reference: str = "", hint: str = ""
    ) -> None:
        super().__init__(message, reference=reference, hint=hint)
        self.retry_after = retry_after


class VMError(PykataError):
    """The virtual machine failed. ``console`` is the end of what the guest's kernel wrote, escaped and cut."""

    def __init__(self, message: str, *, console: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.console = console


class BootError(VMError):
    """The virtual machine ended before its agent answered."""


class BootTimeoutError(BootError, TimeoutError):
    """The agent didn't answer within the boot timeout (counted from when the boot got its slot)."""


class VMDiedError(VMError):
    """The virtual machine was running and ended: killed, crashed or switched off."""


class GuestPanicError(VMDiedError):
    """The guest's kernel panicked."""


class ShareLostError(VMDiedError):
    """The process ended that served the virtual machine files of the host, or its network.

    Without its network the virtual machine is ended. Without files by virtio-fs it goes on: who uses them there gets
    ENOTCONN. Then this is the ``error`` of each :class:`~pykata.Completed` that had them, and is raised for new
    containers, which would have them, and by those whose root filesystem they were.
    """


class AgentError(PykataError):
    """The agent in the guest failed.

    ``console`` is the end of the guest's console, and ``completed`` what the command that was being run had written,
    as far as it came; empty and None where there is none.
    """

    console: str = ""
    completed: Completed | None = None


class AgentLostError(AgentError):
    """The connection to the agent ended."""


class AgentProtocolError(AgentError):
    """The guest sent something that the protocol doesn't allow. Its connection is closed."""


class AgentTimeoutError(AgentError, TimeoutError):
    """The agent didn't answer within the deadline of the call."""


class AgentRefusedError(AgentError):
    """The agent answered with an error. ``status`` is the name of the gRPC status, e.g. ``"NOT_FOUND"``."""

    def __init__(self, message: str, *, status: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


class DetachedError(PykataError):
    """Something is wrong with a detached sandbox. ``name`` is what it is called."""

    def __init__(self, message: str, *, name: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.name = name


class DetachedNotFoundError(DetachedError):
    """There is no detached sandbox of this name."""


class DetachedTakenError(DetachedError):
    """Another detached sandbox, running or ended, has this name."""


class DetachedEndedError(DetachedError):
    """The detached sandbox has ended."""


class DetachedLostError(DetachedError):
    """The process that kept the detached sandbox was killed; its virtual machine went with it."""


class FileError(PykataError, OSError):
    """An operation on a container's files failed. ``errno``, ``strerror`` and ``filename`` are those of the container.

    ``errno`` tells what has no class of its own: ``ENOSPC``, ``EROFS``, ``ENOTEMPTY``, ...
    """

    def __init__(self, message: str, *, errno: int, strerror: str, filename: str, hint: str = "") -> None:
        PykataError.__init__(self, message, hint=hint)
        # What OSError itself would take from its arguments.
        self.errno, self.strerror, self.filename = errno, strerror, filename


class FileMissingError(FileError, FileNotFoundError):
    """There is no such file in the container."""


class FilePresentError(FileError, FileExistsError):
    """There is such a file in the container already."""


class FileDeniedError(FileError, PermissionError):
    """The user in the container may not do this."""


class FileIsDirectoryError(FileError, IsADirectoryError):
    """It is a directory, where a file was expected."""


class FileNotDirectoryError(FileError, NotADirectoryError):
    """It isn't a directory, where one was expected."""


class UnsafeTreeError(PykataError):
    """What came from a container isn't something that may be written to the host. ``path`` names it there."""

    def __init__(self, message: str, *, path: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.path = path


class SandboxClosedError(PykataError):
    """The sandbox (or container) isn't open: not entered yet, or left already."""


class CommandFailedError(PykataError):
    """A command didn't end with exit code 0. ``completed`` has its output and the reason."""

    def __init__(self, message: str, *, completed: Completed, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.completed = completed


def _of_image(reference: str, text: str) -> str:
    """What was found in an image, by who reads it: without the image's name nobody knows which one is meant."""
    named = reference in text or reference.partition(":")[2] in text.split() if reference else True
    return text if named else f"{reference[:200]}: {text}"


def last_line(text: str, limit: int = 300) -> str:
    """The last line of ``text`` that isn't blank, cut to ``limit`` characters."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:limit] if lines else ""


def printable(raw: bytes, limit: int = 200) -> str:
    """Bytes of a guest, safe to put into a message or a terminal: escaped, and cut to ``limit`` characters."""
    text = raw.decode("utf-8", "backslashreplace")
    safe = "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= limit else safe[:limit] + "…"
