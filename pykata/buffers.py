"""Bytes in whatever form a caller has them."""

from __future__ import annotations

from pykata.errors import ConfigError


def bytes_of(data: object, name: str = "data") -> memoryview:
    """The bytes of a buffer (``bytes``, ``array``, a view of whatever elements and strides), as a view of bytes.

    Copied only where they aren't in one piece. Raises :class:`ConfigError` for what isn't a buffer.
    """
    if isinstance(data, str):
        raise ConfigError(f"{name}={data!r:.80} is text, not bytes", hint=f"{name}.encode() makes bytes of it")
    try:
        view = memoryview(data)  # type: ignore[arg-type]   # what isn't a buffer is refused here
    except (TypeError, ValueError):     # ValueError: a view that was released
        raise ConfigError(f"{name}={data!r:.80} is not bytes", hint="bytes, or what has the buffer protocol") from None
    try:
        return view.cast("B")
    except (TypeError, ValueError):     # strided, empty in one of its dimensions, or of elements that aren't C's
        return memoryview(view.tobytes())
