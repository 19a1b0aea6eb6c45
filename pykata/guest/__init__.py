"""The guest bundle: the kernel and the RAM disk that a sandbox boots, and the image that comes with them."""

from pykata.guest.bundle import Bundle, find_bundle, load_bundle

__all__ = ["Bundle", "find_bundle", "load_bundle"]
