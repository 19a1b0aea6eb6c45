"""Container images: where they are, and what is in them."""

from pykata.images.pulled import Pulling
from pykata.images.resolve import resolve

__all__ = ["Pulling", "resolve"]
