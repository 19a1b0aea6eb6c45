"""Fixtures of these tests."""

from tests.places import places as places
