"""What the tree keeps of a file says all that its entry did, in a tenth of the memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata.errors import DiskFullError
from pykata.images import nodes_disk
from pykata.images.entry import Entry, Kind
from pykata.images.leaf import Inode, entry_of, kind_of, layer_of, leaf_of, offset_of, stored_of
from pykata.images.limits import Limits
from pykata.images.plan import plan
from pykata.images.tree import Tree
from tests.images_fixtures import file, merged

SIZE = st.integers(0, 2**62)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    size = draw(SIZE)
    return Entry(
        b"a/b", draw(st.sampled_from([Kind.FILE, Kind.FILE, Kind.SYMLINK, Kind.CHAR])), draw(st.integers(0, 0o7777)),
        draw(st.integers(0, 2**32 - 2)), draw(st.integers(0, 2**32 - 2)), draw(st.integers(-2**70, 2**70)), size,
        xattrs=draw(st.sampled_from([(), ((b"user.a", b"b"),)])), extents=draw(st.sampled_from([None, ((0, 1),)])),
        stored=draw(st.sampled_from([size, 1])), offset=draw(SIZE),
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(entries(), st.integers(0, 511))
def test_nothing_is_lost(entry: Entry, layer: int) -> None:
    leaf = leaf_of(entry, layer)
    assert entry_of(leaf, b"a/b") == entry
    assert entry_of(leaf, b"a/b").offset == entry.offset == offset_of(leaf)
    assert entry_of(leaf, b"c").path == b"c"
    assert (layer_of(leaf), kind_of(leaf), stored_of(leaf)) == (layer, entry.kind, entry.stored)


def test_plain_files_are_packed() -> None:
    leaf = leaf_of(Entry(b"a", Kind.FILE, size=5, stored=5), 3)
    assert not isinstance(leaf, Inode)
    assert sys.getsizeof(leaf) < 100


def test_memory_of_a_large_image() -> None:
    def files(count: int) -> None:
        tree, paths = Tree(), (b"usr/share/d%d/file-%07d" % (n // 200, n) for n in range(count))
        tree.apply(0, (Entry(path, Kind.FILE, mtime=n, size=10, stored=10, offset=n) for n, path in enumerate(paths)))
        made = plan(tree)
        assert sum(1 for _ in made.files(0)) == count

    files(1000)
    tracemalloc.start()
    try:
        files(20_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / 20_000 < 400          # bytes for each file; with its entry it was 700


def test_memory_does_not_grow_with_the_number_of_files() -> None:
    few, many = 10_000, 30_000
    argv = [sys.executable, "-m", "tests.large_layer", str(1024 * 1024), str(few), str(many)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    before, after = map(int, done.stdout.split())
    assert (after - before) / (many - few) < 60     # bytes for each further file; held in memory it was 300


def test_names_that_do_not_fit_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    small = nodes_disk._SCHEMA.replace("BEGIN;", "PRAGMA max_page_count = 20; BEGIN;")
    monkeypatch.setattr(nodes_disk, "_SCHEMA", small)
    files = [file(f"a/{number}", bytes(10)) for number in range(5000)]
    with pytest.raises(DiskFullError, match="no space left for the names"):
        merged([files], Limits(memory=1000))
