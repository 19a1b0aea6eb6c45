"""How the documentation is built: ``make docs``, or ``nox --sessions docs``. A warning is an error."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "adapters"))

project = "pykata"
author = "the pykata developers"
copyright = f"2026, {author}"
version = release = installed_version("pykata")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pykata {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_display_short_literal_types = True

# No inventories of other projects: the build must work, and be the same, without a network.
intersphinx_mapping: dict[str, tuple[str, None]] = {}


class CommandHelp(SphinxDirective):
    """``command-help``: what ``pykata ... --help`` prints, from the parser itself."""

    optional_arguments = 10

    def run(self) -> list[nodes.Node]:
        """The help text as a literal block."""
        from pykata_cli.parser import make_parser

        parser: Any = make_parser()
        for name in self.arguments:
            parser = parser._subparsers._group_actions[0].choices[name]
        text = parser.format_help()
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Any) -> None:
    """Register our directive."""
    app.add_directive("command-help", CommandHelp)
