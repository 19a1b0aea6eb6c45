"""Container images: where they are, and what is in them."""

from pykata.images.resolve import resolve

__all__ = ["resolve"]
