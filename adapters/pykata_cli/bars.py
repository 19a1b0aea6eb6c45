"""Shows a pull on a terminal: a bar for each layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from attrs import define, field

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    import pykata

WORDS = {"downloading": "", "retrying": "trying again", "downloaded": "done", "exists": "is here"}


@contextmanager
def bars(out: TextIO) -> Iterator[Bars | None]:
    """What shows the events of a pull on ``out``: None if that isn't a terminal, nothing before the first event."""
    if not out.isatty():
        yield None
        return
    shown = Bars(out)
    try:
        yield shown
    finally:
        shown.stop()


@define(eq=False)
class Bars:
    """Bars that appear with the first event, and go when the image is ready."""

    out: TextIO
    _progress: Progress | None = None
    _tasks: dict[str, TaskID] = field(factory=dict)

    def __call__(self, event: pykata.PullEvent) -> None:
        if event.status == "converted":
            self.stop()
            return
        if self._progress is None:
            self._progress = _start(self.out)
        if event.digest not in self._tasks:
            short = event.digest.partition(":")[2][:12]
            self._tasks[event.digest] = self._progress.add_task(short, total=event.total, state="")
        self._progress.update(self._tasks[event.digest], completed=event.done, state=WORDS[event.status])

    def stop(self) -> None:
        """Take the bars off the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()


def _start(out: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    progress = Progress(*columns, TextColumn("{task.fields[state]}"), console=Console(file=out), transient=True)
    progress.start()
    return progress
