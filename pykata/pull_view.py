"""How far a pull is, for notebooks: as HTML that changes in place."""

from __future__ import annotations

import sys
from html import escape
from typing import Any

from pykata.spec import PullEvent

WORDS = {"downloading": "", "retrying": "trying again", "downloaded": "done", "exists": "is here"}


class PullView:
    """Shows a pull in a notebook, a bar for each layer: pass one as ``progress=``.

    ::

        async with pykata.Sandbox(progress=pykata.PullView()) as sb:
            await sb.run("python:3.12-slim", ["python", "-V"])

    In IPython it displays itself with the first event, and changes in place. Elsewhere it only keeps account: a widget
    of your own can be set to ``fraction`` and ``text``. One view may be used for many pulls.
    """

    def __init__(self) -> None:
        self.layers: dict[str, PullEvent] = {}
        """What was told last of each layer of the image that is being pulled, by digest."""
        self.reference = ""
        """The image that is being pulled, or was last."""
        self.converted = False
        """Whether it is ready."""
        self._shown: Any = None

    def __call__(self, event: PullEvent) -> None:
        if self.converted or event.reference != self.reference:
            self.layers, self.reference, self.converted = {}, event.reference, False
        if event.status == "converted":
            self.converted = True
        else:
            self.layers[event.digest] = event
        self._show()

    @property
    def fraction(self) -> float:
        """How much of what is known of has come, from 0 to 1."""
        total = sum(event.total for event in self.layers.values())
        done = sum(event.done for event in self.layers.values())
        return 1.0 if self.converted else done / total if total else 0.0

    @property
    def text(self) -> str:
        """It in a line."""
        how = "ready" if self.converted else f"{self.fraction:.0%} of {len(self.layers)} layers"
        return f"{self.reference}: {how}"

    def __repr__(self) -> str:
        return f"<PullView {self.text}>"

    def _repr_html_(self) -> str:
        rows = "".join(map(_row, () if self.converted else self.layers.values()))
        return f"<div>{escape(self.text)}</div><table>{rows}</table>" if rows else f"<div>{escape(self.text)}</div>"

    def _show(self) -> None:
        # Who has no IPython doesn't get it imported.
        if self._shown is not None:
            self._shown.update(self)
        elif (ipython := sys.modules.get("IPython")) is not None and ipython.get_ipython() is not None:
            self._shown = ipython.display.display(self, display_id=True)


def _row(event: PullEvent) -> str:
    name, megabytes = event.digest.partition(":")[2][:12], f"{event.done / 1e6:.1f} / {event.total / 1e6:.1f} MB"
    bar = f'<progress value="{event.done}" max="{max(event.total, 1)}"></progress>'
    return f"<tr><td>{escape(name)}</td><td>{bar}</td><td>{megabytes}</td><td>{WORDS[event.status]}</td></tr>"
