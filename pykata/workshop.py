"""Making images, and taking them elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import anyio.to_thread

from pykata.errors import ImageNotFoundError, ImageReferenceError
from pykata.images.depot import Record, find_depot
from pykata.images.name import Name
from pykata.images.recipe import Recipe
from pykata.spec import Registries


async def build_image(recipe: Recipe, name: str, *, architecture: str | None = None) -> str:
    """Make the image of a recipe and keep it under ``name``, which is returned, for :meth:`Sandbox.run`.

    ::

        await sb.run(await build_image(Recipe(packages=("python3-minimal",)), "app:dev"), ["python3", "-V"])

    An image of this name that was made of the same recipe is taken as it is; to get newer packages,
    :func:`remove_image` it before. Raises :class:`ConfigError`, :class:`ImageError` and :class:`HostError`.
    """
    from pykata.images import resolve
    from pykata.images.build import build

    parsed, machine = _named(name), architecture or os.uname().machine
    base = await resolve(recipe.base, architecture=machine) if recipe.base else None
    await build(recipe, parsed, find_depot(), machine, base)
    return name


async def save_image(name: str, path: str | Path) -> None:
    """Write an image that was pulled or made as an OCI layout, a directory that must not be there yet.

    Raises :class:`ImageError` and :class:`HostError`.
    """
    from pykata.images.publish import save

    record = await anyio.to_thread.run_sync(_here, name)
    await anyio.to_thread.run_sync(save, find_depot(), record, Path(path))


async def push_image(name: str, to: str | None = None, *, registries: Registries | None = None) -> str:
    """Put an image that was pulled or made into a registry, as ``to`` or under its own name; returns its digest.

    Raises :class:`ImageError`, and :class:`ImageUnauthorizedError` for a registry that doesn't let us.
    """
    from pykata.images.publish import push

    record = await anyio.to_thread.run_sync(_here, name)
    return await push(find_depot(), record, _named(to or name), registries)


def _named(name: str) -> Name:
    from pykata.images.reference import parse

    parsed = parse(name).name
    if parsed is None or parsed.digest:
        raise ImageReferenceError(f"{name!r} is no name of an image with a tag", reference=name, hint="such as app:dev")
    return parsed


def _here(name: str) -> Record:
    from pykata.images.reference import parse

    parsed, records = parse(name).name, [record for record, _ in find_depot().records()]
    found = [record for record in records if parsed is not None and record.name == str(parsed)]
    if not found:
        raise ImageNotFoundError(f"there is no image {name} here", reference=name, hint="see pykata images")
    return found[0]
