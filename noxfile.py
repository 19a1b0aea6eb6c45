"""What is run to check pykata. The quick sessions use the environment that nox itself runs in: `.venv`.

``make test`` runs those that a change must pass; ``nox --list`` shows all.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
AGENT = ROOT / "guest" / "agent"

nox.options.sessions = ["lint", "types", "unit", "guest", "docs", "wheel", "vm"]
nox.options.default_venv_backend = "none"
nox.options.error_on_missing_interpreters = True

PROJECT = nox.project.load_toml("pyproject.toml")


def python(session: nox.Session, *args: str) -> None:
    """Run a module with the Python that runs nox, so that nothing depends on PATH."""
    session.run(sys.executable, "-m", *args, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and common mistakes, in Python."""
    python(session, "ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    python(session, "mypy")


@nox.session
def unit(session: nox.Session) -> None:
    """The tests that boot nothing."""
    python(session, "pytest", "-m", "not vm and not slow", *session.posargs)


@nox.session
def guest(session: nox.Session) -> None:
    """The agent: its unit tests and its lints, in Rust."""
    # Cargo looks for its configuration from the working directory upwards, not from the manifest.
    with session.chdir(AGENT):
        seed = {"PROPTEST_RNG_SEED": "1"}  # the same cases each time
        session.run("cargo", "test", "--locked", "--lib", *session.posargs, env=seed, external=True)
        if shutil.which("cargo-clippy"):
            session.run("cargo", "clippy", "--locked", "--lib", "--bins", "--", "--deny", "warnings", external=True)
        else:
            session.warn("cargo-clippy isn't installed: not checked")
        if shutil.which("cargo-fmt"):
            session.run("cargo", "fmt", "--check", external=True)


@nox.session
def guest_vm(session: nox.Session) -> None:
    """The agent's tests in a real guest, in Rust, without the host's half of pykata."""
    show = [sys.executable, "-c", "import pykata; print(pykata.find_bundle().kernel)"]
    kernel = session.run(*show, external=True, silent=True)
    with session.chdir(AGENT):
        session.run("cargo", "build", "--locked", "--release", "--bin", "pykata-agent", external=True)
        built = next(AGENT.glob("target/*-linux-gnu/release/pykata-agent"))
        env = {"PYKATA_KERNEL": str(kernel).strip(), "PYKATA_AGENT": str(built)}
        test = ["cargo", "test", "--locked", "--features", "client", "--test", "vm"]
        session.run(*test, *session.posargs, env=env, external=True)


@nox.session
def vm(session: nox.Session) -> None:
    """The tests that boot virtual machines."""
    python(session, "pytest", "-m", "vm and not slow", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that take minutes each."""
    python(session, "pytest", "-m", "slow", *session.posargs)


@nox.session(venv_backend="venv", reuse_venv=True)
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    session.install("--quiet", "--editable", ".", *nox.project.dependency_groups(PROJECT, "docs"))
    options = ["--builder", "html", "--fail-on-warning", "--keep-going", "--jobs", "auto"]
    session.run("sphinx-build", *options, "docs", "docs/_build/html", *session.posargs)


@nox.session(venv_backend="venv", reuse_venv=True)
def wheel(session: nox.Session) -> None:
    """Build the wheels of pykata and of its guest bundle, install both where there is nothing else, and use them."""
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.install("--quiet", *nox.project.dependency_groups(PROJECT, "wheel"))
    session.run("python", "-m", "build", "--outdir", str(dist), ".", silent=True)
    write = "import pathlib, sys, pykata.guest as g; print(g.write_wheel(g.find_bundle(), pathlib.Path(sys.argv[1])))"
    session.run(sys.executable, "-c", write, str(dist), external=True)
    session.install("--quiet", "--force-reinstall", *map(str, dist.glob("*.whl")))
    nothing_else = {"PYKATA_BUNDLE": None, "PYKATA_CACHE": session.create_tmp()}
    with session.chdir(session.create_tmp()):
        session.run("pykata", "--version")
        session.run("pykata", "guest", "info", env=nothing_else)
        hello = ["run", "--isolation", "emulated", "builtin:busybox", "--", "uname", "-r"]
        session.run("pykata", *hello, env=nothing_else)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure; arguments are passed on, such as --json."""
    for script in sorted((ROOT / "benchmarks").glob("[a-z]*.py")):
        python(session, f"benchmarks.{script.stem}", *session.posargs)

