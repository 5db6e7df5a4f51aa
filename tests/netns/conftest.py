"""Fixtures of the tests in network namespaces."""

from tests.netns.lab_fixtures import lab

__all__ = ["lab"]
