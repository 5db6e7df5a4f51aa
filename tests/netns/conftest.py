"""Fixtures of the tests in network namespaces."""

from tests.netns.disks import cast, disks
from tests.netns.lab_fixtures import lab
from tests.netns.service_fixtures import proxied

__all__ = ["cast", "disks", "lab", "proxied"]
