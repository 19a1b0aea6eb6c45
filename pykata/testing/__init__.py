"""Doubles of the parts of pykata that need a virtual machine, for tests that take milliseconds."""

from pykata.testing.agent import FakeAgent, FakeContainer
from pykata.testing.commands import BUILTINS, Command
from pykata.testing.faults import Fault, Moment
from pykata.testing.files import FakeFile, FakeFiles
from pykata.testing.guest import FakeFs, fake_bundle, fake_image
from pykata.testing.hypervisor import FakeHypervisor, FakeVM
from pykata.testing.process import FakeProcess

__all__ = [
    "BUILTINS",
    "Command",
    "FakeAgent",
    "FakeContainer",
    "FakeFile",
    "FakeFiles",
    "FakeFs",
    "FakeHypervisor",
    "FakeProcess",
    "FakeVM",
    "Fault",
    "Moment",
    "fake_bundle",
    "fake_image",
]
