"""Trying again: what may pass by itself gets several chances, ever later."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import httpx

from pykata.errors import ImageError, RegistryUnreachableError
from pykata.spec import Registries

T = TypeVar("T")

FIRST_DELAY = 0.25      # seconds; doubled each time, and shortened by chance, so that many don't come back together
LONGEST_DELAY = 8.0
PATIENCE = 4            # times the timeout of a connection: for a whole exchange that isn't about a layer
LONGEST_WISH = 60.0     # seconds; a registry that wants us to wait longer gets an error instead


class TransientError(Exception):
    """It may work the next time. ``error`` is what is raised if it doesn't, ``after`` when the other side is ready.

    ``absent``: nothing was connected at all.
    """

    def __init__(self, error: ImageError, *, after: float | None = None, absent: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after
        self.absent = absent


async def retried(
    attempt: Callable[[], Awaitable[T]], registries: Registries, host: str, *, patient: bool = False
) -> T:
    """What ``attempt`` returns in the end. What can't be connected at first isn't tried again: it isn't there.

    ``patient``: an attempt may take as long as it takes.
    """
    for number in range(registries.retries):
        try:
            return await _in_time(attempt, registries, host, patient)
        except TransientError as transient:
            if transient.absent and not number:
                raise transient.error from transient.__cause__
            await pause(number, transient)
    try:
        return await _in_time(attempt, registries, host, patient)
    except TransientError as transient:
        raise transient.error from transient.__cause__


async def _in_time(attempt: Callable[[], Awaitable[T]], registries: Registries, host: str, patient: bool) -> T:
    # The timeout of a read is no help against somebody who sends a byte now and then.
    with anyio.move_on_after(None if patient else PATIENCE * registries.timeout):
        return await attempt()
    raise too_slow(host, registries)


def too_slow(host: str, registries: Registries) -> TransientError:
    """An exchange took longer than it may."""
    return TransientError(RegistryUnreachableError(f"{host} took more than {PATIENCE * registries.timeout:g} s"))


async def pause(number: int, transient: TransientError) -> None:
    """Wait before try ``number``, counted from 0. Raises its error if that would take too long."""
    delay = min(FIRST_DELAY * 2**number, LONGEST_DELAY) * random.uniform(0.5, 1)
    if transient.after is not None:
        if transient.after > LONGEST_WISH:
            raise transient.error
        delay = max(delay, transient.after)
    await anyio.sleep(delay)


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the other side wants us to wait (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, when.timestamp() - time.time())
