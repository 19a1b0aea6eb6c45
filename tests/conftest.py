"""What every test gets: directories of its own, a guest to boot, and a check that it left nothing behind.

A skipped test fails in CI, unless its reason begins with ``hardware:``, which says that this machine lacks some.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import hypothesis
import pytest

from tests import leaks
from tests.blocking import Blocking
from tests.hanging import limited

if TYPE_CHECKING:
    from pykata.guest import Bundle

ROOT = Path(__file__).resolve().parent.parent
DEMO_IMAGE = ROOT / "images" / "debian-python"
HARDWARE = "hardware:"

# Seconds after which a test hangs; many times what it takes on a machine that is slow and busy.
QUICK_TEST = 900.0
BOOTING_TEST = 1800.0
SLOW_TEST = 3600.0

# The same examples in each run, however long they take: what a test says of a change must not depend on chance. Who
# looks for others says so: --hypothesis-profile=default.
hypothesis.settings.register_profile(
    "pykata", derandomize=True, deadline=None, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow],
)  # fmt: skip
hypothesis.settings.load_profile("pykata")

# A socket's path has at most 107 bytes (unix(7)): this one is short, and tmp_path isn't.
HOME = Path(tempfile.mkdtemp(prefix="pk-", dir="/tmp"))
PLACES = leaks.Places(run=HOME / "run", cache=HOME / "cache", tmp=HOME / "tmp", state=HOME / "state")
USER_CACHE = os.environ.get("PYKATA_CACHE")

pytest_plugins = ["pytester"]


# --- the whole run ---


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-callbacks", type=float, metavar="SECONDS",
        help="fail a test that kept the event loop busy for longer; for an idle machine",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for place in PLACES.all:
        place.mkdir(mode=0o700)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())      # tmp_path isn't a leak
    os.environ.update(
        PYKATA_RUN=str(PLACES.run), PYKATA_CACHE=str(PLACES.cache), PYKATA_STATE=str(PLACES.state),
        TMPDIR=str(PLACES.tmp),
    )  # fmt: skip
    tempfile.tempdir = None
    # A shell starts what runs in its background with SIGINT ignored, and so would be every program that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    leaks.adopt_orphans()
    # The argv of every program and the steps of a start are in the report of a test that fails.
    logging.getLogger("pykata").setLevel(logging.DEBUG)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(HOME, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"vm", "conformance"} & set(item.path.parts):
            item.add_marker(pytest.mark.vm)


# --- a skip is a failure ---


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.outcome == "skipped" and _forbidden(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and _forbidden(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    if report.failed:
        report.sections += [*_of_error(call.excinfo.value if call.excinfo else None), *_of_machines(item)]
    return report


def _forbidden(why: object) -> bool:
    reason = str(why[2]) if isinstance(why, tuple) else str(why)
    return bool(os.environ.get("CI")) and not reason.removeprefix("Skipped: ").startswith(HARDWARE)


# --- what a failing test shows ---

MACHINES = pytest.StashKey[deque[Any]]()
LAST_MACHINES = 16
"""So many of a test's machines are in its report: one of a thousand would keep a lot."""


def _of_error(error: BaseException | None) -> Iterator[tuple[str, str]]:
    for name in ("console", "output"):
        if text := getattr(error, name, ""):
            yield f"{name} of the {type(error).__name__}", str(text)


def _of_machines(item: pytest.Item) -> Iterator[tuple[str, str]]:
    machines = item.stash.get(MACHINES, deque[Any]())
    for number, running in enumerate(machines, 1):
        yield f"console of virtual machine {number}", running.vm.console()
        yield f"timeline of virtual machine {number}", str(running.timings)


@pytest.fixture(autouse=True)
def virtual_machine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    """A test that boots gets the bundle, and its machines are in its report if it fails."""
    if request.node.get_closest_marker("vm") is None:
        return
    import pykata.boot
    import pykata.sandbox

    monkeypatch.setenv("PYKATA_BUNDLE", str(request.getfixturevalue("bundle").path))
    machines: deque[Any] = deque(maxlen=LAST_MACHINES)
    request.node.stash[MACHINES] = machines
    boot = pykata.boot.boot

    @functools.wraps(boot)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        return _Recorded(boot(*args, **kwargs), machines)

    monkeypatch.setattr(pykata.sandbox, "boot", recorded)


class _Recorded:
    """A boot whose machine is remembered."""

    def __init__(self, inner: Any, machines: deque[Any]) -> None:
        self._inner = inner
        self._machines = machines

    async def __aenter__(self) -> Any:
        running = await self._inner.__aenter__()
        self._machines.append(running)
        return running

    async def __aexit__(self, *error: Any) -> Any:
        return await self._inner.__aexit__(*error)


# --- nothing is left ---


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a process, thread, descriptor, socket, file, mount, loop device or interface."""
    before = leaks.snapshot(PLACES)
    yield
    if found := leaks.left(before, PLACES):
        pytest.fail("left behind:\n  " + "\n  ".join(found), pytrace=False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    slow = pyfuncitem.config.getoption("--slow-callbacks")
    # hypothesis runs its function many times, each in a loop of its own.
    if not hasattr(pyfuncitem.obj, "hypothesis") and inspect.iscoroutinefunction(pyfuncitem.obj):
        pyfuncitem.obj = _watched(pyfuncitem.obj, slow, _limit(pyfuncitem))
    return (yield)


def _limit(test: pytest.Item) -> float:
    if test.get_closest_marker("slow"):
        return SLOW_TEST
    return BOOTING_TEST if test.get_closest_marker("vm") else QUICK_TEST


def _watched(
    test: Callable[..., Awaitable[None]], slow: float | None, limit: float
) -> Callable[..., Awaitable[None]]:
    """The test, with the check that it ends, leaves no task in its loop and didn't block it."""

    @functools.wraps(test)
    async def watched(*args: Any, **kwargs: Any) -> None:
        known = asyncio.all_tasks()
        with Blocking(slow) as blocking:
            await limited(test(*args, **kwargs), limit)
        # A sandbox that is still open takes down the container of its last command: nobody waits for that.
        if leaving := [task for task in asyncio.all_tasks() if task.get_name() == "pykata removal"]:
            await asyncio.wait(leaving, timeout=60)
        # A cancelled task needs a turn of the loop for each of its awaits to be over.
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        if found := [*leaks.other_tasks(known), *blocking.found]:
            pytest.fail("left behind or blocking:\n  " + "\n  ".join(found), pytrace=False)

    return watched


# --- fixtures ---


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """The guest bundle of these sources, from the cache of the user or built into it. It fails, it never skips."""
    from pykata.guest import find_bundle
    from pykata.guest.build import build_bundle

    if os.environ.get("PYKATA_BUNDLE"):
        return find_bundle()
    with pytest.MonkeyPatch.context() as patch:
        # The tests' own cache is empty, and a kernel takes minutes.
        patch.setenv("PYKATA_CACHE", USER_CACHE) if USER_CACHE else patch.delenv("PYKATA_CACHE")
        patch.setenv("TMPDIR", os.environ["PYTEST_DEBUG_TEMPROOT"])
        return anyio.run(build_bundle)


@pytest.fixture(scope="session")
def demo_image() -> str:
    """The OCI layout with Debian and Python, made if it is missing."""
    if not DEMO_IMAGE.exists():
        maker = ROOT / "scripts" / "make_demo_image.py"
        environment = os.environ | {"TMPDIR": os.environ["PYTEST_DEBUG_TEMPROOT"]}
        subprocess.run([sys.executable, maker, DEMO_IMAGE], check=True, env=environment)
    return str(DEMO_IMAGE)
