"""What to run in a container, and how it is collected: the arguments that ``run`` and ``process`` share, checked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from attrs import field, frozen

from pykata.errors import ConfigError
from pykata.options import (
    Rlimits,
    check_cmd,
    check_cwd,
    check_env,
    check_rlimits,
    check_seconds,
    check_terminal,
    check_user,
    is_text,
)
from pykata.spec import ImageConfig, Terminal

MAX_OUTPUT = 64 * 1024 * 1024
"""Bytes of stdout, and of stderr, that a Completed keeps unless told otherwise."""

Callback = Callable[[bytes], Awaitable[object] | object]


@frozen(kw_only=True)
class Command:
    """A command as the caller gave it. ``args`` None means the image's own."""

    args: tuple[str, ...] | None
    entrypoint: tuple[str, ...] | None = None
    env: Mapping[str, str] = field(factory=dict)
    cwd: str = ""
    user: str = ""
    rlimits: tuple[tuple[str, int, int], ...] = ()
    terminal: Terminal | None = None
    stdin: bool = True
    """Something may come on its standard input; else that is at its end from the start."""
    collected: bool = False
    """Only its end is waited for."""

    def limits(self) -> Rlimits:
        """The limits as a caller gives them."""
        return {name.removeprefix("RLIMIT_").lower(): (soft, hard) for name, soft, hard in self.rlimits}

    def argv(self, config: ImageConfig) -> tuple[str, ...]:
        """The arguments for a new container: entrypoint and command, as Docker combines them.

        A command replaces the image's ``Cmd``; an entrypoint of the caller's replaces both ``Entrypoint`` and ``Cmd``.
        """
        if self.entrypoint is not None:
            return self._some(self.entrypoint + (self.args or ()))
        return self._some(config.entrypoint + (config.cmd if self.args is None else self.args))

    def _some(self, args: tuple[str, ...]) -> tuple[str, ...]:
        if not args:
            raise ConfigError("there is no command: none was given, and the image has none", hint="pass cmd=[...]")
        return args


def command(
    cmd: Sequence[str] | None,
    *,
    entrypoint: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    rlimits: Rlimits | None = None,
    tty: bool | Terminal = False,
    how: Collection | None = None,
) -> Command:
    """Check the arguments of ``run``, which has a ``how``, and ``process``. Raises :class:`ConfigError`."""
    return Command(
        args=check_cmd(cmd),
        entrypoint=() if entrypoint in ([], ()) else check_cmd(entrypoint, "entrypoint"),
        env=check_env(env),
        cwd=check_cwd(cwd),
        user=check_user(user),
        rlimits=check_rlimits(rlimits),
        terminal=check_terminal(tty),
        stdin=how is None or bool(how.input),
        collected=how is not None and how.is_quiet,
    )


def shell(script: str) -> list[str]:
    """The command that runs ``script`` in the container's shell. Raises :class:`ConfigError`."""
    if not is_text(script):
        wrong = f"script={script!r:.80} is not text in UTF-8 without NUL"
        raise ConfigError(wrong, hint="run takes a list of arguments")
    return ["/bin/sh", "-c", script]


@frozen(kw_only=True)
class Collection:
    """What to do with a command's input, output and time."""

    input: bytes | None = None
    timeout: float | None = None
    on_stdout: Callback | None = None
    on_stderr: Callback | None = None
    max_output: int = MAX_OUTPUT
    check: bool = False

    @property
    def is_quiet(self) -> bool:
        """Nobody takes part in what happens before the end."""
        return not self.input and self.on_stdout is None and self.on_stderr is None


def collection(
    *,
    input: bytes | str | None,
    timeout: float | None,
    on_stdout: Callback | None,
    on_stderr: Callback | None,
    max_output: int,
    check: bool,
) -> Collection:
    """Check the arguments that only ``run`` has. Raises :class:`ConfigError`."""
    if isinstance(input, str):
        try:
            input = input.encode()
        except UnicodeEncodeError as exc:
            raise ConfigError(f"input={input!r:.80} can't be said in UTF-8: {exc.reason}", hint="give bytes") from exc
    if input is not None and not isinstance(input, bytes | bytearray | memoryview):
        raise ConfigError(f"input={input!r:.80} is neither bytes nor text")
    for name, callback in (("on_stdout", on_stdout), ("on_stderr", on_stderr)):
        if callback is not None and not callable(callback):
            raise ConfigError(f"{name}={callback!r:.80} can't be called", hint="give a function of one argument, bytes")
    if not isinstance(max_output, int) or isinstance(max_output, bool) or max_output < 0:
        raise ConfigError(f"max_output={max_output!r} is not a number of bytes")
    return Collection(
        input=None if input is None else bytes(input),
        timeout=check_seconds("timeout", timeout),
        on_stdout=on_stdout,
        on_stderr=on_stderr,
        max_output=max_output,
        check=check,
    )
