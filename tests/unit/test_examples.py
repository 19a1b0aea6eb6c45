"""Every example and the README's code run, and print what they say they print."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pykata

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def normal(output: str) -> str:
    """Output without what differs between builds of the guest."""
    return re.sub(r"\b6\.\d+\.\d+\b", "6.N.N", output).strip()


def promised(docstring: str) -> str:
    """The block of a docstring after ``It prints::``."""
    block = docstring.partition("It prints::\n\n")[2]
    return "\n".join(line.removeprefix("    ") for line in block.rstrip().splitlines())


def block(markdown: str, language: str) -> str:
    """The first code block of a language."""
    found = re.search(rf"^```{language}\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    assert found, f"no block of {language}"
    return found[1]


def run(program: Path) -> str:
    done = subprocess.run([sys.executable, "-W", "error", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.vm
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path) -> None:
    import ast

    said = promised(ast.get_docstring(ast.parse(example.read_text()), clean=True) or "")
    assert said, "the docstring says what it prints"
    assert normal(run(example)) == normal(said)


@pytest.mark.vm
def test_readme(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    program = tmp_path / "readme.py"
    program.write_text(block(readme, "python"))
    assert normal(run(program)) == normal(block(readme, "text"))


@pytest.mark.vm
def test_the_guide_to_processes(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guides" / "processes.md").read_text()
    program = tmp_path / "guide.py"
    program.write_text(block(guide, "python"))
    assert run(program).strip() == block(guide, "text").strip()


@pytest.mark.vm
def test_the_guide_to_networks_of_the_host(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guides" / "networks-of-the-host.md").read_text()
    program = tmp_path / "guide.py"
    program.write_text(block(guide, "python"))
    assert run(program).strip() == block(guide, "text").strip()


async def test_the_guide_to_testing(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"pykata": pykata}
    exec(block((ROOT / "docs" / "guides" / "testing.md").read_text(), "python"), namespace)  # noqa: S102
    await namespace["test_greeting"](tmp_path)


@pytest.mark.vm
async def test_the_guide_to_detached_sandboxes(capsys: pytest.CaptureFixture[str]) -> None:
    code = block((ROOT / "docs" / "guides" / "detached.md").read_text(), "python")
    namespace: dict[str, Any] = {"pykata": pykata}
    exec("async def main():\n" + textwrap.indent(code, "    "), namespace)  # noqa: S102
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pykata.EmulationWarning)
        await namespace["main"]()
    assert capsys.readouterr().out == "143\n"


@pytest.mark.vm
async def test_the_guide_to_building(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "guides" / "building.md").read_text()
    namespace: dict[str, Any] = {"pykata": pykata}
    exec("async def main():\n" + textwrap.indent(block(guide, "python"), "    "), namespace)  # noqa: S102
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pykata.EmulationWarning)
        await namespace["main"]()
    assert capsys.readouterr().out.strip() == block(guide, "text").strip()


@pytest.mark.vm
async def test_the_guide_to_templates(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "guides" / "templates.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {"pykata": pykata}
    exec("async def main():\n" + textwrap.indent("".join(blocks), "    "), namespace)  # noqa: S102
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pykata.EmulationWarning)
        await namespace["main"]()
    said = capsys.readouterr().out.split("\n\n")
    assert said[0] in ("boot\na fresh container", "template\na fresh container")
    assert said[1:3] == ["model", "model\nme"]
    assert said[3].startswith("pykata-")
    assert said[4:] == ["at once", "work", "work", ""]


@pytest.mark.vm
async def test_the_guide_to_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "guides" / "volumes.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {"pykata": pykata, "__file__": __file__}
    exec("async def main():\n" + textwrap.indent("".join(blocks), "    "), namespace)  # noqa: S102
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pykata.EmulationWarning)
        await namespace["main"]()
    assert capsys.readouterr().out == "True\nb'42\\n'\n"


@pytest.mark.vm
def test_the_guide_to_notebooks(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "guides" / "notebooks.md").read_text()
    namespace: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pykata.EmulationWarning)
        for cell in re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
            exec(cell, namespace)  # noqa: S102
    assert capsys.readouterr().out.split() == ["hello", "kept"]


@pytest.mark.vm
async def test_the_guide_to_files(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "guides" / "files.md").read_text()
    namespace: dict[str, Any] = {"pykata": pykata}
    exec(block(guide, "python"), namespace)  # noqa: S102
    await namespace["main"]()
    assert capsys.readouterr().out == block(guide, "text")


def test_the_readme_is_honest_about_make() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", ROOT / "CHANGELOG.md"]), ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


async def test_the_guide_to_network_policies(capsys: pytest.CaptureFixture[str]) -> None:
    from pykata.net.policy.enforce import Policing
    from pykata.net.policy.events import Events, Key

    guide = (ROOT / "docs" / "guides" / "network-policy.md").read_text()
    values, listen, change = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(values, namespace)  # noqa: S102
    events = Events()
    guard = Policing(namespace["web"].policy, [], events)
    namespace["sb"] = SimpleNamespace(network=pykata.RunningNetwork(guard=guard))
    events.tell(Key("denied", "address", "nobody allowed it", "tcp", "20.0.0.1", 443, ""))
    events.close()
    exec("async def main():\n" + textwrap.indent(listen + change, "    "), namespace)  # noqa: S102
    await namespace["main"]()
    assert capsys.readouterr().out == "denied tcp 20.0.0.1 443  nobody allowed it\n"
    assert [rule.text for rule in guard._policy.deny] == ["pypi.org", "10.1.0.0/16"]


@pytest.mark.vm
def test_the_guide_to_networks(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guides" / "networks.md").read_text()
    said, served = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    exec(said, {})  # noqa: S102
    program = tmp_path / "guide.py"
    program.write_text(served)
    assert run(program) == block(guide, "text")
