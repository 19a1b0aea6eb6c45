"""Ways for a fake virtual machine to fail, and when."""

from __future__ import annotations

from typing import Literal

Fault = Literal["die", "panic", "hang"]
"""``die``: the VMM is killed. ``panic``: the guest's kernel panics. ``hang``: nothing happens any more, for ever."""

Moment = Literal[
    "boot", "plug", "unplug", "removal",
    "Setup", "CreateContainer", "RemoveContainer", "Run", "Signal", "Resize", "Inspect", "AbortShare", "Stats",
]  # fmt: skip
"""``boot`` is before the agent runs, ``removal`` when that takes down a container that was one command's; those with
capitals are calls of the agent, as they arrive."""
