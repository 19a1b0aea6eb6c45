"""Networks on the command line."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import attrs

import pykata


def network(arguments: argparse.Namespace) -> str | pykata.Network | pykata.NetworkStrategy:
    """The network that was asked for: as little as says it."""
    policy = bool(arguments.allow or arguments.deny)
    more = bool(policy or arguments.publish or arguments.dns or arguments.dns_search)
    strategy = _strategy(arguments.network or ("user" if more else "none"))
    if not (more or arguments.add_host):
        return strategy
    return pykata.Network(
        strategy, allow=arguments.allow or None, deny=arguments.deny, ports=arguments.publish, dns=arguments.dns,
        search=arguments.dns_search, hosts=dict(_host(each) for each in arguments.add_host),
    )  # fmt: skip


def _host(text: str) -> tuple[str, str]:
    name, colon, address = text.partition(":")
    if not colon:
        raise pykata.ConfigError(f"--add-host {text!r} is not NAME:ADDRESS", hint="such as db:10.0.0.5")
    return name, address.removeprefix("[").removesuffix("]")


def _strategy(text: str) -> str | pykata.NetworkStrategy:
    """``NAME``, or ``NAME:KEY=VALUE,...`` with the arguments of the strategy; one without a key is its first."""
    name, colon, options = text.partition(":")
    if not colon:
        return name
    kind = _kinds().get(name)
    if kind is None:
        hint = f"these do: {', '.join(_kinds())}"
        raise pykata.ConfigError(f"--network {text!r}: {name!r} takes no options", hint=hint)
    fields = {field.name: field for field in _fields(kind)}
    said: dict[str, Any] = {}
    for word in options.split(","):
        key, equals, value = word.partition("=")
        if not equals and not said and fields:
            key, value = next(iter(fields)), word
        if key not in fields:
            raise pykata.ConfigError(f"--network {text!r}: {name} has no option {key!r}",
                                     hint=f"it has {', '.join(fields) or 'none'}")
        said[key] = _value(str(fields[key].type), value, text)
    return kind(**said)


def _kinds() -> dict[str, type[pykata.NetworkStrategy]]:
    """The public strategies by their names."""
    public = [getattr(pykata, each) for each in dir(pykata)]
    found = [each for each in public if isinstance(each, type) and issubclass(each, pykata.NetworkStrategy)]
    return {each.name: each for each in found if _fields(each)}


def _fields(kind: type[pykata.NetworkStrategy]) -> tuple[attrs.Attribute[Any], ...]:
    return attrs.fields(kind) if attrs.has(kind) else ()


def _value(kind: str, value: str, text: str) -> Any:
    """A value of an option, of the type that its field is declared with."""
    if "tuple" in kind:
        return tuple(value.split("+"))
    if "bool" in kind:
        if value not in ("true", "false"):
            raise pykata.ConfigError(f"--network {text!r}: {value!r} is neither true nor false")
        return value == "true"
    if "int" in kind:
        try:
            return int(value)
        except ValueError:
            raise pykata.ConfigError(f"--network {text!r}: {value!r} is no number") from None
    return value


@asynccontextmanager
async def logged(path: str | None) -> AsyncIterator[Callable[[pykata.RunningNetwork], None]]:
    """What writes the events of a network to the file. They end with its sandbox, which is left before the block."""
    tasks: list[asyncio.Task[None]] = []

    def log(network: pykata.RunningNetwork) -> None:
        # No task group: it would wrap what goes wrong in the block, which has a message of its own.
        if path is not None:
            tasks.append(asyncio.ensure_future(_log(network, Path(path))))

    try:
        yield log
        if tasks:
            await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
            await asyncio.wait([task])
    for task in tasks:
        if not task.cancelled() and (failure := task.exception()) is not None:
            raise failure


async def _log(network: pykata.RunningNetwork, path: Path) -> None:
    async with await anyio.open_file(path, "a") as file:
        async for event in network.events():
            await file.write(json.dumps(attrs.asdict(event)) + "\n")
            await file.flush()


def published(ports: Sequence[pykata.Port]) -> list[str]:
    """Ports as lines for people."""
    shown = [(f"[{each.address}]" if ":" in each.address else each.address, each) for each in ports]
    return [f"{address}:{each.host} -> {each.guest}/{each.protocol}" for address, each in shown]
