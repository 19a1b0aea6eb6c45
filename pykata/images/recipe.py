"""What an image of one's own is made of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from attrs import evolve, field, frozen

from pykata.errors import ConfigError
from pykata.images.entry import BadEntryError, clean_path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?(=[A-Za-z0-9.+:~-]+)?")
_SUITE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@frozen
class FileContent:
    """A file of a recipe: bytes, or the path of a file of this machine."""

    content: bytes | Path
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)


@frozen(kw_only=True)
class Recipe:
    """An image that is made here: a frozen value; each ``with_`` method returns another one.

    ::

        recipe = Recipe(packages=("python3-minimal",)).with_env(LANG="C.UTF-8")
        recipe = recipe.with_files({"/app/main.py": "print(6 * 7)"})
        await sb.run(await build_image(recipe, "app:dev"), ["python3", "/app/main.py"])

    It begins with Debian ``packages`` (and what they need, by mmdebstrap), with the image ``base``, or with nothing.
    ``suite`` is Debian's, by default this machine's, and ``sources`` lines of apt, by default this machine's for that
    suite. ``cmd``, ``entrypoint``, ``user`` and ``workdir`` are as in an image's config.
    """

    packages: tuple[str, ...] = ()
    base: str = ""
    suite: str = ""
    sources: tuple[str, ...] = ()
    files: Mapping[str, FileContent] = field(factory=lambda: MappingProxyType({}))
    env: Mapping[str, str] = field(factory=lambda: MappingProxyType({}))
    cmd: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""

    def __attrs_post_init__(self) -> None:
        if self.packages and self.base:
            raise ConfigError("a recipe begins with packages or with a base, not with both")
        for package in self.packages:
            if not isinstance(package, str) or not _PACKAGE.fullmatch(package):
                raise ConfigError(f"{package!r} is not the name of a Debian package")
        if self.suite and not _SUITE.fullmatch(self.suite):
            raise ConfigError(f"suite={self.suite!r} is not the name of a Debian release")

    def with_packages(self, *packages: str) -> Recipe:
        """With more Debian packages."""
        return evolve(self, packages=(*self.packages, *packages))

    def with_files(
        self, files: Mapping[str, bytes | str | Path], *, mode: int = 0o644, owner: tuple[int, int] = (0, 0)
    ) -> Recipe:
        """With files at these paths in the image: content, or the path of a file on this machine, read when it is made.

        ``owner`` is user and group by number. What is missing of their directories is made.
        """
        added = {_checked(path): _content(path, content, mode, owner) for path, content in files.items()}
        return evolve(self, files=MappingProxyType({**self.files, **added}))

    def with_env(self, **env: str) -> Recipe:
        """With environment variables."""
        return evolve(self, env=MappingProxyType({**self.env, **env}))

    def with_cmd(self, cmd: Iterable[str], *, user: str = "", workdir: str = "") -> Recipe:
        """With what is run by default, as whom, and where."""
        return evolve(self, cmd=tuple(cmd), user=user or self.user, workdir=workdir or self.workdir)

    def identity(self) -> str:
        """What tells this recipe from another one; files count by their content."""
        hashing = hashlib.sha256(repr((
            self.packages, self.base, self.suite, self.sources, sorted(self.env.items()), self.cmd, self.entrypoint,
            self.user, self.workdir)).encode())
        for path, file in sorted(self.files.items()):
            digest = hashlib.sha256(file.content if isinstance(file.content, bytes) else file.content.read_bytes())
            hashing.update(repr((path, file.mode, file.owner, digest.hexdigest())).encode())
        return hashing.hexdigest()


def _checked(path: str) -> str:
    try:
        clean = clean_path(path.encode())
    except BadEntryError as exc:
        raise ConfigError(f"{path!r} is no path in an image: {exc.why}") from exc
    if not path.startswith("/") or not clean:
        raise ConfigError(f"{path!r} is not the absolute path of a file")
    return clean.decode()


def _content(path: str, content: bytes | str | Path, mode: int, owner: tuple[int, int]) -> FileContent:
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes | Path):
        raise ConfigError(f"the content of {path} is {type(content).__name__}, neither text nor bytes nor a Path")
    if isinstance(content, Path) and not content.is_file():
        raise ConfigError(f"there is no file {content} for {path}")
    return FileContent(content, mode, owner)
