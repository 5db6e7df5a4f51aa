"""Limits of connection tracking, as kube-proxy sets them when it is told to: once, at the start.

A limit that a container may not write, or a kernel has not, is no reason to leave Services alone: it is said and passed
over. What the node has that is larger than what is asked for stays: somebody wanted it so.

Source: Documentation/networking/nf_conntrack-sysctl.rst; KubeProxyConfiguration's `conntrack`, v1.36.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from kube_proxy_lite.settings import ConntrackOptions

_FOLDER = Path("/proc/sys/net/netfilter")
_MAX = "nf_conntrack_max"

log = logging.getLogger(__name__)


def set_conntrack(options: ConntrackOptions, folder: Path = _FOLDER, cores: int = 0) -> None:
    """Writes what is asked for; says in the log what could not be written."""
    for name, value in wanted(options, cores or os.cpu_count() or 1):
        path = folder / name
        try:
            before = int(path.read_text())
            if before == value or (name == _MAX and before > value):
                continue
            path.write_text(f"{value}\n")
            log.info("%s is %d now, was %d", name, value, before)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be set to %d: %s", path, value, error)


def wanted(options: ConntrackOptions, cores: int) -> Iterator[tuple[str, int]]:
    """Names and values; nothing for what is left as it is."""
    if options.max_per_core or options.min:
        yield _MAX, max(options.min, options.max_per_core * cores)
    for name, value in (
        ("nf_conntrack_tcp_timeout_established", options.tcp_established_timeout),
        ("nf_conntrack_tcp_timeout_close_wait", options.tcp_close_wait_timeout),
        ("nf_conntrack_udp_timeout", options.udp_timeout),
        ("nf_conntrack_udp_timeout_stream", options.udp_stream_timeout),
        ("nf_conntrack_tcp_be_liberal", int(options.tcp_be_liberal)),
    ):
        if value:
            yield name, value
