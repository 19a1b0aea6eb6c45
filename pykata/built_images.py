"""Making images, and taking them elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from pykata.errors import ImageNotFoundError, ImageReferenceError
from pykata.images.depot import Record, find_depot
from pykata.images.name import Name
from pykata.images.recipe import Recipe
from pykata.paths import check_path
from pykata.spec import BuildEvent, Registries

if TYPE_CHECKING:
    from pykata.sandbox import Sandbox

log = logging.getLogger(__name__)


async def build_image(
    recipe: Recipe, name: str, *, architecture: str | None = None, sandbox: Sandbox | None = None,
    progress: Callable[[BuildEvent], object] | None = None,
) -> str:
    """Make the image of a recipe and keep it under ``name``, which is returned, for :meth:`Sandbox.run`.

    ::

        await sb.run(await build_image(Recipe(packages=("python3-minimal",)), "app:dev"), ["python3", "-V"])
        await build_image(recipe, "app:dev", sandbox=Sandbox(memory="2G", disk="1G", network="user"))

    The recipe's commands are run in ``sandbox``: one that is open, or one that isn't, which is then entered for them;
    by default a small one without a network. How it pulls images counts for the recipe's base, too. ``progress`` is
    told each step, and what its command writes.

    What was made before of the same is taken as it is: the image, and each step after the same ones. To get newer
    packages, :func:`remove_image` it before. Raises :class:`ConfigError`, :class:`ImageError`
    (:class:`BuildFailedError` for a command), :class:`HostError`, and what entering a sandbox does.
    """
    from pykata.build_steps import commands, find_base
    from pykata.images.build import Builder, build

    parsed, machine, report = _named(name), architecture or os.uname().machine, told(progress)
    base = await find_base(recipe.base, machine, sandbox) if recipe.base else None
    async with commands(sandbox) as run:
        await build(recipe, parsed, Builder(find_depot(), machine, run, report), base)
    return name


async def load_image(reference: str, name: str, *, architecture: str | None = None) -> str:
    """Keep an image that is elsewhere on this machine under ``name``, which is returned, for :meth:`Sandbox.run`.

    ::

        await load_image("./app.tar", "app:1")
        await load_image("docker-daemon:app:1", "app:1")

    An OCI layout or archive is taken over as it is, so that its digest stays. Of everything else the filesystem becomes
    one layer. Raises :class:`ImageError` and :class:`HostError`.
    """
    from pykata.images.take_over import take_over

    machine = architecture or os.uname().machine
    if await take_over(reference, _named(name), find_depot(), machine) is None:
        await build_image(Recipe(base=reference), name, architecture=machine)
    return name


async def save_image(name: str, path: str | Path) -> None:
    """Write an image that was pulled or made as an OCI layout: a directory, or an archive if ``path`` ends in ``.tar``.

    It must not be there yet. Raises :class:`ImageError` and :class:`HostError`.
    """
    from pykata.images.publish import save

    where = check_path("path", path)
    record = await anyio.to_thread.run_sync(_here, name)
    await anyio.to_thread.run_sync(save, find_depot(), record, where)


async def push_image(name: str, to: str | None = None, *, registries: Registries | None = None) -> str:
    """Put an image that was pulled or made into a registry, as ``to`` or under its own name; returns its digest.

    Raises :class:`ImageError`, and :class:`ImageUnauthorizedError` for a registry that doesn't let us.
    """
    from pykata.images.publish import push

    record = await anyio.to_thread.run_sync(_here, name)
    return await push(find_depot(), record, _named(to or name), registries)


def told(progress: Callable[[BuildEvent], object] | None) -> Callable[[BuildEvent], None]:
    """What tells each step. A callback that fails doesn't fail the work."""
    def tell(event: BuildEvent) -> None:
        if progress is not None:
            try:
                progress(event)
            except Exception:
                log.exception("the progress callback failed")

    return tell


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
