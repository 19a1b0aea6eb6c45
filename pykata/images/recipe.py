"""What an image of one's own is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from attrs import evolve, field, frozen

from pykata.errors import ConfigError
from pykata.images.entry import BadEntryError, clean_path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHELL = ("/bin/sh", "-c")

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?(=[A-Za-z0-9.+:~-]+)?")
_SUITE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_PORT = re.compile(r"[0-9]{1,5}(/(tcp|udp|sctp))?")
_NOTHING: Mapping[str, str] = MappingProxyType({})


@frozen
class FileContent:
    """A file of a recipe: bytes, or the path of a file or a directory of this machine.

    ``mode`` None is the file's own; those of a directory keep theirs. ``exclude`` are patterns as in ``.dockerignore``
    of what is left out of a directory.
    """

    content: bytes | Path
    mode: int | None = 0o644
    owner: tuple[int, int] = (0, 0)
    exclude: tuple[str, ...] = ()


@frozen
class FilesStep:
    """Files by their path in the image, without its leading slash."""

    files: Mapping[str, FileContent]


@frozen
class RunStep:
    """A command that is run in what was made so far; ``env``, ``user`` and ``workdir`` are those of the recipe then."""

    cmd: tuple[str, ...]
    env: Mapping[str, str]
    user: str
    workdir: str
    timeout: float | None = None


@frozen(kw_only=True)
class Recipe:
    """An image that is made here: a frozen value; each method returns another one.

    ::

        recipe = Recipe(base="python:3.12-slim").with_env(LANG="C.UTF-8")
        recipe = recipe.run("pip install attrs").with_files({"/app/main.py": "print(6 * 7)"})
        await sb.run(await build_image(recipe, "app:dev"), ["python3", "/app/main.py"])

    It begins with Debian ``packages`` (and what they need, by mmdebstrap), with the image ``base``, or with nothing.
    ``suite`` is Debian's, by default this machine's, and ``sources`` lines of apt, by default this machine's for that
    suite. ``cmd``, ``entrypoint``, ``user``, ``workdir``, ``labels`` and ``ports`` (such as ``"80/tcp"``) are as in an
    image's config; what isn't given is the base's. ``steps`` is what :meth:`with_files` and :meth:`run` add.
    """

    packages: tuple[str, ...] = ()
    base: str = ""
    suite: str = ""
    sources: tuple[str, ...] = ()
    steps: tuple[FilesStep | RunStep, ...] = ()
    env: Mapping[str, str] = field(default=_NOTHING)
    labels: Mapping[str, str] = field(default=_NOTHING)
    ports: tuple[str, ...] = ()
    cmd: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    user: str = ""
    workdir: str = ""
    stop_signal: str = ""

    def __attrs_post_init__(self) -> None:
        if self.packages and self.base:
            raise ConfigError("a recipe begins with packages or with a base, not with both")
        for package in self.packages:
            if not isinstance(package, str) or not _PACKAGE.fullmatch(package):
                raise ConfigError(f"{package!r} is not the name of a Debian package")
        if self.suite and not _SUITE.fullmatch(self.suite):
            raise ConfigError(f"suite={self.suite!r} is not the name of a Debian release")
        for port in self.ports:
            if not _PORT.fullmatch(port):
                raise ConfigError(f"{port!r} is not a port", hint="such as 80 or 53/udp")
        if self.workdir and not self.workdir.startswith("/"):
            raise ConfigError(f"workdir={self.workdir!r} is not an absolute path in the image")

    @classmethod
    def from_dockerfile(
        cls, path: str | Path, *, context: str | Path | None = None, args: Mapping[str, str] | None = None
    ) -> Recipe:
        """The recipe that a Dockerfile describes, as far as its instructions are known here.

        ``context`` is the directory that ``COPY`` takes files from, by default the Dockerfile's own; ``args`` are
        values for its ``ARG``\\ s. Raises ConfigError, which names the line.
        """
        from pykata.images.dockerfile import read_dockerfile

        return read_dockerfile(Path(path), Path(context) if context is not None else Path(path).parent, args or {})

    def with_packages(self, *packages: str) -> Recipe:
        """With more Debian packages."""
        return evolve(self, packages=(*self.packages, *packages))

    def with_files(
        self, files: Mapping[str, bytes | str | Path], *, mode: int | None = 0o644, owner: tuple[int, int] = (0, 0),
        exclude: Sequence[str] = (),
    ) -> Recipe:
        """With files at these paths in the image.

        Each is content, or the path of a file or a directory on this machine, read when the image is made. ``mode``
        None is the file's own; those of a directory keep theirs. ``owner`` is user and group by number. ``exclude`` are
        patterns as in ``.dockerignore``, of what is left out of directories. What is missing of the files' directories
        is made.
        """
        added = {
            _checked(path, content): _content(path, content, mode, owner, tuple(exclude))
            for path, content in files.items()
        }
        *steps, last = self.steps or (None,)
        if isinstance(last, FilesStep) and not _has_directory(last.files) and not _has_directory(added):
            return evolve(self, steps=(*steps, FilesStep(MappingProxyType({**last.files, **added}))))
        return evolve(self, steps=(*self.steps, FilesStep(MappingProxyType(added))))

    def run(
        self, cmd: str | Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> Recipe:
        """With what a command changes: it is run in a sandbox on what was made so far, and its files become a layer.

        Text is a script for the image's ``/bin/sh``; a list is a program and its arguments. It has the environment, the
        user and the working directory that the recipe has by now, and ``env`` on top. It is run once: the next time, in
        whatever recipe, its layer is taken if all before it was the same. ``timeout`` is in seconds. A command that
        fails raises :class:`BuildFailedError` from :func:`build_image`.
        """
        args = (*SHELL, cmd) if isinstance(cmd, str) else tuple(cmd)
        if not args or not all(isinstance(arg, str) and "\0" not in arg for arg in args) or not args[-1]:
            raise ConfigError(f"cmd={cmd!r} is no command", hint='a script, or a list such as ["make", "install"]')
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"timeout={timeout!r} is not a duration", hint="seconds as a number above 0, or None")
        step = RunStep(args, MappingProxyType({**self.env, **(env or {})}), self.user, self.workdir, timeout)
        return evolve(self, steps=(*self.steps, step))

    def with_env(self, **env: str) -> Recipe:
        """With environment variables."""
        return evolve(self, env=MappingProxyType({**self.env, **env}))

    def with_labels(self, labels: Mapping[str, str]) -> Recipe:
        """With labels of the image's config."""
        return evolve(self, labels=MappingProxyType({**self.labels, **labels}))

    def with_workdir(self, workdir: str) -> Recipe:
        """With another working directory, also for what is run from here on; a relative one is below the one before."""
        return evolve(self, workdir=str(PurePosixPath(self.workdir or "/", workdir)))

    def with_user(self, user: str) -> Recipe:
        """As another user (``"name"``, ``"uid"``, ``"uid:gid"``), also for what is run from here on."""
        return evolve(self, user=user)

    def with_entrypoint(self, entrypoint: Iterable[str]) -> Recipe:
        """With a program that gets the command as its arguments. The base's command isn't for it, and goes."""
        return evolve(self, entrypoint=tuple(entrypoint))

    def with_cmd(self, cmd: Iterable[str], *, user: str = "", workdir: str = "") -> Recipe:
        """With what is run by default, as whom, and where."""
        return evolve(self, cmd=tuple(cmd), user=user or self.user, workdir=workdir or self.workdir)


def _has_directory(files: Mapping[str, FileContent]) -> bool:
    return any(isinstance(one.content, Path) and one.content.is_dir() for one in files.values())


def _checked(path: str, content: object) -> str:
    try:
        clean = clean_path(path.encode())
    except BadEntryError as exc:
        raise ConfigError(f"{path!r} is no path in an image: {exc.why}") from exc
    if not path.startswith("/") or not (clean or (isinstance(content, Path) and content.is_dir())):
        raise ConfigError(f"{path!r} is not the absolute path of a file")
    return clean.decode()


def _content(
    path: str, content: bytes | str | Path, mode: int | None, owner: tuple[int, int], exclude: tuple[str, ...]
) -> FileContent:
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes | Path):
        raise ConfigError(f"the content of {path} is {type(content).__name__}, neither text nor bytes nor a Path")
    if isinstance(content, Path) and not (content.is_file() or content.is_dir()):
        raise ConfigError(f"there is no file and no directory {content} for {path}")
    return FileContent(content, mode, owner, exclude)
