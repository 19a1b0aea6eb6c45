"""Merging layers, against two models of what an image is: a history of filesystems, and a naive way to apply layers."""

from __future__ import annotations

import hashlib
import posixpath
import tarfile
from collections.abc import Sequence

import pytest
from attrs import define, evolve, field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from pykata.errors import ImageCorruptError
from pykata.images.limits import DEFAULT_LIMITS, Limits
from tests.images_fixtures import Item, file, folder, hardlink, merged, opaque, symlink, whiteout

NAMES = ["a", "b", ".wh", "é"]


@define(eq=False)
class File:
    """A file of a model; names that share the object are hard links."""

    kind: str
    content: str = ""
    mode: int = 0o644


Tree = dict[str, File]
"""By path. A path's parents are there, and are directories."""


def show(tree: Tree) -> dict[str, tuple[object, ...]]:
    return {path: (one.kind, one.content, one.mode, frozenset(p for p, other in tree.items() if other is one))
            for path, one in tree.items()}


# How much of the names is held in memory: all, a few, none.
memories = st.sampled_from([DEFAULT_LIMITS.memory, 2000, 0])


def show_merged(layers: Sequence[Sequence[Item]], memory: int) -> dict[str, tuple[object, ...]]:
    kinds = {tarfile.REGTYPE: "file", tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "link"}
    return {
        path: (kinds[one.kind], one.link if one.kind == tarfile.SYMTYPE else one.data, one.mode, one.names)
        for path, one in merged(layers, Limits(memory=memory)).items() if path
    }


def content_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def below(path: str, top: str) -> bool:
    return path.startswith(f"{top}/") or not top


# --- a history of filesystems: the layers are what changed from one to the next ---


@frozen
class Change:
    """A step in the life of a filesystem, as a container makes it."""

    verb: str
    path: str
    other: str
    number: int


paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
changes = st.builds(
    Change, st.sampled_from(["write", "write", "mkdir", "symlink", "remove", "link", "chmod", "rename"]), paths, paths,
    st.integers(0, 3),
)


def step(tree: Tree, change: Change) -> None:
    """Do it if a filesystem would let us."""
    path, other = change.path, change.other
    parent = posixpath.dirname(path)
    has_parent = not parent or (parent in tree and tree[parent].kind == "dir")
    existing = tree.get(path)
    match change.verb:
        case "remove" | "write" | "symlink" | "mkdir" if existing is not None:
            for gone in [p for p in tree if p == path or below(p, path)]:
                del tree[gone]
        case "chmod" if existing is not None and existing.kind != "link":
            existing.mode = 0o600 + change.number
        case "link" if has_parent and existing is None and other in tree and tree[other].kind != "dir":
            tree[path] = tree[other]
        case "rename" if has_parent and existing is None and other in tree and not below(path + "/", other):
            for moved in [p for p in tree if p == other or below(p, other)]:
                tree[path + moved[len(other):]] = tree.pop(moved)
    if has_parent and path not in tree:
        match change.verb:
            case "write":
                tree[path] = File("file", str(change.number))
            case "mkdir":
                tree[path] = File("dir", mode=0o755)
            case "symlink":
                tree[path] = File("link", f"../{other}", mode=0o777)


def copied(tree: Tree) -> Tree:
    """The tree, with files that change on their own."""
    copies: dict[int, File] = {}
    return {path: copies.setdefault(id(one), evolve(one)) for path, one in tree.items()}


def difference(old: Tree, new: Tree, opaquely: bool) -> list[Item]:
    """The layer that makes ``new`` of ``old``, as a snapshotter writes it."""
    items: list[Item] = []
    before, after = show(old), show(new)
    replaced: list[str] = []        # directories whose lower content the layer hides
    for path in sorted(after) if opaquely else ():
        if "dir" == after[path][0] == before.get(path, ("",))[0] and not any(below(path, top) for top in replaced):
            replaced.append(path)
    # A file that has a name in there is written anew, under all of its names.
    hidden = {one for path, one in new.items() if any(below(path, top) for top in replaced)}
    for path in sorted(after):
        one = new[path]
        if path in replaced:
            items += [folder(path, mode=one.mode), opaque(path)]
        elif one in hidden or before.get(path) != after[path]:
            first = min(p for p in new if new[p] is one)
            if one.kind == "dir":
                items.append(folder(path, mode=one.mode))
            elif first != path and (one in hidden or before.get(first) != after[first]):
                items.append(hardlink(path, first))
            elif one.kind == "file":
                items.append(file(path, one.content.encode(), mode=one.mode))
            else:
                items.append(symlink(path, one.content, mode=one.mode))
    for path in sorted(before):
        if path not in after and not any(below(path, top) for top in replaced) and (
            posixpath.dirname(path) in (*after, "") and after.get(posixpath.dirname(path), ("dir",))[0] == "dir"
        ):
            items.append(whiteout(path))
    return items


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.lists(changes, max_size=12), st.booleans()), min_size=1, max_size=4), memories)
def test_layers_of_a_history_give_the_last_filesystem(
    history: list[tuple[list[Change], bool]], memory: int
) -> None:
    tree: Tree = {}
    layers = []
    for steps, opaquely in history:
        old = copied(tree)
        for change in steps:
            step(tree, change)
        layers.append(difference(old, tree, opaquely))
    expected = {path: (kind, content_of(str(content)) if kind == "file" else content, mode, names)
                for path, (kind, content, mode, names) in show(tree).items()}
    assert show_merged(layers, memory) == expected


# --- any layers at all, against a naive way to apply them ---


class RefusedError(Exception):
    """The model says that these layers are damaged."""


@define
class Naive:
    """All files in one dict, and a search through all of it for everything."""

    tree: Tree = field(factory=dict)

    def apply(self, items: Sequence[Item]) -> None:
        mine: set[str] = set()
        for item in items:
            self._apply(item, mine)

    def _apply(self, item: Item, mine: set[str]) -> None:
        parent, name = posixpath.split(item.name)
        if name == ".wh..wh..opq":
            self._hide([p for p in self.tree if below(p, parent)] if self._is_directory(parent) else [], mine)
        elif name.startswith(".wh."):
            gone = posixpath.join(parent, name[4:])
            self._hide([p for p in self.tree if p == gone or below(p, gone)], mine)
        else:
            target = self.tree.get(item.link)
            if item.kind == tarfile.LNKTYPE and (target is None or target.kind == "dir"):
                raise RefusedError
            self._make_parents(parent, mine)
            self._put(item, target, mine)

    def _is_directory(self, path: str) -> bool:
        return not path or (path in self.tree and self.tree[path].kind == "dir")

    def _hide(self, gone: list[str], mine: set[str]) -> None:
        for path in gone:
            if not any(p == path or below(p, path) for p in mine):
                del self.tree[path]

    def _make_parents(self, path: str, mine: set[str]) -> None:
        parts = path.split("/") if path else []
        for count in range(1, len(parts) + 1):
            top = "/".join(parts[:count])
            if top not in self.tree:
                self.tree[top] = File("dir", mode=0o755)
                mine.add(top)
            elif self.tree[top].kind != "dir":
                raise RefusedError

    def _put(self, item: Item, target: File | None, mine: set[str]) -> None:
        existing = self.tree.get(item.name)
        if existing is not None and not (existing.kind == "dir" and item.kind == tarfile.DIRTYPE):
            for path in [p for p in self.tree if p == item.name or below(p, item.name)]:
                del self.tree[path]
                mine.discard(path)
        mine.add(item.name)
        if item.kind == tarfile.LNKTYPE:
            assert target is not None
            self.tree[item.name] = target
        elif item.kind == tarfile.DIRTYPE:
            self.tree[item.name] = File("dir", mode=item.mode)
        elif item.kind == tarfile.SYMTYPE:
            self.tree[item.name] = File("link", item.link, item.mode)
        else:
            self.tree[item.name] = File("file", hashlib.sha256(item.data).hexdigest(), item.mode)


few = st.sampled_from(["a", "b", "a/a", "a/b", "b/a", "a/a/a", "a/b/.wh"])     # so few that they meet often
items = st.one_of(
    st.builds(file, few, st.sampled_from([b"", b"1", b"22"])),
    st.builds(folder, few, mode=st.sampled_from([0o700, 0o755])),
    st.builds(symlink, few, few),
    st.builds(hardlink, few, few),
    st.builds(whiteout, few),
    st.builds(opaque, few),
)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.lists(items, max_size=8), min_size=1, max_size=4), memories)
def test_any_layers_are_merged_as_naively(layers: list[list[Item]], memory: int) -> None:
    naive = Naive()
    try:
        for layer in layers:
            naive.apply(layer)
    except RefusedError:
        with pytest.raises(ImageCorruptError):
            merged(layers, Limits(memory=memory))
        return
    assert show_merged(layers, memory) == show(naive.tree)
