"""Which arguments a command gets, and how its end is told."""

from __future__ import annotations

from typing import Any

import pytest

from pykata.command import collection, command
from pykata.completed import Completed
from pykata.errors import CommandFailedError, ConfigError, VMDiedError
from pykata.spec import ImageConfig

IMAGE = ImageConfig(entrypoint=("/entry", "-v"), cmd=("serve",))


@pytest.mark.parametrize(
    ("cmd", "entrypoint", "argv"),
    [
        (None, None, ("/entry", "-v", "serve")),
        (["x"], None, ("/entry", "-v", "x")),
        (["x"], [], ("x",)),
        (["x"], ["other"], ("other", "x")),
        (None, ["other"], ("other",)),
    ],
)
def test_entrypoint_and_command_combine_as_with_docker(cmd: Any, entrypoint: Any, argv: tuple[str, ...]) -> None:
    assert command(cmd, entrypoint=entrypoint).argv(IMAGE) == argv


def test_no_command_anywhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="no command"):
        command(None).argv(ImageConfig())


@pytest.mark.parametrize(
    "arguments", [{"cwd": "relative"}, {"cwd": "/a\0"}, {"user": 3}, {"user": "a\0"}, {"entrypoint": "sh"},
                  {"cwd": "/\udcff"}, {"user": "\udcff"}, {"entrypoint": ["\udcff"]}]
)
def test_bad_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        command(["x"], **arguments)


@pytest.mark.parametrize(
    "arguments", [{"input": 3}, {"input": "\ud800"}, {"max_output": -1}, {"max_output": 1.5}, {"timeout": 0}]
)
def test_bad_ways_to_collect_are_named(arguments: dict[str, Any]) -> None:
    defaults: dict[str, Any] = {
        "input": None, "timeout": None, "on_stdout": None, "on_stderr": None, "max_output": 1, "check": False,
    }  # fmt: skip
    with pytest.raises(ConfigError):
        collection(**{**defaults, **arguments})


def ended(**how: Any) -> Completed:
    return Completed(**{"args": ("prog", "-x"), "exit_code": 0, "reason": "exit", **how})


def test_check_passes_what_ended_well() -> None:
    done = ended()
    assert done.check() is done


@pytest.mark.parametrize(
    ("done", "said"),
    [
        (ended(exit_code=3, stderr_bytes=b"one\nlast words\n"), "exit code 3 (last words)"),
        (ended(exit_code=143, reason="signal", signal=15), "SIGTERM"),
        (ended(exit_code=227, reason="signal", signal=99), "signal 99"),
        (ended(exit_code=137, reason="oom", signal=9), "memory"),
        (ended(exit_code=137, reason="timeout", signal=9), "time"),
        (ended(exit_code=None, reason="vm_died", error=VMDiedError("QEMU was killed")), "QEMU was killed"),
        (ended(exit_code=0, reason="timeout"), "time"),
    ],
)
def test_check_says_how_it_ended(done: Completed, said: str) -> None:
    with pytest.raises(CommandFailedError) as caught:
        done.check()
    assert said in str(caught.value)
    assert caught.value.completed is done


def test_output_that_is_not_text_is_kept_as_bytes() -> None:
    done = ended(stdout_bytes=b"\xff\xfe", stderr_bytes=b"ok")
    assert (done.stdout, done.stderr) == ("\ufffd\ufffd", "ok")
