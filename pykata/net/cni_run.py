"""Running CNI plugins: ADD, CHECK and DEL of a chain (CNI specification 1.0.0, sections 2 to 5)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
from attrs import asdict, evolve, frozen

from pykata.errors import CNIError, ToolMissingError
from pykata.host import KILL, PIPE, TOOL_ENV, PipeReader, spawn
from pykata.net.cni_conf import NetworkList

LARGEST = 1 << 20       # bytes of an answer
RESULT = "cni.json"

UNCHECKED = {"portmap"}
"""Its CHECK looks for rules of IPv6 in a container that has none, and fails (release 1.1.1, which is Debian 12's)."""

Result = Mapping[str, Any]


@frozen
class Invocation:
    """A container as plugins see it, which is a sandbox."""

    conf: NetworkList
    path: tuple[str, ...]
    container: str
    netns: str
    interface: str
    timeout: float
    args: Mapping[str, str]
    ports: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, what: Mapping[str, Any]) -> Invocation:
        made = cls(**what)
        conf = what["conf"]
        return evolve(made, conf=NetworkList(**{**conf, "plugins": tuple(conf["plugins"])}), path=tuple(made.path))

    async def add(self) -> Result:
        """Each plugin in turn, with the result of the one before. Raises CNIError."""
        result: Result | None = None
        for plugin in self.conf.plugins:
            answer = await self._call("ADD", plugin, result)
            try:
                result = json.loads(answer)
            except ValueError:
                result = None
            if not isinstance(result, dict):
                raise CNIError(plugin["type"], msg="its result is no JSON object")
        assert result is not None
        return result

    async def check(self, result: Result) -> None:
        """Is all as it was made? Raises CNIError."""
        if self.conf.checks and self.conf.version >= "0.4.0":       # which has it first
            for plugin in self.conf.plugins:
                if plugin["type"] not in UNCHECKED:
                    await self._call("CHECK", plugin, result)

    async def delete(self, result: Result | None) -> list[CNIError]:
        """Each plugin, the last one first, whatever others say; what they say is returned."""
        errors = []
        for plugin in reversed(self.conf.plugins):
            try:
                await self._call("DEL", plugin, result if self.conf.version >= "0.4.0" else None)
            except CNIError as error:
                errors.append(error)
            except ToolMissingError as error:
                errors.append(CNIError(plugin["type"], msg=str(error)))
        return errors

    async def _call(self, command: str, plugin: Mapping[str, Any], previous: Result | None) -> bytes:
        env = {
            **TOOL_ENV, "CNI_COMMAND": command, "CNI_CONTAINERID": self.container, "CNI_NETNS": self._netns(),
            "CNI_IFNAME": self.interface, "CNI_PATH": ":".join(self.path),
        }  # fmt: skip
        if self.args:
            env["CNI_ARGS"] = ";".join(f"{name}={value}" for name, value in self.args.items())
        conf = json.dumps(self._conf(plugin, previous)).encode()
        return await execute(find(plugin["type"], self.path), env, conf, timeout=self.timeout)

    def _netns(self) -> str:
        # After a crash it may be gone, which a plugin has to cope with at DEL.
        return self.netns if Path(self.netns).exists() else ""

    def _conf(self, plugin: Mapping[str, Any], previous: Result | None) -> dict[str, Any]:
        made = {**plugin, "name": self.conf.name, "cniVersion": self.conf.version}
        capabilities = made.pop("capabilities", {})
        if capabilities.get("portMappings") and self.ports:
            made["runtimeConfig"] = {"portMappings": self.ports}
        if previous is not None:
            made["prevResult"] = previous
        return made


def find(plugin: str, path: tuple[str, ...]) -> Path:
    """The program of a plugin. Raises ToolMissingError."""
    found = shutil.which(plugin, path=":".join(path))
    if found is None:
        raise ToolMissingError(f"the CNI plugin {plugin!r} is in none of {', '.join(path)}",
                               hint="apt-get install containernetworking-plugins, or set CNI_PATH")
    return Path(found)


def check_plugins(conf: NetworkList, path: tuple[str, ...]) -> None:
    """Raise ToolMissingError if one isn't there, before any is run."""
    for plugin in conf.plugins:
        find(plugin["type"], path)
        if isinstance(ipam := plugin.get("ipam"), Mapping) and ipam.get("type"):
            find(str(ipam["type"]), path)


async def execute(program: Path, env: Mapping[str, str], conf: bytes, *, timeout: float) -> bytes:
    """Run a plugin to its end. Raises CNIError with what it says of its failure."""
    out, err = bytearray(), bytearray()
    with anyio.move_on_after(timeout) as patience:
        async with spawn([program], stdin=PIPE, stdout=PIPE, stderr=PIPE, env=env, kill=KILL) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_collect, process.stdout, out)
                tasks.start_soon(_collect, process.stderr, err)
                with suppress(anyio.BrokenResourceError):
                    async with process.stdin:
                        await process.stdin.send(conf)
            code = await process.wait()
    if patience.cancelled_caught:
        raise CNIError(program.name, msg=f"it took longer than {timeout:g} s")
    if code:
        raise _failure(program.name, code, bytes(out), bytes(err))
    return bytes(out)


async def _collect(stream: PipeReader, into: bytearray) -> None:
    async for chunk in stream:
        into += chunk[: LARGEST - len(into)]


def _failure(plugin: str, exit_code: int, out: bytes, err: bytes) -> CNIError:
    """Section 5, "Error"."""
    try:
        said = json.loads(out)
        return CNIError(plugin, code=int(said["code"]), msg=str(said["msg"]), details=str(said.get("details", "")))
    except (ValueError, TypeError, KeyError):
        text = (err or out)[-2000:].decode(errors="backslashreplace").strip()
        return CNIError(plugin, msg=f"it ended with code {exit_code}", details=text)


def keep_result(run_dir: Path, result: Result) -> None:
    """Write it down for DEL, which wants it."""
    (run_dir / RESULT).write_text(json.dumps(result))


def kept_result(run_dir: Path) -> Result | None:
    """That of ADD, if it came that far."""
    try:
        found = json.loads((run_dir / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
