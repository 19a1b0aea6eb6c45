"""A layer of Debian packages, made by mmdebstrap."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from pykata import host
from pykata.images.config import go_architecture
from pykata.images.depot import Depot, explained
from pykata.images.pack import Built, copy_file, pack
from pykata.images.recipe import Recipe

DEBIAN = {"amd64": "amd64", "arm64": "arm64"}       # Go's names of architectures, and Debian's


async def make_packages(recipe: Recipe, depot: Depot, architecture: str) -> Built:
    """What mmdebstrap makes of the packages. It needs no root: it has user namespaces."""
    tool = host.find_tool("mmdebstrap", package="mmdebstrap")
    suite, sources = recipe.suite, recipe.sources
    if not suite or not sources:
        suite, sources = await _apt_sources(suite)
    with explained(depot.path):
        depot.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=host.BUILDING, dir=depot.path) as work:
        tar = Path(work, "packages.tar")
        await host.run_tool([
            tool, "--quiet", "--variant=minbase", f"--include={','.join(recipe.packages)}", "--format=tar",
            f"--architectures={DEBIAN[go_architecture(architecture)]}", "--aptopt=Acquire::Languages none",
            suite, str(tar), *sources,
        ], env={**host.TOOL_ENV, "SOURCE_DATE_EPOCH": "0", "HOME": work, "TMPDIR": work})
        return await pack(depot, partial(copy_file, tar))


async def _apt_sources(suite: str) -> tuple[str, tuple[str, ...]]:
    """A release of Debian, and where apt of this machine gets it (nothing: mmdebstrap knows a place)."""
    apt = host.find_tool("apt-get", package="apt")
    fields = "$(CODENAME)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)|$(ORIGIN)"
    listed = await host.run_tool([apt, "indextargets", "--format", fields, "Created-By: Packages"])
    found = [line.split("|") for line in sorted(set(listed.decode().splitlines()))]
    debian = [(codename, source) for codename, source, origin in found if origin.startswith("Debian")]
    suite = suite or next((codename for codename, _ in debian if "-" not in codename), "stable")
    return suite, tuple(source for codename, source in debian if codename.split("-")[0] == suite)
