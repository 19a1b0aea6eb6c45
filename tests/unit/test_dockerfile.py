"""Dockerfiles as recipes: what each instruction means, and what is refused, by its line."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import IO, cast

import pytest

from pykata import ConfigError, Recipe
from pykata.images.ignore import Ignored, parse_ignore
from pykata.images.recipe import FilesStep, RunStep
from pykata.images.recipe_files import write_files


def read(folder: Path, text: str, **args: str) -> Recipe:
    (folder / "Dockerfile").write_text(text)
    return Recipe.from_dockerfile(folder / "Dockerfile", args=args)


def tarred(step: FilesStep | RunStep) -> dict[str, tarfile.TarInfo]:
    assert isinstance(step, FilesStep)
    out = io.BytesIO()
    write_files(step, cast(IO[bytes], out))
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        return {info.name: info for info in tar}


def test_an_ordinary_one(tmp_path: Path) -> None:
    recipe = read(tmp_path, r"""
        # syntax=docker/dockerfile:1
        ARG VERSION=3.12
        FROM python:$VERSION-slim AS app
        ENV LANG=C.UTF-8 \
            # between
            NAME="a b"
        ENV OLD the old form
        WORKDIR /srv
        WORKDIR app
        ARG EXTRA
        RUN pip install attrs && \
            echo $NAME
        USER 1000:1000
        RUN ["make", "all"]
        EXPOSE 80 53/udp
        LABEL org.test="x y" z=1
        STOPSIGNAL SIGINT
        ENTRYPOINT ["python"]
        CMD -m app
    """, VERSION="3.13", EXTRA="e")
    assert (recipe.base, recipe.workdir, recipe.user) == ("python:3.13-slim", "/srv/app", "1000:1000")
    assert dict(recipe.env) == {"LANG": "C.UTF-8", "NAME": "a b", "OLD": "the old form"}
    first, second = recipe.steps
    assert isinstance(first, RunStep)
    assert isinstance(second, RunStep)
    assert first.cmd == ("/bin/sh", "-c", "pip install attrs &&             echo $NAME")
    assert first.env["EXTRA"] == "e"
    assert (first.user, first.workdir) == ("", "/srv/app")
    assert (second.cmd, second.user) == (("make", "all"), "1000:1000")
    assert (recipe.ports, recipe.stop_signal) == (("80", "53/udp"), "SIGINT")
    assert dict(recipe.labels) == {"org.test": "x y", "z": "1"}
    assert (recipe.entrypoint, recipe.cmd) == (("python",), ("/bin/sh", "-c", "-m app"))


@pytest.mark.parametrize(("text", "value"), [
    ("$A", "a"), ("${A}b", "ab"), ("${NONE:-else}", "else"), ("${A:-else}", "a"), ("${A:+instead}", "instead"),
    ("${NONE:+instead}x", "x"), (r"\$A", "$A"), ("$NONE/x", "/x"), ("${NONE:-${A}}", "a"),
])
def test_variables(tmp_path: Path, text: str, value: str) -> None:
    assert read(tmp_path, f"FROM scratch\nENV A=a\nUSER {text}").user == value


def test_copying(tmp_path: Path) -> None:
    (tmp_path / "src/sub").mkdir(parents=True)
    (tmp_path / "src/main.py").write_text("print()")
    (tmp_path / "src/main.py").chmod(0o755)
    (tmp_path / "src/sub/secret.key").write_text("")
    (tmp_path / "src/sub/data").write_text("d")
    (tmp_path / "src/link").symlink_to("main.py")
    (tmp_path / "one.txt").write_text("1")
    (tmp_path / "two.txt").write_text("2")
    (tmp_path / ".dockerignore").write_text("**/*.key\nDockerfile\n")
    recipe = read(tmp_path, """
        FROM scratch
        COPY src /app
        COPY --chown=5:6 --chmod=600 *.txt /etc/texts/
        COPY one.txt /etc/renamed
    """)
    tree, files = recipe.steps
    found = tarred(tree)
    assert set(found) == {"app/main.py", "app/sub", "app/sub/data", "app/link"}
    assert (found["app/main.py"].mode, found["app/main.py"].mtime, found["app/link"].linkname) == (0o755, 0, "main.py")
    found = tarred(files)
    assert set(found) == {"etc/texts/one.txt", "etc/texts/two.txt", "etc/renamed"}
    one = found["etc/texts/one.txt"]
    assert (one.mode, one.uid, one.gid) == (0o600, 5, 6)


def test_what_is_copied_later_wins(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").write_text("of the directory")
    (tmp_path / "x").write_text("of its own")
    for order in (["x /a/x", "d /a"], ["d /a", "x /a/x"], ["d /a", "d /a"]):
        recipe = read(tmp_path, "FROM scratch\n" + "\n".join(f"COPY {line}" for line in order))
        assert len(recipe.steps) == 2, "in one layer their order would be lost"


@pytest.mark.parametrize(("text", "why"), [
    ("RUN x", "line 1, RUN: it stands before FROM"), ("", "has no FROM"),
    ("FROM a\nFROM b", "line 2, FROM: there is more than one stage"),
    ("FROM a\nHEALTHCHECK CMD x", "line 2, HEALTHCHECK: it isn't supported"), ("FROM a\nNONSENSE b", "NONSENSE"),
    ("FROM --platform=x a", "--platform=x isn't supported"), ("FROM a\nRUN --mount=type=cache x", "--mount=type=cache"),
    ("FROM a\nRUN <<EOF\nx\nEOF", "here-documents"), ("FROM a\nCOPY --from=b x y", "--from isn't supported"),
    ("FROM a\nCOPY ../x /", "outside of the context"), ("FROM a\nCOPY none /", "none isn't in"),
    ("FROM a\nCOPY outside /", "leads out of the context"), ("FROM a\nCOPY x", "needs something to copy"),
    ("FROM a\nCOPY --chown=www x /", "by number"), ("FROM a\nADD https://x.test/y /", "fetched or unpacked"),
    ("FROM a\nADD y.tar.gz /", "fetched or unpacked"), ("FROM a\nENV x=1 y", "'y' has no value"),
    ("FROM a\nENV x='1", "no closing quotation"), ("FROM a\nCMD [1]", "something else than text"),
    ("FROM a\nEXPOSE http", "'http' is not a port"), ("FROM a b", "it isn't FROM IMAGE"),
    ("FROM a\nUSER", "says nothing"),
    ("# escape=`\nFROM a", "only the backslash"),
])
def test_what_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context/outside").symlink_to("/etc/passwd")
    (tmp_path / "context/x").write_text("")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "context", text)
    assert why in str(caught.value)
    assert "Dockerfile" in str(caught.value)


def test_arguments_that_nothing_asks_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no ARG A"):
        read(tmp_path, "FROM a", A="1")
    with pytest.raises(ConfigError, match="can't read"):
        Recipe.from_dockerfile(tmp_path / "none")


@pytest.mark.parametrize(("pattern", "path", "out"), [
    ("a", "a", True), ("a", "a/b", True), ("a", "b/a", False), ("**/a", "b/a", True), ("**/a", "a", True),
    ("*.md", "x.md", True), ("*.md", "d/x.md", False), ("a?", "ab", True), ("[ab]x", "bx", True),
    ("[^ab]x", "bx", False),
    ("/a/", "a", True), ("a/**", "a/b/c", True), (r"\*", "*", True), (r"\*", "a", False), ("a.b", "axb", False),
])
def test_patterns(pattern: str, path: str, out: bool) -> None:
    assert Ignored([pattern])(path) == out


def test_the_last_pattern_decides() -> None:
    ignored = Ignored(parse_ignore("# all\n*.md\n\n!README.md\n"))
    assert ignored("x.md")
    assert not ignored("README.md")
