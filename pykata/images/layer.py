"""A layer as it is stored. What reads layers is only loaded when they are read: most images were converted before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO

from attrs import frozen

from pykata.images.limits import Limits


@frozen
class Layer:
    """A layer as it is stored. ``digest`` and ``size`` are about the stored bytes, ``diff_id`` about the plain tar.

    What the source doesn't say is empty. ``name`` is what messages call it. ``whiteouts`` False takes ``.wh.`` names
    for files, as in a plain archive.
    """

    name: str
    open: Callable[[], IO[bytes]]
    digest: str = ""
    size: int | None = None
    diff_id: str = ""
    whiteouts: bool = True


def write_merged(layers: Sequence[Layer], limits: Limits, dest: IO[bytes]) -> None:
    """See :func:`pykata.images.layers.write_layers`."""
    from pykata.images.layers import write_layers

    write_layers(layers, limits, dest)
