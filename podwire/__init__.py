"""Podwire: a Kubernetes pod network. This package holds what its programs share, the `podwire` command and the lab."""

__version__ = "0.1.0"
