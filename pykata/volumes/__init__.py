"""Volumes: what a sandbox's containers have beside their images, and share."""

from pykata.volumes.kinds import CACHES, Bind, DiskImage, FsspecVolume, ImageVolume, Tmpfs
from pykata.volumes.named import Named, list_volumes, remove_volume
from pykata.volumes.places import Checked, Volume, check_volumes
from pykata.volumes.stored import StoredVolume, describe_volumes

__all__ = [
    "CACHES",
    "Bind",
    "Checked",
    "DiskImage",
    "FsspecVolume",
    "ImageVolume",
    "Named",
    "StoredVolume",
    "Tmpfs",
    "Volume",
    "check_volumes",
    "describe_volumes",
    "list_volumes",
    "remove_volume",
]
