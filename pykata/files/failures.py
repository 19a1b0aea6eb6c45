"""From what the container's kernel said to an error that says what to do."""

from __future__ import annotations

import errno
import os

from pykata.errors import (
    FileDeniedError,
    FileError,
    FileIsDirectoryError,
    FileMissingError,
    FileNotDirectoryError,
    FilePresentError,
    printable,
)
from pykata.files.paths import shown, text
from pykata.files.v1 import Failure

CLASSES: dict[int, type[FileError]] = {
    errno.ENOENT: FileMissingError,
    errno.EEXIST: FilePresentError,
    errno.EACCES: FileDeniedError,
    errno.EPERM: FileDeniedError,
    errno.EISDIR: FileIsDirectoryError,
    errno.ENOTDIR: FileNotDirectoryError,
}

HINTS: dict[int, str] = {
    errno.EACCES: "container.files.as_user(...) works as another user",
    errno.EPERM: "container.files.as_user(...) works as another user",
    errno.ENOSPC: "the container's writable layer is full: Sandbox(disk=...)",
    errno.EXDEV: "what the image has can't be renamed in place, as with rename(2) on overlayfs: copy it",
    errno.ENOTEMPTY: "remove(recursive=True) removes what is in it, too",
    errno.EBUSY: "a mount point stays where it is, as does what others use",
    errno.ELOOP: "too many symlinks, or one of /proc's that lead to open files",
}


STEP_HINTS: dict[tuple[int, str], str] = {
    (errno.EINVAL, "regular file"): "open() reads and writes such a thing as a stream; atomic=False writes in place",
    (errno.EBUSY, "replace"): "a mount point can't be replaced: atomic=False writes in place",
    (errno.ENOSPC, "watch"): "the guest's limit of watches: a smaller tree, or recursive=False",
}
"""Where the step says more than the number: by its end."""


def error(number: int, step: str, path: bytes, *, hint: str | None = None) -> FileError:
    """The error for a step that failed on a path."""
    said = os.strerror(number)
    return CLASSES.get(number, FileError)(
        f"can't {step} {shown(path)}: {said}", errno=number, strerror=said, filename=text(path),
        hint=_hint(number, step) if hint is None else hint,
    )  # fmt: skip


def _hint(number: int, step: str) -> str:
    for (reason, end), hint in STEP_HINTS.items():
        if number == reason and step.endswith(end):
            return hint
    return HINTS.get(number, "")


def from_guest(failure: Failure, path: bytes) -> FileError:
    """The error for what the guest reported of an operation on ``path``. Nothing in it is believed to be sane."""
    number = failure.errno if 0 < failure.errno < 4096 else errno.EIO
    inner = failure.path[:4096]
    if inner and not inner.startswith(b"/") and b"/" not in inner and inner != path:
        inner = path.rstrip(b"/") + b"/" + inner
    return error(number, printable(failure.step.encode("utf-8", "backslashreplace"), 60), inner or path)
