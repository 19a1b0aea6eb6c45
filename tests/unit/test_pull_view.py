"""How far a pull is, in a notebook and for a widget of one's own."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pykata import PullEvent, PullView

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
EVENTS = (
    PullEvent("<app>:1", ONE, "downloading", 250_000, 1_000_000),
    PullEvent("<app>:1", TWO, "exists", 1_000_000, 1_000_000),
)


def test_an_account_is_kept() -> None:
    view = PullView()
    assert (view.fraction, view.layers) == (0.0, {})
    for event in EVENTS:
        view(event)
    assert view.fraction == 0.625
    assert view.text == "<app>:1: 62% of 2 layers"
    html = view._repr_html_()
    assert '<progress value="250000" max="1000000">' in html
    assert "&lt;app&gt;" in html
    assert "<app>" not in html
    assert "is here" in html
    view(PullEvent("<app>:1", "", "converted"))
    assert (view.fraction, repr(view)) == (1.0, "<PullView <app>:1: ready>")
    assert "<progress" not in view._repr_html_()
    view(PullEvent("other", ONE, "downloading", 0, 0))
    assert (view.reference, view.fraction) == ("other", 0.0)
    assert '<progress value="0" max="1">' in view._repr_html_()


@pytest.mark.parametrize("in_a_notebook", [True, False])
def test_a_notebook_shows_it_once(monkeypatch: pytest.MonkeyPatch, in_a_notebook: bool) -> None:
    shown: list[tuple[str, Any]] = []

    def display(what: Any, *, display_id: bool) -> Any:
        assert display_id
        shown.append(("display", what))
        return SimpleNamespace(update=lambda what: shown.append(("update", what)))

    ipython = SimpleNamespace(get_ipython=lambda: object() if in_a_notebook else None,
                              display=SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    view = PullView()
    for event in EVENTS:
        view(event)
    assert shown == ([("display", view), ("update", view)] if in_a_notebook else [])
