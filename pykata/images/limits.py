"""How much an image may ask for before we refuse it."""

from __future__ import annotations

from attrs import frozen

GIB = 1024**3


@frozen
class Limits:
    """Bounds for one image: a few kilobytes of compressed zeros can claim any amount of disk and memory.

    ``size`` bounds the uncompressed layers in bytes, ``holes`` what its sparse files pretend to be on top of that: half
    a second of tar2sqfs for each GiB, which at 256 GiB crashes. ``entries`` bounds the files of all layers together,
    each of which takes about 300 bytes while the image is converted (and as many in tar2sqfs), and ``names`` the bytes
    of their names and attributes. What of that is more than ``memory`` bytes goes to a temporary file.
    """

    size: int = 64 * GIB
    holes: int = 16 * GIB
    entries: int = 2_000_000
    names: int = GIB // 2
    layers: int = 512
    memory: int = 24 * 1024**2


DEFAULT_LIMITS = Limits()
