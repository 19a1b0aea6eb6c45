"""From a reference to an image."""

from __future__ import annotations

from functools import partial

import anyio.to_thread

from pykata.errors import ImageError
from pykata.images.builtin import Builtin, find_builtin
from pykata.images.limits import DEFAULT_LIMITS, Limits
from pykata.images.oci import find_oci
from pykata.images.reference import Reference, Source, parse
from pykata.images.tarball import find_tarball
from pykata.spec import Image


async def resolve(
    reference: str, *, architecture: str, builtin: Builtin | None = None, limits: Limits = DEFAULT_LIMITS
) -> Image:
    """Find the image that ``reference`` names, for a guest of this ``architecture`` (``x86_64``, ``aarch64``).

    ::

        image = await resolve("oci:./images/debian-python", architecture="x86_64")

    Only metadata is read and verified; the layers are when ``write_tar`` reads them. ``builtin`` are the images that
    ``builtin:NAME`` can name, with their disks and OCI configs. Raises :class:`~pykata.errors.ImageError`.
    """
    parsed = parse(reference)
    return await anyio.to_thread.run_sync(partial(_find, parsed, architecture, builtin or {}, limits))


def _find(reference: Reference, architecture: str, builtin: Builtin, limits: Limits) -> Image:
    try:
        match reference.source:
            case Source.OCI:
                return find_oci(reference, architecture, limits)
            case Source.TARBALL:
                return find_tarball(reference, architecture, limits)
            case Source.BUILTIN:
                return find_builtin(reference, architecture, builtin)
            case _:
                raise NotImplementedError(reference.source)
    except ImageError as exc:
        exc.reference = exc.reference or reference.text
        raise
