"""How a command ended, and what it wrote."""

from __future__ import annotations

import signal as signals

from attrs import field, frozen

from pykata.errors import CommandFailedError, VMDiedError
from pykata.spec import Reason


@frozen(kw_only=True)
class Completed:
    """A command that has ended.

    ``exit_code`` is 0..255: 128 + the signal's number when a signal ended it, 127 when the command wasn't found, 126
    when it couldn't be executed, and None when the virtual machine died under it. ``stdout_bytes`` and ``stderr_bytes``
    hold everything it wrote until then, up to ``max_output`` each; ``truncated`` says that there was more.

    ``reason`` is ``"exit"``, ``"signal"``, ``"oom"``, ``"timeout"`` or ``"vm_died"``. It is ``"oom"`` when memory ran
    out in the container and the command failed of it: the kernel killed the command itself; or it killed a child, and
    the command, a shell, passed that on as exit code 137; or it killed any process of the container while nothing else
    was run there, and the command ended with another exit code than 0. A command that came to exit code 0 all the same
    has ``"exit"``; ``oom_kills`` is in each case how many processes the kernel killed meanwhile.
    """

    args: tuple[str, ...]
    exit_code: int | None
    reason: Reason
    signal: int | None = None
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    truncated: bool = False
    oom_kills: int = 0
    error: VMDiedError | None = field(default=None, eq=False)
    """Why the virtual machine died, if it did; a :class:`ShareLostError` if files of the host were lost meanwhile."""

    @property
    def stdout(self) -> str:
        """Standard output as text; what isn't UTF-8 is replaced by U+FFFD."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Standard error as text; what isn't UTF-8 is replaced by U+FFFD."""
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def ok(self) -> bool:
        """It ended by itself with exit code 0, and no files of the host were lost that it had."""
        return self.reason == "exit" and self.exit_code == 0 and self.error is None

    def check(self) -> Completed:
        """Return itself if the command ended well; otherwise raise :class:`CommandFailedError`."""
        if self.ok:
            return self
        said = self.stderr.strip().splitlines()
        raise CommandFailedError(
            f"{self.args[0]!r} {self._how()}{self._without()}", completed=self, hint=said[-1][:300] if said else ""
        ) from self.error

    def _without(self) -> str:
        return f"; {self.error}" if self.error is not None and self.reason != "vm_died" else ""

    def _how(self) -> str:
        match self.reason:
            case "exit":
                return f"ended with exit code {self.exit_code}"
            case "signal":
                return f"was ended by {signal_name(self.signal)}"
            case "oom":
                return "failed because memory ran out"
            case "timeout":
                return "was killed because its time was up"
            case "vm_died":
                return f"ended with its virtual machine: {self.error}"


def signal_name(number: int | None) -> str:
    """``SIGTERM`` for 15; ``signal 99`` for what this host has no name for."""
    try:
        return signals.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"
