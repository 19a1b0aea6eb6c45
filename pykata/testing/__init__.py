"""Doubles of the parts of pykata that need a virtual machine, for tests that take milliseconds."""

from pykata.testing.agent import FakeAgent, FakeContainer
from pykata.testing.commands import BUILTINS, Command
from pykata.testing.process import FakeProcess

__all__ = ["BUILTINS", "Command", "FakeAgent", "FakeContainer", "FakeProcess"]
