"""The lines of a Dockerfile, and the words in them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping

from attrs import evolve, frozen

from pykata.errors import ConfigError

_VARIABLE = re.compile(r"\\(.)|\$(?:(\w+)|\{(\w+)(?::([-+])((?:[^{}]|\{[^{}]*\})*))?\})", re.DOTALL)


@frozen
class Line:
    """An instruction, and the line that it begins on."""

    number: int
    word: str
    rest: str

    def wrong(self, why: str, hint: str = "") -> ConfigError:
        return ConfigError(f"line {self.number}, {self.word}: {why}", hint=hint)


def read_lines(text: str) -> Iterator[Line]:
    """The instructions, with continued lines joined and comments taken out."""
    parts: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            if not parts and re.match(r"#\s*escape\s*=\s*`", line.strip()):
                raise ConfigError(f"line {number}: only the backslash continues lines")
            continue
        if not line.strip():
            continue            # also between continued lines, as in Docker
        first = first if parts else number
        continued = line.rstrip().endswith("\\")
        parts.append(line.rstrip()[:-1] if continued else line)
        if not continued:
            yield _line(first, "".join(parts))
            parts = []
    if parts:
        yield _line(first, "".join(parts))


def _line(number: int, text: str) -> Line:
    word, _, rest = text.strip().partition(" ")
    if "\t" in word:
        word, _, more = word.partition("\t")
        rest = f"{more} {rest}"
    return Line(number, word.upper(), rest.strip())


def expanded(line: Line, known: Mapping[str, str]) -> str:
    """With ``$NAME``, ``${NAME}``, ``${NAME:-else}`` and ``${NAME:+instead}`` replaced."""
    def value(match: re.Match[str]) -> str:
        escaped, plain, braced, how, word = match.groups()
        if escaped is not None:
            return escaped if escaped == "$" else match[0]
        found = known.get(plain or braced, "")
        if how == "-":
            return found or _VARIABLE.sub(value, word)
        if how == "+":
            return _VARIABLE.sub(value, word) if found else ""
        return found

    return _VARIABLE.sub(value, line.rest)


# --- arguments ---



def read_array(line: Line) -> list[str] | None:
    """The exec form, a JSON array of text; None if it isn't one."""
    if not line.rest.startswith("["):
        return None
    try:
        found = json.loads(line.rest)
    except ValueError:
        return None         # then it is a command for the shell, such as [ -e /file ]
    if not all(isinstance(one, str) for one in found):
        raise line.wrong("its array has something else than text in it")
    return list(found)


def read_words(line: Line) -> list[str]:
    try:
        return shlex.split(line.rest, comments=False)
    except ValueError as exc:
        raise line.wrong(f"{exc}".lower()) from exc


def read_pairs(line: Line) -> dict[str, str]:
    words = read_words(line)
    if words and "=" not in words[0]:
        name, _, value = line.rest.partition(" ")       # the old form, ENV NAME the value
        return {name: value.strip()}
    if wrong := next((word for word in words if "=" not in word), None):
        raise line.wrong(f"{wrong!r} has no value", "NAME=value")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def read_options(line: Line) -> tuple[dict[str, str], list[str]]:
    words = line.rest.split() if not (array := read_array(line)) else array
    options = {}
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0)[2:].partition("=")
        options[name] = value
    if words and words[0].startswith("["):
        words = read_array(evolve(line, rest=" ".join(words))) or words
    return options, words


def read_mode(line: Line, given: str | None) -> int | None:
    if given is None:
        return None
    if not re.fullmatch(r"[0-7]{3,4}", given):
        raise line.wrong(f"--chmod={given} isn't supported here", "octal digits, such as 755")
    return int(given, 8)


def read_owner(line: Line, given: str | None) -> tuple[int, int]:
    if given is None:
        return (0, 0)
    user, _, group = given.partition(":")
    if not user.isdecimal() or not (group or user).isdecimal():
        raise line.wrong(f"--chown={given} isn't supported here", "user and group by number, such as 1000:1000")
    return int(user), int(group or user)
