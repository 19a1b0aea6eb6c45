"""What is printed to our own stdout and stderr, which the caller may have closed, filled up, or left unread."""

from __future__ import annotations

import os
import sys
from typing import TextIO

_STREAMS = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_WRONLY, "w"), ("stderr", os.O_WRONLY, "w"))


def open_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever the caller did to them."""
    for fd, (name, flags, mode) in enumerate(_STREAMS):
        try:
            os.fstat(fd)
        except OSError:
            # A descriptor that the caller closed would be given to the first file we open.
            os.open(os.devnull, flags)
        if getattr(sys, name) is None:      # and Python has nothing for it; what is printed there would go to stdout
            stream = open(fd, mode, errors="backslashreplace", closefd=False)   # noqa: SIM115  to the end
            setattr(sys, name, stream)
    # Names of files that are no text, and whatever the caller's locale lacks.
    if (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:
        reconfigure(errors="backslashreplace")


def show(text: str, end: str = "\n") -> None:
    """Print to stdout. Raises BrokenPipeError when nobody reads it, and HostError when it can't be written."""
    try:
        print(text, end=end, flush=True)
    except OSError as exc:
        _give_up("stdout")
        if isinstance(exc, BrokenPipeError):
            raise
        from pykata import HostError

        raise HostError(f"can't write to stdout: {exc.strerror}") from exc


def say(text: str) -> None:
    """A line on stderr. If that can't be written, nobody can be told, and nothing else fails of it."""
    tell(sys.stderr, f"pykata: {text}\n")


def tell(out: TextIO, text: str | bytes) -> None:
    """The same, of something else than what we have to say, where ``out`` is mostly stderr."""
    try:
        if isinstance(text, bytes):
            out.buffer.write(text)
        else:
            out.write(text)
        out.flush()
    except OSError:
        if out is sys.stderr:
            _give_up("stderr")


def _give_up(name: str) -> None:
    """Take a stream's place that can't be written: Python would try again when it ends, and complain."""
    setattr(sys, name, open(os.devnull, "w"))       # noqa: SIM115  to the end
