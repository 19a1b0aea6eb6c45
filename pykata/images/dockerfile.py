"""Reads a Dockerfile as a recipe: one stage, with the instructions that a recipe has a word for.

What isn't known is refused, never ignored. Reference: "Dockerfile reference" of Docker's documentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from attrs import define, evolve, field

from pykata.errors import ConfigError
from pykata.images.dockerfile_lines import (
    Line,
    expanded,
    read_array,
    read_lines,
    read_mode,
    read_options,
    read_owner,
    read_pairs,
    read_words,
)
from pykata.images.ignore import Ignored, parse_ignore
from pykata.images.recipe import SHELL, Recipe

MAX_SIZE = 1024 * 1024      # bytes

_EXPANDED = ("ADD", "COPY", "ENV", "EXPOSE", "FROM", "LABEL", "STOPSIGNAL", "USER", "WORKDIR", "ARG")
_HINTS = {
    "HEALTHCHECK": "nothing here asks for it: leave it out", "VOLUME": "pass volumes= to Sandbox",
    "ONBUILD": "write the instruction into the Dockerfile that it is for", "SHELL": 'use RUN ["bash", "-c", "..."]',
    "MAINTAINER": "use LABEL",
}


@define
class _Reading:
    context: Path
    given: Mapping[str, str]
    recipe: Recipe = field(factory=Recipe)
    args: dict[str, str] = field(factory=dict)          # of the stage
    before: dict[str, str] = field(factory=dict)        # of what stands before FROM
    begun: bool = False
    ignored: tuple[str, ...] = ()


def read_dockerfile(path: Path, context: Path, args: Mapping[str, str]) -> Recipe:
    """The recipe of a Dockerfile. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SIZE + 1).decode()
        ignore = context / ".dockerignore"
        ignored = parse_ignore(ignore.read_text()) if ignore.is_file() else ()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"can't read {path}: {exc}") from exc
    if len(text) > MAX_SIZE:
        raise ConfigError(f"{path} has more than {MAX_SIZE} bytes")
    reading = _Reading(context.absolute(), args, ignored=ignored)
    try:
        for line in read_lines(text):
            _follow(reading, line)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc.message}", hint=exc.hint) from exc
    if not reading.begun:
        raise ConfigError(f"{path} has no FROM")
    unused = set(args) - set(reading.args) - set(reading.before)
    if unused:
        raise ConfigError(f"{path} has no ARG {', '.join(sorted(unused))}")
    return reading.recipe


def _follow(reading: _Reading, line: Line) -> None:
    instruction = _INSTRUCTIONS.get(line.word)
    if instruction is None:
        raise line.wrong("it isn't supported here", _HINTS.get(line.word, f"known are {', '.join(_INSTRUCTIONS)}"))
    if not line.rest:
        raise line.wrong("it says nothing")
    if not reading.begun and line.word not in ("ARG", "FROM"):
        raise line.wrong("it stands before FROM")
    if line.word in _EXPANDED:
        known = {**reading.args, **reading.recipe.env} if reading.begun else reading.before
        line = evolve(line, rest=expanded(line, known))
    reading.recipe = instruction(reading, line)


# --- the instructions ---


def _from(reading: _Reading, line: Line) -> Recipe:
    words = line.rest.split()
    if reading.begun:
        raise line.wrong("there is more than one stage", "make an image of each, with files of the one for the other")
    if words[0].startswith("--"):
        raise line.wrong(f"{words[0]} isn't supported here", "the guest's architecture is asked for by --architecture")
    if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
        raise line.wrong("it isn't FROM IMAGE")
    reading.begun = True
    return Recipe() if words[0] == "scratch" else Recipe(base=words[0])


def _arg(reading: _Reading, line: Line) -> Recipe:
    for word in read_words(line):
        name, has_default, default = word.partition("=")
        known = reading.args if reading.begun else reading.before
        if name in reading.given:
            known[name] = reading.given[name]
        elif has_default:
            known[name] = default
        elif name in reading.before:
            known[name] = reading.before[name]
    return reading.recipe


def _run(reading: _Reading, line: Line) -> Recipe:
    if line.rest.startswith("--"):
        raise line.wrong(f"{line.rest.split()[0]} isn't supported here")
    if re.search(r"<<-?['\"]?\w+", line.rest):
        raise line.wrong("here-documents aren't supported", "put the script into a file, and COPY it")
    given = {name: value for name, value in reading.args.items() if name not in reading.recipe.env}
    return reading.recipe.run(read_array(line) or line.rest, env=given)


def _copy(reading: _Reading, line: Line) -> Recipe:
    options, words = read_options(line)
    mode, owner = read_mode(line, options.get("chmod")), read_owner(line, options.get("chown"))
    if unknown := set(options) - {"chmod", "chown"}:
        raise line.wrong(f"--{min(unknown)} isn't supported here")
    if len(words) < 2:
        raise line.wrong("it needs something to copy, and a place")
    *sources, target = words
    found = [path for source in sources for path in _found(reading, line, source)]
    into = target.endswith("/") or len(found) > 1 or target == "."
    place = PurePosixPath(reading.recipe.workdir or "/", target)
    files: dict[str, bytes | str | Path] = {}
    recipe = reading.recipe
    for path in found:
        if path.is_dir():
            below = path.relative_to(reading.context).as_posix()
            exclude = _below(reading.ignored, below)
            recipe = recipe.with_files({str(place): path}, mode=None, owner=owner, exclude=exclude)
        else:
            files[str(place / path.name if into else place)] = path
    return recipe.with_files(files, mode=mode, owner=owner) if files else recipe


def _add(reading: _Reading, line: Line) -> Recipe:
    _, (*sources, _) = read_options(line)
    for source in sources:
        if "://" in source or re.search(r"\.(tar|tgz|tar\.\w+|git)$", source):
            raise line.wrong(f"{source} would be fetched or unpacked, which isn't supported here", "RUN can do both")
    return _copy(reading, line)


def _env(reading: _Reading, line: Line) -> Recipe:
    return reading.recipe.with_env(**read_pairs(line))


def _label(reading: _Reading, line: Line) -> Recipe:
    return reading.recipe.with_labels(read_pairs(line))


def _workdir(reading: _Reading, line: Line) -> Recipe:
    return reading.recipe.with_workdir(" ".join(read_words(line)))


def _user(reading: _Reading, line: Line) -> Recipe:
    return reading.recipe.with_user(line.rest)


def _cmd(reading: _Reading, line: Line) -> Recipe:
    return reading.recipe.with_cmd(read_array(line) or (*SHELL, line.rest))


def _entrypoint(reading: _Reading, line: Line) -> Recipe:
    return reading.recipe.with_entrypoint(read_array(line) or (*SHELL, line.rest))


def _expose(reading: _Reading, line: Line) -> Recipe:
    return evolve(reading.recipe, ports=(*reading.recipe.ports, *line.rest.split()))


def _stop_signal(reading: _Reading, line: Line) -> Recipe:
    return evolve(reading.recipe, stop_signal=line.rest)


_INSTRUCTIONS: Mapping[str, Callable[[_Reading, Line], Recipe]] = {
    "FROM": _from, "ARG": _arg, "RUN": _run, "COPY": _copy, "ADD": _add, "ENV": _env, "LABEL": _label,
    "WORKDIR": _workdir, "USER": _user, "CMD": _cmd, "ENTRYPOINT": _entrypoint, "EXPOSE": _expose,
    "STOPSIGNAL": _stop_signal,
}  # fmt: skip


# --- what is copied ---


def _found(reading: _Reading, line: Line, source: str) -> list[Path]:
    """The files and directories of the context that a source means."""
    parts = [part for part in source.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise line.wrong(f"{source} is outside of the context")
    pattern = "/".join(parts)
    some = sorted(reading.context.glob(pattern)) if re.search(r"[*?\[]", pattern) else [reading.context / pattern]
    ignored, root = Ignored(reading.ignored), reading.context.resolve()
    kept = [path for path in some if path.exists() and not ignored(path.relative_to(reading.context).as_posix())]
    for path in kept:
        if not path.resolve().is_relative_to(root):
            raise line.wrong(f"{source} is a symlink that leads out of the context")
    if not kept:
        raise line.wrong(f"{source} isn't in {reading.context}", ".dockerignore may leave it out")
    return kept


def _below(patterns: tuple[str, ...], folder: str) -> tuple[str, ...]:
    """The patterns for what is in a directory of the context, whose paths begin there."""
    if folder == ".":
        return patterns
    found = []
    for pattern in patterns:
        sign, rest = ("!", pattern[1:]) if pattern.startswith("!") else ("", pattern)
        rest = rest.lstrip("/")
        if rest.startswith("**"):
            found.append(pattern)
        elif rest.startswith(folder + "/"):
            found.append(sign + rest[len(folder) + 1:])
    return tuple(found)
