"""Synchronous classes, made of the asynchronous ones: every public name, with its signature and docstring.

What a method returns is converted: a coroutine is run to its end, a context manager becomes one for ``with``, an
asynchronous iterator one for ``for``, and an object that has asynchronous methods gets a synchronous face of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from itertools import zip_longest
from types import TracebackType
from typing import Any

import anyio.to_thread

from pykata.isolation import check_isolation
from pykata.sandbox import Sandbox
from pykata.sync.bridge import Held, Turn, call, iterate

HIDDEN = frozenset(
    {"advance", "catch_up", "check", "complete", "consumed", "full", "leave", "of", "push", "put", "take"}
)
"""Public among the modules of pykata, and of no use to others."""

AWAITED = ("on_stdout", "on_stderr", "on_error", "on_data", "read")
"""Callbacks whose result is awaited, if need be: so they may be called in another thread than the loop's."""

HOOKS = ("setup", "warm_up")
"""Functions that a constructor is given, and that are called while nobody waits for one of our calls."""

IN_LOOP = frozenset({"close", "write", "write_eof", "writelines"})
"""Methods that aren't asynchronous, but may be called in the loop's thread only."""

END = object()


class Facade:
    """A synchronous face of an asynchronous object."""

    _of: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in HIDDEN:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return convert(getattr(self._of, name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Facade) and bool(self._of == other._of)

    def __hash__(self) -> int:
        return hash(self._of)

    def __repr__(self) -> str:
        return repr(self._of)


class _Iterable(Facade):
    def __iter__(self) -> Iterator[Any]:
        while (item := call(_next(self._of))) is not END:
            yield convert(item)


async def _next(iterator: Any) -> Any:
    # anext() may return an awaitable that is no coroutine.
    return await anext(iterator, END)


class _Context(Facade):
    def __enter__(self) -> Any:
        if isinstance(self._of, Sandbox):
            check_isolation(self._of.options)       # here, where its warning finds the caller's line
        self._held = Held(self._of, lambda _: self)
        return self._held.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return self._held.__exit__(kind, error, trace)


def convert(value: Any, turn: Turn | None = None) -> Any:
    """What a synchronous caller gets for it."""
    if inspect.iscoroutine(value):
        return convert(call(value, turn))
    if isinstance(value, AsyncGenerator):
        return iterate(value, convert, turn or Turn())
    kind: Any = type(value)         # Any: mypy doesn't take a class for hashable
    if has_face(kind):
        face = facade(kind)
        made = face.__new__(face)
        made._of = value
        return made
    if isinstance(value, AbstractAsyncContextManager):
        return Held(value, convert)
    if type(value) is dict:
        return {name: convert(item) for name, item in value.items()}
    return [convert(item) for item in value] if type(value) is list else value


@functools.cache
def has_face(kind: type[Any]) -> bool:
    """Is it a class of ours with something asynchronous in it?"""
    if not kind.__module__.startswith("pykata.") or issubclass(kind, BaseException | Facade | Held):
        return False
    if inspect.isabstract(kind):
        return False        # a kind of strategy: a value, which nobody but a sandbox enters
    return hasattr(kind, "__anext__") or any(_is_asynchronous(inspect.getattr_static(kind, name)) for name in dir(kind))


def _is_asynchronous(member: object) -> bool:
    function = inspect.unwrap(getattr(member, "__func__", member))      # type: ignore[arg-type]
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


@functools.cache
def facade(kind: type) -> type[Facade]:
    """The synchronous class for an asynchronous one."""
    bases = [base for name, base in (("__anext__", _Iterable), ("__aenter__", _Context)) if hasattr(kind, name)]
    members: dict[str, Any] = {"__doc__": kind.__doc__, "__module__": "pykata.sync", "__qualname__": kind.__name__}
    for name in dir(kind):
        if not name.startswith("_") and name not in HIDDEN:
            members[name] = _member(kind, name)
    if "__init__" in vars(kind):
        members["__init__"] = _constructor(kind)
    return type(kind.__name__, tuple(bases) or (Facade,), {name: what for name, what in members.items() if what})


def _member(kind: type, name: str) -> Any:
    member = inspect.getattr_static(kind, name)
    if isinstance(member, classmethod):
        bound = getattr(kind, name)
        return staticmethod(functools.wraps(bound)(lambda *args, **options: _called(bound, args, options)))
    if isinstance(member, property):
        return property(lambda self: convert(getattr(self._of, name)), doc=member.__doc__)
    if inspect.isfunction(member):
        return functools.wraps(member)(lambda self, *args, **options: _called(getattr(self._of, name), args, options))
    return None         # an attribute of the instance


def _constructor(kind: type) -> Callable[..., None]:
    def construct(self: Facade, *args: Any, **options: Any) -> None:
        for name, value in options.items():
            options[name] = _in_thread(value) if name in HOOKS and callable(value) else _bare(value)
        self._of = kind(*map(_bare, args), **options)

    return functools.wraps(kind.__init__)(construct)  # type: ignore[misc]


def function(asynchronous: Callable[..., Any]) -> Callable[..., Any]:
    """The synchronous function for an asynchronous one, or for one that returns what has asynchronous methods."""
    return functools.wraps(asynchronous)(lambda *args, **options: _called(asynchronous, args, options))


def _called(method: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    turn = Turn()
    options = {name: _passed(turn, name, value) for name, value in options.items()}
    names = list(inspect.signature(method).parameters) if any(map(callable, args)) else []
    args = tuple(_passed(turn, name, value) for name, value in zip_longest(names[: len(args)], args))
    if method.__name__ in IN_LOOP and not inspect.iscoroutinefunction(method):
        return call(_in_loop(method, args, options))
    return convert(method(*args, **options), turn)


def _passed(turn: Turn, name: str | None, value: Any) -> Any:
    return turn.here(value) if name in AWAITED and callable(value) else _bare(value)


def _bare(value: Any) -> Any:
    return value._of if isinstance(value, Facade) else value


def _in_thread(hook: Callable[[Any], object]) -> Callable[[Any], Any]:
    """The hook as one for the loop: unless it is asynchronous itself, it runs in a thread, and is given a facade."""
    if inspect.iscoroutinefunction(hook):
        return hook

    async def run(given: Any) -> object:
        # Abandoned rather than waited for: what it was given is about to end, and so are its calls.
        return await anyio.to_thread.run_sync(hook, convert(given), abandon_on_cancel=True)

    return run


async def _in_loop(method: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return method(*args, **options)
